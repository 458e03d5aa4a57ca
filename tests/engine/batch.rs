//! Many callers at once: each gets what it would get alone, whatever the others do.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::scope;

use apbd::engine::{Driver, Engine, EngineError, Job, LocalEngine, LocalOptions, Progress};
use apbd::generate::generator::Step;
use apbd::generate::sampler::argmax;
use apbd::plan::{AttentionMode, AttentionRequest, Execution, Placement, Selector};

use super::strategies::relative_error;

/// A golden model of random weights, on so many ranks.
fn open(ranks: usize, concurrency: usize, memory_bytes: u64) -> LocalEngine {
    let model = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/goldens/llama-3.1");
    let options = LocalOptions {
        ranks,
        threads: ranks,
        concurrency,
        memory_bytes: Some(memory_bytes),
        ..LocalOptions::default()
    };
    LocalEngine::open(&model, &options).unwrap()
}

/// Generates greedily and keeps all logits.
#[derive(Default)]
struct Greedy {
    steps: usize,
    logits: Vec<Vec<f32>>,
    tokens: Vec<u32>,
    /// Cancels when so many layers or tokens are done.
    cancel_at: Option<usize>,
    reports: usize,
}

impl Driver for Greedy {
    fn progress(&mut self, _: Progress) -> bool {
        self.reports += 1;
        self.cancel_at != Some(self.reports)
    }

    fn next(&mut self, logits: &mut [f32]) -> Result<Step, EngineError> {
        self.logits.push(logits.to_vec());
        let token = argmax(logits).unwrap();
        self.tokens.push(token);
        Ok(if self.tokens.len() == self.steps { Step::Stop } else { Step::Continue(token) })
    }
}

/// The `index`-th of a mixed lot: lengths, strategies and numbers of tokens differ.
fn request(index: usize) -> (Vec<u32>, Vec<u32>, AttentionRequest, usize) {
    let modes =
        [AttentionMode::Apb, AttentionMode::Full, AttentionMode::Star, AttentionMode::Ring, AttentionMode::Ulysses];
    let mode = modes[index % modes.len()];
    let token = |at: usize| ((at * 7 + index * 13) % 90 + 3) as u32;
    let (context, query) = (40 + 23 * index, 2 + index % 5);
    let request = AttentionRequest {
        mode: Some(mode),
        hosts: Some(1 + index % 6),
        selector: (mode == AttentionMode::Apb).then_some(Selector::QueryAware),
        execution: Execution {
            placement: if index.is_multiple_of(3) { Placement::Paired } else { Placement::Contiguous },
            ..Execution::default()
        },
        ..AttentionRequest::default()
    };
    let query = (0..query).map(|at| token(at + 1000)).collect();
    ((0..context).map(token).collect(), query, request, 3 + index % 7)
}

fn run(engine: &LocalEngine, index: usize, cancel_at: Option<usize>) -> Result<Greedy, EngineError> {
    let (context, query, request, steps) = request(index);
    let plan = engine.plan(context.len(), query.len(), 1, &request)?;
    let mut driver = Greedy { steps, cancel_at, ..Greedy::default() };
    engine.run(&Job { context: &context, query: &query, plan: &plan, new_tokens: steps }, &mut driver)?;
    Ok(driver)
}

#[test]
fn callers_at_once_get_what_each_would_get_alone() {
    for ranks in [1, 3] {
        let alone: Vec<Greedy> = (0..12).map(|index| run(&open(ranks, 1, 1 << 30), index, None).unwrap()).collect();
        let engine = open(ranks, 5, 1 << 30);
        let together = scope(|scope| {
            let threads: Vec<_> = (0..12)
                .map(|index| {
                    scope.spawn({
                        let engine = &engine;
                        move || run(engine, index, None)
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap().unwrap()).collect::<Vec<_>>()
        });
        for (index, (alone, together)) in alone.iter().zip(&together).enumerate() {
            assert_eq!(alone.tokens, together.tokens, "request {index} on {ranks} ranks");
            for (step, (a, b)) in alone.logits.iter().zip(&together.logits).enumerate() {
                let error = relative_error(a, &b.iter().map(|x| f64::from(*x)).collect::<Vec<_>>());
                assert!(error < 1e-5, "request {index}, token {step}, on {ranks} ranks: {error:e}");
            }
        }
    }
}

#[test]
fn a_cancelled_caller_leaves_the_others_alone() {
    let engine = open(2, 4, 1 << 30);
    let outcomes = scope(|scope| {
        let cancel = |index: usize| (index % 2 == 1).then_some(1 + index / 2);
        let threads: Vec<_> = (0..8)
            .map(|index| {
                scope.spawn({
                    let engine = &engine;
                    move || run(engine, index, cancel(index))
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
    });
    for (index, outcome) in outcomes.into_iter().enumerate() {
        match (index % 2, outcome) {
            (0, Ok(done)) => assert_eq!(done.tokens, run(&engine, index, None).unwrap().tokens),
            (1, Err(EngineError::Cancelled)) => {}
            (_, other) => panic!("request {index}: {:?}", other.map(|done| done.tokens)),
        }
    }
}

#[test]
fn a_caller_that_panics_leaves_the_others_alone() {
    struct Panics;
    impl Driver for Panics {
        fn progress(&mut self, _: Progress) -> bool {
            true
        }
        fn next(&mut self, _: &mut [f32]) -> Result<Step, EngineError> {
            panic!("a caller's own fault")
        }
    }
    let engine = open(2, 4, 1 << 30);
    scope(|scope| {
        let bad = scope.spawn(|| {
            let (context, query, request, _) = request(3);
            let plan = engine.plan(context.len(), query.len(), 1, &request).unwrap();
            let _ = engine.run(&Job { context: &context, query: &query, plan: &plan, new_tokens: 4 }, &mut Panics);
        });
        let good = scope.spawn(|| run(&engine, 4, None));
        assert!(bad.join().is_err());
        assert!(good.join().unwrap().is_ok());
    });
    assert!(run(&engine, 5, None).is_ok());
}

#[test]
fn memory_for_one_serves_many_one_after_the_other() {
    let roomy = open(1, 8, 1 << 30);
    let needed = |index| {
        let (context, query, request, steps) = request(index);
        let plan = roomy.plan(context.len(), query.len(), 1, &request).unwrap();
        roomy.bytes_for(&plan, steps)
    };
    let most = (0..8).map(needed).max().unwrap();
    let engine = open(1, 8, most);
    let served = AtomicUsize::new(0);
    scope(|scope| {
        for index in 0..8 {
            let (engine, served) = (&engine, &served);
            scope.spawn(move || {
                assert!(run(engine, index, None).is_ok());
                served.fetch_add(1, Ordering::SeqCst);
            });
        }
    });
    assert_eq!(served.load(Ordering::SeqCst), 8);
    assert!(matches!(run(&open(1, 8, most / 4), 7, None), Err(EngineError::Memory { .. })));
}
