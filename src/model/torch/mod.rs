//! Retaining heads as published: PyTorch's `.bin` files, converted to safetensors.
//!
//! Invariant: no code of the file is executed, nothing but tensors is taken from it, and every byte that is read lies inside its entry.

mod machine;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use safetensors::tensor::TensorView;
use zip::ZipArchive;
use zip::result::ZipError;

use machine::{Element, TensorRef};

/// The pickle itself; those of published heads have some tens of kilobytes.
const PICKLE_BYTES_AT_MOST: u64 = 64 << 20;
/// All storages together; heads for a model of 70 billion parameters have two gigabytes.
const STORAGE_BYTES_AT_MOST: u64 = 16 << 30;

/// Why a file could not be converted.
#[derive(Debug, thiserror::Error)]
#[error("{}: {reason}", path.display())]
pub struct ConvertError {
    path: PathBuf,
    reason: String,
}

/// What was converted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Converted {
    /// Weights of retaining heads.
    pub tensors: usize,
    /// Tensors that belong to no head, and were left out.
    pub left_out: usize,
}

/// Writes the retaining heads in the PyTorch file `from` to the safetensors file `to`.
pub fn convert_heads(from: &Path, to: &Path) -> Result<Converted, ConvertError> {
    let failed = |path: &Path, reason: String| ConvertError { path: path.to_owned(), reason };
    let mut archive = Archive::open(from).map_err(|reason| failed(from, reason))?;
    let all = archive.tensors().map_err(|reason| failed(from, reason))?;
    let count = all.len();
    let heads: Vec<(String, TensorRef)> = all.into_iter().filter(|(name, _)| is_head(name)).collect();
    if heads.is_empty() {
        let reason = format!("has {count} tensors, but none is called …self_attn.fc1.weight or …self_attn.fc2.weight");
        return Err(failed(from, reason));
    }
    let mut contents = Vec::with_capacity(heads.len());
    for (name, tensor) in heads {
        let bytes = archive.content(&tensor).map_err(|reason| failed(from, format!("'{name}': {reason}")))?;
        contents.push((name, tensor, bytes));
    }
    let converted = Converted { tensors: contents.len(), left_out: count - contents.len() };
    write(to, &contents).map_err(|reason| failed(to, reason))?;
    Ok(converted)
}

fn is_head(name: &str) -> bool {
    name.ends_with(".self_attn.fc1.weight") || name.ends_with(".self_attn.fc2.weight")
}

fn write(path: &Path, contents: &[(String, TensorRef, Vec<u8>)]) -> Result<(), String> {
    let mut views = Vec::with_capacity(contents.len());
    for (name, tensor, bytes) in contents {
        let dtype = match tensor.element {
            Element::F32 => Dtype::F32,
            Element::F16 => Dtype::F16,
            Element::Bf16 => Dtype::BF16,
        };
        let view = TensorView::new(dtype, tensor.shape.clone(), bytes).map_err(|error| error.to_string())?;
        views.push((name.as_str(), view));
    }
    safetensors::serialize_to_file(views, None, path).map_err(|error| error.to_string())
}

/// A PyTorch file: a zip archive with a pickle and one entry a storage, none of them compressed.
struct Archive {
    zip: ZipArchive<File>,
    /// Folder that all entries lie in.
    root: String,
    left: u64,
}

impl Archive {
    fn open(path: &Path) -> Result<Self, String> {
        let file = File::open(path).map_err(|error| error.to_string())?;
        let zip = ZipArchive::new(file).map_err(|error| match error {
            ZipError::Io(error) => error.to_string(),
            _ => "is no PyTorch file of version 1.6 or later (a zip archive); save it anew with torch.save".to_owned(),
        })?;
        let names = zip.file_names().filter_map(Result::ok);
        let pickles: Vec<String> = names.filter_map(|name| name.strip_suffix("/data.pkl").map(str::to_owned)).collect();
        let [root] = &pickles[..] else {
            return Err("is a zip archive, but not one of PyTorch: data.pkl is missing".to_owned());
        };
        Ok(Self { root: root.to_owned(), zip, left: STORAGE_BYTES_AT_MOST })
    }

    fn tensors(&mut self) -> Result<Vec<(String, TensorRef)>, String> {
        let big_endian = format!("{}/byteorder", self.root);
        if self.zip.index_for_name(&big_endian).is_some() && self.read(&big_endian, 16)? != b"little" {
            return Err("its numbers are big-endian".to_owned());
        }
        let program = self.read(&format!("{}/data.pkl", self.root), PICKLE_BYTES_AT_MOST)?;
        machine::run(&program)
    }

    /// The tensor's elements, row by row.
    fn content(&mut self, tensor: &TensorRef) -> Result<Vec<u8>, String> {
        let storage = self.read(&format!("{}/data/{}", self.root, tensor.storage), self.left)?;
        self.left -= storage.len() as u64;
        rows(tensor, &storage).ok_or_else(|| format!("reaches beyond its storage of {} bytes", storage.len()))
    }

    fn read(&mut self, name: &str, at_most: u64) -> Result<Vec<u8>, String> {
        let entry = self.zip.by_name(name).map_err(|error| format!("entry {name}: {error}"))?;
        if entry.size() > at_most {
            return Err(format!("entry {name} has {} bytes, more than {at_most}", entry.size()));
        }
        let mut bytes = Vec::new();
        // The size in the directory may be a lie.
        let read = entry.take(at_most).read_to_end(&mut bytes);
        read.map_err(|error: io::Error| format!("entry {name}: {error}")).map(|_| bytes)
    }
}

/// The elements of a view of `storage`, copied row by row; `None` if one lies outside.
fn rows(tensor: &TensorRef, storage: &[u8]) -> Option<Vec<u8>> {
    let size = tensor.element.size();
    let (shape, strides) = (&tensor.shape, &tensor.strides);
    let (rows, row_stride) = if shape.len() == 2 { (shape[0], strides[0]) } else { (1, 0) };
    let (cols, col_stride) = shape.last().map_or((1, 1), |&cols| (cols, strides[strides.len() - 1]));
    if rows == 0 || cols == 0 {
        return Some(Vec::new());
    }
    // A stride of 0 repeats elements: no more of them than the storage has.
    let total = rows.checked_mul(cols)?;
    let last = (rows - 1)
        .checked_mul(row_stride)?
        .checked_add((cols - 1).checked_mul(col_stride)?)?
        .checked_add(tensor.offset)?;
    if last >= storage.len() / size || total > storage.len() / size {
        return None;
    }
    let mut out = Vec::with_capacity(total * size);
    for row in 0..rows {
        for col in 0..cols {
            let at = (tensor.offset + row * row_stride + col * col_stride) * size;
            out.extend_from_slice(&storage[at..at + size]);
        }
    }
    Some(out)
}
