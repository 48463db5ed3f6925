//! The ranks of one job, and what they do together.
//!
//! [`Comm`] is the same type for one process and for many: with a world size of 1 nothing is initialised and every
//! collective is the identity. MPI is started only where a launcher started this process.

use tch::{Device, Tensor};

use crate::error::{Error, Result};

#[cfg(feature = "mpi")]
mod mpi;
#[cfg(not(feature = "mpi"))]
#[path = "absent.rs"]
mod mpi;

/// This process's place among the ranks of the job.
pub struct Comm {
    /// This process's number, 0 to below `world_size`.
    pub rank: usize,
    /// Its number among the ranks on the same node.
    pub local_rank: usize,
    /// The number of ranks.
    pub world_size: usize,
    world: Option<mpi::World>,
}

impl Comm {
    /// Joins the other ranks, if a launcher started this process as one of several.
    ///
    /// # Errors
    /// Communication, where MPI cannot be started or was not built in; usage, where a launcher started several
    /// processes that MPI takes for worlds of one each.
    pub fn start() -> Result<Self> {
        let Some(launched) = launched_world_size() else {
            return Ok(Self { rank: 0, local_rank: 0, world_size: 1, world: None });
        };
        // Without a process manager's variables some MPIs abort inside their initialisation, others see a world of one.
        if !MANAGERS.iter().any(|name| std::env::var_os(name).is_some()) {
            return Err(apart(launched.unwrap_or(1)));
        }
        let world = mpi::World::start()?;
        let (rank, local_rank, world_size) = world.place();
        if launched.is_some_and(|n| n > 1) && world_size == 1 {
            return Err(apart(launched.unwrap_or(1)));
        }
        Ok(Self { rank, local_rank, world_size, world: Some(world) })
    }

    /// Whether this rank is the one that writes.
    pub fn is_root(&self) -> bool {
        self.rank == 0
    }

    /// Replaces an fp32 tensor by its sum over all ranks, added in the order of the ranks, so that every rank holds
    /// the same bits in every run.
    ///
    /// # Errors
    /// Communication, where the tensor is not contiguous fp32. A peer that is lost ends this process inside MPI.
    pub fn all_reduce(&self, tensor: &mut Tensor) -> Result<()> {
        self.on_host(tensor, mpi::World::all_reduce)
    }

    /// Replaces an fp32 tensor by rank 0's.
    ///
    /// # Errors
    /// As [`Comm::all_reduce`].
    pub fn broadcast(&self, tensor: &mut Tensor) -> Result<()> {
        self.on_host(tensor, mpi::World::broadcast)
    }

    /// MPI works on host memory: a tensor elsewhere goes there and back.
    fn on_host(&self, tensor: &mut Tensor, collective: fn(&mpi::World, &mut Tensor) -> Result<()>) -> Result<()> {
        match &self.world {
            None => Ok(()),
            Some(world) if tensor.device() == Device::Cpu => collective(world, tensor),
            Some(world) => {
                let mut host = tensor.to_device(Device::Cpu);
                collective(world, &mut host)?;
                tensor.copy_(&host);
                Ok(())
            }
        }
    }

    /// Every rank's numbers, in the order of the ranks; each rank must give the same count.
    ///
    /// The one small collective: sums, maxima and decisions are taken from its result, alike on every rank.
    pub fn gather(&self, mine: &[f64]) -> Vec<Vec<f64>> {
        match &self.world {
            None => vec![mine.to_vec()],
            Some(world) => world.gather(mine),
        }
    }

    /// The sums of the ranks' numbers, added in the order of the ranks.
    pub fn sum(&self, mine: &[f64]) -> Vec<f64> {
        let mut totals = vec![0.0; mine.len()];
        for numbers in self.gather(mine) {
            for (total, number) in totals.iter_mut().zip(numbers) {
                *total += number;
            }
        }
        totals
    }

    /// Whether any rank says so.
    pub fn any(&self, mine: bool) -> bool {
        self.sum(&[f64::from(u8::from(mine))])[0] > 0.0
    }

    /// Waits until every rank is here: before one leaves, whose end a launcher may take for the job's.
    pub fn barrier(&self) {
        if let Some(world) = &self.world {
            world.barrier();
        }
    }

    /// Ends every rank of the job with this exit code. One process alone just returns its own.
    pub fn abort(&self, code: u8) {
        if let Some(world) = &self.world {
            world.abort(code);
        }
    }
}

/// The variables through which MPI finds the other processes: PMIx's, and PMI's as Slurm and Hydra set them.
const MANAGERS: [&str; 4] = ["PMIX_RANK", "PMI_RANK", "PMI_FD", "PMI_SIZE"];

/// What to say where N processes would be N worlds of one.
fn apart(processes: usize) -> anyhow::Error {
    Error::Usage(format!(
        "a launcher started {processes} processes, but MPI cannot join them: each would train a model of its own; start \
         them with `srun --mpi=pmix` (`srun --mpi=list` shows whether Slurm has it), or with the mpirun of the MPI that \
         `mpicc` belongs to"
    ))
    .into()
}

/// `Some` where a launcher started this process, with the number of processes where it says so.
///
/// Inside a Slurm job mpirun's own variables outrank Slurm's, which then describe mpirun's daemon. Slurm's step size
/// counts, not `SLURM_NTASKS`, which batch shells carry too.
fn launched_world_size() -> Option<Option<usize>> {
    let number = |name: &str| std::env::var(name).ok()?.parse::<usize>().ok();
    if let Some(n) = number("OMPI_COMM_WORLD_SIZE").or_else(|| number("PMI_SIZE")) {
        return Some(Some(n));
    }
    if std::env::var_os("PMIX_RANK").is_some() {
        return Some(number("SLURM_STEP_NUM_TASKS"));
    }
    number("SLURM_STEP_NUM_TASKS").filter(|&n| n > 1).map(Some)
}
