//! Finds documents below files and folders.
//!
//! A file that is named is taken, whatever it is called. Of a folder the files are taken whose extension is a document's; hidden
//! ones are not looked at, nor what an `.ignore` file of the folder excludes.
//!
//! Invariant: every document once, in natural order; what was passed over is counted.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use ignore::WalkBuilder;

use super::canonical;
use super::order::natural;
use crate::document::media;

/// The documents that were found, by their one name.
#[derive(Debug, Default)]
pub struct Found {
    /// In natural order.
    pub documents: Vec<PathBuf>,
    /// What was passed over in folders.
    pub skipped: Skipped,
    /// Folders that could not be read, with the reason.
    pub unreadable: Vec<String>,
}

/// Files of folders that are no documents, by extension.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Skipped(BTreeMap<String, usize>);

impl Skipped {
    /// How many.
    pub fn count(&self) -> usize {
        self.0.values().sum()
    }
}

impl std::fmt::Display for Skipped {
    /// `3 .py, 1 .pdf`
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let kinds: Vec<String> = self.0.iter().map(|(kind, count)| format!("{count} {kind}")).collect();
        f.write_str(&kinds.join(", "))
    }
}

/// All documents of `paths`.
pub fn discover(paths: &[PathBuf]) -> Found {
    let mut found = Found::default();
    let mut documents = BTreeSet::new();
    for path in paths {
        if path.is_dir() {
            walk(path, &mut documents, &mut found);
        } else {
            documents.insert(canonical(path));
        }
    }
    found.documents = documents.into_iter().collect();
    found.documents.sort_by(|one, other| natural(one, other));
    found
}

fn walk(folder: &Path, documents: &mut BTreeSet<PathBuf>, found: &mut Found) {
    // A version control system ignores large data that is there to be processed all the same.
    let walk = WalkBuilder::new(folder).standard_filters(false).hidden(true).ignore(true).build();
    for entry in walk {
        match entry {
            Ok(entry) if entry.file_type().is_some_and(|kind| kind.is_dir()) => {}
            Ok(entry) if media::by_extension(&entry.file_name().to_string_lossy()).is_some() => {
                documents.insert(canonical(entry.path()));
            }
            Ok(entry) => *found.skipped.0.entry(kind(entry.path())).or_default() += 1,
            Err(error) => found.unreadable.push(error.to_string()),
        }
    }
}

fn kind(path: &Path) -> String {
    match path.extension() {
        Some(extension) => format!(".{}", extension.to_string_lossy().to_lowercase()),
        None => "without extension".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn documents_are_found_once_and_the_rest_is_counted() {
        let folder = tempfile::tempdir().expect("a folder");
        let root = folder.path().canonicalize().expect("a path");
        fs::create_dir_all(root.join("deep/er")).expect("made");
        fs::create_dir_all(root.join(".git")).expect("made");
        let names = [
            "10.txt",
            "2.MD",
            "deep/er/a.html",
            "data.json",
            "deep/b.json",
            "Makefile",
            ".git/c.txt",
            "secret.txt",
            "notes.log",
        ];
        for name in names {
            fs::write(root.join(name), "x").expect("written");
        }
        fs::write(root.join(".ignore"), "secret.txt").expect("written");
        fs::write(root.join(".gitignore"), "*.log").expect("written");
        let paths = [root.join("10.txt"), root.clone(), root.join("deep/../data.json"), root.join("gone.txt")];
        let found = discover(&paths);
        let expected = ["2.MD", "10.txt", "data.json", "deep/er/a.html", "gone.txt", "notes.log"];
        assert_eq!(found.documents, expected.map(|name| root.join(name)));
        assert_eq!(found.skipped.to_string(), "2 .json, 1 without extension");
        assert!(found.unreadable.is_empty());
    }
}
