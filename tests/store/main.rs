//! The store's promises, the same functions on every implementation.

mod costs;
mod drops;
mod errors;
mod forget;
mod meeting;
mod on_postgres;
#[path = "../services/postgres.rs"]
mod postgres;
mod suite;

use apbd::job::retry::RetryPolicy;
use apbd::store::{Access, Roles, StoreError, StoreUrl, migrate, open};
use tempfile::TempDir;

/// A fresh SQLite file, kept as long as the test runs.
async fn sqlite() -> suite::Fresh {
    let directory = TempDir::new().expect("a temporary directory");
    let url = StoreUrl::Sqlite(directory.path().join("test.db"));
    let store = open(&url, Access::Worker, suite::policy()).await.expect("opens");
    suite::Fresh { store, _keep: Box::new(directory) }
}

/// A fresh database of the shared server.
async fn postgres_database() -> suite::Fresh {
    let url: StoreUrl = postgres::shared().database().parse().expect("a URL");
    migrate(&url, &Roles::default()).await.expect("migrated");
    let store = open(&url, Access::Worker, suite::policy()).await.expect("opens");
    suite::Fresh { store, _keep: Box::new(()) }
}

macro_rules! on_both {
    ($($suite:ident: $($test:ident)*;)*) => {
        mod sqlite_store { $($(
            #[tokio::test]
            async fn $test() {
                crate::$suite::$test(crate::sqlite().await).await;
            }
        )*)* }
        mod postgres_store { $($(
            #[tokio::test]
            async fn $test() {
                crate::$suite::$test(crate::postgres_database().await).await;
            }
        )*)* }
    };
}

on_both! {
    suite:
    enqueueing_twice_is_enqueueing_once
    claims_follow_priority_deadline_size_and_age
    two_claims_never_return_the_same_job
    a_claim_takes_only_what_its_worker_serves
    a_result_is_stored_with_its_timing_and_shown
    a_stale_attempt_changes_nothing
    an_expired_lease_is_swept_and_counted
    a_job_that_kills_its_workers_is_quarantined
    failures_of_the_surroundings_are_counted_apart
    a_requeued_job_spent_nothing
    a_queued_job_is_cancelled_at_once_and_a_running_one_is_asked
    a_deadline_that_passed_fails_a_waiting_job
    completion_events_stay_until_they_are_confirmed
    dead_jobs_are_replayed_with_clean_counters
    a_rejection_is_written_once
    lists_and_reports_show_what_is_there
    text_that_no_database_holds_is_cleaned_and_flagged
    latency_is_reported_by_stage;
    errors:
    every_error_has_the_fate_of_its_class;
    meeting:
    nodes_find_the_first_one_while_it_waits;
    costs:
    what_inferences_take_is_learned
    nothing_that_is_observed_is_lost;
    drops:
    a_file_is_ready_when_it_was_seen_unchanged
    a_sidecar_is_found_beside_its_document
    a_file_is_disposed_of_when_its_job_has_ended
    an_ended_job_is_noted_until_it_was_written;
    forget:
    what_ended_is_forgotten_with_all_that_hangs_on_it
    what_somebody_still_waits_for_is_kept
    rejections_are_forgotten;
}

#[tokio::test]
async fn a_sqlite_file_has_one_worker_and_any_number_of_lookers() {
    let directory = TempDir::new().expect("a temporary directory");
    let url = StoreUrl::Sqlite(directory.path().join("test.db"));
    assert!(
        matches!(open(&url, Access::Client, suite::policy()).await, Err(StoreError::File { .. })),
        "nothing to look at"
    );
    let worker = open(&url, Access::Worker, suite::policy()).await.expect("opens");
    let second = open(&url, Access::Worker, suite::policy()).await.err().expect("one worker a file");
    let process = std::process::id().to_string();
    assert!(matches!(second, StoreError::InUse { .. }) && second.to_string().contains(&process), "{second}");
    assert!(open(&url, Access::Client, suite::policy()).await.is_ok());
    worker.close().await;
    drop(worker);
    assert!(open(&url, Access::Worker, suite::policy()).await.is_ok());
}

#[tokio::test]
async fn what_a_dead_worker_held_is_queued_again_when_the_file_is_opened() {
    let directory = TempDir::new().expect("a temporary directory");
    let url = StoreUrl::Sqlite(directory.path().join("test.db"));
    let store = open(&url, Access::Worker, suite::policy()).await.expect("opens");
    let job = suite::add(&*store, suite::message("file:///a")).await;
    let held = suite::claim(&*store, 1).await;
    store.close().await;
    drop(store);
    let store = open(&url, Access::Worker, suite::policy()).await.expect("opens");
    let again = suite::claim(&*store, 1).await;
    assert_eq!((again[0].job.id, again[0].failures.suspect), (job, 1));
    assert!(again[0].attempt > held[0].attempt);
}

#[tokio::test]
async fn a_file_that_is_no_database_is_said_to_be_none() {
    let directory = TempDir::new().expect("a temporary directory");
    let path = directory.path().join("notes.txt");
    std::fs::write(&path, "not a database, but long enough to look at ".repeat(40)).expect("written");
    for access in [Access::Client, Access::Worker] {
        let error = open(&StoreUrl::Sqlite(path.clone()), access, RetryPolicy::local()).await.err().expect("refused");
        assert!(error.to_string().contains("notes.txt"), "{error}");
    }
    assert!(std::fs::read_to_string(&path).expect("read").starts_with("not a database"), "left as it was");
}
