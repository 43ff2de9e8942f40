//! Messages that arrive.

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_brokers_send_to_each_other_in_order() {
    const ROUNDS: u64 = 500;
    let mut nodes = cluster(3, config()).await;
    for group in 1..=ROUNDS {
        for from in &nodes {
            for to in nodes.iter().filter(|to| to.broker() != from.broker()) {
                from.send(to, vec![heartbeat(group), append(group, &[100, 10_000])]);
            }
        }
        if group % 50 == 0 {
            tokio::task::yield_now().await;
        }
    }
    for node in &mut nodes {
        let own = node.broker();
        let delivered = node.delivered(4 * ROUNDS as usize).await;
        assert_eq!(delivered.len(), 2, "from both others: {:?}", delivered.keys());
        for (from, messages) in delivered {
            let (appends, heartbeats): (Vec<_>, Vec<_>) =
                messages.iter().partition(|message| matches!(message.message.body, PeerBody::Append { .. }));
            for messages in [appends, heartbeats] {
                let groups: Vec<_> = messages.iter().map(|message| group_of(message)).collect();
                assert_eq!(groups, (1..=ROUNDS).collect::<Vec<_>>(), "from {from} to {own}");
                assert_eq!(
                    format!("{:?}", messages[0]),
                    format!(
                        "{:?}",
                        match &messages[0].message.body {
                            PeerBody::Append { .. } => append(1, &[100, 10_000]),
                            _ => heartbeat(1),
                        }
                    )
                );
            }
        }
    }
    for node in &nodes {
        let figures = node.network.figures();
        assert_eq!((figures.messages_sent, figures.messages_received), (4 * ROUNDS, 4 * ROUNDS));
        assert_eq!((figures.brokers_connected, figures.messages_dropped, figures.refused), (2, 0, 0));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_waits_leaves_together() {
    let mut nodes = cluster(2, config()).await;
    let (one, two) = pair(&mut nodes);
    // Before there is a stream at all: what has gathered by then goes as one message.
    one.send(two, (1..=1_000).map(heartbeat).collect());
    let Told::Delivered(_, messages) = two.next().await else { panic!("something else came first") };
    assert_eq!(messages.len(), 1_000);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_larger_than_frame_and_window_arrives() {
    let mut config = config();
    config.limits.receiving_bytes = 100 << 20;
    let mut nodes = cluster(2, config).await;
    let (one, two) = pair(&mut nodes);
    one.send(two, vec![append(1, &[40 << 20, 5]), append(2, &[3])]);
    let delivered = two.delivered(2).await;
    let PeerBody::Append { entries, .. } = &delivered[&one.broker()][0].message.body else { panic!("no append") };
    assert_eq!(entries.iter().map(LogEntry::data_bytes).collect::<Vec<_>>(), [40 << 20, 5]);
    // More of them than there is room for at once: what was taken gives its room back.
    for group in 3..8 {
        one.send(two, vec![append(group, &[40 << 20])]);
        two.delivered(1).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_newer_stream_of_the_same_broker_takes_the_older_ones_place() {
    let mut nodes = cluster(2, config()).await;
    let (one, two) = pair(&mut nodes);
    until_connected(one, two).await;
    while one.told.try_recv().is_ok() {}
    // The same broker, started anew, while its old connection still seems to be there.
    let again = Node::start(PeerIdentity { incarnation: 2, ..identity(1) }, config()).await;
    again.knows(two);
    until_connected(&again, two).await;
    one.until(|told| matches!(told, Told::Unreachable(broker) if *broker == id(2))).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_of_a_broker_that_speaks_is_not_heard_and_takes_over_once_that_has_ended() {
    let mut nodes = cluster(2, config()).await;
    let (one, two) = pair(&mut nodes);
    two.network.book().set_start(id(1), one.network.identity().incarnation);
    until_connected(one, two).await;
    let mut copy = Node::start(PeerIdentity { incarnation: 99, ..identity(1) }, config()).await;
    copy.knows(two);
    copy.send(two, vec![heartbeat(7)]);
    copy.until(|told| matches!(told, Told::Unreachable(broker) if *broker == id(2))).await;
    let refused = copy.network.client().report(id(2), pb::ReportRequest::default(), LONG).await;
    assert!(refused.expect_err("the first one speaks").message.contains("runs already"));
    // The first one is none the worse for it.
    one.send(two, vec![heartbeat(8)]);
    let heard = two.until(|told| matches!(told, Told::Delivered(_, messages) if group_of(&messages[0]) == 8)).await;
    let is_of_copy = |told: &Told| matches!(told, Told::Delivered(_, messages) if group_of(&messages[0]) == 7);
    assert!(!heard.iter().any(is_of_copy));
    // Where another start is registered, the earlier one's streams end.
    two.network.book().set_start(id(1), 99);
    one.send(two, vec![heartbeat(9)]);
    one.until(|told| matches!(told, Told::Unreachable(broker) if *broker == id(2))).await;
    until_connected(&copy, two).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_a_broker_that_is_forgotten_nothing_is_kept_until_it_comes_back() {
    let mut nodes = cluster(2, config()).await;
    let (one, two) = pair(&mut nodes);
    until_connected(one, two).await;
    assert_eq!(one.network.shared_for_tests().links(), 2);
    one.network.forget(id(2));
    assert_eq!(one.network.shared_for_tests().links(), 0);
    one.knows(two);
    until_connected(one, two).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn draining_ends_streams_and_is_told_as_an_end() {
    let mut nodes = cluster(2, config()).await;
    let (one, two) = pair(&mut nodes);
    until_connected(one, two).await;
    two.drain.send_replace(true);
    one.until(|told| matches!(told, Told::Gone(broker) if *broker == id(2))).await;
    timeout(LONG, &mut two.serving).await.expect("in time").expect("no panic").expect("no error");
}

fn pair(nodes: &mut [Node]) -> (&mut Node, &mut Node) {
    let [one, two, ..] = nodes else { panic!("two brokers") };
    (one, two)
}
