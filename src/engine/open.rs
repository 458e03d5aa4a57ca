//! A model directory to an engine: its files read and named, its weights put on devices.
//!
//! Invariant: what an engine says of its model (name, digest, tokenizer) does not depend on where it runs.

use std::io;
use std::path::{Path, PathBuf};

use crate::backend::BackendError;
use crate::generate::vocabulary::Vocabulary;
use crate::model::tokenizer::{Tokenizer, TokenizerError};
use crate::model::{ModelError, ModelSpec};

use super::HEADS_FILE;
use super::devices::Devices;
use super::digest::model_digest;
use super::service::ModelEngine;

/// Why a model could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Its files are missing or wrong.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// Its tokenizer is wrong.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The device could not be used.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// A file could not be read.
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
}

/// The files of a model.
pub(super) struct ModelFiles<'a> {
    /// `config.json` and weights; a tokenizer if there is one.
    pub directory: &'a Path,
    /// What `config.json` says.
    pub spec: ModelSpec,
    /// Retaining heads, if there are any.
    pub heads: Option<PathBuf>,
}

impl<D: Devices> ModelEngine<D> {
    /// Opens a model directory; `place` loads its weights. Without `heads` the directory's own are taken, if it has any.
    pub(super) fn open_on<F>(directory: &Path, heads: Option<&Path>, place: F) -> Result<Self, OpenError>
    where
        F: FnOnce(&ModelFiles<'_>) -> Result<D, OpenError>,
    {
        let spec = ModelSpec::load(directory)?;
        let own_heads = directory.join(HEADS_FILE);
        let heads = heads.map(Path::to_owned).or_else(|| own_heads.is_file().then_some(own_heads));
        let files = ModelFiles { directory, spec, heads };
        let devices = place(&files)?;
        let digest = model_digest(directory, files.heads.as_deref())
            .map_err(|source| OpenError::Io { path: directory.to_owned(), source })?;
        let vocabulary: Option<Box<dyn Vocabulary>> = match directory.join("tokenizer.json").is_file() {
            true => Some(Box::new(Tokenizer::load(directory)?)),
            false => None,
        };
        Ok(Self::new(name(directory), digest, files.spec, devices, vocabulary))
    }
}

/// The directory's own name, also of `.` and of a link.
fn name(directory: &Path) -> String {
    let whole = directory.canonicalize().unwrap_or_else(|_| directory.to_owned());
    whole.file_name().unwrap_or(whole.as_os_str()).to_string_lossy().into_owned()
}
