//! Controllers that are not it any more, or not yet.

use std::collections::BTreeMap;

use flowstone_protocol::peer::peer_client::PeerClient;
use flowstone_protocol::{Error, peer};
use tonic::transport::{Channel, Endpoint};

use super::surviving::hello;
use super::world::{World, error_of, free_address, soon, until};

fn peer_of(world: &World, id: i32) -> PeerClient<Channel> {
    let address = format!("http://{}", world.places[&id].peer);
    PeerClient::new(Endpoint::from_shared(address).expect("an address").connect_lazy())
}

/// What a broker of this start says to the controller, and is told.
async fn beat(
    controller: &mut PeerClient<Channel>,
    caller: &peer::Caller,
    metadata_replica_id: u64,
) -> Result<peer::BrokerHeartbeatResponse, Error> {
    let request = peer::BrokerHeartbeatRequest {
        caller: Some(caller.clone()),
        metadata_replica_id,
        ..peer::BrokerHeartbeatRequest::default()
    };
    let answer = soon("a heartbeat", controller.broker_heartbeat(request)).await.map_err(error_of)?.into_inner();
    match &answer.error {
        Some(error) => Err(Error::from_detail(error)),
        None => Ok(answer),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_controller_that_may_not_be_it_any_more_names_no_other_replica_of_the_metadata() {
    let mut world = World::of(3).await;
    world.add_place(4).await;
    world.start(4).await;
    let number = world.client(1).cluster().await.expect("described").controller_id;
    let fourth = format!("http://{}", world.places[&4].peer);
    let mut caller = hello(&fourth, None).await.expect("it answers").answerer.expect("said");
    caller.to_broker_id = number;
    world.kill(4).await;
    let mut controller = peer_of(&world, number);
    // With a majority behind it, it says which one is meant.
    let replica = beat(&mut controller, &caller, 0).await.expect("taken").metadata_replica_id;
    assert_ne!(replica, 0);
    // From here on it is alone, and does not know it yet. Another one may have given broker 4 a replica meanwhile.
    let others: BTreeMap<_, _> = world.running.extract_if(.., |id, _| *id != number).collect();
    drop(others);
    let answered = beat(&mut controller, &caller, replica ^ 1).await;
    let error = answered.expect_err("what it knows may be from before");
    assert!(error.is_retriable(), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_controller_takes_nobody_in_before_its_own_start_is_known() {
    let mut world = World::of(1).await;
    let first = format!("http://{}", world.places[&1].peer);
    let mut caller = hello(&first, None).await.expect("it answers").answerer.expect("said");
    caller.broker_id = 7;
    caller.directory_id = vec![7; 16].into();
    caller.incarnation = 7;
    caller.to_broker_id = 1;
    let mut before = world.places[&1].peer.clone();
    for round in 0..5 {
        world.kill(1).await;
        let address = free_address().await;
        world.places.get_mut(&1).expect("a place").peer = address.clone();
        world.seeds = vec![address.clone()];
        let starting = tokio::spawn(world.starting(1));
        // From the moment that it can be asked. Nobody runs as broker 7.
        let request = peer::RegisterRequest {
            caller: Some(caller.clone()),
            client_address: "127.0.0.1:7".to_owned(),
            peer_address: "127.0.0.1:8".to_owned(),
            version: "test".to_owned(),
            feature_level: 1,
            ..peer::RegisterRequest::default()
        };
        let mut controller = peer_of(&world, 1);
        let taken_in = until("it takes in", async || {
            let answer = soon("a registration", controller.register(request.clone())).await;
            let answer = answer.map_err(|status| status.to_string())?.into_inner();
            match &answer.error {
                Some(error) => Err(Error::from_detail(error).to_string()),
                None => Ok(answer),
            }
        })
        .await;
        let told: Vec<&str> = taken_in.metadata_replicas.iter().map(|it| it.peer_address.as_str()).collect();
        assert!(told.contains(&address.as_str()), "round {round}: {told:?} may be {before}, where nobody is any more");
        let broker = soon("start", starting).await.expect("no panic").expect("it starts");
        world.running.insert(1, broker);
        before = address;
    }
}
