//! From a delivery to a job to take in, or to the reason why it is none. Pure.
//!
//! Invariant: whatever a producer sends gives one of the two; nothing of a message's values is in a reason but short names.

use lapin::BasicProperties;

use crate::document::fetch::Locations;
use crate::job::clean::clean;
use crate::job::{Digest, ErrorCode, JobId, JobMessage, MessageLimits};
use crate::store::{Door, NewJob, Rejection, Reply};

/// Longest name of a queue in the protocol, in bytes.
const NAME_BYTES: usize = 255;

/// What messages have to keep to.
#[derive(Debug, Clone)]
pub struct Terms {
    /// Sizes.
    pub limits: MessageLimits,
    /// Where documents may be.
    pub locations: Locations,
    /// Queues that completion events may be sent to: names, or prefixes that end in `*`.
    pub reply_targets: Vec<String>,
}

impl Terms {
    /// Whether a completion event may be sent there.
    pub fn allows_reply(&self, target: &str) -> bool {
        self.reply_targets.iter().any(|allowed| match allowed.strip_suffix('*') {
            Some(prefix) => target.starts_with(prefix),
            None => target == allowed,
        })
    }

    /// Reads a message that came by `queue`.
    pub fn read(&self, queue: &str, data: &[u8], properties: &BasicProperties) -> Result<NewJob, Box<Rejection>> {
        let told = Told::of(properties);
        let refuse = |code: ErrorCode, reason: String, job_id: Option<JobId>| {
            Box::new(Rejection {
                door: Door::Amqp,
                origin: queue.to_owned(),
                message_id: told.message_id.clone(),
                job_id,
                code,
                reason,
                digest: Digest::of_bytes(data),
                size_bytes: data.len() as u64,
            })
        };
        let given = told.message_id.as_deref().and_then(|id| id.parse::<JobId>().ok());
        if let Some(other) = told.content_type.filter(|kind| !is_json(kind)) {
            let other: String = clean(&other).chars().take(64).collect();
            let reason = format!("content type {other}: expected application/json");
            return Err(refuse(ErrorCode::MessageInvalid, reason, given));
        }
        let parsed =
            JobMessage::parse(data, &self.limits).map_err(|error| refuse(error.code, error.to_string(), given))?;
        let job_id = parsed.job_id.or(given);
        let job = parsed.check(given, &self.limits).map_err(|error| refuse(error.code, error.to_string(), job_id))?;
        for document in &job.documents {
            if let Err(reason) = self.locations.allows(&document.uri) {
                return Err(refuse(ErrorCode::LocationNotAllowed, reason, job_id));
            }
        }
        let reply = match told.reply_to {
            Some(target) if !self.allows_reply(&target) || target.len() > NAME_BYTES => {
                let reason = "reply_to is not one of the allowed targets".to_owned();
                return Err(refuse(ErrorCode::ReplyNotAllowed, reason, job_id));
            }
            Some(target) => Some(Reply { target, correlation_id: told.correlation_id.clone() }),
            None => None,
        };
        Ok(NewJob { job, door: Door::Amqp, origin: queue.to_owned(), size_bytes: None, reply })
    }
}

/// What stands beside the message's body, cleaned of what the database cannot hold.
struct Told {
    message_id: Option<String>,
    content_type: Option<String>,
    reply_to: Option<String>,
    correlation_id: Option<String>,
}

impl Told {
    fn of(properties: &BasicProperties) -> Self {
        let text = |value: &Option<lapin::types::ShortString>| {
            value.as_ref().map(|value| clean(value.as_str()).into_owned()).filter(|value| !value.is_empty())
        };
        Self {
            message_id: text(properties.message_id()),
            content_type: text(properties.content_type()),
            reply_to: text(properties.reply_to()),
            correlation_id: text(properties.correlation_id()),
        }
    }
}

fn is_json(content_type: &str) -> bool {
    content_type.split(';').next().is_some_and(|name| name.trim().eq_ignore_ascii_case("application/json"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::document::fetch::Locations;
    use serde_json::{Value, json};

    fn terms() -> Terms {
        Terms {
            limits: MessageLimits::default(),
            locations: Locations::of_buckets(&[("main", "docs", "in/")]),
            reply_targets: vec!["done".to_owned(), "team-*".to_owned()],
        }
    }

    fn message(uri: &str) -> Value {
        json!({ "version": 1, "task": "summarise", "documents": [{ "uri": uri }] })
    }

    fn code(message: &Value, properties: BasicProperties) -> Option<ErrorCode> {
        let id = "6f9619ff-8b86-4d01-b42d-00c04fc964ff";
        let properties = properties.with_message_id(id.into());
        terms().read("jobs", message.to_string().as_bytes(), &properties).err().map(|rejection| rejection.code)
    }

    #[test]
    fn what_is_allowed_comes_in_and_nothing_else() {
        let plain = BasicProperties::default;
        assert_eq!(code(&message("s3://main/docs/in/a"), plain()), None);
        for uri in ["s3://main/docs/out/a", "s3://main/other/in/a", "s3://evil/docs/in/a", "file:///etc/passwd"] {
            assert_eq!(code(&message(uri), plain()), Some(ErrorCode::LocationNotAllowed), "{uri}");
        }
        let with_endpoint = json!({ "version": 1, "task": "summarise", "endpoint": "http://169.254.169.254",
            "documents": [{ "uri": "s3://main/docs/in/a" }] });
        assert_eq!(code(&with_endpoint, plain()), Some(ErrorCode::MessageInvalid));
        let xml = plain().with_content_type("text/xml".into());
        assert_eq!(code(&message("s3://main/docs/in/a"), xml), Some(ErrorCode::MessageInvalid));
    }

    #[test]
    fn replies_go_to_allowed_targets_only() {
        for (target, allowed) in [("done", true), ("team-a", true), ("done2", false), ("other", false)] {
            let properties = BasicProperties::default().with_reply_to(target.into());
            let expected = (!allowed).then_some(ErrorCode::ReplyNotAllowed);
            assert_eq!(code(&message("s3://main/docs/in/a"), properties), expected, "{target}");
        }
    }

    #[test]
    fn any_bytes_give_a_job_or_a_reason() {
        let deep = "[".repeat(100_000);
        let nul = "{\"version\":1,\"task\":\"a\u{0}\"}";
        for bytes in [&b""[..], b"\xff\xfe", b"{}", b"null", deep.as_bytes(), nul.as_bytes(), &[b'x'; 300_000]] {
            let rejection = terms().read("jobs", bytes, &BasicProperties::default()).expect_err("refused");
            assert!(!rejection.reason.contains('\0') && rejection.reason.len() < 400, "{}", rejection.reason);
        }
    }
}
