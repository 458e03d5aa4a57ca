//! The communicator between GPUs: the conformance suite, and what only devices can do wrong.
//!
//! On the emulator there are many devices; of real ones as many as the machine has, and what needs more is listed as ignored.

#[path = "../../src/comm/conformance.rs"]
mod conformance;

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use apbd::backend::Backend;
use apbd::backend::cuda::{Cuda, CudaMatrix, CudaOptions, CudaScores};
use apbd::comm::nccl::{Deadlines, NcclComm};
use apbd::comm::{Comm, CommError, Partials};
use half::bf16;
use libtest_mimic::Trial;

/// Devices that are used at most, and what is taken of each.
const DEVICES_AT_MOST: usize = 5;
const MEMORY_BYTES: usize = 64 << 20;
const START: Duration = Duration::from_secs(120);

/// The devices there are.
pub struct Devices(Vec<Arc<Cuda>>);

impl Devices {
    /// Opens all that there are, up to what is needed.
    pub fn open() -> Self {
        let options = CudaOptions { memory_bytes: Some(MEMORY_BYTES), ..CudaOptions::default() };
        Self((0..DEVICES_AT_MOST).map_while(|device| Cuda::open(device, &options).ok()).map(Arc::new).collect())
    }

    fn connect(&self, size: usize, deadline: Duration) -> Result<Vec<NcclComm>, CommError> {
        NcclComm::group(&self.0[..size], Deadlines { start: START, collective: deadline })
    }
}

impl conformance::Ranks for Devices {
    type M = CudaMatrix;
    type S = CudaScores;
    type C = NcclComm;

    fn group(&self, size: usize, deadline: Duration) -> Vec<NcclComm> {
        self.connect(size, deadline).unwrap()
    }
    fn matrix(&self, comm: &NcclComm, rows: usize, cols: usize, values: &[f32]) -> CudaMatrix {
        let bits: Vec<u16> = values.iter().map(|value| bf16::from_f32(*value).to_bits()).collect();
        comm.device().matrix_from(rows.max(1), cols, &padded(&bits, rows, cols)).unwrap()
    }
    fn scores(&self, comm: &NcclComm, rows: usize, cols: usize, values: &[f32]) -> CudaScores {
        let mut scores = comm.device().scores(rows.max(1), cols).unwrap();
        comm.device().set_scores(&padded(values, rows, cols), &mut scores).unwrap();
        scores
    }
    fn matrix_values(&self, comm: &NcclComm, matrix: &CudaMatrix) -> Vec<f32> {
        comm.device().read_matrix(matrix).unwrap().into_iter().map(|bits| bf16::from_bits(bits).to_f32()).collect()
    }
    fn scores_values(&self, comm: &NcclComm, scores: &CudaScores) -> Vec<f32> {
        comm.device().read_scores(scores).unwrap()
    }
    fn settle(&self, comm: &NcclComm) -> Result<(), CommError> {
        comm.settle()
    }
    fn most(&self) -> usize {
        self.0.len()
    }
}

/// A device has no empty matrices: those get a row of zeros.
fn padded<T: Copy + Default>(values: &[T], rows: usize, cols: usize) -> Vec<T> {
    if rows == 0 { vec![T::default(); cols] } else { values.to_vec() }
}

/// A test's name, the devices that it needs, and what it does with them.
type Test = (&'static str, usize, fn(&Devices));

/// The suite and the tests below. They run alone: two communicators on the same devices may each wait for what the other has to do first.
pub fn trials(device: &Arc<Mutex<Option<Cuda>>>) -> Vec<Trial> {
    let there_is_a_device = device.lock().unwrap().is_some();
    let devices = Arc::new(if there_is_a_device { Devices::open() } else { Devices(Vec::new()) });
    let own: [Test; 5] = [
        ("a_collective_waits_for_what_was_computed_and_is_waited_for", 2, order),
        ("memory_of_a_collective_is_not_given_to_others_before_it_is_done", 2, dropped),
        ("a_wait_for_a_device_ends_when_a_peer_gives_up", 2, given_up),
        ("a_wait_for_a_device_ends_by_the_deadline", 2, too_late),
        ("a_communicator_serves_as_often_as_it_is_asked", 2, often),
    ];
    let trial = |(name, needed, test): Test| {
        let (devices, alone, ignored) = (devices.clone(), device.clone(), devices.0.len() < needed);
        let run = move || {
            let _alone = alone.lock();
            test(&devices);
            Ok(())
        };
        Trial::test(format!("nccl_{name}"), run).with_ignored_flag(ignored)
    };
    conformance::tests::<Devices>().into_iter().chain(own).map(trial).collect()
}

/// Runs `body` on two ranks.
fn on_two<T: Send>(devices: &Devices, deadline: Duration, body: impl Fn(NcclComm) -> T + Sync) -> Vec<T> {
    let ends = devices.connect(2, deadline).unwrap();
    std::thread::scope(|scope| {
        let threads: Vec<_> = ends.into_iter().map(|end| scope.spawn(|| body(end))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

const ROWS: usize = 64;
const COLS: usize = 512;

/// A matrix whose elements are all `value`, made by computing: copies that take a while, the right one last.
fn computed(device: &Cuda, value: f32) -> CudaMatrix {
    let filled =
        |value: f32| device.matrix_from(ROWS, COLS, &vec![bf16::from_f32(value).to_bits(); ROWS * COLS]).unwrap();
    let mut matrix = device.matrix(2 * ROWS, COLS).unwrap();
    for step in 0..20 {
        let from = filled(if step == 19 { value } else { -1.0 });
        device.copy_rows(&from, 0, ROWS, &mut matrix, 0).unwrap();
        device.copy_rows(&from, 0, ROWS, &mut matrix, ROWS).unwrap();
    }
    matrix
}

fn all_are(device: &Cuda, matrix: &CudaMatrix, expected: [f32; 2]) {
    let values = device.read_matrix(matrix).unwrap();
    for (half, expected) in values.chunks(ROWS * COLS).zip(expected) {
        let other =
            half.iter().map(|bits| bf16::from_bits(*bits).to_f32()).enumerate().find(|(_, value)| *value != expected);
        assert!(other.is_none(), "not all are {expected}: {other:?}");
    }
}

/// The host never waits in between: only the device's own order makes the values right.
fn order(devices: &Devices) {
    for _ in 0..10 {
        on_two(devices, conformance::PATIENT, |comm| {
            let device = comm.device().clone();
            let gathering = comm.all_gather([computed(&device, 1.0 + comm.rank() as f32)], &[ROWS, ROWS]).unwrap();
            let beside = computed(&device, 9.0);
            let [gathered] = comm.finish(gathering).unwrap();
            let mut copy = device.matrix(2 * ROWS, COLS).unwrap();
            device.copy_rows(&gathered, 0, 2 * ROWS, &mut copy, 0).unwrap();
            let turning = comm.rotate([gathered], ROWS, [computed(&device, 0.0)], ROWS).unwrap();
            let (_, [turned]) = comm.finish_all_to_all(turning).unwrap();
            all_are(&device, &copy, [1.0, 2.0]);
            // Both ranks held the first one's rows in front.
            all_are(&device, &device_half(&device, &turned), [1.0, 0.0]);
            all_are(&device, &beside, [9.0, 9.0]);
            among_the_computing(&comm, &device);
            comm.settle().unwrap();
        });
    }
}

/// What is computed before partial results are gathered goes with them, and what is computed after has those of all.
fn among_the_computing(comm: &NcclComm, device: &Cuda) {
    let (mut parts, mut lse) = (computed(device, 3.0 + comm.rank() as f32), device.scores(2 * ROWS, COLS).unwrap());
    let mut copy = device.matrix(2 * ROWS, COLS).unwrap();
    comm.all_gather_partials(Partials::Attention(&mut parts, &mut lse), &[ROWS, ROWS]).unwrap();
    device.copy_rows(&parts, 0, 2 * ROWS, &mut copy, 0).unwrap();
    // Given back at once: whoever gets the memory computes later.
    drop((parts, lse));
    all_are(device, &computed(device, 8.0), [8.0, 8.0]);
    all_are(device, &copy, [3.0, 4.0]);
}

/// The first rows of a matrix in one of their own.
fn device_half(device: &Cuda, matrix: &CudaMatrix) -> CudaMatrix {
    let mut half = device.matrix(ROWS, COLS).unwrap();
    device.copy_rows(matrix, 0, ROWS, &mut half, 0).unwrap();
    half
}

/// A started collective that is never finished keeps its matrix until it is done, also while others ask for memory.
fn dropped(devices: &Devices) {
    on_two(devices, conformance::PATIENT, |comm| {
        let device = comm.device().clone();
        for _ in 0..20 {
            drop(comm.all_gather([computed(&device, 3.0)], &[ROWS, ROWS]).unwrap());
            // Most likely where that one was.
            let later = computed(&device, 5.0);
            drop(comm.rotate([computed(&device, 4.0)], ROWS, [computed(&device, 4.0)], ROWS).unwrap());
            all_are(&device, &later, [5.0, 5.0]);
        }
        comm.settle().unwrap();
    });
}

/// Has the host wait for the device alone, which waits for a peer; what comes of it is heard at the next call.
fn wait_for_device(comm: &NcclComm, counts: &[usize]) -> Result<(), CommError> {
    let device = comm.device().clone();
    let gathering = comm.all_gather([computed(&device, 1.0)], counts)?;
    drop(comm.rotate([computed(&device, 1.0)], ROWS, [computed(&device, 1.0)], ROWS)?);
    let [gathered] = comm.finish(gathering)?;
    // A plain wait of the backend, that knows nothing of communicators.
    device.read_matrix(&gathered).unwrap();
    comm.barrier()
}

fn given_up(devices: &Devices) {
    let outcomes = on_two(devices, conformance::PATIENT, |comm| {
        if comm.rank() == 0 {
            return wait_for_device(&comm, &[ROWS, ROWS]);
        }
        std::thread::sleep(Duration::from_millis(300));
        comm.abort("no more");
        comm.settle()
    });
    for outcome in outcomes {
        assert!(matches!(&outcome, Err(CommError::Aborted { rank: 1, reason }) if reason == "no more"), "{outcome:?}");
    }
}

fn too_late(devices: &Devices) {
    let deadline = Duration::from_millis(500);
    let start = Instant::now();
    let other = std::sync::Barrier::new(2);
    let outcomes = on_two(devices, deadline, |comm| {
        let outcome = (comm.rank() == 0).then(|| wait_for_device(&comm, &[ROWS, 0]));
        other.wait();
        outcome.unwrap_or_else(|| comm.settle())
    });
    assert!(matches!(outcomes[0], Err(CommError::TimedOut { rank: 0, .. })), "{outcomes:?}");
    assert!(matches!(outcomes[1], Err(CommError::Aborted { rank: 0, .. })), "{outcomes:?}");
    assert!(start.elapsed() > deadline && start.elapsed() < START / 2, "{:?}", start.elapsed());
}

/// And one that has failed is followed by a new one on the same devices.
fn often(devices: &Devices) {
    for _ in 0..3 {
        let both = std::sync::Barrier::new(2);
        on_two(devices, conformance::PATIENT, |comm| {
            let device = comm.device().clone();
            let free = device.free_bytes();
            for turn in 0..200 {
                let counts = [turn % 3, (turn + 1) % 4];
                let (mut parts, mut lse) = (device.matrix(8, 16).unwrap(), device.scores(8, 4).unwrap());
                comm.all_gather_partials(Partials::Attention(&mut parts, &mut lse), &counts).unwrap();
                let both = [device.matrix(8, 4).unwrap(), device.matrix(8, 2).unwrap()];
                comm.all_gather(both, &counts).and_then(|pending| comm.finish(pending)).unwrap();
                assert_eq!(comm.broadcast(turn % 2, turn as u64).unwrap(), turn as u64);
            }
            comm.settle().unwrap();
            assert_eq!(device.free_bytes(), free, "memory was not given back");
            both.wait();
            comm.abort("enough");
        });
    }
}
