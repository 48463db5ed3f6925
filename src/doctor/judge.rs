//! What all ranks' facts say together: rows of the report, warnings and faults. Every rank has the same facts and comes
//! to the same judgement.

use std::collections::{BTreeMap, BTreeSet};

use super::facts::Facts;
use super::network;
use super::report::{ranks, Place, Report};

/// A clock that is further off makes logs of several nodes hard to read together.
const CLOCK_TOLERANCE_S: f64 = 1.0;

/// The ranks by one of their facts, the first rank's first.
fn by<T: PartialEq>(all: &[Facts], fact: impl Fn(&Facts) -> T) -> Vec<(T, Vec<&Facts>)> {
    let mut groups: Vec<(T, Vec<&Facts>)> = Vec::new();
    for facts in all {
        let value = fact(facts);
        match groups.iter_mut().find(|(found, _)| *found == value) {
            Some((_, group)) => group.push(facts),
            None => groups.push((value, vec![facts])),
        }
    }
    groups
}

fn ranks_of(group: &[&Facts]) -> String {
    let numbers: Vec<usize> = group.iter().map(|facts| facts.rank).collect();
    let hosts: BTreeSet<&str> = group.iter().map(|facts| facts.host.as_str()).collect();
    format!("{} on {}", ranks(&numbers), hosts.into_iter().collect::<Vec<_>>().join(", "))
}

/// A row with a fact that should be the same everywhere; each value with its ranks if it is not.
fn shared_row(report: &mut Report, name: &str, all: &[Facts], fact: impl Fn(&Facts) -> String) {
    let groups = by(all, fact);
    let lines: Vec<String> = match &groups[..] {
        [(value, _)] => vec![value.clone()],
        groups => groups.iter().map(|(value, group)| format!("{}: {value}", ranks_of(group))).collect(),
    };
    report.row(name, &lines.join("\n"));
}

/// A fault for each value that differs from rank 0's.
fn must_agree(report: &mut Report, all: &[Facts], what: &str, remedy: &str, fact: impl Fn(&Facts) -> String) {
    let groups = by(all, fact);
    for (value, group) in groups.iter().skip(1) {
        let text = format!("{} with another {what} than rank 0: {value}, not {}", ranks_of(group), groups[0].0);
        report.fault(Place::Peers, text, remedy);
    }
}

/// Software, networks, and which rank runs where.
pub fn judge(all: &[Facts], report: &mut Report) {
    software(all, report);
    for (lines, group) in by(all, |facts| [vec![network::describe(&facts.interfaces)], facts.choices.clone()].concat())
    {
        report.row("network", &format!("{}: {}", ranks_of(&group), lines.join(", ")));
    }
    report.gap();
    layout(all, report);
    cores(all, report);
    gpus(all, report);
}

fn software(all: &[Facts], report: &mut Report) {
    shared_row(report, "MPI", all, |facts| facts.mpi.clone().unwrap_or_else(|| "not started: one process".into()));
    let short = |facts: &Facts| facts.digest.chars().take(16).collect::<String>();
    shared_row(report, "binary", all, |facts| format!("sha256 {}..., {}", short(facts), facts.binary));
    shared_row(report, "LibTorch", all, |facts| facts.libtorch.clone());
    shared_row(report, "CUDA", all, |facts| facts.cuda.clone());
    let nccl = |facts: &Facts| facts.nccl.clone().unwrap_or_else(|reason| format!("none: {reason}"));
    match all.iter().any(|facts| matches!(facts.gpu, Ok(Some(_)))) {
        true => shared_row(report, "NCCL", all, nccl),
        false => report.row("NCCL", "not used without GPUs"),
    }
    let copy = "build once and copy that binary to every node, or put it where all nodes see the same file";
    must_agree(report, all, "binary (by SHA-256)", copy, |facts| format!("{}...", short(facts)));
    let load = "load the same modules, and run the same launch/setup, on every node";
    must_agree(report, all, "LibTorch", load, |facts| facts.libtorch.clone());
    must_agree(report, all, "MPI library", load, |facts| facts.mpi.clone().unwrap_or_default());
    // MPI says its version in its line, mpirun in a variable.
    if let (Ok(version), Some(mpi)) = (std::env::var("OMPI_VERSION"), &all[0].mpi) {
        if !mpi.contains(&version) {
            report.warn(
                format!("mpirun is Open MPI's {version}, the binary is linked to another: {mpi}"),
                "use the mpirun beside the mpicc that Lockstep was built with",
            );
        }
    }
}

fn layout(all: &[Facts], report: &mut Report) {
    let rows: Vec<[String; 6]> = all
        .iter()
        .map(|facts| {
            let device = match &facts.gpu {
                Ok(None) => "cpu".into(),
                Ok(Some(gpu)) => {
                    let visible = &facts.visible_gpus;
                    format!("cuda:{} {}, {} MiB, {}, visible {visible}", gpu.index, gpu.name, gpu.memory_mib, gpu.bus)
                }
                Err(_) => "none".into(),
            };
            let [rank, local, threads] = [facts.rank, facts.local_rank, facts.threads].map(|n| n.to_string());
            [rank, facts.host.clone(), local, facts.cores.clone(), threads, device]
        })
        .collect();
    report.table(["rank", "host", "local", "cores", "threads", "device"], &rows);
    report.gap();
}

fn cores(all: &[Facts], report: &mut Report) {
    for (host, group) in by(all, |facts| facts.host.clone()) {
        let cores: BTreeSet<usize> = group.iter().flat_map(|facts| facts.core_numbers()).collect();
        let threads: usize = group.iter().map(|facts| facts.threads).sum();
        if !cores.is_empty() && threads > cores.len() {
            let fewer = match threads > group.len() {
                true => format!("OMP_NUM_THREADS={}, ", (cores.len() / group.len()).max(1)),
                false => String::new(),
            };
            report.warn(
                format!(
                    "on {host} the {} with {threads} threads together share {} core{}",
                    if group.len() == 1 { "rank".into() } else { format!("{} ranks", group.len()) },
                    cores.len(),
                    if cores.len() == 1 { "" } else { "s" }
                ),
                format!(
                    "{fewer}more cores for each rank (srun --cpus-per-task), or fewer ranks; if all are bound to the \
                     same core, mpirun --bind-to none or srun --cpu-bind=cores"
                ),
            );
        }
    }
}

fn gpus(all: &[Facts], report: &mut Report) {
    let remedy = "launch/setup --cuda, and no more ranks on a node than it has GPUs, all visible to each (srun \
                  --gpu-bind=none); `--device cpu` if the CPU is meant";
    for (reason, group) in by(all, |facts| facts.gpu.as_ref().err().cloned()) {
        if let Some(reason) = reason {
            report.fault(Place::Setup, format!("{}: no GPU can be used: {reason}", ranks_of(&group)), remedy);
        }
    }
    // As training, which goes on without.
    for (reason, group) in by(all, |facts| facts.unused_gpu.clone()) {
        if let Some(reason) = reason {
            let text =
                format!("{}: `device: auto` means the CPU, since no GPU can be used: {reason}", ranks_of(&group));
            report.warn(text, remedy);
        }
    }
    let users: Vec<&Facts> = all.iter().filter(|facts| matches!(facts.gpu, Ok(Some(_)))).collect();
    if users.is_empty() {
        return;
    }
    let idle: Vec<&Facts> = all.iter().filter(|facts| matches!(facts.gpu, Ok(None))).collect();
    if !idle.is_empty() {
        report.fault(
            Place::Peers,
            format!("on the CPU: {} ({}); the others on GPUs", ranks_of(&idle), idle[0].cuda),
            "ask for nodes that all have GPUs (sbatch --gpus-per-node), or `--device cpu` for all",
        );
    }
    // NCCL refuses a GPU that comes twice under one name of the node.
    let mut by_gpu: BTreeMap<(&str, &str, Option<&str>), Vec<&Facts>> = BTreeMap::new();
    for facts in &users {
        if let Ok(Some(gpu)) = &facts.gpu {
            by_gpu.entry((&facts.host, &gpu.bus, facts.host_id.as_deref())).or_default().push(facts);
        }
    }
    for ((_, bus, _), group) in by_gpu.iter().filter(|(_, group)| group.len() > 1) {
        report.fault(
            Place::Setup,
            format!("{} share the GPU {bus}, which NCCL refuses", ranks_of(group)),
            "one rank for each GPU: no more ranks on a node than it has GPUs, and no CUDA_VISIBLE_DEVICES that names one \
             GPU for all; in a test only, a different NCCL_HOSTID for each rank",
        );
    }
    for facts in &users {
        if let Err(reason) = &facts.nccl {
            report.fault(Place::Setup, format!("{}: {reason}", facts.name()), "launch/setup --cuda on that node");
        }
        if let Some(wrong) = &facts.wrong_for_nccl {
            report.fault(
                Place::Peers,
                format!("{}: {wrong}; it has {}", facts.name(), network::describe(&facts.interfaces)),
                format!("set {} to the interface that joins the nodes, or unset it", network::NCCL_INTERFACE),
            );
        }
    }
    must_agree(report, all, "NCCL", "run the same launch/setup --cuda on every node", |facts| {
        facts.nccl.clone().unwrap_or_else(|_| "none".into())
    });
}

/// A row for the clocks: seconds by which each rank's is ahead of rank 0's.
pub fn clocks(all: &[Facts], ahead_s: &[f64], report: &mut Report) {
    let furthest = (0..ahead_s.len()).max_by(|&a, &b| ahead_s[a].abs().total_cmp(&ahead_s[b].abs())).unwrap_or(0);
    if all.len() == 1 {
        return report.row("clocks", "one rank");
    }
    let (name, by) = (all[furthest].name(), ahead_s[furthest]);
    let distance = match by.abs() < 1.0 {
        true => format!("{:.2} ms", by.abs() * 1000.0),
        false => format!("{:.1} s", by.abs()),
    };
    report.row("clocks", &format!("at most {distance} from rank 0's ({name})"));
    if by.abs() > CLOCK_TOLERANCE_S {
        let way = if by > 0.0 { "ahead of" } else { "behind" };
        report.warn(
            format!("the clock of {name} is {distance} {way} rank 0's: times in logs of several nodes do not fit"),
            "keep the nodes' clocks by NTP (chronyc tracking shows how well)",
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::torch::Gpu;

    fn rank(rank: usize, host: &str) -> Facts {
        let gpu = Gpu { index: 0, name: "GPU".into(), memory_mib: 1024, bus: "0000:01:00".into() };
        Facts {
            rank,
            local_rank: 0,
            host: host.into(),
            cores: "0-1".into(),
            threads: 2,
            gpu: Ok(Some(gpu)),
            unused_gpu: None,
            visible_gpus: "0".into(),
            host_id: None,
            libtorch: "2.11.0".into(),
            cuda: "loaded".into(),
            nccl: Ok("2.28.9".into()),
            mpi: Some("Open MPI v5".into()),
            binary: "/bin/lockstep".into(),
            digest: "abc".into(),
            interfaces: Vec::new(),
            choices: Vec::new(),
            wrong_for_nccl: None,
        }
    }

    /// The report on ranks of which the last was changed.
    fn judged(hosts: [&str; 2], change: impl Fn(&mut Facts)) -> String {
        let mut all: Vec<Facts> = hosts.iter().enumerate().map(|(number, host)| rank(number, host)).collect();
        all.iter_mut().skip(1).for_each(change);
        let mut report = Report::default();
        judge(&all, &mut report);
        clocks(&all, &[0.0, 0.002], &mut report);
        report.text()
    }

    #[test]
    fn equal_ranks_with_a_gpu_each_can_train() {
        let text = judged(["n1", "n2"], |_| ());
        assert!(text.ends_with("this job can train"), "{text}");
        assert!(!text.contains("warning"), "{text}");
        assert!(text.contains("at most 2.00 ms from rank 0's (rank 1 on n2)"), "{text}");
    }

    #[test]
    fn each_fault_names_its_ranks_and_its_remedy() {
        type Change = fn(&mut Facts);
        let cases: [(Change, &str, &str); 7] = [
            (|f| f.digest = "def".into(), "rank 1 on n2 with another binary (by SHA-256)", "build once"),
            (|f| f.libtorch = "2.10.0".into(), "another LibTorch than rank 0: 2.10.0, not 2.11.0", "same modules"),
            (|f| f.nccl = Ok("2.20.5".into()), "another NCCL than rank 0: 2.20.5", "launch/setup --cuda"),
            (|f| f.nccl = Err("NCCL cannot be loaded".into()), "rank 1 on n2: NCCL cannot be loaded", "launch/setup"),
            (|f| f.gpu = Ok(None), "on the CPU: rank 1 on n2 (loaded); the others on GPUs", "--gpus-per-node"),
            (
                |f| f.gpu = Err("no libtorch_cuda".into()),
                "rank 1 on n2: no GPU can be used: no libtorch_cuda",
                "--device",
            ),
            (|f| f.wrong_for_nccl = Some("NCCL_SOCKET_IFNAME=x".into()), "rank 1 on n2: NCCL_SOCKET_IFNAME=x", "unset"),
        ];
        for (change, what, remedy) in cases {
            let text = judged(["n1", "n2"], change);
            let fault = text.split("fault:").nth(1).unwrap_or_else(|| panic!("no fault: {text}"));
            assert!(fault.contains(what) && fault.contains(remedy), "{fault}");
        }
    }

    #[test]
    fn a_gpu_for_two_ranks_is_a_fault_unless_nccl_takes_them_for_two_nodes() {
        let text = judged(["n1", "n1"], |_| ());
        assert!(text.contains("ranks 0-1 on n1 share the GPU 0000:01:00"), "{text}");
        let text = judged(["n1", "n1"], |f| f.host_id = Some("other".into()));
        assert!(text.ends_with("this job can train"), "{text}");
        assert!(text.contains("on n1 the 2 ranks with 4 threads together share 2 cores"), "{text}");
        assert!(text.contains("OMP_NUM_THREADS=1"), "{text}");
    }

    #[test]
    fn a_clock_that_is_off_is_a_warning() {
        let mut report = Report::default();
        clocks(&[rank(0, "n1"), rank(1, "n2")], &[0.0, -90.0], &mut report);
        assert!(report.text().contains("clock of rank 1 on n2 is 90.0 s behind rank 0's"), "{}", report.text());
        assert!(report.verdict().is_ok());
    }
}
