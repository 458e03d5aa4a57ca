//! S3 event messages: which object they speak of.
//!
//! Invariant: a message is a hint and nothing more: what it names is looked at, never believed.

use serde::Deserialize;
use serde_json::Value;

/// An object that something has happened to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Hint {
    /// Bucket.
    pub bucket: String,
    /// The key, in each way in which the message can be understood.
    pub keys: Vec<String>,
}

/// As AWS, MinIO and Ceph write it; keys are percent-encoded as in forms, except by some versions of some servers.
#[derive(Deserialize)]
struct Notification {
    #[serde(rename = "Records", default)]
    records: Option<Vec<Record>>,
    /// As AWS EventBridge writes it; the key is not encoded.
    detail: Option<Entity>,
    /// A notification within one (SNS), as text.
    #[serde(rename = "Message")]
    message: Option<String>,
}

#[derive(Deserialize)]
struct Record {
    s3: Option<Entity>,
}

#[derive(Deserialize)]
struct Entity {
    bucket: Bucket,
    object: Object,
}

#[derive(Deserialize)]
struct Bucket {
    name: String,
}

#[derive(Deserialize)]
struct Object {
    key: String,
}

/// What a message speaks of; nothing if it is no event of an object.
pub(super) fn hints(body: &[u8]) -> Vec<Hint> {
    read(body, true)
}

fn read(body: &[u8], may_wrap: bool) -> Vec<Hint> {
    let Ok(value) = serde_json::from_slice::<Value>(body) else { return Vec::new() };
    let Ok(notification) = serde_json::from_value::<Notification>(value) else { return Vec::new() };
    if let Some(inner) = notification.message.filter(|_| may_wrap) {
        return read(inner.as_bytes(), false);
    }
    let of_records = notification.records.unwrap_or_default().into_iter().filter_map(|record| record.s3);
    let entities = of_records.chain(notification.detail);
    entities.map(|entity| Hint { bucket: entity.bucket.name, keys: readings(entity.object.key) }).collect()
}

/// The key decoded, and as it stands if that is something else.
fn readings(key: String) -> Vec<String> {
    let mut keys: Vec<String> = crate::objects::decoded(&key).into_iter().collect();
    if !keys.contains(&key) {
        keys.push(key);
    }
    keys
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_servers_form_is_read() {
        let record = r#"{"eventName":"s3:ObjectCreated:Put","s3":{"bucket":{"name":"b"},"object":{"key":"drop/a%2F%2Fb+c%C3%BC.txt","size":1}}}"#;
        let minio = format!(r#"{{"EventName":"s3:ObjectCreated:Put","Key":"b/drop/x","Records":[{record}]}}"#);
        let sns = serde_json::json!({ "Type": "Notification", "Message": minio }).to_string();
        for text in [&minio, &sns] {
            let hints = hints(text.as_bytes());
            assert_eq!((hints.len(), hints[0].bucket.as_str()), (1, "b"));
            assert_eq!(hints[0].keys[0], "drop/a//b cü.txt");
        }
        let bridge = r#"{"detail-type":"Object Created","detail":{"bucket":{"name":"b"},"object":{"key":"a b"}}}"#;
        assert_eq!(hints(bridge.as_bytes())[0].keys, ["a b"]);
    }

    #[test]
    fn anything_else_is_no_hint() {
        for text in
            ["", "no", "[]", "{}", r#"{"Records":[{"s3":null}]}"#, r#"{"Event":"s3:TestEvent"}"#, r#"{"Message":"x"}"#]
        {
            assert!(hints(text.as_bytes()).is_empty(), "{text}");
        }
    }
}
