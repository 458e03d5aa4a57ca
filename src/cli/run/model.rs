//! Which model `apbd run` uses when it is told none: the one that comes with the program.
//!
//! Invariant: what is found does not depend on the working directory.

use std::env;
use std::path::{Path, PathBuf};

/// Names a model directory.
pub(in crate::cli) const VARIABLE: &str = "APBD_MODEL";

/// The directory that was named, or the first place that has the program's own model.
pub(in crate::cli) fn find(named: Option<&Path>) -> Result<PathBuf, String> {
    if let Some(directory) = named {
        return Ok(directory.to_owned());
    }
    let places = places(env::current_exe().ok().as_deref());
    places.iter().find(|place| place.join("config.json").is_file()).cloned().ok_or_else(|| {
        let places: Vec<String> = places.iter().map(|place| format!("  {}", place.display())).collect();
        format!(
            "the model that comes with apbd is at none of these places:\n{}\nname one with --model or {VARIABLE}",
            places.join("\n")
        )
    })
}

/// Where an installation, a package and a source tree have it.
fn places(program: Option<&Path>) -> Vec<PathBuf> {
    let mut places = Vec::new();
    // A link to the program is as good as the program.
    let program = program.map(|program| program.canonicalize().unwrap_or_else(|_| program.to_owned()));
    if let Some(directory) = program.as_deref().and_then(Path::parent) {
        places.push(directory.join("model"));
        places.extend(directory.parent().map(|prefix| prefix.join("share/apbd/model")));
    }
    places.push(Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/model"));
    places
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_named_model_is_taken_and_the_own_one_found_in_the_source_tree() {
        assert_eq!(find(Some(Path::new("/some/model"))), Ok(PathBuf::from("/some/model")));
        assert!(find(None).is_ok_and(|place| place.join("model.safetensors").is_file()));
    }

    #[test]
    fn an_installed_program_looks_in_its_prefix() {
        let places = places(Some(Path::new("/opt/apbd/bin/apbd")));
        assert_eq!(places[..2], [PathBuf::from("/opt/apbd/bin/model"), PathBuf::from("/opt/apbd/share/apbd/model")]);
    }
}
