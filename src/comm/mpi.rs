//! MPI: the rendezvous, and the collectives of CPU tensors.
#![allow(unsafe_code)]

use mpi::collective::Root;
use mpi::datatype::PartitionMut;
use mpi::environment::Universe;
use mpi::topology::{Communicator, SimpleCommunicator};
use mpi::traits::CommunicatorCollectives;
use mpi::{Count, Threading};
use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result};

/// Elements of one exchange: bounds the scratch memory and keeps MPI's counts far from `i32::MAX`.
const CHUNK: usize = 1 << 22;

/// MPI's world, finalised when dropped.
pub struct World {
    // Declared before the universe, so that it is freed before MPI_Finalize.
    world: SimpleCommunicator,
    _universe: Universe,
}

impl World {
    pub fn start() -> Result<Self> {
        let (universe, _) = mpi::initialize_with_threading(Threading::Serialized)
            .ok_or_else(|| Error::Communication("MPI was already started in this process".into()))?;
        Ok(Self { world: universe.world(), _universe: universe })
    }

    /// (rank, rank on this node, number of ranks).
    pub fn place(&self) -> (usize, usize, usize) {
        let local = self.world.split_shared(self.world.rank());
        (index(self.world.rank()), index(local.rank()), index(self.world.size()))
    }

    /// Sums in the order of the ranks. MPI's own algorithms choose the order by size, topology and version; here
    /// rank r receives everyone's r-th part, adds it in order, and sends the sum to all: the traffic of a ring
    /// all-reduce (a reduce-scatter and an all-gather), with an order that never changes.
    pub fn all_reduce(&self, tensor: &mut Tensor) -> Result<()> {
        let data = floats(tensor)?;
        for chunk in data.chunks_mut(CHUNK) {
            self.all_reduce_chunk(chunk);
        }
        Ok(())
    }

    fn all_reduce_chunk(&self, data: &mut [f32]) {
        let ranks = index(self.world.size());
        let bounds: Vec<usize> = (0..=ranks).map(|r| data.len() * r / ranks).collect();
        let counts: Vec<Count> = bounds.windows(2).map(|w| count(w[1] - w[0])).collect();
        let starts: Vec<Count> = bounds[..ranks].iter().map(|&b| count(b)).collect();
        let rank = index(self.world.rank());
        let mine = bounds[rank + 1] - bounds[rank];

        let mut parts = vec![0f32; mine * ranks];
        let part_counts = vec![count(mine); ranks];
        let part_starts: Vec<Count> = (0..ranks).map(|r| count(r * mine)).collect();
        {
            let send = mpi::datatype::Partition::new(&*data, &counts[..], &starts[..]);
            let mut receive = PartitionMut::new(&mut parts[..], &part_counts[..], &part_starts[..]);
            self.world.all_to_all_varcount_into(&send, &mut receive);
        }
        let (sum, others) = parts.split_at_mut(mine);
        for part in others.chunks_exact(mine.max(1)) {
            for (total, value) in sum.iter_mut().zip(part) {
                *total += value;
            }
        }
        let mut receive = PartitionMut::new(data, &counts[..], &starts[..]);
        self.world.all_gather_varcount_into(&*sum, &mut receive);
    }

    pub fn broadcast(&self, tensor: &mut Tensor) -> Result<()> {
        for chunk in floats(tensor)?.chunks_mut(CHUNK) {
            self.world.process_at_rank(0).broadcast_into(chunk);
        }
        Ok(())
    }

    pub fn gather(&self, mine: &[f64]) -> Vec<Vec<f64>> {
        let ranks = index(self.world.size());
        if mine.is_empty() {
            return vec![Vec::new(); ranks];
        }
        let mut all = vec![0f64; mine.len() * ranks];
        self.world.all_gather_into(mine, &mut all[..]);
        all.chunks_exact(mine.len()).map(<[f64]>::to_vec).collect()
    }

    pub fn barrier(&self) {
        self.world.barrier();
    }

    pub fn abort(&self, code: u8) {
        self.world.abort(i32::from(code));
    }
}

/// The memory of a contiguous fp32 CPU tensor.
fn floats(tensor: &mut Tensor) -> Result<&mut [f32]> {
    if tensor.kind() != Kind::Float || tensor.device() != Device::Cpu || !tensor.is_contiguous() {
        return Err(Error::Communication(format!(
            "MPI sums contiguous fp32 tensors on the CPU, this one is {:?} on {:?}",
            tensor.kind(),
            tensor.device()
        ))
        .into());
    }
    // SAFETY: the tensor is contiguous fp32 in host memory (checked above), so `numel` floats lie at its data pointer;
    // the exclusive borrow of the tensor outlives the slice, and training is single-threaded between backward and
    // optimizer, so no other view of the storage is written meanwhile.
    Ok(unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast::<f32>(), tensor.numel()) })
}

/// MPI's non-negative numbers as Rust's.
fn index(number: Count) -> usize {
    usize::try_from(number).unwrap_or(0)
}

/// A length of at most [`CHUNK`] x ranks as MPI's count.
fn count(length: usize) -> Count {
    Count::try_from(length).unwrap_or(Count::MAX)
}
