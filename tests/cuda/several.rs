//! The engine on several GPUs: every strategy over 2, 3, 4 and 8 of them gives what one gives, and what fails is said in time.
//!
//! Every strategy is held against the CPU backend on one GPU (`parity`); here the number of GPUs may change the order of additions at most.

use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use apbd::backend::cuda::{Cuda, CudaOptions};
use apbd::engine::{CudaEngine, CudaEngineOptions, Driver, Engine, EngineError, Job, ModelEngine, Progress};
use apbd::generate::generator::Step;
use apbd::plan::{AttentionMode, AttentionRequest, Execution, Placement};
use libtest_mimic::Trial;

use super::fixture;
use super::parity::{Forced, requests, run, tokens};

/// Error of logits, of the largest: what the order of additions costs in bf16 on a model of random weights (3 % was seen).
const TOLERANCE: f32 = 0.1;
const MODEL: &str = "goldens/llama-3.1";
const MEMORY_BYTES: usize = 400 << 20;
const RANKS_AT_MOST: usize = 8;
/// Runs in one of which memory is full in time.
const TRIES: usize = 50;

/// A test's name, the GPUs that it needs, and what it does with those that there are.
type Test = (&'static str, usize, fn(usize));

const TESTS: &[Test] = &[
    ("every_strategy_on_several_gpus_gives_what_one_gives", 2, strategies),
    ("gpus_are_those_that_are_named_in_the_order_of_their_links", 4, named),
    ("an_inference_on_several_gpus_that_is_cancelled_leaves_the_engine_usable", 2, cancelled),
    ("what_one_gpu_can_not_do_ends_the_others_at_once", 2, failed),
];

/// The tests; those that need more GPUs than there are, are ignored.
pub fn trials(device: &Arc<Mutex<Option<Cuda>>>) -> Vec<Trial> {
    let there_is_a_device = device.lock().unwrap().is_some();
    let smallest = CudaOptions { memory_bytes: Some(64 << 20), ..CudaOptions::default() };
    let gpus = match there_is_a_device {
        true => (0..RANKS_AT_MOST).take_while(|device| Cuda::open(*device, &smallest).is_ok()).count(),
        false => 0,
    };
    let trial = |&(name, needed, test): &Test| {
        let alone = device.clone();
        let run = move || {
            let _alone = alone.lock();
            test(gpus);
            Ok(())
        };
        Trial::test(name, run).with_ignored_flag(gpus < needed)
    };
    TESTS.iter().map(trial).collect()
}

fn open(model: &str, devices: &[usize]) -> CudaEngine {
    let backend = CudaOptions { memory_bytes: Some(MEMORY_BYTES), ..CudaOptions::default() };
    let options = CudaEngineOptions { devices: devices.to_vec(), backend, ..CudaEngineOptions::default() };
    CudaEngine::open(&fixture(model), &options).unwrap()
}

fn contiguous(request: &AttentionRequest) -> AttentionRequest {
    let execution = Execution { placement: Placement::Contiguous, overlap: false, ..request.execution };
    AttentionRequest { execution, ..request.clone() }
}

fn compare(what: &str, got: &Forced<'_>, expected: &Forced<'_>) {
    for (step, (got, expected)) in got.logits.iter().zip(&expected.logits).enumerate() {
        let largest = expected.iter().fold(0f32, |largest, value| largest.max(value.abs()));
        let error = got.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max) / largest;
        assert!(error < TOLERANCE, "{what}, step {step}: relative error {error:.3}");
    }
}

/// Every strategy over little, so that the emulator comes to an end of it.
fn small_requests(heads: bool) -> Vec<AttentionRequest> {
    let smaller = |request: AttentionRequest| AttentionRequest {
        anchor: request.anchor.map(|_| 12),
        passing: request.passing.map(|_| 3),
        ..request
    };
    requests(heads).into_iter().map(smaller).collect()
}

fn strategies(gpus: usize) {
    let one = open(MODEL, &[0]);
    let requests = small_requests(one.has_retaining_heads());
    agree(&one, 61, &requests, 2..=gpus.min(4));
    if gpus >= 8 {
        let requests: Vec<_> = requests.into_iter().map(for_eight).collect();
        agree(&one, 125, &requests, 8..=8);
    }
}

/// A host for each of eight ranks, or, of APB, two.
fn for_eight(request: AttentionRequest) -> AttentionRequest {
    let hosts = if request.mode == Some(AttentionMode::Apb) { 16 } else { 8 };
    AttentionRequest { hosts: request.hosts.map(|_| hosts), ..request }
}

/// Whether so many ranks give what `one` gives for documents of `count` tokens.
fn agree(one: &CudaEngine, count: usize, requests: &[AttentionRequest], ranks: RangeInclusive<usize>) {
    let vocab = one.spec().vocab;
    let job = (&tokens(count, vocab, 1)[..], &tokens(3, vocab, 2)[..]);
    let expected: Vec<_> = requests.iter().map(|request| (run(one, job, request, None), request)).collect();
    for ranks in ranks {
        let several = open(MODEL, &(0..ranks).collect::<Vec<_>>());
        assert!(several.info().device.starts_with(&format!("{ranks} x cuda")), "{}", several.info().device);
        for (expected, request) in &expected {
            // With three the hosts do not divide.
            let request = if ranks == 3 { contiguous(request) } else { (*request).clone() };
            let got = run(&several, job, &request, Some(&expected.chosen));
            compare(&format!("{ranks} GPUs, {request:?}"), &got, expected);
        }
    }
}

fn named(_: usize) {
    let engine = open(MODEL, &[3, 0, 2, 1]);
    let order: Vec<usize> = engine.devices().backends().map(|backend| backend.ordinal()).collect();
    assert_eq!(order[0], 3);
    let mut all = order.clone();
    all.sort_unstable();
    assert_eq!(all, [0, 1, 2, 3]);
}

/// Stops after some layers.
struct Impatient {
    layers: usize,
}

impl Driver for Impatient {
    fn progress(&mut self, progress: Progress) -> bool {
        !matches!(progress, Progress::Prefill { layers_done, .. } if layers_done == self.layers)
    }

    fn next(&mut self, _: &mut [f32]) -> Result<Step, EngineError> {
        Ok(Step::Stop)
    }
}

/// What the work lists that are kept take at most on these models; far less than a dozen requests would leave behind.
const LISTS_BYTES: usize = 64 << 10;

fn cancelled(gpus: usize) {
    let engine = open(MODEL, &(0..gpus).collect::<Vec<_>>());
    let vocab = engine.spec().vocab;
    let (context, query) = (tokens(61, vocab, 1), tokens(3, vocab, 2));
    let requests = small_requests(engine.has_retaining_heads());
    // What the group keeps for itself is there from its first inference on.
    run(&engine, (&context, &query), &requests[0], None);
    let free = || -> Vec<usize> { engine.devices().backends().map(|backend| backend.free_bytes()).collect() };
    let before = free();
    for request in requests {
        let plan = engine.plan(context.len(), query.len(), 3, &request).unwrap();
        let job = Job { context: &context, query: &query, plan: &plan, new_tokens: 1 };
        let outcome = engine.run(&job, &mut Impatient { layers: 1 });
        assert!(matches!(outcome, Err(EngineError::Cancelled)), "{request:?}: {outcome:?}");
        run(&engine, (&context, &query), &request, None);
        // The other ranks let go of a sequence a little after its caller has its answer; a few work lists are kept for the next one.
        let given_back = || before.iter().zip(free()).all(|(before, after)| after + LISTS_BYTES >= *before);
        let began = Instant::now();
        while !given_back() {
            assert!(
                began.elapsed() < Duration::from_secs(20),
                "{request:?}: memory was not given back: {before:?}, {:?}",
                free()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Fills the memory of one GPU in the middle of a prefill, so that its next matrix does not fit.
struct Greedy<'a> {
    engine: &'a ModelEngine<apbd::engine::CudaDevices>,
    taken: Vec<apbd::backend::cuda::CudaMatrix>,
}

impl Driver for Greedy<'_> {
    fn progress(&mut self, progress: Progress) -> bool {
        use apbd::backend::Backend;
        let victim = self.engine.devices().backends().last().unwrap();
        if matches!(progress, Progress::Prefill { layers_done: 1, .. }) {
            while let Ok(matrix) = victim.matrix(1, (victim.free_bytes() / 4).max(256)) {
                self.taken.push(matrix);
            }
        }
        true
    }

    fn next(&mut self, _: &mut [f32]) -> Result<Step, EngineError> {
        Ok(Step::Stop)
    }
}

fn failed(gpus: usize) {
    // The last has to have something to do: there are five hosts.
    let engine = open(MODEL, &(0..gpus.min(4)).collect::<Vec<_>>());
    let vocab = engine.spec().vocab;
    let (context, query) = (tokens(61, vocab, 1), tokens(3, vocab, 2));
    // What of its rows a layer passes on is chosen into memory of the layer's own; all else that ranks need is there when a sequence begins.
    let request = small_requests(false).into_iter().find(|request| request.mode == Some(AttentionMode::Apb)).unwrap();
    let plan = engine.plan(context.len(), query.len(), 3, &request).unwrap();
    let job = Job { context: &context, query: &query, plan: &plan, new_tokens: 1 };
    let start = Instant::now();
    let run = |_| engine.run(&job, &mut Greedy { engine: &engine, taken: Vec::new() });
    // Of progress one is told while the ranks go on: fast GPUs may have what they need before their memory is full.
    let outcome = (0..TRIES).map(run).find(Result::is_err);
    assert!(matches!(outcome, Some(Err(EngineError::Memory { .. } | EngineError::Device { .. }))), "{outcome:?}");
    assert!(start.elapsed() < Duration::from_secs(100), "{:?}", start.elapsed());
}
