//! Outputs are honest: whatever a result lacks is a column of `results` and of `report_jobs`, and a flag of the completion event. With the
//! model that comes along, made to take less than it could.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use apbd::intake::amqp::Publisher;
use apbd::job::{ErrorCode, JobId};
use apbd::store::{JobDetail, JobState, Store};
use serde_json::{Value, json};

use crate::harness::{Daemon, Site, declare, ended, message, sql};
use crate::services::postgres::shared;

/// Tokens that the model of these tests takes.
const WINDOW: u64 = 1024;

/// The flags of a result, as columns are named.
const FLAGS: [&str; 5] =
    ["approximate_attention", "input_truncated", "output_truncated", "schema_failed", "text_cleaned"];

/// The model that comes along, with a shorter window.
fn small_model(into: &Path) -> PathBuf {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/model");
    let model = into.join("model");
    fs::create_dir(&model).expect("made");
    for entry in fs::read_dir(&from).expect("the fixture model") {
        let name = entry.expect("an entry").file_name();
        symlink(from.join(&name), model.join(&name)).expect("linked");
    }
    let mut config: Value = serde_json::from_slice(&fs::read(from.join("config.json")).expect("read")).expect("JSON");
    config["max_position_embeddings"] = json!(WINDOW);
    fs::remove_file(model.join("config.json")).expect("only the link");
    fs::write(model.join("config.json"), config.to_string()).expect("written");
    model
}

/// A daemon with that model on PostgreSQL, and a queue for its completion events.
struct Reader {
    site: Site,
    _daemon: Daemon,
    publisher: Publisher,
    store: Arc<dyn Store>,
    done: String,
}

impl Reader {
    async fn new() -> Self {
        let mut site = Site::on_postgres(shared()).await;
        site.engine = format!("model = \"{}\"\nthreads = 2\n", small_model(site.directory.path()).display());
        let daemon = site.start();
        daemon.ready().await;
        let (publisher, store) = (site.publisher().await, site.store().await);
        let done = format!("done-{}", JobId::random());
        declare(&publisher, &done).await;
        Self { site, _daemon: daemon, publisher, store, done }
    }

    /// Sends a job about a document with these bytes; the end of it, and its event.
    async fn read(&self, bytes: &[u8], more: Value) -> (JobDetail, Value) {
        let job = JobId::random();
        let path = self.site.path("documents").join(format!("{job}.txt"));
        fs::write(&path, bytes).expect("written");
        let mut body = json!({ "version": 1, "task": "summarise", "max_new_tokens": 4,
            "documents": [{ "uri": format!("file://{}", path.display()) }] });
        for (name, value) in more.as_object().expect("an object") {
            body[name] = value.clone();
        }
        self.site.send_raw(&self.publisher, job, &body, Some(&self.done)).await;
        let detail = ended(&*self.store, job).await;
        let event: Value = serde_json::from_slice(&message(&self.publisher, &self.done).await.data).expect("JSON");
        assert_eq!(event["job_id"], json!(job));
        (detail, event)
    }

    /// The flags that are set, and what was done about too long a context: the same in both tables and in the event.
    async fn flags(&self, bytes: &[u8], more: Value) -> (Vec<&'static str>, String) {
        let (detail, event) = self.read(bytes, more).await;
        assert_eq!(detail.summary.state, JobState::Succeeded, "{:?}", detail.summary.error);
        let columns = FLAGS.join(", ");
        let row = |table: &str| -> Value {
            let query = format!(
                "SELECT row_to_json(r) FROM (SELECT {columns}, overflow FROM {table} WHERE job_id = '{}') r",
                detail.summary.job_id
            );
            serde_json::from_str(&sql(shared(), &self.site, &query)).expect("one row")
        };
        let flags = row("results");
        assert_eq!(row("report_jobs"), flags);
        assert_eq!(event["flags"], flags);
        let overflow = flags["overflow"].as_str().expect("a text").to_owned();
        (FLAGS.into_iter().filter(|flag| flags[flag] == json!(true)).collect(), overflow)
    }

    /// The error of a job that has no result, the same in the database and in the event.
    async fn error(&self, bytes: &[u8], more: Value) -> ErrorCode {
        let (detail, event) = self.read(bytes, more).await;
        let error = detail.summary.error.expect("a reason");
        assert_eq!((detail.summary.state, detail.result), (JobState::Failed, None), "{}", error.message);
        let said = json!({ "code": error.code, "class": error.code.class(), "message": error.message });
        assert_eq!((&event["error"], &event["flags"]), (&said, &Value::Null));
        error.code
    }
}

fn words(count: usize) -> Vec<u8> {
    (0..count).map(|number| format!("The {number}th word is here. ")).collect::<String>().into_bytes()
}

fn none() -> String {
    "none".to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_whole_answer_to_a_whole_document_has_no_flag() {
    let reader = Reader::new().await;
    let schema = json!({ "type": "object", "properties": { "number": { "enum": [7] } }, "required": ["number"],
        "additionalProperties": false });
    let extract = json!({ "task": "extract", "schema": schema, "max_new_tokens": 64, "attention": { "mode": "full" } });
    assert_eq!(reader.flags(&words(20), extract.clone()).await, (vec![], none()));
    // Parts that are put together exactly are no approximation.
    let mut ring = extract;
    ring["attention"] = json!({ "mode": "ring", "hosts": 3 });
    assert_eq!(reader.flags(&words(40), ring).await, (vec![], none()));
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_a_result_lacks_is_a_column_and_in_the_event() {
    let reader = Reader::new().await;
    assert_eq!(reader.flags(&words(20), json!({ "max_new_tokens": 1 })).await, (vec!["output_truncated"], none()));

    let schema =
        json!({ "type": "object", "properties": { "a": { "type": "string", "minLength": 500 } }, "required": ["a"] });
    let cut = json!({ "task": "extract", "schema": schema, "max_new_tokens": 3 });
    assert_eq!(reader.flags(&words(20), cut).await, (vec!["output_truncated", "schema_failed"], none()));

    for mode in ["star", "apb"] {
        let parts = json!({ "attention": { "mode": mode, "hosts": 3, "anchor": 16, "passing": 16 } });
        let (flags, _) = reader.flags(&words(60), parts).await;
        assert!(flags.contains(&"approximate_attention"), "{mode}: {flags:?}");
    }

    let long = words(400);
    let truncated = json!({ "overflow": "truncate_middle" });
    let (flags, overflow) = reader.flags(&long, truncated).await;
    assert!(flags.contains(&"input_truncated"), "{flags:?}");
    assert_eq!(overflow, "truncate_middle");
    assert_eq!(reader.error(&long, json!({})).await, ErrorCode::ContextTooLong);
    assert_eq!(reader.error(&long, json!({ "overflow": "fail" })).await, ErrorCode::ContextTooLong);
    assert_eq!(reader.error(&long, json!({ "overflow": "map_reduce" })).await, ErrorCode::ContextTooLong);

    // One damaged byte among so many that are UTF-8 beyond ASCII: replaced, not read as another encoding.
    let damaged = [&"é".repeat(60).into_bytes()[..], b"\xff"].concat();
    let with = |odd: &[u8]| [&words(20), odd, &words(20)].concat();
    let instructed = json!({ "instruction": "Be\u{0} short." });
    let odd = [(with(b"\x07 a bell"), json!({})), (with(&damaged), json!({})), (words(20), instructed)];
    for (bytes, more) in odd {
        let (flags, _) = reader.flags(&bytes, more.clone()).await;
        assert!(flags.contains(&"text_cleaned"), "{more}, {} bytes: {flags:?}", bytes.len());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_schema_that_can_not_be_followed_is_an_error_and_no_result() {
    let reader = Reader::new().await;
    let unusable = [
        json!({ "type": "nonsense" }),
        json!({ "not": {} }),
        json!({ "$ref": "#/definitions/missing" }),
        json!({ "$ref": "http://127.0.0.1:1/schema.json" }),
        json!({ "$ref": "file:///etc/passwd" }),
        json!({ "type": "string", "pattern": "(" }),
    ];
    for schema in unusable {
        let code = reader.error(&words(5), json!({ "task": "extract", "schema": schema })).await;
        assert_eq!(code, ErrorCode::SchemaUnsupported, "{schema}");
    }
    // One that contains itself has no end: it is followed, or it is refused, and whoever serves it lives on.
    let endless = json!({ "$ref": "#" });
    let (detail, _) = reader.read(&words(5), json!({ "task": "extract", "schema": endless })).await;
    assert!(detail.attempts.len() == 1 && detail.summary.state != JobState::Dead, "{:?}", detail.summary);
    assert_eq!(reader.flags(&words(5), json!({ "max_new_tokens": 1 })).await.0, ["output_truncated"]);
}
