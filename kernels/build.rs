//! Compiles the kernels of this folder to cubins, with the feature `cuda` only, and lists them in `$OUT_DIR/cubins.rs`.
//!
//! nvcc is found by `NVCC`, on `PATH`, or where `kernels/toolchain` installs it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::{env, fs, thread};

/// This folder as the crate sees it that the kernels are built for, `src/backend`.
const KERNELS: &str = "../../kernels";
/// Architectures each module is compiled for; the first that a device can run is taken.
const ARCHITECTURES: [&str; 2] = ["90a", "80"];
/// Modules that need Hopper's instructions.
const HOPPER_ONLY: [&str; 1] = ["attention/hopper"];

struct Job {
    module: String,
    architecture: &'static str,
}

fn main() {
    println!("cargo::rerun-if-changed={KERNELS}");
    println!("cargo::rerun-if-env-changed=NVCC");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    let nvcc = find_nvcc().unwrap_or_else(|| {
        panic!("feature `cuda` needs nvcc 13.0: set NVCC, put it on PATH, or install it with kernels/toolchain")
    });
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let jobs = jobs();
    compile_all(&nvcc, &out, &jobs);
    fs::write(out.join("cubins.rs"), listing(&out, &jobs)).expect("OUT_DIR is writable");
}

fn find_nvcc() -> Option<PathBuf> {
    if let Some(given) = env::var_os("NVCC") {
        return Some(given.into());
    }
    let path = env::var_os("PATH").unwrap_or_default();
    if let Some(found) = env::split_paths(&path).map(|folder| folder.join("nvcc")).find(|file| file.is_file()) {
        return Some(found);
    }
    let cache = env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| env::var_os("HOME").map(|home| Path::new(&home).join(".cache")))?;
    let link = cache.join("apbd/cuda-13.0/nvcc");
    println!("cargo::rerun-if-changed={}", link.display());
    link.is_file().then_some(link)
}

fn jobs() -> Vec<Job> {
    let mut modules = Vec::new();
    for folder in ["", "attention/"] {
        for entry in fs::read_dir(Path::new(KERNELS).join(folder)).expect("kernels/ is there") {
            let path = entry.expect("kernels/ is readable").path();
            if path.extension().is_some_and(|extension| extension == "cu") {
                modules.push(format!("{folder}{}", path.file_stem().expect("a file has a stem").display()));
            }
        }
    }
    modules.sort();
    let runs = |module: &str, architecture: &str| architecture == "90a" || !HOPPER_ONLY.contains(&module);
    modules
        .into_iter()
        .flat_map(|module| ARCHITECTURES.map(|architecture| Job { module: module.clone(), architecture }))
        .filter(|job| runs(&job.module, job.architecture))
        .collect()
}

fn cubin(out: &Path, job: &Job) -> PathBuf {
    out.join(format!("{}.sm_{}.cubin", job.module.replace('/', "_"), job.architecture))
}

fn compile_all(nvcc: &Path, out: &Path, jobs: &[Job]) {
    let next = Mutex::new(jobs.iter());
    let workers = env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(1);
    thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                loop {
                    let job = next.lock().expect("no worker panics with the lock").next();
                    let Some(job) = job else { return };
                    compile(nvcc, job, &cubin(out, job));
                }
            });
        }
    });
}

fn compile(nvcc: &Path, job: &Job, to: &Path) {
    let architecture = job.architecture;
    let output = Command::new(nvcc)
        .args(["-std=c++20", "-I", KERNELS, "-cubin", "--Werror=all-warnings"])
        .arg(format!("-gencode=arch=compute_{architecture},code=sm_{architecture}"))
        .arg("-o")
        .arg(to)
        .arg(format!("{KERNELS}/{}.cu", job.module))
        .output()
        .unwrap_or_else(|error| panic!("{} does not run: {error}", nvcc.display()));
    assert!(
        output.status.success(),
        "{} for sm_{architecture}:\n{}{}",
        job.module,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// `(module, architecture, image)` of every cubin, in the order of preference.
fn listing(out: &Path, jobs: &[Job]) -> String {
    let mut text = String::from("&[\n");
    for job in jobs {
        let file = cubin(out, job);
        text += &format!(
            "    ({:?}, {:?}, include_bytes!({:?})),\n",
            job.module,
            job.architecture,
            file.display().to_string()
        );
    }
    text + "]\n"
}
