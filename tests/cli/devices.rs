//! What is said of a driver or a device that does not serve. A real one can not be made older than it is: on the emulator alone.

use std::process::Command;

use apbd::backend::cuda::{Cuda, CudaOptions};

fn is_emulated() -> bool {
    let options = CudaOptions { memory_bytes: Some(1 << 20), ..CudaOptions::default() };
    Cuda::open(0, &options).is_ok_and(|cuda| cuda.device_name() == "emulator")
}

#[test]
fn a_driver_or_a_device_of_the_wrong_age_is_said_so() {
    if !is_emulated() {
        return;
    }
    let directory = tempfile::TempDir::new().expect("a temporary directory");
    for (variable, value, expected) in [
        ("APBD_EMULATED_DRIVER", "12080", "the NVIDIA driver is for CUDA 12.8, 13.0 is needed"),
        ("APBD_EMULATED_CAPABILITY", "75", "compute capability 7.5; the kernels are for 8.x and 9.0"),
    ] {
        let run = Command::new(env!("CARGO_BIN_EXE_apbd"))
            .args(["run", "README.md", "--backend", "cuda", "--model", "fixtures/model", "--db"])
            .arg(directory.path().join("jobs.db"))
            .env(variable, value)
            .output()
            .expect("it runs");
        let said = String::from_utf8_lossy(&run.stderr);
        assert!(said.contains(expected), "{said}");
        assert_eq!(run.status.code(), Some(64), "{said}");
    }
}
