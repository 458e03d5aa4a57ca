//! Files and folders of a command line: the documents in them, and a job for each whose identity follows from its content.
//!
//! Invariant: the same bytes at the same place under the same options are the same job; any other is another one.

mod discover;
mod order;

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

use crate::document::fetch::entity_tag;
use crate::job::wire::DocumentMessage;
use crate::job::{Digest, DocumentUri, JobId, JobMessage, MessageError, MessageLimits};
use crate::store::{Door, NewJob};

pub use discover::{Found, Skipped, discover};

/// What every job of one command line has in common.
#[derive(Debug, Clone)]
pub struct FileJobs {
    /// The message without documents and identity.
    pub template: JobMessage,
    /// Digest of the model that will serve it: another model means another answer.
    pub model_digest: String,
    /// Bytes a document may have; of a longer one only the size is looked at.
    pub at_most_bytes: u64,
}

impl FileJobs {
    /// The job of one file. A file that cannot be read gets one too: the pipeline finds out why and leaves the reason.
    pub fn job(&self, path: &Path) -> Result<NewJob, MessageError> {
        let mut message = self.template.clone();
        let (etag, size_bytes) = match content(path, self.at_most_bytes) {
            Ok((digest, size)) => (digest.as_ref().map(entity_tag), Some(size)),
            Err(_) => (None, None),
        };
        let uri = DocumentUri::from_path(path).map(|uri| uri.to_string()).unwrap_or_default();
        message.documents = vec![DocumentMessage { uri, etag, ..DocumentMessage::default() }];
        let limits = MessageLimits::default();
        // The payload's digest is over everything but the identity, which is derived from it.
        let payload = message.clone().check(Some(JobId::derive(&[])), &limits)?.payload_digest;
        let id = JobId::derive(&[b"file", payload.as_bytes(), self.model_digest.as_bytes()]);
        let job = message.check(Some(id), &limits)?;
        Ok(NewJob { job, door: Door::Files, origin: path.display().to_string(), size_bytes, reply: None })
    }
}

/// Digest of a regular file; none for one that is too large to be read anyway.
pub(super) fn content_digest(path: &Path, at_most: u64) -> io::Result<Option<Digest>> {
    content(path, at_most).map(|(digest, _)| digest)
}

/// Digest and size of a regular file; no digest for one that is too large to be read anyway.
fn content(path: &Path, at_most: u64) -> io::Result<(Option<Digest>, u64)> {
    let about = std::fs::metadata(path)?;
    if !about.is_file() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    if about.len() > at_most {
        return Ok((None, about.len()));
    }
    let (mut file, mut digest, mut size) = (File::open(path)?, Sha256::new(), 0);
    let mut chunk = vec![0; 1 << 16];
    loop {
        match file.read(&mut chunk)? {
            0 => return Ok((Some(Digest::from_bytes(digest.finalize().into())), size)),
            read => {
                digest.update(&chunk[..read]);
                size += read as u64;
            }
        }
    }
}

/// The one name of a file: absolute, without `..` and, as far as it exists, without links. Two ways to a file are one document.
fn canonical(path: &Path) -> PathBuf {
    if let Ok(whole) = path.canonicalize() {
        return whole;
    }
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let mut plain = PathBuf::new();
    for part in absolute.components() {
        match part {
            std::path::Component::ParentDir => drop(plain.pop()),
            part => plain.push(part),
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::job::Task;

    fn jobs(max_new_tokens: u32, model: &str) -> FileJobs {
        let mut template = JobMessage::new(Task::Summarise, Vec::new());
        template.max_new_tokens = Some(max_new_tokens);
        FileJobs { template, model_digest: model.to_owned(), at_most_bytes: 100 }
    }

    #[test]
    fn identity_follows_from_content_place_options_and_model() {
        let folder = tempfile::tempdir().expect("a folder");
        let (one, other) = (folder.path().join("one.txt"), folder.path().join("other.txt"));
        fs::write(&one, "words").expect("written");
        fs::write(&other, "words").expect("written");
        let id = |jobs: &FileJobs, path: &Path| jobs.job(path).expect("a job").job.id;
        let first = id(&jobs(8, "m"), &one);
        assert_eq!(first, id(&jobs(8, "m"), &one));
        let others = [id(&jobs(9, "m"), &one), id(&jobs(8, "n"), &one), id(&jobs(8, "m"), &other)];
        assert!(!others.contains(&first));
        fs::write(&one, "other words").expect("written");
        assert_ne!(first, id(&jobs(8, "m"), &one));
        fs::write(&one, "words").expect("written");
        assert_eq!(first, id(&jobs(8, "m"), &one));
    }

    #[test]
    fn what_cannot_be_read_is_a_job_all_the_same() {
        let folder = tempfile::tempdir().expect("a folder");
        let gone = jobs(8, "m").job(&folder.path().join("gone.txt")).expect("a job");
        assert_eq!((gone.size_bytes, gone.job.documents[0].etag.clone()), (None, None));
        let long = folder.path().join("long.txt");
        fs::write(&long, [b'x'; 101]).expect("written");
        let long = jobs(8, "m").job(&long).expect("a job");
        assert_eq!((long.size_bytes, long.job.documents[0].etag.clone()), (Some(101), None));
    }

    #[test]
    fn two_ways_to_a_file_are_one() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("a.txt");
        fs::write(&path, "words").expect("written");
        let around = folder.path().join("x/../a.txt");
        fs::create_dir(folder.path().join("x")).expect("made");
        assert_eq!(canonical(&around), canonical(&path));
        assert_eq!(canonical(Path::new("/no/where/../x.txt")), Path::new("/no/x.txt"));
    }
}
