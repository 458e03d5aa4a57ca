//! What only a server can show: roles, a schema that is missing, a database that goes away.

use std::time::Duration;

use apbd::job::retry::RetryPolicy;
use apbd::store::{Access, JobState, ReportView, Roles, StoreError, StoreUrl, migrate, open};

use crate::{postgres, suite};

#[tokio::test]
async fn a_database_without_the_schema_is_told_to_be_migrated() {
    let url: StoreUrl = postgres::shared().database().parse().expect("a URL");
    let error = open(&url, Access::Client, suite::policy()).await.err().expect("refused");
    assert!(matches!(error, StoreError::Schema { .. }) && error.to_string().contains("apbd migrate"), "{error}");
    let first = migrate(&url, &Roles::default()).await.expect("migrated");
    assert!(first.from == 0 && first.to > 0);
    let second = migrate(&url, &Roles::default()).await.expect("nothing to do");
    assert_eq!((second.from, second.to), (first.to, first.to));
    assert!(open(&url, Access::Client, suite::policy()).await.is_ok());
}

#[tokio::test]
async fn each_role_can_do_its_part_and_no_more() {
    let server = postgres::shared();
    let url = server.database();
    let database = url.rsplit_once('/').expect("a name").1;
    let (app, reporter) = (format!("{database}_app"), format!("{database}_reporter"));
    let roles = Roles { app: Some(app.clone()), reporter: Some(reporter.clone()) };
    migrate(&url.parse().expect("a URL"), &roles).await.expect("migrated");
    server.sql(database, &format!("ALTER ROLE {app} LOGIN; ALTER ROLE {reporter} LOGIN"));

    let as_app = server.url(&app, database).parse().expect("a URL");
    let store = open(&as_app, Access::Worker, suite::policy()).await.expect("opens");
    suite::finish_one(&*store).await;
    let forgotten = store.forget(Duration::ZERO, 10).await.expect("forgotten");
    assert_eq!(forgotten.jobs, 1, "an app may forget");
    let sums = store.report(ReportView::Tokens, 10).await.expect("reported");
    assert_eq!(sums.rows.len(), 1, "what was summed up of it stays");
    let dropped = sqlx_error(&server.url(&app, database), "DROP TABLE jobs").await;
    assert_eq!(dropped.as_deref(), Some("42501"), "an app changes no table");

    let as_reporter = server.url(&reporter, database);
    for view in ReportView::ALL {
        let sql = format!("SELECT * FROM report_{}", view.as_str());
        assert_eq!(sqlx_error(&as_reporter, &sql).await, None, "{sql}");
    }
    for sql in ["SELECT * FROM jobs", "SELECT * FROM results", "DELETE FROM outbox"] {
        assert_eq!(sqlx_error(&as_reporter, sql).await.as_deref(), Some("42501"), "{sql}");
    }
}

/// The SQLSTATE that a statement is refused with.
async fn sqlx_error(url: &str, sql: &str) -> Option<String> {
    use sqlx::Connection;
    let mut connection = sqlx::PgConnection::connect(url).await.expect("connects");
    let ran = sqlx::raw_sql(sqlx::AssertSqlSafe(sql.to_owned())).execute(&mut connection).await;
    Some(ran.err()?.as_database_error()?.code()?.into_owned())
}

#[tokio::test]
async fn a_server_that_goes_away_is_waited_for() {
    let mut server = postgres::Postgres::start();
    let url: StoreUrl = server.database().parse().expect("a URL");
    migrate(&url, &Roles::default()).await.expect("migrated");
    let store = open(&url, Access::Worker, RetryPolicy::default()).await.expect("opens");
    let job = suite::add(&*store, suite::message("file:///a")).await;
    let lease = suite::claim(&*store, 1).await[0].lease();
    server.stop();
    let error = store.finish(&lease, &suite::succeeded()).await.expect_err("nobody answers");
    assert!(error.is_transient(), "{error}");
    server.restart();
    assert!(store.finish(&lease, &suite::succeeded()).await.expect("the pool connects again"));
    assert_eq!(suite::state(&*store, job).await, JobState::Succeeded);
}

#[tokio::test]
async fn a_server_that_is_not_there_is_named_without_its_password() {
    let url: StoreUrl = "postgres://app:s3cret@127.0.0.1:1/jobs".parse().expect("a URL");
    let error = open(&url, Access::Client, RetryPolicy::default()).await.err().expect("nobody listens");
    assert!(error.is_transient(), "{error}");
    let said = format!("{error} {error:?}");
    assert!(said.contains("127.0.0.1:1/jobs") && !said.contains("s3cret"), "{said}");
}
