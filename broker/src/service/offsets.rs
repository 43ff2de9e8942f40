//! `ListOffsets`: offsets by position in the log or by timestamp.

use std::sync::Arc;

use flowstone_protocol::pb::offset_query::At;
use flowstone_protocol::{Error, ErrorCode, Offset, Timestamp, pb};
use flowstone_replication::{FoundOffset, OffsetQuery, Reply};
use futures::{StreamExt, stream};
use tokio::sync::oneshot;

use super::{find, parse_tp};
use crate::node::Node;

/// Queries of one call that are under way at once.
const QUERIES_AT_ONCE: usize = 32;

/// Answers every query, in order; each fails alone.
pub(super) async fn list_offsets(
    node: &Arc<Node>,
    request: pb::ListOffsetsRequest,
) -> Result<pb::ListOffsetsResponse, Error> {
    let queries_max = node.config.limits.queries_per_request;
    if request.queries.len() > queries_max {
        return Err(Error::new(
            ErrorCode::InvalidRequest,
            format!(
                "{} queries in one call, and {queries_max} is the limit (limits.queries_per_request); split them",
                request.queries.len()
            ),
        ));
    }
    // A few at a time: looking a time up may read from the disk, and others ask, too.
    let lookups: Vec<_> = request.queries.into_iter().map(|query| one(node, query, request.linearizable)).collect();
    let answers: Vec<_> = stream::iter(lookups).buffered(QUERIES_AT_ONCE).collect().await;
    let answers = answers.into_iter().map(|answer: Result<pb::OffsetAnswer, Error>| {
        answer.unwrap_or_else(|error| pb::OffsetAnswer {
            offset: -1,
            timestamp: -1,
            log_start: -1,
            high_watermark: -1,
            records: 0,
            error: Some(error.to_detail()),
            last_stable_offset: -1,
        })
    });
    Ok(pb::ListOffsetsResponse { answers: answers.collect() })
}

async fn one(node: &Arc<Node>, query: pb::OffsetQuery, linearizable: bool) -> Result<pb::OffsetAnswer, Error> {
    let partition = find(node, parse_tp(&query.topic_id, query.partition)?)?;
    let wanted = match query.at {
        Some(At::Start(_)) => OffsetQuery::Start,
        Some(At::End(_)) => OffsetQuery::End,
        Some(At::Timestamp(ms)) if ms >= 0 => OffsetQuery::Timestamp(Timestamp::new(ms)),
        Some(At::Timestamp(ms)) => {
            let error = Error::new(
                ErrorCode::InvalidRequest,
                format!("timestamp {ms} is below zero; give milliseconds since 1970"),
            );
            return Err(node.explain(error, &partition));
        }
        Some(At::RecordsFromEnd(records)) => OffsetQuery::RecordsFromEnd(records),
        Some(At::RecordsFrom(offset)) => OffsetQuery::RecordsFrom(Offset::new(offset.max(0))),
        None => {
            let error = Error::new(
                ErrorCode::InvalidRequest,
                "set `at`: start, end, timestamp, records_from_end or records_from",
            );
            return Err(node.explain(error, &partition));
        }
    };
    if linearizable {
        // Who leads asks a majority whether it still does; what is looked up afterwards is at least as new.
        let (sender, receiver) = oneshot::channel();
        partition.replica.read_index(Reply::from(sender));
        receiver
            .await
            .map_err(|_| super::shutting_down())
            .and_then(|answer| answer)
            .map_err(|error| node.explain(error, &partition))?;
    }
    let (sender, receiver) = oneshot::channel();
    partition.replica.list_offset(wanted, Reply::from(sender));
    let found: Option<FoundOffset> = receiver
        .await
        .map_err(|_| super::shutting_down())
        .and_then(|answer| answer)
        .map_err(|error| node.explain(error, &partition))?;
    let status = partition.replica.status();
    let records = found.and_then(|found| found.records).unwrap_or(status.records);
    let (offset, timestamp) = match found {
        Some(found) => (found.offset, found.timestamp),
        // No record is so late: whoever reads from the end on gets the next that is.
        None => (status.high_watermark, Timestamp::NONE),
    };
    Ok(pb::OffsetAnswer {
        offset: offset.get(),
        timestamp: timestamp.get(),
        log_start: status.log_start.get(),
        high_watermark: status.high_watermark.get(),
        records,
        error: None,
        last_stable_offset: status.last_stable_offset.get(),
    })
}
