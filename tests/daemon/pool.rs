//! Several engines, each on devices of its own: who goes where, and what the end of one means for the others.

use std::fs;
use std::process::Command;

use apbd::job::ErrorCode;
use apbd::store::JobState;

use crate::harness::{Site, all, apbd, ended, settled, succeeded, until};

#[tokio::test(flavor = "multi_thread")]
async fn a_group_that_is_killed_costs_its_own_document_an_attempt_and_the_other_goes_on() {
    let site = Site::with_groups(&[("left", 1, 10_000), ("right", 1, 10_000)]);
    let daemon = site.start();
    daemon.ready().await;
    let (publisher, store) = (site.publisher().await, site.store().await);
    let jobs = [site.send_lasting(&publisher, 40).await, site.send_lasting(&publisher, 40).await];
    for job in jobs {
        until("it is in its group", || async {
            let detail = store.show(job).await.expect("shown");
            detail.is_some_and(|detail| detail.summary.progress.is_some_and(|progress| progress.done > 0))
        })
        .await;
    }
    let engines = daemon.engines();
    assert_eq!(engines.len(), 2);
    let status = Command::new("sh").args(["-c", "kill -9 $0", &engines[0].to_string()]).status();
    assert!(status.expect("kill runs").success());
    until("it is seen", || async { daemon.log().contains("the engine is replaced") }).await;
    let (status, text) = daemon.get("/readyz").expect("an answer");
    assert_eq!(status, 200, "the other group serves: {text}");
    let next = site.send(&publisher, 0).await;
    assert_eq!(succeeded(&*store, next).await.attempts.len(), 1);
    let mut attempts = Vec::new();
    for job in jobs {
        let detail = succeeded(&*store, job).await;
        attempts.push((detail.attempts.len(), detail.failures.suspect));
    }
    attempts.sort_unstable();
    assert_eq!(attempts, [(1, 0), (2, 1)]);
    until("both groups are there", || async { daemon.engines().len() == 2 }).await;
    let (_, metrics) = daemon.get("/metrics").expect("an answer");
    let crashes =
        metrics.lines().filter(|line| line.starts_with("apbd_engine_ends_total") && line.contains("\"crashed\""));
    let counts: Vec<&str> = crashes.filter_map(|line| line.rsplit(' ').next()).collect();
    assert!(counts == ["0", "1"] || counts == ["1", "0"], "{metrics}");
    for part in
        ["apbd_ready{part=\"engine\"} 1", "apbd_ready{part=\"engine left\"} 1", "apbd_ready{part=\"engine right\"} 1"]
    {
        assert!(metrics.contains(part), "{part} is not in {metrics}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn short_documents_do_not_wait_behind_long_ones_and_what_fits_nowhere_is_told() {
    let site = Site::with_groups(&[("small", 1, 400), ("large", 1, 4000)]);
    let long = site.document("long.txt", &"many words ".repeat(700));
    let too_long = site.document("too_long.txt", &"many words ".repeat(5000));
    let daemon = site.start();
    daemon.ready().await;
    let (publisher, store) = (site.publisher().await, site.store().await);
    let mut longs = Vec::new();
    for _ in 0..8 {
        longs.push(site.send_over(&publisher, &long, 600).await);
    }
    until("one is read, and there are more than the daemon keeps waiting", || async {
        let jobs = all(&*store).await;
        let read = jobs.iter().filter(|job| job.progress.is_some_and(|progress| progress.done > 0)).count();
        read == 1 && jobs.len() == 8 && daemon.log().contains("have enough to do")
    })
    .await;
    let mut shorts = Vec::new();
    for _ in 0..10 {
        shorts.push(site.send_lasting(&publisher, 1).await);
    }
    for job in shorts {
        assert_eq!(succeeded(&*store, job).await.attempts.len(), 1);
    }
    for job in longs {
        let detail = store.show(job).await.expect("shown").expect("there");
        assert!(!detail.summary.state.is_final(), "ten short ones went round it: {:?}", detail.summary);
        assert_eq!((detail.failures.suspect, detail.failures.infra), (0, 0));
        store.cancel(job).await.expect("asked");
    }
    let job = site.send_over(&publisher, &too_long, 1).await;
    let error = ended(&*store, job).await.summary.error.expect("a reason");
    assert_eq!(error.code, ErrorCode::MemoryTooSmall, "{}", error.message);
    assert!(error.message.contains("the engine has 4000"), "that of the largest group: {}", error.message);
}

#[tokio::test(flavor = "multi_thread")]
async fn documents_share_a_group_as_far_as_its_memory_goes() {
    let site = Site::with_groups(&[("small", 2, 1000), ("large", 8, 4000)]);
    let long = site.document("long.txt", &"many words ".repeat(700));
    let daemon = site.start();
    daemon.ready().await;
    let (publisher, store) = (site.publisher().await, site.store().await);
    for number in 0..24 {
        match number % 3 {
            0 => site.send_over(&publisher, &long, 5).await,
            _ => site.send_lasting(&publisher, 3).await,
        };
    }
    // An engine that is brought more than it has ends, and that would be seen.
    for job in settled(&*store, 24).await {
        // Some long ones have come again, because others waited for the large group already; nothing is counted for that.
        let failures = succeeded(&*store, job.job_id).await.failures;
        assert_eq!((failures.suspect, failures.infra), (0, 0));
    }
    assert!(!daemon.log().contains("is replaced"), "{}", daemon.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn of_fifty_documents_in_two_groups_the_one_that_kills_engines_is_quarantined() {
    let site = Site::with_groups(&[("left", 2, 10_000), ("right", 2, 10_000)]);
    let daemon = site.start();
    daemon.ready().await;
    let (publisher, store) = (site.publisher().await, site.store().await);
    let (mut neighbours, mut poison) = (Vec::new(), None);
    for number in 0..50 {
        match number {
            7 => poison = Some(site.send(&publisher, 1).await),
            _ => neighbours.push(site.send_lasting(&publisher, 3).await),
        }
    }
    settled(&*store, 50).await;
    for job in neighbours {
        assert_eq!(succeeded(&*store, job).await.failures.suspect, 0);
    }
    let detail = ended(&*store, poison.expect("sent")).await;
    assert_eq!((detail.summary.state, detail.attempts.len()), (JobState::Dead, 2));
}

#[tokio::test(flavor = "multi_thread")]
async fn two_groups_of_threads_read_with_the_real_model_and_check_shows_them() {
    let mut site = Site::new();
    site.engine = String::new();
    site.extra =
        "[[pool.group]]\nname = \"one\"\ncpu_threads = 1\n[[pool.group]]\nname = \"two\"\ncpu_threads = 2\nranks = 2\n"
            .to_owned();
    let daemon = site.start();
    daemon.ready().await;
    let (publisher, store) = (site.publisher().await, site.store().await);
    for _ in 0..4 {
        site.send(&publisher, 0).await;
    }
    let jobs = settled(&*store, 4).await;
    assert!(jobs.iter().all(|job| job.state == JobState::Succeeded), "{jobs:?}");
    let configuration = site.configuration(1).display().to_string();
    let output = apbd(&["check", "--config", &configuration], &site.path("documents/plain.txt"));
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    for line in ["ok    group one: cpu, 1 threads, 1 rank", "ok    group two: cpu, 2 threads, 2 ranks"] {
        assert!(said.contains(line), "{said}");
    }
    let wrong = fs::read_to_string(site.configuration(1)).expect("written").replace("ranks = 2", "ranks = 3");
    let path = site.path("wrong.toml");
    fs::write(&path, wrong).expect("written");
    let output = apbd(&["serve", "--config", &path.display().to_string()], &path);
    assert_eq!(output.status.code(), Some(64));
}
