//! Files of jobs that have ended: tagged, moved or deleted, as the place's policy says.
//!
//! Invariant: nothing is done to a file before its job's end is committed, and nothing to another version of it; every step can be repeated.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use tracing::warn;

use super::listing::file_version;
use super::profile::{Disposal, below};
use super::{DropFolder, LookError};
use crate::failpoint;
use crate::job::DocumentUri;
use crate::objects::{GetRequest, ObjectClient, ObjectError};
use crate::store::{DropFate, DropFile, DropMark, EndedFile, JobState};
use crate::telemetry::metrics;

/// Files in one page.
const BATCH: u32 = 200;

/// Why a file stays as it is.
enum Kept {
    /// Worth another try.
    For(LookError),
    /// For good, with the reason.
    ForGood(String),
}

/// What is done with one file.
enum Step<'a> {
    Tag(&'a str, &'static str),
    MoveTo(&'a DocumentUri),
    Delete,
}

impl From<ObjectError> for Kept {
    fn from(error: ObjectError) -> Self {
        match error.is_transient() {
            true => Self::For(error.into()),
            false => Self::ForGood(error.to_string()),
        }
    }
}

impl From<io::Error> for Kept {
    fn from(error: io::Error) -> Self {
        Self::ForGood(error.to_string())
    }
}

impl DropFolder {
    /// Applies the policy to every file whose job has ended.
    pub(super) async fn dispose(&self) -> Result<(), LookError> {
        if self.place.disposal == Disposal::Leave {
            return Ok(());
        }
        let mut after = None;
        loop {
            let ended = self.store.drop_ended(&self.name(), after, BATCH).await?;
            let Some(last) = ended.last() else { return Ok(()) };
            after = Some(last.file.file);
            for file in ended {
                self.dispose_of(file).await?;
            }
        }
    }

    async fn dispose_of(&self, ended: EndedFile) -> Result<(), LookError> {
        failpoint::reach("drop.disposing");
        let reason = match self.apply(&ended).await {
            Ok(()) => None,
            Err(Kept::For(error)) => return Err(error),
            Err(Kept::ForGood(reason)) => {
                warn!(drop.place = %self.place.at, error.message = reason, "a file of an ended job stays as it is");
                Some(reason)
            }
        };
        failpoint::reach("drop.disposed");
        metrics::DROPS.add(&[if reason.is_none() { "disposed" } else { "kept" }], 1);
        let fate = DropFate::Disposed(reason);
        let mark = DropMark { file: ended.file.file, version: ended.file.version, fate };
        Ok(self.store.drop_mark(&self.name(), &[mark]).await?)
    }

    async fn apply(&self, ended: &EndedFile) -> Result<(), Kept> {
        let succeeded = ended.state == Some(JobState::Succeeded);
        let step = match &self.place.disposal {
            Disposal::Tag(name) => Step::Tag(name, ended.state.map_or("rejected", JobState::as_str)),
            Disposal::Move { to, .. } if succeeded => Step::MoveTo(to),
            Disposal::Move { failed_to: Some(to), .. } => Step::MoveTo(to),
            Disposal::Delete if succeeded => Step::Delete,
            Disposal::Leave | Disposal::Move { .. } | Disposal::Delete => return Ok(()),
        };
        if ended.file.fault.is_some() {
            return Err(Kept::ForGood("its name cannot be used in a request".to_owned()));
        }
        let uri = ended.file.uri.parse::<DocumentUri>().map_err(Kept::ForGood)?;
        let sidecar = ended.file.sidecar.as_ref().map(|text| text.parse::<DocumentUri>()).transpose();
        let sidecar = sidecar.map_err(Kept::ForGood)?;
        if !self.step(&step, &uri, Some(&ended.file)).await? {
            return Ok(());
        }
        failpoint::reach("drop.half_disposed");
        match (&step, sidecar) {
            (Step::MoveTo(_) | Step::Delete, Some(sidecar)) => self.step(&step, &sidecar, None).await.map(drop),
            _ => Ok(()),
        }
    }

    /// `false`: there is another version of it by now, and nothing was done. `pinned` is the version that is meant; of a sidecar any.
    async fn step(&self, step: &Step<'_>, uri: &DocumentUri, pinned: Option<&DropFile>) -> Result<bool, Kept> {
        let name = below(&self.place.at, uri).ok_or_else(|| Kept::ForGood("it is not below its place".to_owned()))?;
        match uri {
            DocumentUri::File { path } => {
                let (path, version) = (path.clone(), pinned.map(|file| file.version.clone()));
                let to = match step {
                    Step::MoveTo(DocumentUri::File { path: folder }) => {
                        Some(folder.join(Path::new(std::ffi::OsStr::from_bytes(name))))
                    }
                    Step::Delete => None,
                    Step::MoveTo(DocumentUri::S3 { .. }) | Step::Tag(..) => {
                        return Err(Kept::ForGood("that cannot be done with a file".to_owned()));
                    }
                };
                let moving = tokio::task::spawn_blocking(move || move_file(&path, to, version.as_deref()));
                Ok(moving.await.map_err(|error| Kept::ForGood(error.to_string()))??)
            }
            DocumentUri::S3 { store, bucket, key } => {
                let client = self.stores.iter().find(|client| client.alias() == store);
                let client = client.ok_or_else(|| Kept::ForGood(format!("no store is named {store}")))?;
                let to = match step {
                    Step::MoveTo(DocumentUri::S3 { key: prefix, .. }) => {
                        Some(format!("{prefix}{}", String::from_utf8_lossy(name)))
                    }
                    _ => None,
                };
                let etag = pinned.and_then(|file| file.etag.as_deref());
                if pinned.is_some() && etag.is_none() {
                    return Err(Kept::ForGood("the server gives no tags, so versions cannot be told apart".to_owned()));
                }
                let object = Object { client, bucket, key, etag };
                match object.apply(step, to.as_deref()).await {
                    Ok(()) => Ok(true),
                    Err(ObjectError::Changed { .. }) => Ok(false),
                    Err(error) => Err(error.into()),
                }
            }
        }
    }
}

/// A version of an object, or any if it has no tag here.
struct Object<'a> {
    client: &'a ObjectClient,
    bucket: &'a str,
    key: &'a str,
    etag: Option<&'a str>,
}

impl Object<'_> {
    /// That it has gone is fine: this was done before.
    async fn apply(&self, step: &Step<'_>, to: Option<&str>) -> Result<(), ObjectError> {
        let &Self { client, bucket, key, etag } = self;
        // Not every server minds a condition, so it is also asked before.
        let request = GetRequest { bucket, key, version_id: None, etag };
        let now = match client.head(request).await {
            Ok(head) => head.etag,
            Err(ObjectError::NotFound { .. }) => return Ok(()),
            Err(error) => return Err(error),
        };
        if etag.is_some_and(|etag| now.as_deref().is_none_or(|now| now.trim_matches('"') != etag)) {
            return Err(ObjectError::Changed { place: format!("s3://{}/{bucket}/{key}", client.alias()) });
        }
        match (step, to) {
            (Step::Tag(name, value), _) => client.tag(bucket, key, name, value).await,
            (_, Some(to)) => {
                match client.copy(bucket, key, to, etag).await {
                    Ok(()) => failpoint::reach("drop.copied"),
                    Err(ObjectError::NotFound { .. }) => return Ok(()),
                    Err(error) => return Err(error),
                }
                client.delete(bucket, key, etag).await
            }
            (_, None) => client.delete(bucket, key, etag).await,
        }
    }
}

/// Moves a file, or deletes it. `Ok(false)`: it is another version by now.
fn move_file(path: &Path, to: Option<PathBuf>, version: Option<&str>) -> io::Result<bool> {
    let is_same = |path: &Path| match (fs::symlink_metadata(path), version) {
        (Ok(about), Some(version)) => Ok(file_version(&about) == version),
        (Ok(_), None) => Ok(true),
        (Err(error), _) => Err(error),
    };
    match is_same(path) {
        Ok(true) => {}
        Ok(false) => return Ok(false),
        // This was done before.
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(true),
        Err(error) => return Err(error),
    }
    let Some(to) = to else { return fs::remove_file(path).map(|()| true) };
    if let Some(folder) = to.parent() {
        fs::create_dir_all(folder)?;
    }
    fs::rename(path, &to)?;
    // A version that came in between goes back where it was, unless there is yet another.
    if !is_same(&to)? {
        fs::hard_link(&to, path)?;
        return Ok(false);
    }
    Ok(true)
}
