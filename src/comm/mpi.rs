//! MPI: the rendezvous, and the collectives of CPU tensors.
//!
//! One thread owns MPI: it initialises it, makes every call, one after another in the order in which they were asked
//! for, and finalises it. So the thread that trains goes on while gradients travel, can give up waiting for a peer that
//! is gone, and no more is asked of MPI than `MPI_THREAD_FUNNELED`.
#![allow(unsafe_code)]

use std::ffi::{c_int, CStr};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::sync::mpsc::{channel, Receiver, RecvTimeoutError, Sender};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use mpi::collective::Root;
use mpi::datatype::{Partition, PartitionMut};
use mpi::environment::Universe;
use mpi::ffi;
use mpi::request::{scope, LocalScope, Request};
use mpi::topology::{Communicator, SimpleCommunicator};
use mpi::traits::{AsRaw, CommunicatorCollectives, Destination, Equivalence, Source};
use mpi::{Count, Threading};
use tch::{Device, Kind, Tensor};

use super::tree::Branch;
use super::Join;
use crate::error::{tell, Error, Result};
use crate::host;
use crate::patience::receive;
use crate::stop::exit_now;
use crate::torch;

/// Elements of one exchange of an all-reduce or a broadcast: bounds the scratch memory and keeps MPI's counts far from
/// `i32::MAX`.
const CHUNK: usize = 1 << 22;

/// Elements of one rank's part of an exchange, if the ranks are few: what is received is still in the cache, 1 MiB, when it
/// is added.
const PART: usize = 1 << 18;

/// The exit code of a lost peer: `Error::Communication`'s.
const LOST: u8 = 6;

/// From the end of this rank's `MPI_Init` to its first message. Open MPI 5.0 crashes in a rank that receives one while it
/// is still leaving `MPI_Init`'s last barrier (open-mpi/ompi, issue 11438).
const SETTLING: Duration = Duration::from_millis(200);

/// How long a peer that is asked to end the job may take for it.
const ABORT_GRACE: Duration = Duration::from_secs(10);

/// MPI's world, seen from the threads that use it. Finalised when dropped.
pub struct World {
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
    shared: Arc<Shared>,
    pub rank: usize,
    pub local_rank: usize,
    pub world_size: usize,
    /// The first rank of this node.
    pub node: usize,
    pub nodes: usize,
    /// What the MPI library says it is, in one line.
    pub library: String,
    /// The node's name as MPI knows it.
    pub host: String,
}

type Job = Box<dyn FnOnce(&mut Mpi) + Send>;

/// What the asking thread tells MPI's thread while that is busy.
#[derive(Default)]
struct Shared {
    /// Somebody waits: look for messages without a pause. Else a computation goes on, whose core is not to be taken.
    waiting: AtomicBool,
    /// An exit code above 0: end the job with it.
    abort: AtomicI32,
    /// Messages that this rank has sent through the tree.
    sent: AtomicU64,
}

/// The first line of what MPI says of itself, which it does without being initialised.
pub fn library() -> Option<String> {
    let said = mpi::environment::library_version().ok()?;
    said.split(['\n', '\0']).next().map(|line| line.trim().to_owned())
}

impl World {
    /// Initialises MPI; all ranks must do so within `deadline`.
    pub fn start(deadline: Duration) -> Result<Self> {
        let (jobs, queue) = channel::<Job>();
        let (tell, told) = channel();
        let shared = Arc::new(Shared::default());
        let seen = shared.clone();
        let serve = move || {
            let Some((universe, _)) = mpi::initialize_with_threading(Threading::Funneled) else { return };
            thread::sleep(SETTLING);
            let world = universe.world();
            end_with_6_on_error(&world);
            let local = world.split_shared(world.rank());
            let mut node = world.rank();
            local.process_at_rank(0).broadcast_into(&mut node);
            let mut place = [world.rank(), local.rank(), world.size(), node, 0].map(index);
            let mut mpi = Mpi { world, _local: local, scratch: Vec::new(), shared: seen, _universe: universe };
            let is_first = f64::from(u8::from(place[1] == 0));
            place[4] = mpi.reduce(&[is_first], &[Join::Sum], &[]).0[0] as usize;
            let host = mpi::environment::processor_name().unwrap_or_default();
            if tell.send((place, host)).is_ok() {
                queue.into_iter().for_each(|job| job(&mut mpi));
            }
        };
        let thread = host::spawn("mpi", serve)?;
        let ([rank, local_rank, world_size, node, nodes], host) = match receive(&told, deadline) {
            Ok(told) => told,
            Err(RecvTimeoutError::Timeout) => return Err(late("starting MPI", deadline)),
            Err(RecvTimeoutError::Disconnected) => return Err(ended()),
        };
        let library = library().unwrap_or_default();
        let (jobs, thread) = (Some(jobs), Some(thread));
        Ok(Self { jobs, thread, shared, rank, local_rank, world_size, node, nodes, library, host })
    }

    /// Begins to replace a tensor by its sum over the ranks; it must not be touched until [`World::complete`].
    pub fn begin_all_reduce(&self, tensor: &Tensor) -> Result<()> {
        self.begin(tensor, Mpi::all_reduce)
    }

    /// Begins to replace rank r's part of a tensor, `bounds[r]..bounds[r + 1]`, by its sum over the ranks.
    pub fn begin_reduce_scatter(&self, tensor: &Tensor, bounds: &[usize]) -> Result<()> {
        let bounds = bounds.to_vec();
        self.begin(tensor, move |mpi, data| mpi.reduce_scatter(data, &bounds))
    }

    /// Begins to send each rank's part of an fp32 or bf16 tensor to all the others.
    pub fn begin_all_gather(&self, tensor: &Tensor, bounds: &[usize]) -> Result<()> {
        let bounds = bounds.to_vec();
        if tensor.kind() != Kind::BFloat16 {
            return self.begin(tensor, move |mpi, data| mpi.all_gather(data, &bounds));
        }
        let mut lent = Lent::new(tensor, Kind::BFloat16)?;
        self.send(Box::new(move |mpi| mpi.all_gather(torch::halves_mut(&mut lent.0), &bounds)))
    }

    /// Begins to replace a tensor by rank 0's.
    pub fn begin_broadcast(&self, tensor: &Tensor) -> Result<()> {
        self.begin(tensor, Mpi::broadcast)
    }

    fn begin(&self, tensor: &Tensor, collective: impl FnOnce(&mut Mpi, &mut [f32]) + Send + 'static) -> Result<()> {
        let mut lent = Lent::new(tensor, Kind::Float)?;
        self.send(Box::new(move |mpi| collective(mpi, torch::floats_mut(&mut lent.0))))
    }

    /// Waits until everything begun is done.
    pub fn complete(&self, deadline: Duration) -> Result<()> {
        self.call(deadline, |_| ())
    }

    /// Joins numbers and, on rank 0, collects each rank's notes: [`super::Comm::reduce`].
    pub fn reduce(
        &self,
        mine: &[f64],
        joins: &[Join],
        notes: &[f64],
        deadline: Duration,
    ) -> Result<(Vec<f64>, Vec<f64>)> {
        let (mine, joins, notes) = (mine.to_vec(), joins.to_vec(), notes.to_vec());
        self.call(deadline, move |mpi| mpi.reduce(&mine, &joins, &notes))
    }

    pub fn gather(&self, mine: &[f64], deadline: Duration) -> Result<Vec<Vec<f64>>> {
        let (mine, length) = (mine.to_vec(), mine.len().max(1));
        let all = self.call(deadline, move |mpi| mpi.gather(mine))?;
        Ok(match all.is_empty() {
            true => vec![Vec::new(); self.world_size],
            false => all.chunks_exact(length).map(<[f64]>::to_vec).collect(),
        })
    }

    /// Rank 0's bytes, on every rank; each must give as many.
    pub fn broadcast_bytes(&self, bytes: &[u8], deadline: Duration) -> Result<Vec<u8>> {
        let mut bytes = bytes.to_vec();
        self.call(deadline, move |mpi| {
            let root = mpi.world.process_at_rank(0);
            scope(|scope| mpi.wait(root.immediate_broadcast_into(scope, &mut bytes[..])));
            bytes
        })
    }

    /// Messages that this rank has sent through the tree.
    pub fn sent(&self) -> u64 {
        self.shared.sent.load(Ordering::Relaxed)
    }

    /// Ends every rank of the job with this exit code. Returns only if MPI cannot.
    pub fn abort(&self, code: u8) -> ! {
        self.shared.abort.store(i32::from(code), Ordering::Release);
        // Wakes the thread if it waits for work; if it waits for a peer, it looks at the code by itself.
        let _ = self.send(Box::new(|mpi| mpi.abort_if_asked()));
        thread::sleep(ABORT_GRACE);
        exit_now(code)
    }

    fn send(&self, job: Job) -> Result<()> {
        self.jobs.as_ref().and_then(|jobs| jobs.send(job).ok()).ok_or_else(ended)
    }

    fn call<T: Send + 'static>(
        &self,
        deadline: Duration,
        work: impl FnOnce(&mut Mpi) -> T + Send + 'static,
    ) -> Result<T> {
        let (answer, answered): (_, Receiver<T>) = channel();
        self.shared.waiting.store(true, Ordering::Release);
        self.send(Box::new(move |mpi| drop(answer.send(work(mpi)))))?;
        let found = receive(&answered, deadline);
        self.shared.waiting.store(false, Ordering::Release);
        found.map_err(|e| match e {
            RecvTimeoutError::Timeout => late("exchanging with the other ranks", deadline),
            RecvTimeoutError::Disconnected => ended(),
        })
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Without this, MPI would end the job with a number of its own when a peer is lost.
fn end_with_6_on_error(world: &SimpleCommunicator) {
    unsafe extern "C" fn end(_: *mut ffi::MPI_Comm, code: *mut c_int) {
        let mut text = [0; ffi::MPI_MAX_ERROR_STRING as usize];
        let mut length = 0;
        // SAFETY: MPI hands over a valid error code, and writes a text of at most the given size that ends in zero.
        let said = unsafe {
            ffi::MPI_Error_string(*code, text.as_mut_ptr(), &mut length);
            CStr::from_ptr(text.as_ptr()).to_string_lossy()
        };
        tell(&format!("MPI: {said}: a rank is lost, or its network; `lockstep doctor` checks both"));
        exit_now(LOST)
    }
    type Handler = unsafe extern "C" fn(*mut ffi::MPI_Comm, *mut c_int);
    type Variadic = unsafe extern "C" fn(*mut ffi::MPI_Comm, *mut c_int, ...);
    // SAFETY: MPI declares its handlers with further arguments, which it documents as its own affair; a C caller passes
    // the two named ones in the same way. The handler never returns, and lives as long as the program.
    unsafe {
        let mut handler = std::mem::MaybeUninit::uninit();
        let end = std::mem::transmute::<Handler, Variadic>(end);
        ffi::MPI_Comm_create_errhandler(Some(end), handler.as_mut_ptr());
        ffi::MPI_Comm_set_errhandler(world.as_raw(), handler.assume_init());
    }
}

fn late(what: &str, deadline: Duration) -> anyhow::Error {
    Error::Communication(format!(
        "{what} took longer than {} s: a rank hangs, is lost, or was never started; the log of the rank that says \
         nothing, and `lockstep doctor`, may show why",
        deadline.as_secs()
    ))
    .into()
}

fn ended() -> anyhow::Error {
    Error::Communication("MPI's thread has ended; what it said on stderr tells why".into()).into()
}

/// MPI's side: lives in its thread.
struct Mpi {
    // Declared before the universe, so that they are freed before MPI_Finalize.
    world: SimpleCommunicator,
    /// The ranks of this node: kept, since a peer may still be busy with the exchange that made it.
    _local: SimpleCommunicator,
    scratch: Vec<f32>,
    shared: Arc<Shared>,
    _universe: Universe,
}

impl Mpi {
    /// Sums in the order of the ranks. MPI's own algorithms choose the order by size, topology and version; a
    /// reduce-scatter and an all-gather are the traffic of a ring all-reduce, with an order that never changes.
    fn all_reduce(&mut self, data: &mut [f32]) {
        let ranks = index(self.world.size());
        for chunk in data.chunks_mut((ranks * PART).min(CHUNK)) {
            let bounds = super::even_parts(chunk.len(), ranks);
            self.reduce_scatter(chunk, &bounds);
            self.all_gather(chunk, &bounds);
        }
    }

    /// Rank r receives everyone's r-th part and adds them in the order of the ranks, its own where it is.
    fn reduce_scatter(&mut self, data: &mut [f32], bounds: &[usize]) {
        let ranks = index(self.world.size());
        let (mut counts, starts) = counts_and_starts(bounds);
        let rank = index(self.world.rank());
        counts[rank] = 0;
        let mine = bounds[rank + 1] - bounds[rank];
        let part_counts: Vec<Count> = (0..ranks).map(|r| if r == rank { 0 } else { count(mine) }).collect();
        let part_starts: Vec<Count> = (0..ranks).map(|r| count(if r > rank { r - 1 } else { r } * mine)).collect();
        let mut parts = std::mem::take(&mut self.scratch);
        parts.resize(mine * (ranks - 1), 0.0);
        {
            let send = Partition::new(&*data, &counts[..], &starts[..]);
            let mut receive = PartitionMut::new(&mut parts[..], &part_counts[..], &part_starts[..]);
            scope(|scope| self.wait(self.world.immediate_all_to_all_varcount_into(scope, &send, &mut receive)));
        }
        let (before, after) = parts.split_at_mut(rank * mine);
        let own = &mut data[bounds[rank]..bounds[rank + 1]];
        let add = |sum: &mut [f32], part: &[f32]| sum.iter_mut().zip(part).for_each(|(sum, value)| *sum += value);
        let (sum, others) = before.split_at_mut(mine.min(before.len()));
        others.chunks_exact(mine.max(1)).for_each(|part| add(sum, part));
        add(own, sum);
        after.chunks_exact(mine.max(1)).for_each(|part| add(own, part));
        self.scratch = parts;
    }

    /// Each rank sends its part to every other one. All receive at once, in place.
    fn all_gather<T: Equivalence>(&self, data: &mut [T], bounds: &[usize]) {
        let (rank, ranks) = (index(self.world.rank()), index(self.world.size()));
        let (before, rest) = data.split_at_mut(bounds[rank]);
        let (mine, after) = rest.split_at_mut(bounds[rank + 1] - bounds[rank]);
        let mine = &*mine;
        scope(|scope| {
            let mut requests = Vec::with_capacity(2 * ranks);
            let mut parts = (before, after);
            for other in (0..ranks).filter(|&other| other != rank) {
                let rest = if other < rank { &mut parts.0 } else { &mut parts.1 };
                let (part, left) = std::mem::take(rest).split_at_mut(bounds[other + 1] - bounds[other]);
                *rest = left;
                requests.push(self.world.process_at_rank(count(other)).immediate_receive_into(scope, part));
            }
            // Each begins with the rank after it, so that not all send to the same one first.
            for other in (1..ranks).map(|step| (rank + step) % ranks) {
                requests.push(self.world.process_at_rank(count(other)).immediate_send(scope, mine));
            }
            requests.into_iter().for_each(|request| self.wait(request));
        });
    }

    fn broadcast(&mut self, data: &mut [f32]) {
        for chunk in data.chunks_mut(CHUNK) {
            let root = self.world.process_at_rank(0);
            scope(|scope| self.wait(root.immediate_broadcast_into(scope, chunk)));
        }
    }

    fn reduce(&mut self, mine: &[f64], joins: &[Join], notes: &[f64]) -> (Vec<f64>, Vec<f64>) {
        let join = |numbers: &mut Vec<f64>, theirs: &[f64]| {
            for ((number, &other), join) in numbers.iter_mut().zip(theirs).zip(joins) {
                *number = join.of(*number, other);
            }
            numbers.extend(&theirs[joins.len()..]);
        };
        let mut numbers = self.up([mine, notes].concat(), |ranks| mine.len() + ranks * notes.len(), join);
        let notes = numbers.split_off(mine.len());
        self.down(&mut numbers);
        (numbers, if self.world.rank() == 0 { notes } else { Vec::new() })
    }

    fn gather(&mut self, mine: Vec<f64>) -> Vec<f64> {
        let length = mine.len();
        let mut all = self.up(mine, |ranks| ranks * length, |numbers, theirs| numbers.extend(theirs));
        all.resize(length * index(self.world.size()), 0.0);
        self.down(&mut all);
        all
    }

    /// Joins the ranks' numbers on their way to rank 0, which returns those of all. `length` says how many numbers come from
    /// so many ranks; `join` adds the numbers of the ranks that follow to those of the ranks before.
    fn up(&self, mine: Vec<f64>, length: impl Fn(usize) -> usize, join: impl Fn(&mut Vec<f64>, &[f64])) -> Vec<f64> {
        let Branch { parent, children } = self.branch();
        let mut numbers = mine;
        for (child, ranks) in children {
            let mut theirs = vec![0.0; length(ranks)];
            self.receive(&mut theirs, child);
            join(&mut numbers, &theirs);
        }
        if let Some(parent) = parent {
            self.send(&numbers, parent);
        }
        numbers
    }

    /// Replaces every rank's numbers by rank 0's.
    fn down(&self, numbers: &mut [f64]) {
        let Branch { parent, children } = self.branch();
        if let Some(parent) = parent {
            self.receive(numbers, parent);
        }
        // The largest subtree has the longest way.
        for (child, _) in children.into_iter().rev() {
            self.send(numbers, child);
        }
    }

    fn branch(&self) -> Branch {
        Branch::of(index(self.world.rank()), index(self.world.size()))
    }

    fn send(&self, numbers: &[f64], to: usize) {
        let to = self.world.process_at_rank(count(to));
        scope(|scope| self.wait(to.immediate_send(scope, numbers)));
        self.shared.sent.fetch_add(1, Ordering::Relaxed);
    }

    fn receive(&self, numbers: &mut [f64], from: usize) {
        let from = self.world.process_at_rank(count(from));
        scope(|scope| self.wait(from.immediate_receive_into(scope, numbers)));
    }

    /// Waits for the end of a request. MPI's own waiting would keep a core busy; while the rank computes, this one sleeps
    /// between its looks, so that a transfer costs the computation little.
    fn wait<'a, D: ?Sized>(&self, mut request: Request<'a, D, &LocalScope<'a>>) {
        const PAUSE: Duration = Duration::from_micros(200);
        while let Err(pending) = request.test() {
            request = pending;
            self.abort_if_asked();
            match self.shared.waiting.load(Ordering::Acquire) {
                true => thread::yield_now(),
                false => thread::sleep(PAUSE),
            }
        }
    }

    fn abort_if_asked(&self) {
        let code = self.shared.abort.load(Ordering::Acquire);
        if code > 0 {
            self.world.abort(code);
        }
    }
}

/// A contiguous CPU tensor, lent to MPI's thread: whoever began the collective leaves it alone until [`World::complete`].
struct Lent(Tensor);

impl Lent {
    fn new(tensor: &Tensor, kind: Kind) -> Result<Self> {
        if tensor.kind() != kind || tensor.device() != Device::Cpu || !tensor.is_contiguous() {
            return Err(Error::Communication(format!(
                "MPI works on contiguous fp32 tensors on the CPU, and gathers bf16 ones; this one is {:?} on {:?}",
                tensor.kind(),
                tensor.device()
            ))
            .into());
        }
        Ok(Self(tensor.shallow_clone()))
    }
}

fn counts_and_starts(bounds: &[usize]) -> (Vec<Count>, Vec<Count>) {
    (
        bounds.windows(2).map(|w| count(w[1] - w[0])).collect(),
        bounds[..bounds.len() - 1].iter().map(|&b| count(b)).collect(),
    )
}

/// MPI's non-negative numbers as Rust's.
fn index(number: Count) -> usize {
    usize::try_from(number).unwrap_or(0)
}

/// A length as MPI's count. Lengths are those of a chunk or of a bucket, far below the largest count.
fn count(length: usize) -> Count {
    Count::try_from(length).unwrap_or(Count::MAX)
}
