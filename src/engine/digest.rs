//! What makes two results comparable: a digest of configuration, weights and retaining heads.
//!
//! Invariant: depends on the contents and names of the files, not on where they lie or when they were written.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

/// Up to this size a file is read whole.
const WHOLE_BYTES: u64 = 1 << 20;
/// Larger files are sampled: so many pieces of so many bytes, evenly spread, the ends included. Reading all of the tens of
/// gigabytes of a large model would take longer than loading it, and other weights differ nearly everywhere.
const PIECES: u64 = 256;
const PIECE_BYTES: u64 = 4 << 10;

/// Hexadecimal digest of `config.json`, all `*.safetensors` of the model's directory and the heads file used with it.
pub fn model_digest(directory: &Path, heads: Option<&Path>) -> io::Result<String> {
    let mut files: Vec<PathBuf> = fs::read_dir(directory)?
        .map(|entry| entry.map(|entry| entry.path()))
        .filter(|path| path.as_ref().map_or(true, |path| belongs(path)))
        .collect::<io::Result<_>>()?;
    files.sort();
    let mut digest = Sha256::new();
    for file in &files {
        digest.update(file.file_name().unwrap_or_default().as_encoded_bytes());
        add(&mut digest, file)?;
    }
    if let Some(heads) = heads {
        digest.update(b"retaining heads");
        add(&mut digest, heads)?;
    }
    Ok(digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Heads count where they are used, whatever their file is called.
fn belongs(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default();
    name == "config.json"
        || (path.extension().is_some_and(|extension| extension == "safetensors") && name != super::HEADS_FILE)
}

fn add(digest: &mut Sha256, path: &Path) -> io::Result<()> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    digest.update(length.to_le_bytes());
    let mut piece = Vec::new();
    let mut take = |at: u64, bytes: u64| -> io::Result<()> {
        piece.clear();
        file.seek(SeekFrom::Start(at))?;
        (&mut file).take(bytes).read_to_end(&mut piece)?;
        digest.update(&piece);
        Ok(())
    };
    if length <= WHOLE_BYTES {
        return take(0, length);
    }
    (0..PIECES).try_for_each(|index| take((length - PIECE_BYTES) / (PIECES - 1) * index, PIECE_BYTES))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_config_and_heads_count_and_nothing_else() {
        let model = tempfile::tempdir().unwrap();
        let write = |name: &str, bytes: &[u8]| fs::write(model.path().join(name), bytes).unwrap();
        let digest = |heads: Option<&str>| {
            model_digest(model.path(), heads.map(|name| model.path().join(name)).as_deref()).unwrap()
        };
        write("config.json", b"{}");
        write("model.safetensors", &vec![7; 3 << 20]);
        write("retaining_heads.safetensors", b"heads");
        let first = digest(None);
        write("README.md", b"words");
        assert_eq!(digest(None), first);
        assert_ne!(digest(Some("retaining_heads.safetensors")), first);
        write("model.safetensors", &vec![8; 3 << 20]);
        assert_ne!(digest(None), first);
    }
}
