//! Watched prefixes and folders: every file that has stopped changing becomes a job.
//!
//! The whole prefix is looked at again and again, and the identity of a job follows from the place and the version of its file, so a file that
//! is seen twice, by two daemons, or again after a crash is still one job: the inbox knows it.
//!
//! Invariant: one job or one rejection a version of a file; memory grows by a few bytes a file, never with their names or content.

mod listing;
mod settle;

use std::sync::Arc;
use std::time::{Duration, Instant};

use tracing::{info, warn};

use crate::failpoint;
use crate::intake::files::FileJobs;
use crate::job::wire::DocumentMessage;
use crate::job::{Digest, DocumentUri, ErrorCode, JobId, JobMessage, MessageLimits, Priority, Task, TemplateId};
use crate::objects::{ObjectClient, ObjectError};
use crate::pipeline::shutdown::{Phase, Shutdown};
use crate::store::{Door, Enqueued, NewJob, Rejection, Store, StoreError};
use crate::telemetry::health::Component;
use crate::telemetry::metrics;

use listing::{Listing, Seen};
use settle::Settling;

/// Jobs in one transaction at most.
const BATCH: usize = 200;

/// A place whose files become jobs.
#[derive(Debug, Clone, PartialEq)]
pub struct DropProfile {
    /// Prefix or folder.
    pub at: DocumentUri,
    /// What to do with them.
    pub task: Task,
    /// In words.
    pub instruction: Option<String>,
    /// Prompt template.
    pub template: Option<TemplateId>,
    /// Model.
    pub model: Option<String>,
    /// Urgency.
    pub priority: Priority,
    /// How long a file must not have changed before it is taken.
    pub settle: Duration,
    /// How often to look.
    pub poll: Duration,
}

/// A watched place.
pub struct DropFolder {
    /// Where, and what to do with what is there.
    pub profile: DropProfile,
    /// Clients of the configured stores.
    pub stores: Vec<ObjectClient>,
    /// Where jobs go.
    pub store: Arc<dyn Store>,
    /// Bytes of a document at most.
    pub max_document_bytes: u64,
    /// Where its state is reported.
    pub health: Component,
}

/// Why a look did not come to its end; the next one begins anew.
#[derive(Debug, thiserror::Error)]
enum LookError {
    #[error(transparent)]
    Objects(#[from] ObjectError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("{0}")]
    Folder(String),
}

impl DropFolder {
    /// Watches until the drain begins.
    pub async fn run(self, shutdown: Shutdown) {
        let mut settling = Settling::default();
        while shutdown.phase() == Phase::Working {
            match self.look(&mut settling, &shutdown).await {
                Ok(taken) => {
                    self.health.ready();
                    if taken > 0 {
                        info!(drop.place = %self.profile.at, drop.jobs = taken, "files taken in");
                    }
                }
                Err(error) => {
                    warn!(drop.place = %self.profile.at, error.message = %error, "the drop folder could not be looked at");
                    self.health.degraded(&error.to_string());
                }
            }
            tokio::select! {
                () = shutdown.draining() => return,
                () = tokio::time::sleep(self.profile.poll) => {}
            }
        }
    }

    /// Looks at everything once. Returns how many jobs are new.
    async fn look(&self, settling: &mut Settling, shutdown: &Shutdown) -> Result<u64, LookError> {
        let mut listing = Listing::open(&self.profile.at, &self.stores)?;
        let (mut taken, mut ready) = (0, Vec::new());
        settling.begin();
        while let Some(page) = listing.next().await? {
            let now = Instant::now();
            ready.extend(page.into_iter().filter(|seen| settling.is_settled(seen, self.profile.settle, now)));
            while ready.len() >= BATCH {
                taken += self.take_in(ready.split_off(ready.len() - BATCH), settling).await?;
            }
            if shutdown.phase() != Phase::Working {
                return Ok(taken);
            }
        }
        taken += self.take_in(ready, settling).await?;
        settling.end();
        Ok(taken)
    }

    async fn take_in(&self, files: Vec<Seen>, settling: &mut Settling) -> Result<u64, LookError> {
        let mut jobs = Vec::with_capacity(files.len());
        for seen in &files {
            match self.job(seen).await {
                Ok(job) => jobs.push(job),
                Err(reason) => self.reject(seen, reason).await?,
            }
        }
        failpoint::reach("drop.listed");
        let answers = if jobs.is_empty() { Vec::new() } else { self.store.enqueue(&jobs).await? };
        failpoint::reach("drop.committed");
        files.iter().for_each(|seen| settling.taken(seen));
        Ok(answers.iter().filter(|answer| **answer == Enqueued::Inserted).count() as u64)
    }

    async fn job(&self, seen: &Seen) -> Result<NewJob, String> {
        let uri = seen.uri.parse::<DocumentUri>()?;
        let made = match &uri {
            DocumentUri::File { path } => {
                // What identifies a file of this machine is its content: it is read for it.
                let jobs = FileJobs {
                    template: self.template(),
                    model_digest: String::new(),
                    at_most_bytes: self.max_document_bytes,
                };
                let path = path.clone();
                let reading = tokio::task::spawn_blocking(move || jobs.job(&path));
                reading.await.map_err(|error| error.to_string())?
            }
            DocumentUri::S3 { .. } => self.object_job(seen),
        };
        let job = made.map_err(|error| error.to_string())?;
        Ok(NewJob { door: Door::DropFolder, origin: self.profile.at.to_string(), size_bytes: Some(seen.size), ..job })
    }

    fn object_job(&self, seen: &Seen) -> Result<NewJob, crate::job::MessageError> {
        let document = DocumentMessage { uri: seen.uri.clone(), etag: seen.etag.clone(), ..DocumentMessage::default() };
        let message = JobMessage { documents: vec![document], ..self.template() };
        let limits = MessageLimits::default();
        let payload = message.clone().check(Some(JobId::derive(&[])), &limits)?.payload_digest;
        let id = JobId::derive(&[b"drop", payload.as_bytes(), seen.version.as_bytes()]);
        let job = message.check(Some(id), &limits)?;
        Ok(NewJob { job, door: Door::DropFolder, origin: String::new(), size_bytes: None, reply: None })
    }

    fn template(&self) -> JobMessage {
        let profile = &self.profile;
        JobMessage {
            instruction: profile.instruction.clone(),
            template: profile.template.as_ref().map(ToString::to_string),
            model: profile.model.clone(),
            priority: Some(profile.priority.get()),
            ..JobMessage::new(profile.task, Vec::new())
        }
    }

    async fn reject(&self, seen: &Seen, reason: String) -> Result<(), StoreError> {
        let origin = crate::job::clean::clean(&seen.uri).into_owned();
        metrics::REJECTED.add(&["drop", ErrorCode::MessageInvalid.as_str()], 1);
        let rejection = Rejection {
            door: Door::DropFolder,
            origin,
            message_id: Some(seen.version.clone()),
            job_id: None,
            code: ErrorCode::MessageInvalid,
            reason,
            digest: Digest::of_bytes(format!("{}\n{}", seen.uri, seen.version).as_bytes()),
            size_bytes: seen.size,
        };
        self.store.reject(&rejection).await
    }
}
