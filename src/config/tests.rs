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

#[test]
fn groups_have_devices_of_their_own() {
    let base = "[database]\nurl = \"sqlite:x.db\"\n[amqp]\nurl = \"amqp://mq/\"\n";
    let parse = |text: &str| Config::parse(&format!("{base}{text}"), &environment(&[]));
    let one = parse("[engine]\nbackend = \"cuda\"\nranks = 2\n").expect("the form with one engine").engine.groups;
    assert_eq!((one.len(), one[0].ranks, one[0].devices().as_str()), (1, 2, "cuda, 2 ranks"));
    let groups = "[[pool.group]]\ngpus = [0, 1, 2, 3]\nname = \"long\"\n[[pool.group]]\ngpus = [4]\n\
        [[pool.group]]\ncpu_threads = 8\nranks = 2\n";
    let groups = parse(groups).expect("a pool").engine.groups;
    let devices: Vec<(&str, String)> = groups.iter().map(|group| (group.name.as_str(), group.devices())).collect();
    let expected = [("long", "GPU 0, 1, 2, 3, 4 ranks"), ("2", "GPU 4, 1 rank"), ("3", "cpu, 8 threads, 2 ranks")];
    assert_eq!(devices, expected.map(|(name, devices)| (name, devices.to_owned())));
    let wrong = "[engine]\nranks = 2\nkv_cache = \"fp8\"\n[pool]\nsize = 3\n[[pool.group]]\ngpus = [0, 0]\n\
        [[pool.group]]\ngpus = [0]\ncpu_threads = 2\n[[pool.group]]\ngpu = 1\n[[pool.group]]\ncpu_threads = 2\nranks = 3\n\
        [[pool.group]]\ncpu_threads = 2\nname = \"4\"\nmodel = \"/nowhere\"\n";
    let faults = parse(wrong).expect_err("refused").to_string();
    let all = [
        "[engine] ranks: with [[pool.group]]",
        "kv_cache: fp8",
        "[pool] size",
        "GPU 0 is named twice",
        "[[pool.group]] 2: either gpus",
        "[[pool.group]] 3: ",
        "[[pool.group]] 4 ranks: 1 to 2",
        "two have the name 4",
        "/nowhere has no config.json",
    ];
    for named in all {
        assert!(faults.contains(named), "{named} is not in:\n{faults}");
    }
}

#[test]
fn a_group_on_several_nodes_says_where_they_meet() {
    let base = "[database]\nurl = \"sqlite:x.db\"\n[amqp]\nurl = \"amqp://mq/\"\n";
    let parse = |text: &str, variables: &[(&str, &str)]| {
        Config::parse(&format!("{base}[[pool.group]]\ngpus = [0, 1]\n{text}"), &environment(variables))
    };
    let group =
        |text: &str, variables: &[(&str, &str)]| parse(text, variables).expect("a group").engine.groups.remove(0);
    assert_eq!(group("nodes = 1\n", &[("APBD_HUB_ADDRESS", "pod:1")]).nodes, None);
    let nodes = group("nodes = 2\naddress = \"first:7443\"\nnodes_within_s = 5\n", &[]);
    assert_eq!(nodes.devices(), "2 nodes, each GPU 0, 1, 2 ranks");
    let nodes = nodes.nodes.expect("several");
    assert_eq!(
        (nodes.count, &*nodes.address, &*nodes.listen, nodes.within.as_secs()),
        (2, "first:7443", "0.0.0.0:7443", 5)
    );
    let of_scheduler = group("nodes = 3\nlisten = \"10.0.0.1:9\"\n", &[("APBD_HUB_ADDRESS", "pod-0.svc:7443")]);
    let nodes = of_scheduler.nodes.expect("several");
    assert_eq!((&*nodes.address, &*nodes.listen), ("pod-0.svc:7443", "10.0.0.1:9"));
    for (text, named) in [
        ("nodes = 2\n", "address: expected HOST:PORT"),
        ("nodes = 2\naddress = \"first\"\n", "address: expected HOST:PORT"),
        ("nodes = 2\naddress = \"first:7443\"\nlisten = \"here\"\n", "listen: expected ADDRESS:PORT"),
        ("nodes = 0\naddress = \"first:7443\"\n", "nodes: at least 1"),
        ("address = \"first:7443\"\n", "are for nodes = 2 or more"),
        ("nodes = 2\naddress = \"first:7443\"\nnodes_within_s = 0\n", "nodes_within_s: at least 1"),
        ("nodes = 2\naddress = \"first:7443\"\ncommand = [\"x\"]\n", "nodes: not with a command"),
    ] {
        let faults = parse(text, &[]).expect_err("refused").to_string();
        assert!(faults.contains(named), "{named} is not in:\n{faults}");
    }
}

#[test]
fn drop_folders_have_profiles_and_feed_no_one_twice() {
    let base = "[database]\nurl = \"sqlite:x.db\"\n[files]\nfolders = [\"/d\"]\n\
        [[store]]\nalias = \"main\"\nanonymous = true\nallowed = [\"b\"]\n";
    let parse = |text: &str| Config::parse(&format!("{base}{text}"), &environment(&[]));
    let good = "[results]\nat = \"s3://main/b/out\"\n[[drop]]\nat = \"s3://main/b/drop\"\nafter = \"move\"\nmove_to = \"s3://main/b/done/\"\n\
        [drop.profile.facts]\ntask = \"extract\"\nschema = { type = \"object\" }\n[drop.profile.sum]\n\
        [[drop]]\nat = \"file:///d/in\"\n";
    let config = parse(good).expect("a configuration");
    assert_eq!(config.drops[0].at.to_string(), "s3://main/b/drop/", "a prefix ends with a slash");
    assert_eq!(config.results.map(|to| to.to_string()).as_deref(), Some("s3://main/b/out/"));
    let wrong = [
        ("[[drop]]\nat = \"file:///d\"\nafter = \"tag\"\n", "no tags"),
        ("[[drop]]\nat = \"file:///d\"\nafter = \"move\"\n", "needs move_to"),
        ("[[drop]]\nat = \"file:///d\"\nafter = \"move\"\nmove_to = \"file:///d/done\"\n", "come in again"),
        ("[[drop]]\nat = \"file:///d\"\n[results]\nat = \"file:///d/out\"\n", "come in again"),
        ("[[drop]]\nat = \"file:///d\"\nmove_to = \"file:///e\"\n", "after = \"move\""),
        ("[[drop]]\nat = \"file:///d\"\n[[drop]]\nat = \"file:///d/x\"\n", "overlap"),
        ("[[drop]]\nat = \"file:///d\"\ntask = \"extract\"\n", "needs a schema"),
        ("[[drop]]\nat = \"file:///d\"\ntask = \"ask\"\n[drop.profile.a]\n", "write task"),
        ("[[drop]]\nat = \"s3://main/b/x/\"\nevents_queue = \"q\"\n", "needs [amqp]"),
        ("[[drop]]\nat = \"file:///d\"\n[results]\nat = \"s3://other/b/x\"\n", "alias other"),
    ];
    for (text, fault) in wrong {
        let faults = parse(text).expect_err(text).to_string();
        assert!(faults.contains(fault), "{fault} is not in:\n{faults}");
    }
}
