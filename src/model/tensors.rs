//! The tensors of a model directory by name: one safetensors file, or shards with an index; memory-mapped.
//!
//! Invariant: every tensor that is given out lies wholly inside its file.

use std::collections::HashMap;
use std::fs;
use std::path::{Component, Path, PathBuf};

use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;

use super::ModelError;
use crate::backend::mapped::MappedFile;
use crate::backend::{DType, WeightView};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// A mapped safetensors file and where its tensors are.
struct TensorFile {
    path: PathBuf,
    map: MappedFile,
    tensors: HashMap<String, Place>,
}

struct Place {
    dtype: Dtype,
    shape: Vec<usize>,
    start: usize,
    bytes: usize,
}

/// Tensors by name, from one file or several.
pub(super) struct Tensors {
    files: Vec<TensorFile>,
    /// File of each tensor.
    by_name: HashMap<String, usize>,
    /// What an error about a missing tensor names.
    directory: PathBuf,
}

impl Tensors {
    /// The weights of a model directory.
    pub fn of_model(directory: &Path) -> Result<Self, ModelError> {
        let single = directory.join(SINGLE);
        if single.is_file() {
            return Self::of_files(directory, vec![TensorFile::open(single)?]);
        }
        let index = directory.join(INDEX);
        if !index.is_file() {
            let reason = format!("neither {SINGLE} nor {INDEX} is there");
            return Err(ModelError::File { path: directory.to_owned(), reason });
        }
        let files = shards(&index)?.into_iter().map(|name| TensorFile::open(directory.join(name)));
        Self::of_files(directory, files.collect::<Result<_, _>>()?)
    }

    /// One file, such as retaining heads.
    pub fn of_file(path: &Path) -> Result<Self, ModelError> {
        Self::of_files(path, vec![TensorFile::open(path.to_owned())?])
    }

    fn of_files(directory: &Path, files: Vec<TensorFile>) -> Result<Self, ModelError> {
        let mut by_name = HashMap::new();
        for (i, file) in files.iter().enumerate() {
            for name in file.tensors.keys() {
                if let Some(other) = by_name.insert(name.clone(), i) {
                    let other: &TensorFile = &files[other];
                    let reason = format!("is also in {}", other.path.display());
                    return Err(ModelError::Tensor { path: file.path.clone(), name: name.clone(), reason });
                }
            }
        }
        Ok(Self { files, by_name, directory: directory.to_owned() })
    }

    pub fn contains(&self, name: &str) -> bool {
        self.by_name.contains_key(name)
    }

    /// The file a tensor is in; the directory if it is in none.
    pub fn path_of(&self, name: &str) -> &Path {
        self.by_name.get(name).map_or(&self.directory, |&file| &self.files[file].path)
    }

    /// Sizes of a tensor.
    pub fn shape(&self, name: &str) -> Result<&[usize], ModelError> {
        self.find(name).map(|(_, place)| place.shape.as_slice())
    }

    /// A matrix of exactly this shape.
    pub fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<WeightView<'_>, ModelError> {
        self.view(name, &[rows, cols], rows, cols)
    }

    /// A vector of exactly this length, as one row.
    pub fn vector(&self, name: &str, length: usize) -> Result<WeightView<'_>, ModelError> {
        self.view(name, &[length], 1, length)
    }

    fn view(&self, name: &str, shape: &[usize], rows: usize, cols: usize) -> Result<WeightView<'_>, ModelError> {
        let (file, place) = self.find(name)?;
        let wrong = |reason| ModelError::Tensor { path: file.path.clone(), name: name.to_owned(), reason };
        if place.shape != shape {
            return Err(wrong(format!("expected {shape:?}, got {:?}", place.shape)));
        }
        let dtype = match place.dtype {
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::Bf16,
            other => return Err(wrong(format!("is of type {other:?}; f32, f16 and bf16 are supported"))),
        };
        let bytes = &file.map.bytes()[place.start..place.start + place.bytes];
        Ok(WeightView { rows, cols, dtype, bytes })
    }

    fn find(&self, name: &str) -> Result<(&TensorFile, &Place), ModelError> {
        let file = self.by_name.get(name).map(|&file| &self.files[file]);
        let found = file.and_then(|file| Some((file, file.tensors.get(name)?)));
        found.ok_or_else(|| ModelError::Tensor {
            path: self.directory.clone(),
            name: name.to_owned(),
            reason: "is missing".to_owned(),
        })
    }
}

impl TensorFile {
    fn open(path: PathBuf) -> Result<Self, ModelError> {
        let failed = |reason: String| ModelError::File { path: path.clone(), reason };
        let map = MappedFile::open(&path).map_err(|error| failed(error.to_string()))?;
        let bytes = map.bytes();
        // Checks the header, and that the tensors fill the file exactly: a truncated file ends here.
        let file = SafeTensors::deserialize(bytes)
            .map_err(|error| failed(format!("no complete safetensors file: {error}")))?;
        let place = |(name, view): (&str, safetensors::tensor::TensorView<'_>)| {
            let start = view.data().as_ptr().addr() - bytes.as_ptr().addr();
            let place = Place { dtype: view.dtype(), shape: view.shape().to_vec(), start, bytes: view.data().len() };
            (name.to_owned(), place)
        };
        let tensors = file.iter().map(place).collect();
        Ok(Self { path, map, tensors })
    }
}

#[derive(Deserialize)]
struct Index {
    weight_map: HashMap<String, String>,
}

/// File names of the shards, each once.
fn shards(index: &Path) -> Result<Vec<String>, ModelError> {
    let failed = |reason: String| ModelError::File { path: index.to_owned(), reason };
    let text = fs::read_to_string(index).map_err(|error| failed(error.to_string()))?;
    let parsed: Index = serde_json::from_str(&text).map_err(|error| failed(error.to_string()))?;
    let mut names: Vec<String> = parsed.weight_map.into_values().collect();
    names.sort();
    names.dedup();
    let plain = |name: &String| {
        let mut parts = Path::new(name).components();
        matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None))
    };
    match names.iter().find(|name| !plain(name)) {
        Some(name) => Err(failed(format!("'{name}' is not the name of a file in the same directory"))),
        None if names.is_empty() => Err(failed("weight_map is empty".to_owned())),
        None => Ok(names),
    }
}
