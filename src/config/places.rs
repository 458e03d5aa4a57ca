//! Watched places, their profiles and policies, and where results are written.
//!
//! Invariant: no place feeds itself: what is moved or written by the daemon is below no watched place, and no two of those overlap.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;

use super::checked::{fault, parsed, refuse};
use super::raw;
use crate::document::fetch::Locations;
use crate::intake::dropfolder::{Disposal, DropPlace, DropProfile, Profiles, Sidecars};
use crate::job::wire::DocumentMessage;
use crate::job::{DocumentUri, JobId, MessageLimits, Priority, Task, TemplateId};

/// One `[[drop]]`.
pub(super) fn check_drop(
    number: usize,
    mut raw: raw::Drop,
    locations: &Locations,
    faults: &mut Vec<String>,
) -> Option<DropPlace> {
    let at = format!("[[drop]] {number}");
    let Some(place) = raw.at.take() else {
        return fault(faults, &format!("{at}: at is missing; expected s3://… or file:///…"));
    };
    let uri = folder(&format!("{at} at"), &place, faults)?;
    if let Err(reason) = locations.allows(&uri) {
        faults.push(format!("{at} at: {reason}: list it in [[store]] allowed or [files] folders"));
    }
    let disposal = check_disposal(&at, &uri, &mut raw, faults);
    let sidecars = match raw.sidecar.as_deref().unwrap_or("optional") {
        "none" => Some(Sidecars::None),
        "optional" => Some(Sidecars::Optional),
        "required" => Some(Sidecars::Required),
        other => fault(faults, &format!("{at} sidecar: '{other}'; expected none, optional or required")),
    };
    let is_folder = matches!(uri, DocumentUri::File { .. });
    refuse(
        faults,
        is_folder && raw.events_queue.is_some(),
        &format!("{at} events_queue: a folder of this machine sends no messages"),
    );
    let (settle, poll) = (raw.settle_s.unwrap_or(10), raw.poll_s.unwrap_or(30));
    refuse(faults, poll == 0, &format!("{at} poll_s: at least 1"));
    let events_queue = raw.events_queue.take();
    Some(DropPlace {
        profiles: check_profiles(&at, raw, faults)?,
        at: uri,
        sidecars: sidecars?,
        settle: Duration::from_secs(settle),
        poll: Duration::from_secs(poll),
        disposal: disposal?,
        events_queue,
    })
}

/// A prefix ends with a slash, so that no name but those below it begins with it.
fn folder(key: &str, text: &str, faults: &mut Vec<String>) -> Option<DocumentUri> {
    Some(match parsed::<DocumentUri>(key, text, faults)? {
        DocumentUri::S3 { store, bucket, key } if !key.ends_with('/') => {
            DocumentUri::S3 { store, bucket, key: format!("{key}/") }
        }
        uri => uri,
    })
}

fn check_profiles(at: &str, mut raw: raw::Drop, faults: &mut Vec<String>) -> Option<Profiles> {
    let named = raw.profile.take().unwrap_or_default();
    if named.is_empty() {
        let own = raw::Profile {
            task: raw.task,
            instruction: raw.instruction,
            template: raw.template,
            model: raw.model,
            priority: raw.priority,
            schema: raw.schema,
            schema_file: raw.schema_file,
        };
        return check_profile(at, own, faults).map(|profile| Profiles::One(Box::new(profile)));
    }
    let has_own = raw.task.is_some() || raw.instruction.is_some() || raw.template.is_some() || raw.schema.is_some();
    refuse(
        faults,
        has_own || raw.schema_file.is_some() || raw.model.is_some() || raw.priority.is_some(),
        &format!("{at}: has profiles; write task, instruction, template, schema, model and priority there"),
    );
    let mut profiles = BTreeMap::new();
    for (name, profile) in named {
        let wrong = name.is_empty() || name.starts_with('.') || name.contains('/');
        refuse(faults, wrong, &format!("{at} profile {name:?}: is not the name of a folder"));
        if let Some(profile) = check_profile(&format!("{at} profile {name}"), profile, faults) {
            profiles.insert(name, profile);
        }
    }
    Some(Profiles::ByFolder(profiles))
}

fn check_profile(at: &str, raw: raw::Profile, faults: &mut Vec<String>) -> Option<DropProfile> {
    let task = parsed::<Task>(&format!("{at} task"), raw.task.as_deref().unwrap_or("summarise"), faults);
    let template = match raw.template {
        Some(text) => Some(parsed::<TemplateId>(&format!("{at} template"), &text, faults)?),
        None => None,
    };
    let priority = Priority::try_from(raw.priority.unwrap_or(Priority::NORMAL.get()))
        .map_err(|reason| faults.push(format!("{at} priority: {reason}")))
        .ok();
    let schema = check_schema(at, raw.schema, raw.schema_file.as_deref(), faults)?;
    let profile = DropProfile {
        task: task?,
        instruction: raw.instruction,
        template,
        schema,
        model: raw.model,
        priority: priority?,
    };
    // A job of it, to see whether it would be one.
    let mut message = profile.message();
    message.documents = vec![DocumentMessage { uri: "file:///any".to_owned(), ..DocumentMessage::default() }];
    if let Err(error) = message.check(Some(JobId::derive(&[])), &MessageLimits::default()) {
        faults.push(format!("{at}: {error}"));
    }
    Some(profile)
}

/// `None` if it is wrong.
fn check_schema(
    at: &str,
    inline: Option<toml::Table>,
    file: Option<&Path>,
    faults: &mut Vec<String>,
) -> Option<Option<Value>> {
    let Some(path) = file else {
        return Some(inline.and_then(|table| serde_json::to_value(table).ok()));
    };
    if inline.is_some() {
        return fault(faults, &format!("{at} schema and schema_file: only one of them"));
    }
    let read = fs::read(path).map_err(|error| error.to_string());
    let schema = read.and_then(|text| serde_json::from_slice(&text).map_err(|error| error.to_string()));
    schema.map(Some).map_err(|reason| faults.push(format!("{at} schema_file: {}: {reason}", path.display()))).ok()
}

fn check_disposal(at: &str, place: &DocumentUri, raw: &mut raw::Drop, faults: &mut Vec<String>) -> Option<Disposal> {
    let (to, failed_to, tag) = (raw.move_to.take(), raw.failed_to.take(), raw.tag.take());
    let after = raw.after.take();
    let after = after.as_deref().unwrap_or("leave");
    let is_move = after == "move";
    refuse(
        faults,
        !is_move && (to.is_some() || failed_to.is_some()),
        &format!("{at} move_to: is for after = \"move\""),
    );
    refuse(faults, after != "tag" && tag.is_some(), &format!("{at} tag: is for after = \"tag\""));
    match after {
        "leave" => Some(Disposal::Leave),
        "delete" => Some(Disposal::Delete),
        "tag" if matches!(place, DocumentUri::File { .. }) => {
            fault(faults, &format!("{at} after: files of this machine have no tags"))
        }
        "tag" => {
            let name = tag.unwrap_or_else(|| "apbd".to_owned());
            let is_plain = |c: char| c.is_alphanumeric() || " +-=._:/@".contains(c);
            let fits = (1..=128).contains(&name.chars().count()) && name.chars().all(is_plain);
            refuse(faults, !fits, &format!("{at} tag: 1 to 128 letters, digits and + - = . _ : / @"));
            Some(Disposal::Tag(name))
        }
        "move" => {
            let Some(to) = to else { return fault(faults, &format!("{at}: after = \"move\" needs move_to")) };
            let to = destination(&format!("{at} move_to"), place, &to, faults)?;
            let failed_to = match failed_to {
                Some(text) => Some(destination(&format!("{at} failed_to"), place, &text, faults)?),
                None => None,
            };
            Some(Disposal::Move { to, failed_to })
        }
        other => fault(faults, &format!("{at} after: '{other}'; expected leave, tag, move or delete")),
    }
}

/// Where files of `place` can go.
fn destination(key: &str, place: &DocumentUri, text: &str, faults: &mut Vec<String>) -> Option<DocumentUri> {
    let to = folder(key, text, faults)?;
    let is_near = match (place, &to) {
        (DocumentUri::S3 { store, bucket, .. }, DocumentUri::S3 { store: to_store, bucket: to_bucket, .. }) => {
            store == to_store && bucket == to_bucket
        }
        (DocumentUri::File { .. }, DocumentUri::File { .. }) => true,
        _ => false,
    };
    match is_near {
        true => Some(to),
        false => fault(faults, &format!("{key}: expected a prefix of the same bucket, or a folder for a folder")),
    }
}

/// `[results]`.
pub(super) fn check_results(
    raw: raw::Results,
    has_store: impl Fn(&str) -> bool,
    faults: &mut Vec<String>,
) -> Option<DocumentUri> {
    let to = folder("[results] at", &raw.at?, faults)?;
    if let DocumentUri::S3 { store, .. } = &to {
        refuse(faults, !has_store(store), &format!("[results] at: no [[store]] has the alias {store}"));
    }
    Some(to)
}

/// Nothing is watched twice, and nothing the daemon writes is watched.
pub(super) fn check_apart(drops: &[DropPlace], results: Option<&DocumentUri>, faults: &mut Vec<String>) {
    for (index, drop) in drops.iter().enumerate() {
        for other in drops.iter().skip(index + 1) {
            let overlap = is_below(&drop.at, &other.at) || is_below(&other.at, &drop.at);
            refuse(faults, overlap, &format!("[[drop]]: {} and {} overlap", drop.at, other.at));
        }
    }
    let moved = drops.iter().flat_map(|drop| match &drop.disposal {
        Disposal::Move { to, failed_to } => vec![Some(to), failed_to.as_ref()],
        _ => Vec::new(),
    });
    for written in moved.flatten().chain(results) {
        let watched = drops.iter().find(|drop| is_below(written, &drop.at));
        if let Some(drop) = watched {
            faults.push(format!("{written} is below {}, which is watched: it would come in again", drop.at));
        }
    }
}

fn is_below(inner: &DocumentUri, outer: &DocumentUri) -> bool {
    match (inner, outer) {
        (DocumentUri::File { path }, DocumentUri::File { path: folder }) => path.starts_with(folder),
        (DocumentUri::S3 { store, bucket, key }, DocumentUri::S3 { store: of, bucket: r#in, key: prefix }) => {
            store == of && bucket == r#in && key.starts_with(prefix)
        }
        _ => false,
    }
}
