//! The shape of the program, held by a test: who may know whom, where `unsafe` and SQL may stand, what every module says of itself.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// What each module of the library may use. `cli`, at the top, may use everything.
const MAY_USE: &[(&str, &[&str])] = &[
    // No I/O, no device; what a plan and a result are made of.
    ("plan", &[]),
    ("generate", &[]),
    ("cost", &["plan"]),
    ("job", &["plan", "generate"]),
    // The engine's side: never a queue, a store or a document.
    ("comm", &["backend"]),
    ("model", &["backend", "generate"]),
    ("engine", &["backend", "comm", "cost", "generate", "model", "plan"]),
    // A pool as engine and daemon would run it, but for the time.
    ("simulate", &["cost", "engine", "plan"]),
    // The job's side: never a device.
    ("prompt", &["job", "model"]),
    ("objects", &[]),
    ("document", &["job", "objects"]),
    ("store", &["job", "plan", "cost", "generate", "failpoint"]),
    ("telemetry", &[]),
    ("failpoint", &[]),
    ("config", &["job", "store", "document", "intake", "objects"]),
    // Of the pipeline the doors know only how the process is told to stop.
    ("intake", &["job", "store", "document", "objects", "pipeline", "telemetry", "failpoint"]),
    ("outbox", &["job", "store", "intake", "objects", "pipeline", "telemetry", "failpoint"]),
    ("pipeline", &["job", "store", "document", "prompt", "engine", "generate", "plan", "model", "failpoint"]),
    ("supervise", &["engine", "plan", "cost", "telemetry"]),
];

/// Lines of a file at most, tests included.
const LINES_AT_MOST: usize = 600;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// All Rust files below `directory`, with their content.
fn rust_files(directory: &Path) -> Vec<(PathBuf, String)> {
    let mut files = Vec::new();
    for entry in fs::read_dir(directory).expect("a directory") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            files.extend(rust_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).expect("UTF-8");
            files.push((path, text));
        }
    }
    files.sort();
    files
}

/// `(module, file, content)` of the library; `lib.rs` and `main.rs` belong to none.
fn sources() -> Vec<(String, PathBuf, String)> {
    let src = root().join("src");
    let with_module = |(path, text): (PathBuf, String)| {
        let relative = path.strip_prefix(&src).expect("below src").to_owned();
        let first = relative.components().next()?.as_os_str().to_str()?.to_owned();
        let module = first.strip_suffix(".rs").unwrap_or(&first).to_owned();
        (module != "lib" && module != "main").then_some((module, path, text))
    };
    rust_files(&src).into_iter().filter_map(with_module).collect()
}

fn is_test(path: &Path) -> bool {
    let name = path.to_string_lossy();
    name.ends_with("tests.rs") || name.contains("/tests/") || name.ends_with("conformance.rs")
}

/// Code that ships: without the tests at a file's end, and without comments.
fn code(text: &str) -> String {
    let shipped = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
    let lines = shipped.lines().filter(|line| !line.trim_start().starts_with("//"));
    lines.collect::<Vec<_>>().join("\n")
}

/// Modules named as `crate::module`.
fn used(code: &str) -> BTreeSet<String> {
    let name = |rest: &str| rest.chars().take_while(|c| c.is_ascii_lowercase() || *c == '_').collect::<String>();
    code.split("crate::").skip(1).map(name).filter(|name| !name.is_empty()).collect()
}

#[test]
fn modules_use_only_what_they_may() {
    let mut wrong = Vec::new();
    for (module, path, text) in sources() {
        // The backend is a crate of its own: that it uses nothing else is the compiler's to see.
        if module == "cli" || module == "backend" || is_test(&path) {
            continue;
        }
        let Some((_, may)) = MAY_USE.iter().find(|(name, _)| *name == module) else {
            wrong.push(format!("{module} is not in the list of this test"));
            continue;
        };
        for other in used(&code(&text)) {
            if other != module && !may.contains(&other.as_str()) {
                wrong.push(format!("{}: {module} uses {other}", path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn unsafe_code_stands_in_backends_alone() {
    for (module, path, text) in sources() {
        let allowed = module == "backend" || path.to_string_lossy().contains("/comm/nccl/");
        assert!(allowed || !code(&text).contains("unsafe "), "{}", path.display());
    }
}

#[test]
fn sql_stands_in_the_store_alone() {
    for (module, path, text) in sources() {
        let code = code(&text);
        let has_sql = ["SELECT ", "INSERT INTO", "sqlx::"].iter().any(|word| code.contains(word));
        assert!(module == "store" || !has_sql, "{}", path.display());
    }
}

#[test]
fn pure_modules_do_no_input_or_output() {
    for (module, path, text) in sources() {
        let pure = ["job", "plan", "cost", "simulate", "prompt", "generate"].contains(&module.as_str());
        let doors = ["std::fs", "std::net", "std::env", "tokio::", "SystemTime", "Utc::now"];
        let found = doors.iter().find(|door| code(&text).contains(*door));
        assert!(!pure || is_test(&path) || found.is_none(), "{}: {found:?}", path.display());
    }
}

#[test]
fn every_module_says_what_holds_in_it() {
    let src = root().join("src");
    for entry in fs::read_dir(&src).expect("src") {
        let path = entry.expect("an entry").path();
        let file = if path.is_dir() { path.join("mod.rs") } else { continue };
        let text = fs::read_to_string(&file).expect("a module's file");
        assert!(text.starts_with("//! ") && text.contains("//! Invariant: "), "{}", file.display());
    }
}

#[test]
fn the_map_has_every_place() {
    let readme = fs::read_to_string(root().join("README.md")).expect("README.md");
    let entries = |folder: &str| {
        fs::read_dir(root().join(folder)).expect("a folder").map(|entry| entry.expect("an entry").path())
    };
    let below = entries("src").filter(|path| !path.ends_with("lib.rs")).map(|path| ("src/", path));
    let top = entries("").filter(|path| path.is_dir() && !path.ends_with("target")).map(|path| ("", path));
    for (folder, path) in below.chain(top) {
        let name = path.file_name().expect("a name").to_string_lossy();
        let place = format!("`{folder}{name}{}`", if path.is_dir() { "/" } else { "" });
        assert!(name.starts_with('.') || place == "`src/`" || readme.contains(&place), "README.md's map lacks {place}");
    }
}

#[test]
fn files_stay_small_enough_to_read_at_once() {
    for directory in ["src", "tests"] {
        for (path, text) in rust_files(&root().join(directory)) {
            let lines = text.lines().count();
            assert!(lines <= LINES_AT_MOST, "{} has {lines} lines", path.display());
        }
    }
}

#[test]
fn the_top_level_holds_what_the_design_says() {
    let expected = [
        "Cargo.lock",
        "Cargo.toml",
        "README.md",
        "deploy",
        "fixtures",
        "kernels",
        "migrations",
        "src",
        "target",
        "tests",
    ];
    for entry in fs::read_dir(root()).expect("the package") {
        let name = entry.expect("an entry").file_name().to_string_lossy().into_owned();
        // A database of `apbd run` in this folder is ignored by git too.
        let ignored = name.starts_with('.') || name.contains(".db");
        assert!(ignored || expected.contains(&name.as_str()), "{name}");
    }
}
