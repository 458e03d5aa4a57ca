//! What operators read: the alerts and what the runbook says of each, the example configuration, the files that point to each other.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use apbd::config::Config;
use apbd::telemetry::metrics;
use serde_json::Value;

use crate::text::{Table, read, words_after};

const RUNBOOK: &str = "deploy/RUNBOOK.md";
const EXAMPLE: &str = "deploy/apbd.toml";

/// Every rule by its name.
fn alerts() -> BTreeMap<String, Value> {
    let file: Value = serde_yaml_ng::from_str(&read("deploy/alerts.yaml")).expect("YAML");
    let groups = file["groups"].as_array().expect("groups").iter();
    let rules = groups.flat_map(|group| group["rules"].as_array().expect("rules").clone());
    rules.map(|rule| (rule["alert"].as_str().expect("a name").to_owned(), rule)).collect()
}

#[test]
fn every_alert_has_its_answer_in_the_runbook() {
    let names: BTreeSet<String> = alerts().into_keys().collect();
    let table = Table::of(RUNBOOK, "alert");
    assert_eq!(table.names(), names);
    for name in &names {
        assert!(!table.cell(name, "means").is_empty() && !table.cell(name, "do").is_empty(), "{name}");
    }
}

#[test]
fn alerts_ask_for_metrics_and_labels_that_there_are() {
    let declared = metrics::declared();
    let of = |name: &str| {
        let base = ["_bucket", "_sum", "_count"].iter().find_map(|ending| name.strip_suffix(ending)).unwrap_or(name);
        declared.iter().find(|(declared, _, _)| *declared == name || *declared == base)
    };
    // What the scrape itself knows of a target.
    let scraped = ["job", "instance"];
    for (alert, rule) in alerts() {
        let expression = rule["expr"].as_str().expect("an expression");
        let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let names: Vec<String> =
            words_after(expression, "apbd_", is_name).iter().map(|rest| format!("apbd_{rest}")).collect();
        assert!(!names.is_empty() || expression.starts_with("up{"), "{alert}: {expression}");
        let mut labels: BTreeSet<&str> = scraped.into_iter().collect();
        for name in &names {
            let (_, _, own) = of(name).unwrap_or_else(|| panic!("{alert}: there is no metric {name}"));
            labels.extend(own.iter().copied());
        }
        for lists in ["by (", "on ("] {
            for list in expression.split(lists).skip(1).filter_map(|rest| rest.split(')').next()) {
                assert!(list.split(',').all(|label| labels.contains(label.trim())), "{alert}: {list}");
            }
        }
        for selector in expression.split('{').skip(1).filter_map(|rest| rest.split('}').next()) {
            let named = selector.split(',').map(|part| part.split(['=', '!']).next().unwrap_or_default().trim());
            named.for_each(|label| assert!(labels.contains(label), "{alert}: {label}"));
        }
    }
}

/// The example with its choices chosen.
fn with_every_choice() -> String {
    let choice = |line: &str| {
        let is_said =
            |rest: &&str| rest.starts_with("[[") || rest.split_once(" = ").is_some_and(|(key, _)| is_key(key));
        let chosen = line.strip_prefix("# ").filter(is_said);
        chosen.unwrap_or(line).to_owned()
    };
    read(EXAMPLE).lines().map(choice).collect::<Vec<_>>().join("\n")
}

fn is_key(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_ascii_lowercase() || c == '_')
}

#[test]
fn the_example_has_every_key_there_is_and_no_other() {
    let faults = Config::parse(&with_every_choice(), &BTreeMap::new()).expect_err("some exclude each other").faults;
    let unknown = faults.iter().find(|fault| fault.contains("unknown") || fault.contains("TOML"));
    assert_eq!(unknown, None);
    let example = with_every_choice();
    let written: BTreeSet<&str> = example
        .lines()
        .filter_map(|line| line.split_once(" = "))
        .map(|(key, _)| key)
        .filter(|key| is_key(key))
        .collect();
    // The keys are the names in front of the types in the sections' declarations.
    let sections = read("src/config/raw.rs");
    for section in sections.split("section! {").skip(1).filter_map(|rest| rest.split("\n}").next()) {
        let fields = section.split_once('{').expect("fields").1;
        let keys = fields.split(',').filter_map(|field| field.split_once(':')).map(|(key, _)| key.trim());
        for key in keys.filter(|key| is_key(key) && *key != "profile") {
            assert!(written.contains(key), "{EXAMPLE} does not say {key}");
        }
    }
}

#[test]
fn links_lead_to_files_and_headings_that_are_there() {
    let pages =
        ["README.md", RUNBOOK, "deploy/PRODUCERS.md", "deploy/REPORTS.md", "fixtures/README.md", "kernels/README.md"];
    for page in pages {
        let folder = Path::new(page).parent().expect("a folder");
        let text = read(page);
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            if link.contains("://") {
                continue;
            }
            let (file, heading) = link.split_once('#').unwrap_or((link, ""));
            let target = if file.is_empty() { Path::new(page).to_owned() } else { folder.join(file) };
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(&target);
            assert!(path.exists(), "{page}: {link}");
            if !heading.is_empty() {
                let text = read(&target.display().to_string());
                let headings = text.lines().filter_map(|line| line.strip_prefix('#')).map(anchor);
                assert!(headings.into_iter().any(|there| there == heading), "{page}: {link}");
            }
        }
    }
    let named = words_after(&read("deploy/make-secrets"), "see \"", |c| c != '"');
    assert_eq!(named.len(), 1);
    assert!(named.iter().all(|name| read(RUNBOOK).contains(&format!("\n## {name}\n"))), "{named:?}");
}

/// As pages of Markdown name their headings in links.
fn anchor(heading: &str) -> String {
    let kept = heading.trim_start_matches('#').trim().to_lowercase();
    kept.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c)).map(|c| if c == ' ' { '-' } else { c }).collect()
}
