//! Drop folders: their keys, their profiles, and what a sidecar may say.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::sync::Arc;
use std::time::Duration;

use apbd::config::Config;
use apbd::document::fetch::{AllowedSource, Locations, S3Source};
use apbd::intake::dropfolder::{Disposal, DropFolder, DropPlace, DropProfile, Profiles, Sidecars};
use apbd::job::{Priority, Task};
use apbd::pipeline::shutdown;
use apbd::store::JobFilter;
use apbd::telemetry::health::Health;
use serde_json::json;

use crate::events::fresh;
use crate::messages::{PAGE, full};
use crate::text::{Table, quoted};

const BASE: &str = "[database]\nurl = \"sqlite:x.db\"\n[files]\nfolders = [\"/d\"]\n[[drop]]\nat = \"file:///d/in\"\n";

/// What the program says it expects instead of a key that it does not know.
fn expected(section: &str) -> BTreeSet<String> {
    let faults = Config::parse(&format!("{BASE}{section}nothing = 1\n"), &BTreeMap::new()).expect_err("refused");
    let fault = faults.to_string();
    let mut names: BTreeSet<String> = quoted(&fault).into_iter().collect();
    assert!(names.remove("nothing"), "{fault}");
    names
}

#[test]
fn the_tables_have_every_key_and_no_other() {
    let (drop, profile) = (Table::of(PAGE, "key of `[[drop]]`").names(), Table::of(PAGE, "key of a profile").names());
    assert_eq!(profile, expected("[drop.profile.a]\n"));
    assert_eq!(&drop | &profile, expected(""));
    assert!(drop.is_disjoint(&profile));
}

#[test]
fn what_is_absent_is_as_the_tables_say() {
    let config = Config::parse(BASE, &BTreeMap::new()).expect("a configuration");
    let place = &config.drops[0];
    let Profiles::One(profile) = &place.profiles else { panic!("no profile has a name") };
    let drop = Table::of(PAGE, "key of `[[drop]]`");
    let says = |key: &str| drop.cell(key, "without it").to_owned();
    assert_eq!(
        (says("settle_s"), says("poll_s")),
        (place.settle.as_secs().to_string(), place.poll.as_secs().to_string())
    );
    assert_eq!((says("sidecar").as_str(), place.sidecars), ("`optional`", Sidecars::Optional));
    assert_eq!((says("after").as_str(), &place.disposal), ("`leave`", &Disposal::Leave));
    let tagged = BASE.replace("file:///d/in", "s3://main/b/in/") + "after = \"tag\"\n";
    let store = "[[store]]\nalias = \"main\"\nanonymous = true\nallowed = [\"b\"]\n";
    let tagged = Config::parse(&format!("{tagged}{store}"), &BTreeMap::new()).expect("a configuration");
    assert_eq!(tagged.drops[0].disposal, Disposal::Tag(says("tag").trim_matches('`').to_owned()));
    let table = Table::of(PAGE, "key of a profile");
    assert_eq!(table.cell("task", "without it"), format!("`{}`", profile.task));
    assert_eq!(table.cell("priority", "without it"), profile.priority.get().to_string());
}

/// Every key of a message is said by the sidecar of a document of its own.
#[tokio::test]
async fn a_sidecar_may_say_what_the_table_marks() {
    let table = Table::of(PAGE, "key");
    let message = serde_json::to_value(full()).expect("JSON");
    let (store, folder) = fresh().await;
    let drop = folder.path().join("drop");
    fs::create_dir(&drop).expect("a folder");
    let said = |key: &str| match key.split_once('.') {
        Some((outer, inner)) => json!({ outer: { inner: message[outer][inner] } }),
        // A schema and a template are for their task.
        None if key == "schema" => json!({ "task": "extract", "schema": {} }),
        None => json!({ key: message[key] }),
    };
    let keys: Vec<String> = table.names().into_iter().filter(|key| !key.starts_with("documents[]")).collect();
    for key in &keys {
        let mut sidecar = said(key);
        if key == "task" {
            sidecar = json!({ "task": "summarise" });
        }
        fs::write(drop.join(format!("{key}.txt")), "text").expect("written");
        fs::write(drop.join(format!("{key}.txt.job.json")), sidecar.to_string()).expect("written");
    }
    look(&store, &drop).await;
    let listed = store.list(&JobFilter { states: Vec::new(), only: None, limit: 1000 }).await.expect("listed");
    let taken: BTreeSet<&str> = listed.iter().filter_map(|job| job.document.rsplit('/').next()).collect();
    for key in &keys {
        let is_taken = taken.contains(encoded(key).as_str());
        assert_eq!(is_taken, table.cell(key, "sidecar") == "yes", "{key}: {taken:?}");
    }
}

/// The name of the document of `key` in a URI.
fn encoded(key: &str) -> String {
    let uri = apbd::job::DocumentUri::from_path(std::path::Path::new(&format!("/{key}.txt"))).expect("a URI");
    uri.to_string().replace("file:///", "")
}

/// Looks until everything has been seen unchanged.
async fn look(store: &Arc<dyn apbd::store::Store>, folder: &std::path::Path) {
    let locations = Locations { objects: Vec::new(), folders: vec![folder.to_owned()] };
    let profile = DropProfile {
        task: Task::Summarise,
        instruction: None,
        template: None,
        schema: None,
        model: None,
        priority: Priority::NORMAL,
    };
    let drop = DropFolder {
        place: DropPlace {
            at: apbd::job::DocumentUri::from_path(folder).expect("a URI"),
            profiles: Profiles::One(Box::new(profile)),
            sidecars: Sidecars::Required,
            settle: Duration::ZERO,
            poll: Duration::from_secs(60),
            disposal: Disposal::Leave,
            events_queue: None,
        },
        stores: Vec::new(),
        documents: Arc::new(AllowedSource::new(locations, S3Source::new(Vec::new()))),
        store: store.clone(),
        max_document_bytes: 1 << 20,
        events: None,
        health: Health::default().component("drop folder"),
    };
    let (_handle, shutdown) = shutdown::channel();
    for _ in 0..2 {
        drop.look(&shutdown).await.expect("looked at");
    }
}
