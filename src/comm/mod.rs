//! The ranks of one job, and what they do together.
//!
//! [`Comm`] is the same type for one process and for many: with a world size of 1 nothing is initialised and every
//! collective is the identity. MPI is started only if a launcher started this process. It joins the ranks and carries
//! what is small, and CPU tensors; GPU tensors are NCCL's once [`Comm::use_device`] has joined the GPUs.
//!
//! What is small travels in a tree ([`Comm::reduce`], [`Comm::gather`]), so that no rank sends more than 2 log2 N messages
//! for it, however many ranks there are.
//!
//! A collective on a tensor is begun, and all that was begun is finished together, so that sums travel while the backward
//! pass goes on. No wait is longer than the deadline that [`Comm`] was given.

use std::collections::HashMap;
use std::thread;
use std::time::Duration;

use tch::{Device, Tensor};

use crate::error::{Error, Result};
use crate::host;
use crate::launcher::{Launch, Starter};
use crate::patience::Patience;
use crate::torch::{Mark, Marks};

#[cfg(feature = "mpi")]
mod mpi;
#[cfg(not(feature = "mpi"))]
#[path = "absent.rs"]
mod mpi;
mod nccl;
#[cfg(feature = "mpi")]
mod tree;

/// This process's place among the ranks of the job.
pub struct Comm {
    /// This process's number, 0 to below `world_size`.
    pub rank: usize,
    /// Its number among the ranks on the same node.
    pub local_rank: usize,
    /// The number of ranks.
    pub world_size: usize,
    /// The first rank of its node.
    pub node: usize,
    /// The number of nodes.
    pub nodes: usize,
    /// How long it waits for the others.
    pub deadlines: Deadlines,
    // Declared before MPI's world, so that the GPUs part before it is finalised.
    gpus: Option<nccl::Group>,
    world: Option<mpi::World>,
}

/// How long a rank waits for the others.
#[derive(Debug, Clone, Copy)]
pub struct Deadlines {
    /// Until all have started and joined.
    pub startup: Duration,
    /// In one step's exchange.
    pub step: Duration,
    /// Until the others have saved.
    pub save: Duration,
}

impl Default for Deadlines {
    fn default() -> Self {
        Self { startup: Duration::from_secs(600), step: Duration::from_secs(300), save: Duration::from_secs(600) }
    }
}

/// How the numbers of several ranks become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Join {
    /// Their sum, with the bits that the tree's order gives: the same in every run of as many ranks, and on every rank.
    Sum,
    /// The largest; what is not a number does not count.
    Most,
}

impl Join {
    /// The number that two become.
    pub fn of(self, one: f64, other: f64) -> f64 {
        match self {
            Self::Sum => one + other,
            Self::Most => one.max(other),
        }
    }
}

/// What a launcher's libraries say of themselves, for a report.
pub struct Libraries {
    /// MPI's first line; `None` if it was not started.
    pub mpi: Option<String>,
    /// The node's name as MPI knows it.
    pub host: Option<String>,
    /// NCCL's version; the reason, if it cannot be loaded.
    pub nccl: std::result::Result<String, String>,
}

/// The versions of the libraries that ranks talk through.
pub struct Versions {
    /// MPI's first line; `None` if it was not built in.
    pub mpi: Option<String>,
    /// NCCL's version; the reason, if it cannot be loaded.
    pub nccl: std::result::Result<String, String>,
}

/// Asks the libraries for their versions, without starting them.
pub fn versions() -> Versions {
    Versions { mpi: mpi::library(), nccl: nccl::version().map_err(|e| e.to_string()) }
}

impl Comm {
    /// Joins the other ranks, if a launcher started this process as one of several.
    ///
    /// # Errors
    /// Communication, if MPI cannot be started in time or was not built in, or disagrees with Slurm; usage, if a
    /// launcher started several processes that MPI takes for worlds of one each.
    pub fn start(deadlines: Deadlines) -> Result<Self> {
        // Before MPI starts, since it sets variables of its own.
        let launch = Launch::from_environment();
        if !launch.is_joined() {
            let (gpus, world) = (None, None);
            return Ok(Self { rank: 0, local_rank: 0, world_size: 1, node: 0, nodes: 1, deadlines, gpus, world });
        }
        // Without a process manager some MPIs abort inside their initialisation, others see a world of one.
        if launch.manager.is_none() {
            return Err(apart(launch.world_size.unwrap_or(1)));
        }
        let world = mpi::World::start(deadlines.startup)?;
        let mpi::World { rank, local_rank, world_size, node, nodes, .. } = world;
        if world_size == 1 && launch.world_size.is_some_and(|n| n > 1) {
            return Err(apart(launch.world_size.unwrap_or(1)));
        }
        let slurm = [launch.rank, launch.local_rank, launch.world_size];
        if let (Starter::Srun, [Some(task), Some(local_task), Some(tasks)]) = (&launch.by, slurm) {
            if [task, local_task, tasks] != [rank, local_rank, world_size] {
                // Not finalised: that would wait for ranks which have nothing to complain of.
                std::mem::forget(world);
                return Err(Error::Communication(format!(
                    "MPI says that this is rank {rank} of {world_size}, {local_rank} on its node; Slurm says that it is task \
                     {task} of {tasks}, {local_task} on its node; start the ranks with `srun --mpi=pmix` and nothing in \
                     between that changes the environment"
                ))
                .into());
            }
        }
        Ok(Self { rank, local_rank, world_size, node, nodes, deadlines, gpus: None, world: Some(world) })
    }

    /// Joins the ranks' GPUs, if `device` is one and a launcher started this process. From then on, tensors on it are
    /// NCCL's. All ranks must call it, on a CPU too.
    ///
    /// # Errors
    /// Usage, if ranks share a GPU, only some have one, or NCCL cannot be loaded; communication, if the GPUs cannot be
    /// joined in time.
    pub fn use_device(&mut self, device: Device) -> Result<()> {
        let Some(world) = &self.world else { return Ok(()) };
        // Ranks meet here from loading CUDA, which may take some of them long.
        self.barrier(self.deadlines.startup)?;
        let place = match device {
            Device::Cuda(index) => {
                let gpu = crate::torch::gpu(index).map_err(Error::Usage)?;
                let id = std::env::var("NCCL_HOSTID").unwrap_or_default();
                format!("{}\n{}\n{id}", world.host, gpu.bus)
            }
            _ => String::new(),
        };
        check_gpus(&self.gather_text(&place)?)?;
        let Device::Cuda(index) = device else { return Ok(()) };
        // A rank that cannot load NCCL says so itself; the others, who wait for it, are ended with it.
        let id = if self.is_root() { nccl::unique_id()? } else { [0; 128] };
        let id = world.broadcast_bytes(&id, self.deadlines.startup)?;
        let id = id.try_into().map_err(|_| Error::Communication("NCCL's id was cut on its way".into()))?;
        let Deadlines { startup, step, .. } = self.deadlines;
        self.gpus = Some(nccl::Group::start(index, id, self.rank, self.world_size, startup, step)?);
        Ok(())
    }

    /// Whether this rank is the one that writes.
    pub fn is_root(&self) -> bool {
        self.rank == 0
    }

    /// Whether collectives on tensors do anything.
    pub fn is_joined(&self) -> bool {
        self.world_size > 1 || self.gpus.is_some()
    }

    /// What the libraries below say of themselves.
    pub fn libraries(&self) -> Libraries {
        Libraries {
            mpi: self.world.as_ref().map(|world| world.library.clone()),
            host: self.world.as_ref().map(|world| world.host.clone()),
            nccl: nccl::version().map_err(|e| e.to_string()),
        }
    }

    /// The name of this rank's node.
    pub fn host(&self) -> String {
        self.world.as_ref().map_or_else(host::name, |world| world.host.clone())
    }

    /// Begins to replace a tensor by its sum over all ranks: it must not be read or written until [`Comm::complete`].
    ///
    /// On the CPU the sum is added in the order of the ranks, so that every rank holds the same bits in every run; there
    /// only fp32 has one.
    ///
    /// # Errors
    /// Communication, if the tensor is not contiguous, has no sum, or a peer does not answer in time.
    pub fn begin_all_reduce(&self, tensor: &Tensor) -> Result<()> {
        self.begin(tensor, |gpus| gpus.begin_all_reduce(tensor), |world| world.begin_all_reduce(tensor))
    }

    /// Begins to replace rank r's part of a (n,) tensor, `bounds[r]..bounds[r + 1]`, by its sum over all ranks; the rest
    /// of it is left undefined. `bounds` has world_size + 1 entries, from 0 to n. Otherwise as [`Comm::begin_all_reduce`].
    ///
    /// # Errors
    /// As [`Comm::begin_all_reduce`].
    pub fn begin_reduce_scatter(&self, tensor: &Tensor, bounds: &[usize]) -> Result<()> {
        self.check(tensor, bounds)?;
        self.begin(
            tensor,
            |gpus| gpus.begin_reduce_scatter(tensor, bounds),
            |world| world.begin_reduce_scatter(tensor, bounds),
        )
    }

    /// Begins to send rank r's part of a (n,) tensor, `bounds[r]..bounds[r + 1]`, to all ranks.
    ///
    /// # Errors
    /// As [`Comm::begin_all_reduce`].
    pub fn begin_all_gather(&self, tensor: &Tensor, bounds: &[usize]) -> Result<()> {
        self.check(tensor, bounds)?;
        self.begin(tensor, |gpus| gpus.begin_all_gather(tensor, bounds), |world| world.begin_all_gather(tensor, bounds))
    }

    /// What is computed next comes after every collective begun: a CPU waits for them, a GPU will, and the host goes on
    /// ([`Comm::wait_for`] is where it waits).
    ///
    /// # Errors
    /// Communication, if a peer does not answer in time.
    pub fn complete(&self) -> Result<()> {
        match (&self.gpus, &self.world) {
            (Some(gpus), _) => gpus.complete(),
            (None, Some(world)) => world.complete(self.deadlines.step),
            (None, None) => Ok(()),
        }
    }

    /// Waits until this rank's device has reached a mark, and so the collectives that it was to wait for are done.
    ///
    /// # Errors
    /// Communication, if the GPU or a collective fails, or a step's deadline passes among several ranks.
    pub fn wait_for(&self, mark: &Mark) -> Result<()> {
        let mut patience = Patience::begin();
        while !mark.is_reached()? {
            if let Some(gpus) = &self.gpus {
                gpus.check(patience.waited())?;
            }
            thread::yield_now();
        }
        Ok(())
    }

    /// Waits until this rank's device has done all that it was given.
    ///
    /// # Errors
    /// As [`Comm::wait_for`].
    pub fn wait(&self, device: Device) -> Result<()> {
        self.wait_for(&Marks::on(device)?.mark()?)
    }

    /// Replaces a tensor by its sum over all ranks.
    ///
    /// # Errors
    /// As [`Comm::begin_all_reduce`].
    pub fn all_reduce(&self, tensor: &mut Tensor) -> Result<()> {
        self.begin_all_reduce(tensor)?;
        self.complete()
    }

    /// Replaces a tensor by rank 0's.
    ///
    /// # Errors
    /// As [`Comm::begin_all_reduce`].
    pub fn broadcast(&self, tensor: &mut Tensor) -> Result<()> {
        self.begin(tensor, |gpus| gpus.begin_broadcast(tensor), |world| world.begin_broadcast(tensor))?;
        self.complete()
    }

    fn begin(
        &self,
        tensor: &Tensor,
        on_gpu: impl FnOnce(&nccl::Group) -> Result<()>,
        on_cpu: impl FnOnce(&mpi::World) -> Result<()>,
    ) -> Result<()> {
        match (&self.gpus, &self.world) {
            _ if tensor.numel() == 0 => Ok(()),
            (Some(gpus), _) if tensor.device().is_cuda() => on_gpu(gpus),
            (_, Some(world)) => on_cpu(world),
            (_, None) => Ok(()),
        }
    }

    fn check(&self, tensor: &Tensor, bounds: &[usize]) -> Result<()> {
        let ascending = bounds.windows(2).all(|w| w[0] <= w[1]);
        if bounds.len() != self.world_size + 1 || bounds[0] != 0 || bounds.last() != Some(&tensor.numel()) || !ascending
        {
            return Err(Error::Communication(format!(
                "the parts {bounds:?} are not those of {} elements for {} ranks",
                tensor.numel(),
                self.world_size
            ))
            .into());
        }
        Ok(())
    }

    /// The ranks' numbers, each joined as the entry of `joins` for it says, alike on every rank; and on rank 0 the `notes` of
    /// each rank, in the order of the ranks. Each rank must give the same counts.
    ///
    /// The one small collective of a step: it decides everything that ranks decide together.
    ///
    /// # Errors
    /// Communication, if a peer does not answer in time.
    pub fn reduce(&self, mine: &[f64], joins: &[Join], notes: &[f64]) -> Result<(Vec<f64>, Vec<f64>)> {
        self.reduce_within(mine, joins, notes, self.deadlines.step)
    }

    fn reduce_within(
        &self,
        mine: &[f64],
        joins: &[Join],
        notes: &[f64],
        deadline: Duration,
    ) -> Result<(Vec<f64>, Vec<f64>)> {
        match &self.world {
            None => Ok((mine.to_vec(), notes.to_vec())),
            Some(world) => world.reduce(mine, joins, notes, deadline),
        }
    }

    /// Every rank's numbers, in the order of the ranks, on every rank; each rank must give the same count. What is received
    /// grows with the ranks: for the start, and for what is rare.
    ///
    /// # Errors
    /// As [`Comm::reduce`].
    pub fn gather(&self, mine: &[f64]) -> Result<Vec<Vec<f64>>> {
        match &self.world {
            None => Ok(vec![mine.to_vec()]),
            Some(world) => world.gather(mine, self.deadlines.step),
        }
    }

    /// Every rank's text, in the order of the ranks.
    ///
    /// # Errors
    /// As [`Comm::gather`].
    pub fn gather_text(&self, mine: &str) -> Result<Vec<String>> {
        let lengths = self.gather(&[mine.len() as f64])?;
        let longest = lengths.iter().map(|length| length[0] as usize).max().unwrap_or(0);
        let mut bytes: Vec<f64> = mine.bytes().map(f64::from).collect();
        bytes.resize(longest, 0.0);
        let all = self.gather(&bytes)?;
        let text = |(bytes, length): (&Vec<f64>, &Vec<f64>)| {
            let bytes: Vec<u8> = bytes.iter().take(length[0] as usize).map(|&byte| byte as u8).collect();
            String::from_utf8_lossy(&bytes).into_owned()
        };
        Ok(all.iter().zip(&lengths).map(text).collect())
    }

    /// The sums of the ranks' numbers.
    ///
    /// # Errors
    /// As [`Comm::reduce`].
    pub fn sum(&self, mine: &[f64]) -> Result<Vec<f64>> {
        Ok(self.reduce(mine, &vec![Join::Sum; mine.len()], &[])?.0)
    }

    /// The sums of a few numbers, (n,) fp64, over all ranks, alike on every rank and on the numbers' device: by NCCL on a GPU,
    /// elsewhere as [`Comm::sum`].
    ///
    /// # Errors
    /// As [`Comm::begin_all_reduce`].
    pub fn add_up(&self, numbers: &Tensor) -> Result<Tensor> {
        if numbers.device().is_cuda() {
            let mut sums = numbers.copy();
            self.all_reduce(&mut sums)?;
            return Ok(sums);
        }
        let numbers: Vec<f64> = numbers.try_into()?;
        Ok(Tensor::from_slice(&self.sum(&numbers)?))
    }

    /// Whether any rank says so.
    ///
    /// # Errors
    /// As [`Comm::reduce`].
    pub fn any(&self, mine: bool) -> Result<bool> {
        Ok(self.reduce(&[f64::from(u8::from(mine))], &[Join::Most], &[])?.0[0] > 0.0)
    }

    /// Waits until every rank is here, for at most `deadline`: others may be busy with something that takes
    /// longer than a step, and before a rank leaves, whose end a launcher may take for the job's.
    ///
    /// # Errors
    /// As [`Comm::reduce`].
    pub fn barrier(&self, deadline: Duration) -> Result<()> {
        self.reduce_within(&[], &[], &[], deadline).map(drop)
    }

    /// Messages that this rank has sent so far, but for those that carry tensors.
    pub fn messages(&self) -> u64 {
        self.world.as_ref().map_or(0, mpi::World::sent)
    }

    /// Ends every rank of the job with this exit code. One process alone just returns its own.
    pub fn abort(&self, code: u8) {
        if let Some(world) = &self.world {
            world.abort(code);
        }
    }
}

/// Where each rank's share of `length` elements begins and ends: world_size + 1 bounds, the parts as even as can be.
pub fn even_parts(length: usize, world_size: usize) -> Vec<usize> {
    (0..=world_size).map(|rank| length * rank / world_size).collect()
}

/// Refuses GPUs that NCCL cannot join. A rank's place is its host, its GPU and its NCCL_HOSTID, on a line each; nothing on
/// a CPU.
fn check_gpus(places: &[String]) -> Result<()> {
    let (on_cpu, on_gpu): (Vec<usize>, Vec<usize>) = (0..places.len()).partition(|&rank| places[rank].is_empty());
    if !on_cpu.is_empty() && !on_gpu.is_empty() {
        return Err(Error::Usage(format!(
            "ranks {on_cpu:?} would compute on the CPU and ranks {on_gpu:?} on GPUs; all must do the same: `--set device=cuda` \
             makes the former say what they lack, `--set device=cpu` does without GPUs"
        ))
        .into());
    }
    let mut first = HashMap::new();
    for &rank in &on_gpu {
        let other = *first.entry(&places[rank]).or_insert(rank);
        if other != rank {
            let mut lines = places[rank].lines();
            let (host, bus) = (lines.next().unwrap_or_default(), lines.next().unwrap_or_default());
            return Err(Error::Usage(format!(
                "ranks {other} and {rank} share the GPU {bus} of {host}, which NCCL refuses; start at most as many ranks on a \
                 node as it has GPUs, and let all see all of them (`srun --gpu-bind=none`; no CUDA_VISIBLE_DEVICES, or the \
                 same list for all)"
            ))
            .into());
        }
    }
    Ok(())
}

/// What to say if N processes would be N worlds of one.
fn apart(processes: usize) -> anyhow::Error {
    Error::Usage(format!(
        "a launcher started {processes} processes, but MPI cannot join them: each would train a model of its own; start \
         them with `srun --mpi=pmix` (`srun --mpi=list` shows whether Slurm has it), or with the mpirun of the MPI that \
         `mpicc` belongs to"
    ))
    .into()
}

#[cfg(test)]
mod tests {
    use super::check_gpus;

    fn checked<const N: usize>(places: [&str; N]) -> String {
        check_gpus(&places.map(String::from)).map_or_else(|e| e.to_string(), |()| "good".into())
    }

    #[test]
    fn a_shared_gpu_is_refused_unless_nccl_takes_it_for_two_hosts() {
        assert_eq!(checked(["n1\n0000:04:00\n", "n1\n0000:05:00\n", "n2\n0000:04:00\n"]), "good");
        assert_eq!(checked(["n1\n0000:04:00\na", "n1\n0000:04:00\nb"]), "good");
        for id in ["", "a"] {
            let place = format!("n1\n0000:04:00\n{id}");
            let said = checked(["n1\n0000:05:00\n", &place, &place]);
            assert!(said.contains("ranks 1 and 2 share the GPU 0000:04:00 of n1"), "{said}");
            assert!(said.contains("--gpu-bind=none"), "{said}");
        }
    }

    #[test]
    fn all_ranks_compute_on_the_same_kind_of_device() {
        assert_eq!(checked(["", "", ""]), "good");
        let said = checked(["n1\n0000:04:00\n", "", "n1\n0000:05:00\n"]);
        assert!(said.contains("ranks [1] would compute on the CPU and ranks [0, 2] on GPUs"), "{said}");
    }
}
