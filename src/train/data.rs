//! The data folder, opened by every rank and verified by one of each node.

use std::path::Path;
use std::time::Instant;

use tracing::info;

use crate::comm::Comm;
use crate::data::folder::DataDir;
use crate::error::Result;

/// Opens the data folder. Of the ranks that find the same files, on one node, the first checks every byte, and the others wait
/// for it: hashing takes time, and a rank's file is as good as its neighbour's. All ranks must call it; `next` is called
/// before each file that this one verifies. Returns which rank has verified this one's files, too.
///
/// # Errors
/// Data, naming the file, if this rank finds damage, which then ends the others, too; communication, if another does not
/// answer before the start-up's deadline.
pub fn open_data(comm: &Comm, path: &Path, next: impl FnMut()) -> Result<(DataDir, usize)> {
    if comm.world_size == 1 {
        return DataDir::open(path).map(|data| (data, 0));
    }
    let data = DataDir::open_unverified(path)?;
    let deadline = comm.deadlines.startup;
    // Opening takes some nodes longer than others.
    comm.barrier(deadline)?;
    let (rank, host) = (comm.rank, comm.host());
    let found = comm.gather_text(&format!("{host} {}", data.identity()))?;
    let same: Vec<usize> = (0..found.len()).filter(|&other| found[other] == found[rank]).collect();
    let (first, path) = (same[0], path.display());
    if first == rank {
        info!("rank {rank} verifies {path} for ranks {same:?}, on {host}");
        let begun = Instant::now();
        data.verify(next)?;
        info!("rank {rank} has verified {path} in {:.1} s", begun.elapsed().as_secs_f64());
    } else {
        info!("rank {rank} waits for the word of rank {first}, which verifies {path} on {host}");
    }
    comm.barrier(deadline)?;
    Ok((data, first))
}
