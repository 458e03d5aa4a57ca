//! The parts of `deploy/compose.yaml` that can be tried without containers: the file itself, and its secrets, definitions, roles and
//! configuration with the real database, broker and daemon.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use apbd::config::Config;
use apbd::intake::amqp::{Broker, Message, PublishError, Publisher, Topology};
use apbd::telemetry::health::Health;
use lapin::Channel;
use lapin::options::{BasicConsumeOptions, QueueDeclareOptions};
use lapin::types::FieldTable;
use serde_json::Value;
use tempfile::TempDir;

use crate::services::postgres::{OWNER, Postgres};
use crate::services::rabbitmq::RabbitMq;
use crate::services::s3::S3;
use crate::services::{Group, free_port, python, wait_until};
use crate::text::read;

const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy");

fn compose() -> Value {
    let mut file: serde_yaml_ng::Value = serde_yaml_ng::from_str(&read("deploy/compose.yaml")).expect("YAML");
    file.apply_merge().expect("merged");
    serde_json::to_value(file).expect("JSON")
}

fn names(list: &Value) -> Vec<&str> {
    list.as_array().into_iter().flatten().filter_map(Value::as_str).collect()
}

/// A folder of secrets as `deploy/make-secrets` makes them.
struct Secrets(TempDir);

impl Secrets {
    fn make() -> Self {
        let folder = TempDir::new().expect("a folder");
        let made = Command::new(format!("{FOLDER}/make-secrets")).arg(folder.path()).output().expect("bash runs");
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        assert!(made.stdout.is_empty() && made.stderr.is_empty(), "nothing is shown");
        Self(folder)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    fn replace(&self, name: &str, from: &str, to: &str) {
        let text = self.text(name);
        assert!(text.contains(from), "{name} has no {from}");
        fs::write(self.path(name), text.replace(from, to)).expect("written");
    }
}

#[test]
fn what_the_file_names_is_there() {
    let file = compose();
    let services = file["services"].as_object().expect("services");
    let secrets = Secrets::make();
    for (name, secret) in file["secrets"].as_object().expect("secrets") {
        assert_eq!(secret["file"], format!("./secrets/{name}"));
        assert!(!secrets.text(name).is_empty());
    }
    for (name, service) in services {
        let image = service["image"].as_str().expect("an image");
        let (repository, tag) = image.rsplit_once(':').expect("a tag");
        let version = tag.chars().next().is_some_and(|c| c.is_ascii_digit()) && tag.contains('.');
        assert!(version && !repository.contains('.') && !repository.contains(':'), "{name}: {image}");
        for secret in names(&service["secrets"]) {
            assert!(file["secrets"][secret].is_object(), "{name}: {secret}");
        }
        for volume in names(&service["volumes"]) {
            let source = volume.split(':').next().expect("a source");
            let there = match source.strip_prefix("./") {
                Some(path) => Path::new(FOLDER).join(path).exists(),
                None => file["volumes"][source].is_object(),
            };
            assert!(there, "{name}: {volume}");
        }
        for port in names(&service["ports"]) {
            assert!(port.starts_with("127.0.0.1:"), "{name}: {port} is open to others");
        }
        for (other, how) in service["depends_on"].as_object().into_iter().flatten() {
            let awaited = &services[other];
            match how["condition"].as_str() {
                Some("service_healthy") => assert!(awaited["healthcheck"]["test"].is_array(), "{name}: {other}"),
                Some("service_completed_successfully") => assert_eq!(awaited["restart"], "no", "{name}: {other}"),
                condition => panic!("{name} waits for {other}: {condition:?}"),
            }
        }
    }
    let waits = &services["apbd"]["depends_on"];
    assert_eq!(waits["migrate"]["condition"], "service_completed_successfully");
    assert_eq!(waits["bucket"]["condition"], "service_completed_successfully");
    assert_eq!(waits["rabbitmq"]["condition"], "service_healthy");
}

#[test]
fn secrets_are_kept_and_closed() {
    use std::os::unix::fs::PermissionsExt;
    let secrets = Secrets::make();
    let before = secrets.text("rabbitmq-definitions.json");
    fs::remove_file(secrets.path("app_url")).expect("removed");
    let again = Command::new(format!("{FOLDER}/make-secrets")).arg(secrets.0.path()).status().expect("bash runs");
    assert!(again.success());
    assert_eq!(secrets.text("rabbitmq-definitions.json"), before);
    assert!(secrets.text("app_url").contains(&secrets.text("app_password")));
    assert_eq!(fs::metadata(secrets.0.path()).expect("there").permissions().mode() & 0o777, 0o700);
    assert!(!before.contains(&secrets.text("amqp_password")));
    assert_ne!(before, Secrets::make().text("rabbitmq-definitions.json"), "no two folders have the same");
}

/// The daemon's configuration with the secrets of a folder instead of those of a container.
fn configuration(secrets: &Secrets) -> String {
    read("deploy/compose.toml").replace("/run/secrets", &secrets.0.path().display().to_string())
}

fn topology(secrets: &Secrets) -> Topology {
    let config = Config::parse(&configuration(secrets), &BTreeMap::new()).expect("a configuration");
    config.amqp.expect("a queue").topology
}

async fn connected(url: &str) -> (Broker, Publisher) {
    let broker = Broker::new(url, None, "test").expect("a broker");
    let publisher = Publisher::connect(&broker, &Health::default().component("test")).await.expect("connected");
    (broker, publisher)
}

fn message<'a>(queue: &'a str) -> Message<'a> {
    let (exchange, id) = ("", "1".to_owned());
    Message { exchange, routing_key: queue, id, correlation_id: None, reply_to: None, headers: Vec::new(), body: b"{}" }
}

/// The broker takes the definitions, and finds the queues that the daemon declares to be the same.
fn broker(secrets: &Secrets) -> RabbitMq {
    let definitions = secrets.path("rabbitmq-definitions.json");
    let lines = read("deploy/rabbitmq.conf")
        .replace("/run/secrets/rabbitmq-definitions.json", &definitions.display().to_string());
    let node = RabbitMq::start(&lines);
    for url in ["amqp_url", "producer_amqp_url"] {
        secrets.replace(url, "rabbitmq:5672", &format!("127.0.0.1:{}", node.port()));
    }
    node
}

async fn consume(channel: &Channel, queue: &str) -> lapin::Result<lapin::Consumer> {
    channel.basic_consume(queue.into(), "".into(), BasicConsumeOptions::default(), FieldTable::default()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_broker_has_the_queues_of_the_daemon_and_each_user_its_rights() {
    let secrets = Secrets::make();
    let _node = broker(&secrets);
    let wanted = topology(&secrets);
    assert!(wanted.declare);
    for declare in [false, true] {
        let (broker, daemon) = connected(&secrets.text("amqp_url")).await;
        let topology = Topology { declare, ..wanted.clone() };
        topology.ensure(&broker, daemon.channel()).await.expect("the queues are there, and the same");
        assert!(consume(daemon.channel(), &wanted.queue).await.is_ok());
    }
    for other in [
        Topology { delivery_limit: 21, ..wanted.clone() },
        Topology { dead_letter_exchange: format!("{}.other", wanted.queue), ..wanted.clone() },
    ] {
        let (broker, daemon) = connected(&secrets.text("amqp_url")).await;
        assert!(other.ensure(&broker, daemon.channel()).await.is_err(), "{other:?}");
    }
    let (_, producer) = connected(&secrets.text("producer_amqp_url")).await;
    let reply = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    let declared = producer.channel().queue_declare("done-1".into(), reply, FieldTable::default()).await;
    assert!(declared.is_ok() && consume(producer.channel(), "done-1").await.is_ok());
    producer.publish(&message(&wanted.queue)).await.expect("a producer sends jobs");
    assert!(consume(producer.channel(), &wanted.queue).await.is_err(), "and reads none");
    let (_, daemon) = connected(&secrets.text("amqp_url")).await;
    daemon.publish(&message("done-1")).await.expect("the daemon answers");
    let letter = Message { exchange: &wanted.dead_letter_exchange, ..message(&wanted.queue) };
    daemon.publish(&letter).await.expect("the daemon sends dead letters");
    let nowhere = daemon.publish(&message("done-2")).await;
    assert!(matches!(nowhere, Err(PublishError::Returned { .. })));
    assert!(consume(daemon.channel(), "done-1").await.is_err(), "the daemon reads no answers");
}

/// From nothing to a daemon that is healthy, in the order of the file and with its own commands.
#[tokio::test(flavor = "multi_thread")]
async fn the_daemon_starts_as_the_file_starts_it() {
    let (file, secrets) = (compose(), Secrets::make());
    let (node, server, store) = (broker(&secrets), Postgres::start(), S3::start());
    let environment = &file["services"]["postgres"]["environment"];
    let (owner, database) = (text(&environment["POSTGRES_USER"]), text(&environment["POSTGRES_DB"]));
    server.sql("postgres", &format!("CREATE ROLE {owner} SUPERUSER LOGIN"));
    server.sql("postgres", &format!("CREATE DATABASE {database} OWNER {owner}"));
    assert_ne!(owner, OWNER);
    let place = server.url(owner, database);
    let address = place.split('@').nth(1).and_then(|rest| rest.split('/').next()).expect("an address");
    run_roles(&secrets, owner, database, address, server.psql());
    for url in ["owner_url", "app_url"] {
        secrets.replace(url, "postgres:5432", address);
    }
    let migrate = &file["services"]["migrate"];
    let secret =
        text(&migrate["environment"]["APBD_DATABASE_URL_FILE"]).strip_prefix("/run/secrets/").expect("a secret");
    let migrated = Command::new(env!("CARGO_BIN_EXE_apbd"))
        .args(names(&migrate["command"]))
        .env("APBD_DATABASE_URL_FILE", secrets.path(secret))
        .output()
        .expect("apbd runs");
    assert!(migrated.status.success(), "{}", String::from_utf8_lossy(&migrated.stderr));

    fs::write(secrets.path("s3_secret_access_key"), &store.secret_access_key).expect("written");
    make_bucket(&store, "documents");
    let port = free_port();
    let config = configuration(&secrets)
        .replace("http://s3:9000", &store.endpoint())
        .replace("access_key_id = \"apbd\"", &format!("access_key_id = \"{}\"", store.access_key_id))
        .replace("0.0.0.0:9464", &format!("127.0.0.1:{port}"));
    let path = secrets.path("apbd.toml");
    fs::write(&path, config).expect("written");
    let path = path.display().to_string();
    let log = secrets.path("log");
    let daemon = Group::spawn(env!("CARGO_BIN_EXE_apbd"), &["--log", "info", "serve", "--config", &path], |command| {
        command.stderr(fs::File::create(&log).expect("a log"));
    });
    let check = names(&file["services"]["apbd"]["healthcheck"]["test"]);
    let (program, arguments) = check
        .split_first()
        .filter(|(first, _)| **first == "CMD")
        .expect("a command")
        .1
        .split_first()
        .expect("a program");
    let is_healthy = || {
        let arguments = arguments.iter().map(|argument| argument.replace("9464", &port.to_string()));
        Command::new(program).args(arguments).output().is_ok_and(|output| output.status.success())
    };
    assert!(!is_healthy(), "the check fails before the daemon listens");
    wait_until(&format!("health; {}", log.display()), Duration::from_secs(120), is_healthy);
    let told = fs::read_to_string(&log).expect("a log");
    assert!(!told.contains(&secrets.text("app_password")) && !told.contains(&secrets.text("amqp_password")));
    drop((daemon, node));
}

fn text(value: &Value) -> &str {
    value.as_str().expect("a text")
}

/// The script of the database's container, with its variables.
fn run_roles(secrets: &Secrets, owner: &str, database: &str, address: &str, psql: PathBuf) {
    let (host, port) = address.split_once(':').expect("a port");
    let path = format!("{}:{}", psql.parent().expect("a folder").display(), std::env::var("PATH").unwrap_or_default());
    let done = Command::new(format!("{FOLDER}/postgres-roles.sh"))
        .envs([
            ("POSTGRES_USER", owner),
            ("POSTGRES_DB", database),
            ("PGHOST", host),
            ("PGPORT", port),
            ("PATH", &path),
        ])
        .env("SECRETS", secrets.0.path())
        .output()
        .expect("bash runs");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
}

fn make_bucket(store: &S3, name: &str) {
    let code = "import boto3, sys\n\
                boto3.client('s3', endpoint_url=sys.argv[1], region_name='us-east-1', aws_access_key_id=sys.argv[2], \
                aws_secret_access_key=sys.argv[3]).create_bucket(Bucket=sys.argv[4])";
    let arguments = [&store.endpoint(), &store.access_key_id, &store.secret_access_key, name];
    let done = Command::new(python("python")).args(["-c", code]).args(arguments).status();
    assert!(done.expect("python runs").success());
}
