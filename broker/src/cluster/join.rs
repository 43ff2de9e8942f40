//! Asking the seeds until it is known which cluster this broker belongs to: the shell around [`Form`].

use std::time::{Duration, Instant};

use flowstone_protocol::peer::HelloResponse;
use flowstone_protocol::{ClusterId, Error};
use tokio::task::JoinSet;

use super::form::{Decision, Form, Founding, Heard, Me};
use crate::admin_http::Readiness;

/// An answer that takes longer is none.
const ANSWER_MAX: Duration = Duration::from_secs(2);
/// The same reason for waiting is logged this often.
const LOG_EVERY: Duration = Duration::from_secs(10);

/// Finds the cluster, or founds it: returns the founding, which the caller makes durable before anything else.
///
/// # Errors
/// What keeps this broker from ever being part of it; with what to do.
pub(crate) async fn find<H, A>(me: &Me, seeds: &[String], readiness: &Readiness, hello: H) -> Result<Founding, String>
where
    H: Fn(String) -> A,
    A: Future<Output = Result<HelloResponse, Error>> + Send + 'static,
{
    let mut form = Form::new(me.clone(), seeds);
    let mut asked = JoinSet::new();
    let mut logged: Option<(Instant, String)> = None;
    loop {
        for (number, address) in form.ask(Instant::now()) {
            if address == me.peer_address {
                // Not every network lets a machine reach itself by the address that others use.
                form.heard(number, itself(me, seeds), Instant::now());
                continue;
            }
            let answer = hello(address);
            let at = Instant::now();
            asked.spawn(async move { (number, at, tokio::time::timeout(ANSWER_MAX, answer).await) });
        }
        match form.decide(Instant::now()) {
            Decision::Found => {
                let cluster = ClusterId::new(uuid::Uuid::new_v4().as_u128());
                let founding = form.found(cluster, rand::random);
                tracing::info!(%cluster, voters = founding.voters.len(), "all seeds answered: the cluster is founded");
                return Ok(founding);
            }
            Decision::Follow(founding) | Decision::Join(founding) => return Ok(founding),
            Decision::Refuse(reason) => return Err(reason),
            Decision::Wait(reason) => {
                let is_due = logged.as_ref().is_none_or(|(at, told)| *told != reason && at.elapsed() > LOG_EVERY / 10)
                    || logged.as_ref().is_some_and(|(at, _)| at.elapsed() > LOG_EVERY);
                if is_due {
                    tracing::info!(reason, "waiting for the cluster");
                    logged = Some((Instant::now(), reason.clone()));
                }
                readiness.hold("cluster", reason);
            }
        }
        let again = form.ask_again_at().unwrap_or_else(Instant::now);
        tokio::select! {
            Some(answered) = asked.join_next() => {
                // Of the time of the question: a seed that was slow says nothing of now, nor goes before a later answer.
                let Ok((number, at, answer)) = answered else { continue };
                match answer {
                    Ok(Ok(response)) => match Heard::from_message(&response) {
                        Some(heard) => form.heard(number, heard, at),
                        None => form.failed(number, at, "answers what is no answer; is it a Flowstone broker?".to_owned()),
                    },
                    Ok(Err(error)) => form.failed(number, at, error.message),
                    Err(_) => form.failed(number, at, format!("did not answer within {ANSWER_MAX:?}; is it running?")),
                }
            }
            () = tokio::time::sleep_until(again.into()) => {}
        }
    }
}

/// Asks the seeds of a broker that belongs to a cluster already, once and side by side, whether they belong to it as well.
/// Those that do not answer say nothing: a cluster must be able to start with some of its brokers down.
///
/// # Errors
/// Most of them belong to another cluster, or one of them is a second broker of this id.
pub(crate) async fn check<H, A>(me: &Me, seeds: &[String], hello: H) -> Result<(), String>
where
    H: Fn(String) -> A,
    A: Future<Output = Result<HelloResponse, Error>>,
{
    let mut form = Form::new(me.clone(), seeds);
    let others = seeds.iter().enumerate().filter(|(_, seed)| **seed != me.peer_address);
    let asked = others.map(|(number, seed)| {
        let answer = hello(seed.clone());
        async move { (number, tokio::time::timeout(ANSWER_MAX, answer).await) }
    });
    for (number, answer) in futures::future::join_all(asked).await {
        let heard = answer.ok().and_then(Result::ok).and_then(|response| Heard::from_message(&response));
        if let Some(heard) = heard {
            form.heard(number, heard, Instant::now());
        }
    }
    match form.decide(Instant::now()) {
        Decision::Refuse(reason) => Err(reason),
        Decision::Found | Decision::Follow(_) | Decision::Join(_) | Decision::Wait(_) => Ok(()),
    }
}

fn itself(me: &Me, seeds: &[String]) -> Heard {
    Heard {
        broker: me.broker,
        directory: me.directory,
        incarnation: me.incarnation,
        seeds: seeds.to_vec(),
        peer_address: me.peer_address.clone(),
        founding: None,
        feature_level: me.feature_level,
        cluster_feature_level: 0,
    }
}
