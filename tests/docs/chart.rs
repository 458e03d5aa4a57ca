//! The chart for Kubernetes, as far as it can be tried without a cluster: its values, and the configuration in them.

use std::collections::BTreeMap;
use std::fs;

use apbd::config::Config;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::text::read;

fn values() -> Value {
    serde_yaml_ng::from_str(&read("deploy/chart/values.yaml")).expect("YAML")
}

#[test]
fn the_values_follow_their_schema_and_a_misspelt_one_does_not() {
    let schema: Value = serde_json::from_str(&read("deploy/chart/values.schema.json")).expect("JSON");
    let schema = jsonschema::validator_for(&schema).expect("a schema");
    let mut values = values();
    assert!(schema.is_valid(&values), "{:?}", schema.iter_errors(&values).map(|e| e.to_string()).collect::<Vec<_>>());
    let described = schema.is_valid(&json!({ "image": {}, "replicas": 1 }));
    assert!(!described, "what is needed is missing");
    values["replica"] = json!(2);
    assert!(!schema.is_valid(&values));
}

#[test]
fn the_configuration_is_one_and_fits_what_surrounds_it() {
    let (values, secrets) = (values(), TempDir::new().expect("a folder"));
    let text = values["config"].as_str().expect("a text");
    let files = [
        ("database_url", "postgres://apbd@db/apbd"),
        ("amqp_url", "amqps://apbd:x@mq/%2f"),
        ("s3_access_key_id", "id"),
        ("s3_secret_access_key", "key"),
    ];
    for (name, content) in files {
        assert!(text.contains(&format!("\"/run/secrets/{name}\"")), "{name}");
        fs::write(secrets.path().join(name), content).expect("written");
    }
    let text = text.replace("/run/secrets", &secrets.path().display().to_string());
    let config = Config::parse(&text, &BTreeMap::new()).expect("a configuration");
    let seconds = values["terminationGracePeriodSeconds"].as_u64().expect("a number");
    assert!(config.work.grace.as_secs() + 15 <= seconds, "what is drained has its time");
    let pod = read("deploy/chart/templates/deployment.yaml");
    assert!(pod.contains(&format!("containerPort: {}", config.listen.port())));
    assert!(!config.listen.ip().is_loopback(), "the probes come from outside of the pod");
}
