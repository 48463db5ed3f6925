//! What the ranks try together: clocks, the run directory, and sums.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tch::{Device, Kind, Tensor};

use super::facts::Facts;
use super::report::{Place, Report};
use crate::comm::Comm;
use crate::error::Result;
use crate::patience::{until, within};

/// How long a file may take to be seen on another node: NFS may answer from its cache for some seconds.
const VISIBLE_WITHIN: Duration = Duration::from_secs(5);

/// How long a file system may take to answer at all.
const ANSWERS_WITHIN: Duration = Duration::from_secs(20);

/// Bytes of the largest sum, on a CPU and on a GPU.
const LARGEST: [usize; 2] = [16 << 20, 64 << 20];

/// The seconds by which each rank's clock is ahead of rank 0's: the least of a few tries, since the ranks leave a barrier
/// at slightly different times.
///
/// # Errors
/// As [`Comm::gather`].
pub fn clocks(comm: &Comm) -> Result<Vec<f64>> {
    let mut least = vec![f64::INFINITY; comm.world_size];
    for _ in 0..5 {
        comm.barrier(comm.deadlines.step)?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        let all = comm.gather(&[now])?;
        for (least, theirs) in least.iter_mut().zip(&all) {
            let ahead = theirs[0] - all[0][0];
            if ahead.abs() < least.abs() {
                *least = ahead;
            }
        }
    }
    Ok(least)
}

/// Rank 0 writes a file that all must see, and each writes one that rank 0 must see. Nothing of it stays.
///
/// # Errors
/// As [`Comm::gather`].
pub fn shared_folder(comm: &Comm, dir: &Path, all: &[Facts], report: &mut Report) -> Result<()> {
    let dir = std::path::absolute(dir).unwrap_or_else(|_| dir.to_path_buf());
    let elsewhere =
        "name a folder that every node mounts and may write to: `lockstep doctor --run-dir DIR`, and the same \
                     for `lockstep train`";
    let token = format!("{:x}-{:x}", UNIX_EPOCH.elapsed().unwrap_or_default().as_nanos(), std::process::id());
    let mut made = None;
    let begun = match comm.is_root() {
        true => {
            let probe = Probe::new(&dir, &token);
            made = Some(probe.clone());
            answer(move || probe.make())
        }
        false => String::new(),
    };
    // The token, and what went wrong.
    let root = comm.gather_text(&format!("{token}\n{begun}"))?.swap_remove(0);
    let (token, begun) = root.split_once('\n').unwrap_or((&root, ""));
    let outcomes = match begun {
        "" => {
            let probe = Probe::new(&dir, token);
            let rank = comm.rank;
            comm.gather_text(&answer(move || probe.meet(rank)))?
        }
        _ => Vec::new(),
    };
    let mut unseen = Vec::new();
    if let Some(probe) = made {
        let wrote: Vec<usize> = (0..outcomes.len()).filter(|&rank| outcomes[rank].is_empty()).collect();
        unseen = within(ANSWERS_WITHIN, move || probe.finish(&wrote)).unwrap_or_default();
    }
    // Rank 0 alone knows what it does not see; every rank must come to the same verdict.
    let unseen: Vec<f64> = (0..comm.world_size).map(|rank| f64::from(u8::from(unseen.contains(&rank)))).collect();
    let unseen = comm.gather(&unseen)?.swap_remove(0);

    report.row("run dir", &format!("{} (--run-dir)", dir.display()));
    if !begun.is_empty() {
        report.fault(Place::Setup, format!("{} cannot write {}: {begun}", all[0].name(), dir.display()), elsewhere);
        return Ok(());
    }
    let mut good = 0;
    for (facts, outcome) in all.iter().zip(&outcomes) {
        match (outcome.as_str(), unseen[facts.rank] > 0.0) {
            ("", false) => good += 1,
            ("", true) => report.fault(
                Place::Peers,
                format!("rank 0 on {} does not see what {} wrote in {}", all[0].host, facts.name(), dir.display()),
                elsewhere,
            ),
            (reason, _) => report.fault(Place::Peers, format!("{}: {reason}", facts.name()), elsewhere),
        }
    }
    report.row("", &format!("{good} of {} ranks see rank 0's file there, and rank 0 sees theirs", all.len()));
    Ok(())
}

/// What a step of the probe failed with; empty if it did not.
fn answer(step: impl FnOnce() -> std::result::Result<(), String> + Send + 'static) -> String {
    let found = within(ANSWERS_WITHIN, step);
    let silent = || Err(format!("its file system does not answer within {} s", ANSWERS_WITHIN.as_secs()));
    // One line, since lines part the fields of what is sent.
    found.unwrap_or_else(silent).err().unwrap_or_default().replace('\n', " ")
}

/// A folder in the run directory, for files that prove that it is shared.
#[derive(Clone)]
struct Probe {
    dir: PathBuf,
    folder: PathBuf,
    token: String,
    /// The folders that have to be made, outermost first.
    missing: Vec<PathBuf>,
}

impl Probe {
    fn new(dir: &Path, token: &str) -> Self {
        let mut missing: Vec<PathBuf> =
            dir.ancestors().take_while(|folder| !folder.exists()).map(Path::to_path_buf).collect();
        missing.reverse();
        Self { dir: dir.to_path_buf(), folder: dir.join(format!(".doctor-{token}")), token: token.into(), missing }
    }

    fn file(&self, rank: usize) -> PathBuf {
        self.folder.join(format!("rank-{rank}"))
    }

    fn write(&self, rank: usize) -> io::Result<()> {
        let mut file = File::create(self.file(rank))?;
        file.write_all(self.token.as_bytes())?;
        file.sync_all()
    }

    fn sees(&self, rank: usize) -> io::Result<bool> {
        Ok(fs::read_to_string(self.file(rank))? == self.token)
    }

    /// Rank 0's part.
    fn make(&self) -> std::result::Result<(), String> {
        fs::create_dir_all(&self.folder).and_then(|()| self.write(0)).map_err(|e| {
            self.remove();
            e.to_string()
        })
    }

    /// Every rank's part: it finds rank 0's file, and writes its own.
    fn meet(&self, rank: usize) -> std::result::Result<(), String> {
        let dir = self.dir.display();
        if let Err(error) = wait(|| self.sees(0)) {
            return Err(format!("does not see in {dir} what rank 0 wrote there: {error}"));
        }
        if rank == 0 {
            return Ok(());
        }
        self.write(rank).map_err(|e| format!("sees {dir}, but cannot write there: {e}"))
    }

    /// Rank 0's end: the ranks whose files it does not see.
    fn finish(&self, wrote: &[usize]) -> Vec<usize> {
        let unseen = wrote.iter().copied().filter(|&rank| wait(|| self.sees(rank)).is_err()).collect();
        self.remove();
        unseen
    }

    /// Removes what was made, as far as nobody else has put anything into it.
    fn remove(&self) {
        let _ = fs::remove_dir_all(&self.folder);
        for folder in self.missing.iter().rev() {
            let _ = fs::remove_dir(folder);
        }
    }
}

fn wait(look: impl Fn() -> io::Result<bool>) -> io::Result<()> {
    let mut last = Ok(());
    let found = until(VISIBLE_WITHIN, || match look() {
        Ok(true) => Some(()),
        found => {
            last = found.and(Err(io::Error::other("the file there has other contents")));
            None
        }
    });
    found.map_or(last, Ok)
}

/// Sums of several sizes and types, checked number by number, and how fast they are.
///
/// Bandwidths are those of NVIDIA's nccl-tests: `algbw` is the tensor's bytes by the time of one all-reduce, `busbw` is
/// algbw * 2(n-1)/n for n ranks, which can be held against a link's speed whatever n is.
///
/// # Errors
/// As [`Comm::all_reduce`].
pub fn all_reduce(comm: &Comm, device: Device, all: &[Facts], report: &mut Report) -> Result<()> {
    if !comm.is_joined() {
        report.row("all-reduce", "one rank: nothing to add up");
        return Ok(());
    }
    let kinds: &[(Kind, &str)] = match device.is_cuda() {
        true => &[
            (Kind::Float, "fp32"),
            (Kind::Double, "fp64"),
            (Kind::BFloat16, "bf16"),
            (Kind::Half, "fp16"),
            (Kind::Int, "int32"),
            (Kind::Int64, "int64"),
        ],
        // MPI's sums are those of gradients on a CPU.
        false => &[(Kind::Float, "fp32")],
    };
    let mut rows: Vec<[String; 6]> = Vec::new();
    let mut wrong = String::new();
    for &(kind, name) in kinds {
        let width = kind.elt_size_in_bytes();
        for size in [1, 1_000_003, (1 << 20) / width, LARGEST[usize::from(device.is_cuda())] / width] {
            let mut found = brought(comm.rank, comm.world_size, size, kind, device);
            comm.all_reduce(&mut found)?;
            let fault = difference(&found, size, kind, device);
            wrong += &fault.map(|text| format!("{size} numbers of {name}: {text}\n")).unwrap_or_default();
            let seconds = median_time(comm, size, kind, device)?;
            let bytes = size * width;
            let algbw = bytes as f64 / seconds / 1e9;
            let n = comm.world_size as f64;
            let rate = |gb_per_s: f64| format!("{gb_per_s:.3}");
            rows.push([
                name.to_string(),
                size.to_string(),
                bytes.to_string(),
                format!("{:.3}", seconds * 1000.0),
                rate(algbw),
                rate(algbw * 2.0 * (n - 1.0) / n),
            ]);
        }
    }
    let through = if device.is_cuda() { "NCCL" } else { "MPI" };
    report.row("all-reduce", &format!("through {through}; every sum is compared, number by number"));
    report.table(["type", "numbers", "bytes", "time (ms)", "algbw (GB/s)", "busbw (GB/s)"], &rows);
    for (facts, wrong) in all.iter().zip(comm.gather_text(&wrong)?) {
        if let Some(first) = wrong.lines().next() {
            let count = wrong.lines().count();
            report.fault(
                Place::Peers,
                format!("{}: {count} sums through {through} are wrong; the first, of {first}", facts.name()),
                "never train with this; try NCCL_P2P_DISABLE=1 or another MPI transport (OMPI_MCA_btl), other nodes, and \
                 newer versions of the driver and of these libraries",
            );
        }
    }
    Ok(())
}

/// What the sum must be: small whole numbers.
fn expected(size: usize, device: Device) -> Tensor {
    Tensor::arange(size as i64, (Kind::Int64, device)).remainder(100) + 1
}

/// What a rank adds: each element of the sum comes from one rank, and is 0 on the others. So the sum is exact in every
/// type, and for any number of ranks.
fn brought(rank: usize, world_size: usize, size: usize, kind: Kind, device: Device) -> Tensor {
    let mine = Tensor::arange(size as i64, (Kind::Int64, device)).remainder(world_size as i64).eq(rank as i64);
    (expected(size, device) * mine).to_kind(kind)
}

/// Where a sum is wrong first, in words.
fn difference(found: &Tensor, size: usize, kind: Kind, device: Device) -> Option<String> {
    let expected = expected(size, device).to_kind(kind);
    let wrong = found.ne_tensor(&expected).nonzero();
    (wrong.size()[0] > 0).then(|| {
        let at = wrong.int64_value(&[0, 0]);
        let value = |tensor: &Tensor| tensor.double_value(&[at]);
        format!("number {at} is {}, not {}, and {} are wrong", value(found), value(&expected), wrong.size()[0])
    })
}

/// Seconds of one all-reduce on rank 0, which all ranks begin together.
fn median_time(comm: &Comm, size: usize, kind: Kind, device: Device) -> Result<f64> {
    const TRIES: usize = 5;
    // Zeros, which stay what they are.
    let mut tensor = Tensor::zeros([size as i64], (kind, device));
    let mut times = Vec::new();
    for _ in 0..TRIES {
        comm.barrier(comm.deadlines.step)?;
        comm.wait(device)?;
        let start = Instant::now();
        comm.all_reduce(&mut tensor)?;
        comm.wait(device)?;
        times.push(start.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    Ok(times[TRIES / 2])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_ranks_bring_adds_up_exactly_in_every_type() {
        let device = Device::Cpu;
        for kind in [Kind::Float, Kind::Double, Kind::BFloat16, Kind::Half, Kind::Int, Kind::Int64] {
            for (ranks, size) in [(1, 1), (2, 1), (3, 1003), (700, 2000)] {
                let sum = (1..ranks).fold(brought(0, ranks, size, kind, device), |sum, rank| {
                    sum + brought(rank, ranks, size, kind, device)
                });
                assert_eq!(difference(&sum, size, kind, device), None, "{kind:?}, {ranks} ranks");
            }
        }
    }

    #[test]
    fn a_wrong_sum_is_found_and_told() {
        let good = brought(0, 1, 300, Kind::Float, Device::Cpu);
        let _ = good.get(207).fill_(5.0);
        let told = difference(&good, 300, Kind::Float, Device::Cpu);
        assert_eq!(told.as_deref(), Some("number 207 is 5, not 8, and 1 are wrong"));
        // A rank whose part is missing.
        let missing = brought(0, 2, 4, Kind::Float, Device::Cpu);
        assert!(difference(&missing, 4, Kind::Float, Device::Cpu).is_some());
    }

    #[test]
    fn a_probe_leaves_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("a/b");
        let probe = Probe::new(&dir, "token");
        probe.make().unwrap();
        probe.meet(1).unwrap();
        assert_eq!(probe.finish(&[0, 1]), Vec::<usize>::new());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        let other = Probe::new(&dir, "other");
        fs::create_dir_all(&other.folder).unwrap();
        let told = other.meet(1).unwrap_err();
        assert!(told.contains("does not see") && told.contains("No such file"), "{told}");
    }
}
