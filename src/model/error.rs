//! What can be wrong with a model directory, said so that it can be put right.

use std::path::PathBuf;

use crate::backend::BackendError;

/// Why a model could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A file is missing or can not be read.
    #[error("{}: {reason}", path.display())]
    File { path: PathBuf, reason: String },
    /// A field of the configuration is missing, of the wrong type, or asks for what this program can not do.
    #[error("{}: {field}: {reason}", path.display())]
    Config { path: PathBuf, field: String, reason: String },
    /// A tensor is missing or has another shape or type than the configuration says.
    #[error("{}: tensor {name}: {reason}", path.display())]
    Tensor { path: PathBuf, name: String, reason: String },
    /// The device refused a tensor.
    #[error("{}: tensor {name}: {source}", path.display())]
    Backend { path: PathBuf, name: String, source: BackendError },
}
