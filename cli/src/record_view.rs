//! One record as the printing side sees it, whatever the client hands out.

use flowstone_client::RecordRef;

/// A borrowed record with where it lies.
#[derive(Clone, Debug)]
pub(crate) struct RecordView<'a> {
    pub(crate) topic: &'a str,
    pub(crate) partition: i32,
    pub(crate) offset: i64,
    /// Milliseconds since 1970.
    pub(crate) timestamp: i64,
    pub(crate) key: Option<&'a [u8]>,
    pub(crate) value: Option<&'a [u8]>,
    /// In the order in which they were sent, duplicates kept. Without any, nothing is allocated.
    pub(crate) headers: Vec<(&'a [u8], Option<&'a [u8]>)>,
}

impl<'a> From<RecordRef<'a>> for RecordView<'a> {
    fn from(record: RecordRef<'a>) -> Self {
        RecordView {
            topic: record.topic(),
            partition: record.partition(),
            offset: record.offset(),
            timestamp: record.timestamp(),
            key: record.key_bytes(),
            value: record.value_bytes(),
            headers: record.headers().collect(),
        }
    }
}
