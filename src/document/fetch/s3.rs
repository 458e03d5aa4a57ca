//! Documents in object stores: read in ranges, several at once, each resumed where its connection broke.
//!
//! Invariant: all ranges are of the one object that the first answer named (If-Match), so no mixture of two is ever returned.

use std::collections::BTreeMap;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::{StreamExt, TryStreamExt, stream};

use super::{DocumentSource, FetchError, Fetched};
use crate::job::{DocumentRef, DocumentUri};
use crate::objects::{ByteRange, GetRequest, Head, ObjectClient, ObjectError};

/// Bytes of one range.
const RANGE_BYTES: u64 = 8 << 20;
/// Ranges read at once.
const PARALLEL: usize = 4;
/// Tries that bring no byte before a range is given up; the job is tried again later.
const FRUITLESS_TRIES: u32 = 4;
/// Wait after the first such try; doubled each time.
const FIRST_WAIT: Duration = Duration::from_millis(100);

/// Reads objects of configured stores.
#[derive(Clone, Default)]
pub struct S3Source {
    stores: BTreeMap<String, ObjectClient>,
}

impl S3Source {
    /// Reads from these stores.
    pub fn new(stores: impl IntoIterator<Item = ObjectClient>) -> Self {
        Self { stores: stores.into_iter().map(|store| (store.alias().to_owned(), store)).collect() }
    }
}

#[async_trait]
impl DocumentSource for S3Source {
    async fn fetch(&self, document: &DocumentRef, at_most: u64) -> Result<Fetched, FetchError> {
        let place = document.uri.to_string();
        let DocumentUri::S3 { store, bucket, key } = &document.uri else {
            return Err(FetchError::NotAllowed { place });
        };
        let Some(client) = self.stores.get(store) else { return Err(FetchError::NotAllowed { place }) };
        let request =
            GetRequest { bucket, key, version_id: document.version_id.as_deref(), etag: document.etag.as_deref() };
        let (head, first) = read(client, request, 0..RANGE_BYTES.min(at_most.saturating_add(1))).await?;
        if head.size > at_most {
            return Err(FetchError::TooLarge { place, at_most });
        }
        let etag = head.etag.clone();
        // Without a tag from the server there is nothing to hold further ranges to.
        if head.size > first.len() as u64 && etag.is_none() && head.version_id.is_none() {
            let reason = "the server gives no entity tag, so its parts cannot be told from another object's".to_owned();
            return Err(FetchError::Refused { place, reason });
        }
        let pinned = GetRequest { etag: etag.as_deref(), ..request };
        let ranges = ranges(first.len() as u64, head.size).map(|range| read(client, pinned, range));
        let rest: Vec<(Head, Vec<u8>)> = stream::iter(ranges).buffered(PARALLEL).try_collect().await?;
        let mut bytes = first;
        for (_, part) in rest {
            bytes.extend_from_slice(&part);
        }
        Ok(Fetched { bytes, version_id: head.version_id, etag: head.etag, content_type: head.content_type })
    }
}

fn ranges(from: u64, size: u64) -> impl Iterator<Item = ByteRange> {
    let starts = (from..size).step_by(RANGE_BYTES as usize);
    starts.map(move |start| start..(start + RANGE_BYTES).min(size))
}

/// Reads one range to its end, over as many connections as it takes while each brings something.
async fn read(client: &ObjectClient, request: GetRequest<'_>, range: ByteRange) -> Result<(Head, Vec<u8>), FetchError> {
    let mut bytes = Vec::new();
    let (mut pinned, mut fruitless, mut wait) = (request.etag.map(str::to_owned), 0, FIRST_WAIT);
    loop {
        let begin = range.start + bytes.len() as u64;
        let now = GetRequest { etag: pinned.as_deref(), ..request };
        let error = match client.get(now, begin..range.end).await {
            Ok(got) => {
                if pinned.is_none() {
                    pinned = got.head.etag.clone();
                }
                if !got.bytes.is_empty() {
                    (fruitless, wait) = (0, FIRST_WAIT);
                }
                bytes.extend_from_slice(&got.bytes);
                match got.broken {
                    None => return Ok((got.head, bytes)),
                    Some(error) => error,
                }
            }
            Err(error) => error,
        };
        fruitless += 1;
        if !error.is_transient() || fruitless >= FRUITLESS_TRIES {
            return Err(fetch_error(error));
        }
        tokio::time::sleep(wait).await;
        wait *= 2;
    }
}

fn fetch_error(error: ObjectError) -> FetchError {
    let reason = error.to_string();
    match error {
        ObjectError::NotFound { place } => FetchError::NotFound { place },
        ObjectError::Changed { place } => FetchError::Changed { place },
        ObjectError::Forbidden { place, .. } => FetchError::Forbidden { place },
        ObjectError::TimedOut { place, bound } => FetchError::TimedOut { place, seconds: bound.as_secs() },
        ObjectError::Unavailable { place, reason } => FetchError::Unavailable { place, reason },
        ObjectError::Credentials { place, .. }
        | ObjectError::Refused { place, .. }
        | ObjectError::Unreadable { place, .. } => FetchError::Refused { place, reason },
    }
}
