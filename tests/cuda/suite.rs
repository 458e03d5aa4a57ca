//! The CUDA backend against definitions in f64, operation by operation, and whole models against the CPU backend.
//!
//! Runs on the first device that the driver shows, which may be the emulator (`emulator/build`). Without one every test is listed as ignored;
//! `APBD_REQUIRE_GPU=1` makes that a failure.
//!
//! Invariant: outputs are poisoned before an operation, inputs are random, and what is allowed follows from what bf16 costs a plain computation.

// A test that can not be set up has failed.
#![allow(clippy::unwrap_used)]

mod attention;
mod batch;
mod collectives;
mod failures;
mod head;
mod kept;
mod layers;
mod parity;
mod partials;
mod selection;
mod several;
mod travel;
mod values;
mod weights;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Mutex};

use apbd::backend::BackendError;
use apbd::backend::cuda::{AttentionPath, Cuda, CudaOptions};
use libtest_mimic::{Arguments, Failed, Trial};

/// Device memory of the tests: enough for all of them, little enough to share a device.
const MEMORY_BYTES: usize = 1 << 30;

/// What takes the emulator minutes.
const TOO_LONG_TO_EMULATE: [&str; 5] = [
    "attention_is_the_same_every_time",
    "large_weights_come_whole",
    "the_shipped_model_agrees_with_the_cpu",
    "the_shipped_model_reads_from_a_cache_in_fp8",
    "ten_runs_are_equal_to_the_bit",
];

/// A place below the project's fixtures.
fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures").join(name)
}

/// A test by name.
type Test = (&'static str, fn(&Cuda));

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let device = open(AttentionPath::Fastest);
    if let (Err(reason), Ok("1")) = (&device, std::env::var("APBD_REQUIRE_GPU").as_deref()) {
        eprintln!("APBD_REQUIRE_GPU is set, and there is no GPU: {reason}");
        return ExitCode::FAILURE;
    }
    let device = Arc::new(Mutex::new(device.ok()));
    let on_device = [
        attention::TESTS,
        batch::TESTS,
        head::TESTS,
        kept::TESTS,
        layers::TESTS,
        partials::TESTS,
        selection::TESTS,
        travel::TESTS,
        weights::TESTS,
        failures::TESTS,
    ];
    let mut trials: Vec<Trial> = on_device.into_iter().flatten().map(|test| trial(&device, *test)).collect();
    trials.extend(parity::TESTS.iter().map(|(name, test)| {
        let ignored = is_ignored(&device, name);
        let device = device.clone();
        let run = move || {
            // An engine opens the device for itself.
            let _alone = device.lock();
            test();
            Ok(())
        };
        Trial::test(*name, run).with_ignored_flag(ignored)
    }));
    trials.extend(collectives::trials(&device));
    trials.extend(several::trials(&device));
    libtest_mimic::run(&arguments, trials).exit_code()
}

fn open(attention: AttentionPath) -> Result<Cuda, BackendError> {
    Cuda::open(0, &CudaOptions { memory_bytes: Some(MEMORY_BYTES), attention, ..CudaOptions::default() })
}

/// Whether a test can not run here, or should not.
fn is_ignored(device: &Mutex<Option<Cuda>>, name: &str) -> bool {
    match &*device.lock().unwrap() {
        None => true,
        Some(device) => device.device_name() == "emulator" && TOO_LONG_TO_EMULATE.contains(&name),
    }
}

/// A test on the shared device. A failed one leaves it usable: what it held is given back when it unwinds.
fn trial(device: &Arc<Mutex<Option<Cuda>>>, (name, test): Test) -> Trial {
    let ignored = is_ignored(device, name);
    let device = device.clone();
    let run = move || -> Result<(), Failed> {
        let guard = device.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        test(guard.as_ref().unwrap());
        Ok(())
    };
    Trial::test(name, run).with_ignored_flag(ignored)
}
