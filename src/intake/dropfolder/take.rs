//! From documents that have settled to jobs.
//!
//! Invariant: the inbox has the job, or there is a row of its rejection, before the document counts as taken; its identity follows from its
//! place and version alone, so taking it again changes nothing.

use futures_util::{StreamExt, stream};
use tracing::warn;

use super::profile::Sidecars;
use super::{DropFolder, LookError, sidecar};
use crate::failpoint;
use crate::intake::files;
use crate::job::wire::DocumentMessage;
use crate::job::{Digest, DocumentRef, DocumentUri, ErrorCode, JobId, MessageLimits};
use crate::store::{Door, DropFate, DropFile, DropMark, Enqueued, NewJob, ReadyFiles, Rejection, StoreError};
use crate::telemetry::metrics;

/// Documents taken in one transaction.
const BATCH: u32 = 200;
/// Documents whose content or sidecar is read at once.
const PARALLEL: usize = 8;

/// What becomes of a document.
enum Decision {
    Job(Box<NewJob>),
    Reject(ErrorCode, String),
    /// Something did not answer, or has gone: the next look decides.
    Later,
}

impl DropFolder {
    /// Takes every document that has settled. Returns how many jobs are new.
    pub(super) async fn take_ready(&self) -> Result<u64, LookError> {
        let (mut taken, mut after) = (0, None);
        loop {
            let with_sidecar = self.place.sidecars == Sidecars::Required;
            let which = ReadyFiles { settle: self.place.settle, with_sidecar, after, limit: BATCH };
            let ready = self.store.drop_ready(&self.name(), &which).await?;
            let Some(last) = ready.last() else { return Ok(taken) };
            after = Some(last.file);
            taken += self.take(ready).await?;
        }
    }

    async fn take(&self, ready: Vec<DropFile>) -> Result<u64, LookError> {
        let deciding = ready.into_iter().map(async |file| (self.decide(&file).await, file));
        let decided: Vec<(Decision, DropFile)> = stream::iter(deciding).buffered(PARALLEL).collect().await;
        failpoint::reach("drop.listed");
        let (mut jobs, mut marks) = (Vec::new(), Vec::new());
        for (decision, file) in decided {
            let fate = match decision {
                Decision::Later => continue,
                Decision::Job(job) => {
                    let id = job.job.id;
                    jobs.push(*job);
                    DropFate::Taken(id)
                }
                Decision::Reject(code, reason) => {
                    self.reject(&file, code, reason).await?;
                    failpoint::reach("drop.rejected");
                    DropFate::Rejected
                }
            };
            marks.push(DropMark { file: file.file, version: file.version, fate });
        }
        // That another payload is there under the identity means that the options have changed since: the first stands.
        let answers = if jobs.is_empty() { Vec::new() } else { self.store.enqueue(&jobs).await? };
        failpoint::reach("drop.committed");
        self.store.drop_mark(&self.name(), &marks).await?;
        failpoint::reach("drop.marked");
        let new = answers.iter().filter(|answer| **answer == Enqueued::Inserted).count() as u64;
        metrics::DROPS.add(&["taken"], new);
        Ok(new)
    }

    async fn decide(&self, file: &DropFile) -> Decision {
        let invalid = |reason: String| Decision::Reject(ErrorCode::MessageInvalid, reason);
        if let Some(fault) = &file.fault {
            return invalid(fault.clone());
        }
        let uri = match file.uri.parse::<DocumentUri>() {
            Ok(uri) => uri,
            Err(reason) => return invalid(reason),
        };
        if file.size_bytes > self.max_document_bytes {
            let reason = format!("{} bytes, {} are allowed", file.size_bytes, self.max_document_bytes);
            return Decision::Reject(ErrorCode::DocumentTooLarge, reason);
        }
        let mut message = match self.place.profile(&uri) {
            Ok(profile) => profile.message(),
            Err(reason) => return invalid(reason),
        };
        if let Some(beside) = file.sidecar.as_ref().filter(|_| self.place.sidecars != Sidecars::None) {
            match self.read_sidecar(beside).await {
                Ok(Some(text)) => match sidecar::overlay(message, &text, &MessageLimits::default()) {
                    Ok(with) => message = with,
                    Err(reason) => return invalid(reason),
                },
                // It has gone since it was seen.
                Ok(None) if self.place.sidecars == Sidecars::Required => return Decision::Later,
                Ok(None) => {}
                Err(decision) => return decision,
            }
        }
        let Some((etag, version)) = self.identity(file, &uri).await else { return Decision::Later };
        message.documents = vec![DocumentMessage { uri: file.uri.clone(), etag, ..DocumentMessage::default() }];
        let id = JobId::derive(&[b"drop", file.uri.as_bytes(), version.as_bytes()]);
        match message.check(Some(id), &MessageLimits::default()) {
            Ok(job) => Decision::Job(Box::new(NewJob {
                job,
                door: Door::DropFolder,
                origin: self.name(),
                size_bytes: Some(file.size_bytes),
                reply: None,
            })),
            Err(error) => Decision::Reject(error.code, error.to_string()),
        }
    }

    /// The tag that its bytes must have, and what identifies them. A file of this machine is read for it.
    async fn identity(&self, file: &DropFile, uri: &DocumentUri) -> Option<(Option<String>, String)> {
        let DocumentUri::File { path } = uri else { return Some((file.etag.clone(), file.version.clone())) };
        let (path, at_most) = (path.clone(), self.max_document_bytes);
        let digest = tokio::task::spawn_blocking(move || files::content_digest(&path, at_most)).await.ok()?.ok()?;
        let tag = crate::document::fetch::entity_tag(&digest?);
        Some((Some(tag.clone()), tag))
    }

    /// Nothing if it is not there any more.
    async fn read_sidecar(&self, uri: &str) -> Result<Option<Vec<u8>>, Decision> {
        let uri = uri.parse().map_err(|reason| Decision::Reject(ErrorCode::MessageInvalid, reason))?;
        let document = DocumentRef { uri, version_id: None, etag: None, media_type: None };
        let error = match self.documents.fetch(&document, MessageLimits::default().bytes as u64).await {
            Ok(fetched) => return Ok(Some(fetched.bytes)),
            Err(error) => error,
        };
        match error.code() {
            ErrorCode::DocumentNotFound => Ok(None),
            ErrorCode::FetchFailed | ErrorCode::FetchTimedOut | ErrorCode::SourceChanged => {
                warn!(drop.place = %self.place.at, error.message = %error, "a sidecar could not be read, its document waits");
                Err(Decision::Later)
            }
            code => Err(Decision::Reject(code, format!("the sidecar: {error}"))),
        }
    }

    async fn reject(&self, file: &DropFile, code: ErrorCode, reason: String) -> Result<(), StoreError> {
        metrics::REJECTED.add(&["drop", code.as_str()], 1);
        metrics::DROPS.add(&["rejected"], 1);
        let rejection = Rejection {
            door: Door::DropFolder,
            origin: crate::job::clean::clean(&file.uri).into_owned(),
            message_id: Some(file.version.clone()),
            job_id: None,
            code,
            reason,
            digest: Digest::of_bytes(format!("{}\n{}", file.file, file.version).as_bytes()),
            size_bytes: file.size_bytes,
        };
        self.store.reject(&rejection).await
    }
}
