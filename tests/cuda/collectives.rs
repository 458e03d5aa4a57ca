//! The communicator between GPUs: the conformance suite, and what only devices can do wrong.
//!
//! On the emulator there are many devices; of real ones as many as the machine has, and what needs more is listed as ignored.

#[path = "../../src/comm/conformance.rs"]
mod conformance;

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use apbd::backend::cuda::{Cuda, CudaMatrix, CudaOptions, CudaScores};
use apbd::backend::{Backend, HeadShape, even_part};
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
    let own: [Test; 8] = [
        ("partial_results_combined_are_those_gathered_and_merged", 2, combined),
        ("a_wait_for_what_others_write_ends_when_a_peer_gives_up", 2, given_up_combining),
        ("a_wait_for_what_others_write_ends_by_the_deadline", 2, too_late_combining),
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
    on_so_many(devices, 2, deadline, body)
}

fn on_so_many<T: Send>(
    devices: &Devices,
    ranks: usize,
    deadline: Duration,
    body: impl Fn(NcclComm) -> T + Sync,
) -> Vec<T> {
    let ends = devices.connect(ranks, deadline).unwrap();
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

/// The same for a device that waits for what a peer writes to its memory.
fn wait_for_peer(comm: &NcclComm) -> Result<(), CommError> {
    let device = comm.device().clone();
    let (sums, mut x) = (device.scores(ROWS, COLS).unwrap(), device.matrix(ROWS, COLS).unwrap());
    comm.combining(ROWS, COLS).expect("devices that reach each other").add_sums(ROWS, &sums, &mut x)?;
    device.read_matrix(&x).unwrap();
    comm.barrier()
}

fn given_up(devices: &Devices) {
    ends_when_a_peer_gives_up(devices, |comm| wait_for_device(comm, &[ROWS, ROWS]));
}

fn given_up_combining(devices: &Devices) {
    ends_when_a_peer_gives_up(devices, wait_for_peer);
}

fn ends_when_a_peer_gives_up(devices: &Devices, wait: fn(&NcclComm) -> Result<(), CommError>) {
    let outcomes = on_two(devices, conformance::PATIENT, |comm| {
        if comm.rank() == 0 {
            return wait(&comm);
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
    ends_by_the_deadline(devices, |comm| wait_for_device(comm, &[ROWS, 0]));
}

fn too_late_combining(devices: &Devices) {
    ends_by_the_deadline(devices, wait_for_peer);
}

fn ends_by_the_deadline(devices: &Devices, wait: fn(&NcclComm) -> Result<(), CommError>) {
    let deadline = Duration::from_millis(500);
    let start = Instant::now();
    let other = std::sync::Barrier::new(2);
    let outcomes = on_two(devices, deadline, |comm| {
        let outcome = (comm.rank() == 0).then(|| wait(&comm));
        other.wait();
        outcome.unwrap_or_else(|| comm.settle())
    });
    assert!(matches!(outcomes[0], Err(CommError::TimedOut { rank: 0, .. })), "{outcomes:?}");
    assert!(matches!(outcomes[1], Err(CommError::Aborted { rank: 0, .. })), "{outcomes:?}");
    assert!(start.elapsed() > deadline && start.elapsed() < START / 2, "{:?}", start.elapsed());
}

/// Turn after turn, some ranks later than others, rows of every number; the same bits as by the other way, on every rank.
fn combined(devices: &Devices) {
    for ranks in 2..=devices.0.len() {
        on_so_many(devices, ranks, conformance::PATIENT, |comm| {
            for (turn, rows) in [1, 5, 1, 32, 2, 1, 1, 17].into_iter().enumerate() {
                if turn % ranks == comm.rank() {
                    std::thread::sleep(Duration::from_millis(5));
                }
                merged_as_gathered(&comm, turn, rows);
                added_as_gathered(&comm, turn, rows);
                joined_as_gathered(&comm, turn, rows);
            }
            comm.settle().unwrap();
        });
    }
}

/// Something between -1 and 1 for each element, other for every rank and turn.
fn values(comm: &NcclComm, turn: usize, count: usize) -> Vec<f32> {
    let of = |i: usize| ((i * 7919 + comm.rank() * 104_729 + turn * 1_299_709) % 2003) as f32 / 1001.5 - 1.0;
    (0..count).map(of).collect()
}

fn bits(values: &[f32]) -> Vec<u16> {
    values.iter().map(|value| bf16::from_f32(*value).to_bits()).collect()
}

fn scores_from(device: &Cuda, rows: usize, cols: usize, values: &[f32]) -> CudaScores {
    let mut scores = device.scores(rows, cols).unwrap();
    device.set_scores(values, &mut scores).unwrap();
    scores
}

/// This rank's rows at its place among those of all.
fn at_its_place(comm: &NcclComm, own: &[f32]) -> Vec<f32> {
    let mut all = vec![9.0; own.len() * comm.size()];
    all[comm.rank() * own.len()..][..own.len()].copy_from_slice(own);
    all
}

fn merged_as_gathered(comm: &NcclComm, turn: usize, rows: usize) {
    let (device, ranks) = (comm.device().clone(), comm.size());
    let shape = HeadShape { heads: 6, kv_heads: 2, head_dim: 16 << (turn % 4) };
    let (width, heads) = (shape.q_width(), shape.heads);
    let parts = values(comm, turn, rows * width);
    // Of some rows and heads this rank, or every rank, has seen nothing.
    let unseen = |i: usize| i % 7 == comm.rank() || i % 11 == 3;
    let lse = values(comm, turn + 1, rows * heads).into_iter().enumerate();
    let lse: Vec<f32> = lse.map(|(i, value)| if unseen(i) { f32::NEG_INFINITY } else { 20.0 * value }).collect();
    let own = (device.matrix_from(rows, width, &bits(&parts)).unwrap(), scores_from(&device, rows, heads, &lse));
    let mut combined = device.matrix_from(rows + 2, width, &vec![0x4242; (rows + 2) * width]).unwrap();
    let combining = comm.combining(rows, width).expect("devices that reach each other");
    combining.merge_partials(shape, rows, (&own.0, &own.1), (&mut combined, 1)).unwrap();

    let mut all = device.matrix_from(rows * ranks, width, &bits(&at_its_place(comm, &parts))).unwrap();
    let mut all_lse = scores_from(&device, rows * ranks, heads, &at_its_place(comm, &lse));
    comm.all_gather_partials(Partials::Attention(&mut all, &mut all_lse), &vec![rows; ranks]).unwrap();
    let mut merged = device.matrix(rows, width).unwrap();
    device.merge_stacked(shape, rows, ranks, &all, &all_lse, &mut merged).unwrap();
    let (got, spare) = (device.read_matrix(&combined).unwrap(), vec![0x4242; width]);
    let wanted = [spare.clone(), device.read_matrix(&merged).unwrap(), spare].concat();
    assert!(got == wanted, "rank {} of {ranks}, turn {turn}: {rows} rows of {shape:?}", comm.rank());
}

fn added_as_gathered(comm: &NcclComm, turn: usize, rows: usize) {
    let (device, ranks, cols) = (comm.device().clone(), comm.size(), 264 << (turn % 3));
    let (sums, before) = (values(comm, turn, rows * cols), bits(&vec![0.75; rows * cols]));
    let [mut combined, mut added] = [(); 2].map(|()| device.matrix_from(rows, cols, &before).unwrap());
    let combining = comm.combining(rows, cols).expect("devices that reach each other");
    combining.add_sums(rows, &scores_from(&device, rows, cols, &sums), &mut combined).unwrap();
    let mut all = scores_from(&device, rows * ranks, cols, &at_its_place(comm, &sums));
    comm.all_gather_partials(Partials::Sums(&mut all), &vec![rows; ranks]).unwrap();
    device.add_partials(rows, ranks, &all, &mut added).unwrap();
    let [got, wanted] = [combined, added].map(|matrix| device.read_matrix(&matrix).unwrap());
    assert!(got == wanted, "rank {} of {ranks}, turn {turn}: {rows} rows of {cols}", comm.rank());
}

fn joined_as_gathered(comm: &NcclComm, turn: usize, rows: usize) {
    // Of some widths parts overlap, and of some lines one half is all.
    let (device, ranks, cols) = (comm.device().clone(), comm.size(), [331, 2048, 7, 1200][turn % 4]);
    let width = even_part(cols, 0, ranks).len();
    let own = values(comm, turn, rows * width);
    let spare = vec![7.0; (rows + 1) * cols];
    let [mut combined, mut joined] = [(); 2].map(|()| scores_from(&device, rows + 1, cols, &spare));
    let combining = comm.combining(rows, width).expect("devices that reach each other");
    combining.join_columns(rows, &scores_from(&device, rows, width, &own), &mut combined).unwrap();
    let mut all = scores_from(&device, rows * ranks, width, &at_its_place(comm, &own));
    comm.all_gather_partials(Partials::Columns(&mut all), &vec![rows; ranks]).unwrap();
    device.join_columns(rows, ranks, &all, &mut joined).unwrap();
    let [got, wanted] = [combined, joined].map(|scores| device.read_scores(&scores).unwrap());
    assert!(got == wanted, "rank {} of {ranks}, turn {turn}: {rows} rows of {cols}", comm.rank());
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
