//! The example of a group on several machines, held against the program.

use std::collections::BTreeMap;

use apbd::cli::Cli;
use apbd::config::Config;
use clap::Parser;
use serde::Deserialize;
use serde_json::Value;

use crate::text::read;

/// The configuration and the set of pods.
fn manifests() -> Vec<Value> {
    let text = read("deploy/leaderworkerset.yaml");
    let documents = serde_yaml_ng::Deserializer::from_str(&text);
    documents.map(|document| Value::deserialize(document).expect("YAML")).collect()
}

fn container<'a>(set: &'a Value, template: &str) -> &'a Value {
    &set["spec"]["leaderWorkerTemplate"][template]["spec"]["containers"][0]
}

#[test]
fn leader_and_workers_are_started_as_the_program_wants_it() {
    let manifests = manifests();
    let text = manifests[0]["data"]["apbd.toml"].as_str().expect("a configuration");
    let here = text
        .replace("url_file = \"/run/secrets/apbd/database-url\"", "url = \"sqlite:x.db\"")
        .replace("url_file = \"/run/secrets/apbd/amqp-url\"", "url = \"amqp://localhost\"")
        .replace("/models/llama-3.1-8b", concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures/model"));
    let environment = BTreeMap::from([("APBD_HUB_ADDRESS".to_owned(), "apbd-0.apbd:7443".to_owned())]);
    let config = Config::parse(&here, &environment).expect("a configuration");
    let group = &config.engine.groups[0];
    let nodes = group.nodes.as_ref().expect("several nodes");
    let set = &manifests[1];
    assert_eq!(set["spec"]["leaderWorkerTemplate"]["size"], nodes.count);
    for template in ["leaderTemplate", "workerTemplate"] {
        let container = container(set, template);
        assert_eq!(container["resources"]["limits"]["nvidia.com/gpu"], group.gpus.len());
        let variables = container["env"].as_array().expect("variables");
        assert!(variables.iter().any(|variable| variable["name"] == "APBD_HUB_ADDRESS"), "{template}");
        let arguments = container["args"].as_array().expect("arguments").iter().filter_map(Value::as_str);
        // A worker's number is in its environment.
        let number = if template == "workerTemplate" { &["--node", "1"][..] } else { &[] };
        let line = ["apbd"].into_iter().chain(arguments).chain(number.iter().copied());
        if let Err(error) = Cli::try_parse_from(line) {
            panic!("{template}: {error}");
        }
    }
    let ports = container(set, "leaderTemplate")["ports"].as_array().expect("ports");
    assert!(ports.iter().any(|port| nodes.listen.ends_with(&format!(":{}", port["containerPort"]))), "{ports:?}");
}
