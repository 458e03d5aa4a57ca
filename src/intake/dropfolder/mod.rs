//! Watched prefixes and folders: every file that has stopped changing becomes a job.
//!
//! The whole place is looked at again and again ([`listing`]), and what is there is remembered in the store, a page at a time; what has been the
//! same for a while is taken from there ([`take`]), as its profile ([`profile`]) and the file beside it ([`sidecar`]) say. Messages of the object
//! store ([`events`]) only make a look at what they name come earlier. When a job has ended, its file is disposed of ([`dispose`]).
//!
//! Invariant: one job or one rejection a version of a file, however often and by however many daemons it is seen; memory is bounded, whatever
//! is there.

mod dispose;
mod events;
mod listing;
pub mod profile;
mod sidecar;
mod take;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::Instant;
use tracing::{info, warn};

use crate::document::fetch::DocumentSource;
use crate::failpoint;
use crate::intake::amqp::hints::HintQueue;
use crate::job::DocumentUri;
use crate::objects::{GetRequest, Listed, ObjectClient, ObjectError};
use crate::pipeline::shutdown::{Phase, Shutdown};
use crate::store::{DropSighting, Store, StoreError};
use crate::telemetry::health::Component;

use listing::{Listing, Seen};
pub use profile::{Disposal, DropPlace, DropProfile, Profiles, Sidecars};

/// What no look has found for so long is forgotten. Known files are written down once an hour.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(24 * 3600);
/// Messages of the object store that wait; more are lost, the next look makes up for it.
const HINTS: usize = 1000;
/// Keys that were named by a message and are looked at a second time, when they should have settled.
const SECOND_LOOKS: usize = 10_000;
/// Clocks of this process and of the database agree on a duration to less than this.
const MARGIN: Duration = Duration::from_millis(50);

/// A watched place.
pub struct DropFolder {
    /// Where, and what to do with what is there.
    pub place: DropPlace,
    /// Clients of the configured stores.
    pub stores: Vec<ObjectClient>,
    /// Reads files beside documents.
    pub documents: Arc<dyn DocumentSource>,
    /// Where jobs go.
    pub store: Arc<dyn Store>,
    /// Bytes of a document at most.
    pub max_document_bytes: u64,
    /// Messages of the object store.
    pub events: Option<HintQueue>,
    /// Where its state is reported.
    pub health: Component,
}

/// Why a look did not come to its end; the next one begins anew.
#[derive(Debug, thiserror::Error)]
pub enum LookError {
    /// The object store.
    #[error(transparent)]
    Objects(#[from] ObjectError),
    /// The database.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The folder, or the configuration of it.
    #[error("{0}")]
    Folder(String),
}

impl DropFolder {
    /// Watches until the drain begins.
    pub async fn run(mut self, shutdown: Shutdown) {
        let (sender, mut hints) = mpsc::channel(HINTS);
        // Without a queue the sender stays here: a closed channel would answer at once, again and again.
        let (listening, _open) = match self.events.take() {
            Some(queue) => (Some(tokio::spawn(queue.run(sender, shutdown.clone()))), None),
            None => (None, Some(sender)),
        };
        let mut due = VecDeque::new();
        while shutdown.phase() == Phase::Working {
            let looked = self.look(&shutdown).await;
            self.report(looked);
            self.listen_until(Instant::now() + self.place.poll, &mut hints, &mut due, &shutdown).await;
        }
        if let Some(listening) = listening {
            // Nothing rests on what it heard.
            let _ = listening.await;
        }
    }

    /// Looks at everything once, takes what is ready and disposes of what has ended. Returns how many jobs are new.
    pub async fn look(&self, shutdown: &Shutdown) -> Result<u64, LookError> {
        let mut listing = Listing::open(&self.place.at, &self.stores)?;
        while let Some(page) = listing.next().await? {
            self.remember(page).await?;
            failpoint::reach("drop.seen");
            if shutdown.phase() != Phase::Working {
                return Ok(0);
            }
        }
        let taken = self.take_ready().await?;
        self.dispose().await?;
        self.store.drop_forget(&self.name(), FORGOTTEN_AFTER).await?;
        Ok(taken)
    }

    /// Its name in the store.
    fn name(&self) -> String {
        self.place.at.to_string()
    }

    async fn remember(&self, page: Vec<Seen>) -> Result<(), StoreError> {
        let has_sidecars = self.place.sidecars != Sidecars::None;
        let sightings: Vec<DropSighting> = page.into_iter().map(|seen| seen.sighting(has_sidecars)).collect();
        if sightings.is_empty() { Ok(()) } else { self.store.drop_seen(&self.name(), &sightings).await }
    }

    fn report(&self, looked: Result<u64, LookError>) {
        match looked {
            Ok(taken) => {
                self.health.ready();
                if taken > 0 {
                    info!(drop.place = %self.place.at, drop.jobs = taken, "files taken in");
                }
            }
            Err(error) => {
                warn!(drop.place = %self.place.at, error.message = %error, "the drop folder could not be looked at");
                self.health.degraded(&error.to_string());
            }
        }
    }

    /// Looks at what messages name until it is time to look at everything.
    async fn listen_until(
        &self,
        end: Instant,
        hints: &mut mpsc::Receiver<Vec<u8>>,
        due: &mut VecDeque<(Instant, String)>,
        shutdown: &Shutdown,
    ) {
        let mut messages = Vec::new();
        loop {
            let wake = due.front().map_or(end, |(time, _)| end.min(*time));
            let (keys, is_new) = tokio::select! {
                () = shutdown.draining() => return,
                () = tokio::time::sleep_until(wake) => {
                    if Instant::now() >= end {
                        return;
                    }
                    let settled = due.iter().take_while(|(time, _)| *time <= Instant::now()).count();
                    (due.drain(..settled).map(|(_, key)| key).collect(), false)
                }
                count = hints.recv_many(&mut messages, 100) => match count {
                    // Its sender ends with the drain.
                    0 => return,
                    _ => (self.named(messages.drain(..)), true),
                },
            };
            let looked = self.look_at(&keys).await;
            if is_new && !self.place.settle.is_zero() {
                let time = Instant::now() + self.place.settle + MARGIN;
                let room = SECOND_LOOKS.saturating_sub(due.len());
                due.extend(keys.into_iter().take(room).map(|key| (time, key)));
            }
            self.report(looked);
        }
    }

    /// Keys below this place that messages name.
    fn named(&self, messages: impl Iterator<Item = Vec<u8>>) -> Vec<String> {
        let DocumentUri::S3 { bucket, key: prefix, .. } = &self.place.at else { return Vec::new() };
        let hints = messages.flat_map(|body| events::hints(&body)).filter(|hint| hint.bucket == *bucket);
        let keys = hints.flat_map(|hint| hint.keys).filter(|key| key.starts_with(prefix));
        // With a document comes what is beside it, and the other way round.
        keys.map(|key| key.strip_suffix(profile::SIDECAR).unwrap_or(&key).to_owned()).collect()
    }

    /// Looks at some keys only, and takes what is ready.
    async fn look_at(&self, keys: &[String]) -> Result<u64, LookError> {
        let DocumentUri::S3 { store, bucket, .. } = &self.place.at else { return Ok(0) };
        let Some(client) = self.stores.iter().find(|client| client.alias() == store) else { return Ok(0) };
        let mut page = Vec::new();
        for name in keys {
            for key in [name.clone(), format!("{name}{}", profile::SIDECAR)] {
                let request = GetRequest { bucket, key: &key, ..GetRequest::default() };
                match client.head(request).await {
                    Ok(head) if head.etag.is_some() => {
                        let etag = head.etag.map(|etag| etag.trim_matches('"').to_owned());
                        let listed = Listed { key, size: head.size, etag, last_modified: None, is_exact: true };
                        page.push(Seen::object(store, bucket, listed));
                    }
                    // What cannot be told from another version is left to the next whole look.
                    Ok(_) | Err(ObjectError::NotFound { .. }) => {}
                    Err(error) => return Err(error.into()),
                }
            }
        }
        self.remember(page).await?;
        self.take_ready().await
    }
}
