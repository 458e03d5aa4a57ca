use std::collections::BTreeMap;

use super::Config;

fn environment(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

#[test]
fn every_fault_is_said_at_once() {
    let text = r#"
        [databse]
        [amqp]
        url = "http://x"
        prefetch = "many"
        [http]
        listen = "everywhere"
        [work]
        lease_s = 1
        [[store]]
        alias = "main"
        endpoint = "http://s3.example"
        access_key_id = "only half"
    "#;
    let faults =
        Config::parse(text, &environment(&[("APBD_NOTHING_URL", "x")])).expect_err("refused").faults.join("\n");
    let all = ["[databse]", "[amqp]", "[http] listen", "[database] url", "lease_s", "[[store]] 1", "APBD_NOTHING_URL"];
    for named in all {
        assert!(faults.contains(named), "{named} is not in:\n{faults}");
    }
}

#[test]
fn the_environment_goes_before_the_file_and_no_secret_is_shown() {
    let text = "[database]\nurl = \"postgres://a:s3cret@db/x\"\n[amqp]\nurl = \"amqp://u:s3cret@mq/%2f\"\n";
    let set = [("APBD_WORK_LEASE_S", "90"), ("APBD_AMQP_REPLY_TARGETS", "[\"done\"]"), ("APBD_LOG", "info")];
    let config = Config::parse(text, &environment(&set)).expect("a configuration");
    assert_eq!(config.work.lease.as_secs(), 90);
    assert_eq!(config.amqp.as_ref().expect("a queue").reply_targets, ["done"]);
    assert!(!format!("{config:?}").contains("s3cret"), "{config:?}");
}
