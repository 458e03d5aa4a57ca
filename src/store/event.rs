//! The completion event: what a producer that asked for a reply is sent.
//!
//! Invariant: part of the wire form, version 1; the same ending gives the same event.

use serde_json::{Value, json};

use super::{Ending, JobState, Lease};

/// The event of a job that ended, or `None` if it goes on.
pub(super) fn body(lease: Lease, ending: &Ending) -> Option<Value> {
    let state = ending.state();
    if !state.is_final() {
        return None;
    }
    let mut event = head(lease, state);
    match ending {
        Ending::Succeeded(result) => {
            event["text"] = json!(result.text);
            event["extraction"] = json!(result.extraction);
            event["tokens_in"] = json!(result.tokens_in);
            event["tokens_out"] = json!(result.tokens_out);
            event["flags"] = json!(result.flags);
        }
        Ending::Errored { error, .. } => {
            event["error"] = json!({ "code": error.code, "class": error.class(), "message": error.message });
        }
    }
    Some(event)
}

fn head(lease: Lease, state: JobState) -> Value {
    json!({ "version": 1, "event_id": lease.job.event_id(lease.attempt), "job_id": lease.job, "state": state, "attempt": lease.attempt })
}
