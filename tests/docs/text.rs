//! Tables of Markdown files, and words of source files.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

/// The content of a file of the package.
pub fn read(path: &str) -> String {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// A table: its head, and its rows.
pub struct Table {
    pub head: Vec<String>,
    pub rows: Vec<Vec<String>>,
}

impl Table {
    /// Those of `file` whose heads begin with the cell `first`.
    pub fn all(file: &str, first: &str) -> Vec<Self> {
        let text = read(file);
        let mut lines = text.lines();
        let mut tables = Vec::new();
        while let Some(line) = lines.next() {
            let head = cells(line);
            if head.first().is_none_or(|cell| cell != first) {
                continue;
            }
            let rows: Vec<_> = lines.by_ref().skip(1).take_while(|line| line.starts_with('|')).map(cells).collect();
            assert!(rows.iter().all(|row| row.len() == head.len()), "{file}: a row of '{first}' has another width");
            tables.push(Self { head, rows });
        }
        assert!(!tables.is_empty(), "{file} has no table that begins with '{first}'");
        tables
    }

    /// The first of them.
    pub fn of(file: &str, first: &str) -> Self {
        Self::all(file, first).remove(0)
    }

    /// The names in the first column, which stand in backquotes, each once.
    pub fn names(&self) -> BTreeSet<String> {
        let names: Vec<String> = self.rows.iter().map(|row| quoted(&row[0])[0].clone()).collect();
        let set: BTreeSet<String> = names.iter().cloned().collect();
        assert_eq!(names.len(), set.len(), "a name stands twice: {names:?}");
        set
    }

    /// The cell of the row `name` in the column `column`.
    pub fn cell(&self, name: &str, column: &str) -> &str {
        let column = self.head.iter().position(|head| head == column).unwrap_or_else(|| panic!("no column {column}"));
        let row = self.rows.iter().find(|row| quoted(&row[0])[0] == name).unwrap_or_else(|| panic!("no row {name}"));
        &row[column]
    }
}

fn cells(line: &str) -> Vec<String> {
    let Some(inner) = line.strip_prefix('|').and_then(|rest| rest.strip_suffix('|')) else { return Vec::new() };
    inner.split('|').map(|cell| cell.trim().to_owned()).collect()
}

/// What stands in backquotes.
pub fn quoted(text: &str) -> Vec<String> {
    text.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

/// Code that ships: the file without its tests and comments.
pub fn shipped(path: &str) -> String {
    let text = read(path);
    let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
    let lines = code.lines().filter(|line| !line.trim_start().starts_with("//"));
    lines.collect::<Vec<_>>().join("\n")
}

/// The words of `is` that follow `mark` anywhere in `text`.
pub fn words_after(text: &str, mark: &str, is: impl Fn(char) -> bool + Copy) -> BTreeSet<String> {
    text.split(mark).skip(1).map(|rest| rest.chars().take_while(|c| is(*c)).collect()).collect()
}

/// Rust files below a folder of the package, with the tests among them left out.
pub fn sources(folder: &str) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(folder)).expect("a folder") {
        let path = format!("{folder}/{}", entry.expect("an entry").file_name().to_string_lossy());
        if path.ends_with("tests.rs") || path.ends_with("/tests") {
            continue;
        } else if path.ends_with(".rs") {
            found.push(path);
        } else if !path.rsplit('/').next().is_some_and(|name| name.contains('.')) {
            found.extend(sources(&path));
        }
    }
    found.sort();
    found
}
