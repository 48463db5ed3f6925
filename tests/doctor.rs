//! `lockstep doctor` on jobs that are well, and on jobs with a fault put in: each is named, with its remedy.

use std::fs;
#[cfg(feature = "mpi")]
use std::process::Command;
use std::process::Stdio;

mod common;

#[cfg(feature = "mpi")]
use common::binary;
use common::{finish, snapshot, Output, Workspace};

/// Asserts that the report has all of these.
#[track_caller]
fn reports(output: &Output, parts: &[&str]) {
    for part in parts {
        assert!(output.stdout.contains(part), "no {part:?} in\n{}\n{}", output.stdout, output.stderr);
    }
}

#[test]
fn one_process_needs_no_launcher() {
    let work = Workspace::new();
    let said = work.lockstep("doctor --device cpu").ok();
    reports(&said, &["launcher    none", "PMI         none", "LibTorch    2.", "one rank: nothing to add up"]);
    reports(&said, &["1 of 1 ranks see", "verdict:    this job can train"]);
    assert!(!work.path("runs").exists(), "the probe of the run directory left it behind");
    fs::create_dir(work.path("kept")).unwrap();
    work.lockstep("doctor --device cpu --run-dir kept").ok();
    assert!(work.path("kept").exists() && snapshot(&work.path("kept")).is_empty());
}

#[test]
fn a_run_directory_that_cannot_be_made_is_a_fault() {
    let work = Workspace::new();
    fs::write(work.path("file"), "precious").unwrap();
    let said = work.lockstep("doctor --device cpu --run-dir file/runs").fails(2, &["doctor found 1 fault", "remedy"]);
    reports(&said, &["fault:", "cannot write", "file/runs", "Not a directory", "remedy: name a folder"]);
    assert_eq!(fs::read_to_string(work.path("file")).unwrap(), "precious");
}

#[test]
fn a_report_that_nobody_takes_is_an_error() {
    let work = Workspace::new();
    let mut command = work.command(&["doctor", "--device", "cpu"]);
    command.stdout(Stdio::from(fs::File::options().write(true).open("/dev/full").unwrap()));
    finish(command).fails(4, &["standard output"]);
}

#[test]
fn a_gpu_that_is_asked_for_and_not_there_is_a_fault() {
    if lockstep::device::has_driver() {
        return common::not_run("this machine has an NVIDIA driver");
    }
    let said = Workspace::new().lockstep("doctor --device cuda").fails(2, &["no NVIDIA driver"]);
    reports(&said, &["no GPU can be used", "launch/setup --cuda", "--device cpu"]);
}

#[test]
fn tasks_without_a_pmi_are_refused_with_the_remedy() {
    let work = Workspace::new();
    for task in ["0", "1"] {
        let mut command = work.command(&["doctor", "--device", "cpu"]);
        command.env("SLURM_STEP_NUM_TASKS", "2").env("SLURM_PROCID", task);
        let said = finish(command).fails(2, &["2 processes", "--mpi=pmix", "mpirun"]);
        match task {
            "0" => {
                reports(&said, &["launcher    srun, tasks: 2", "PMI         none", "fault:", "remedy: start the ranks"])
            }
            _ => assert_eq!(said.stdout, "", "every task prints the report"),
        }
    }
}

/// An `srun` that answers `--mpi=list` with this text stands first on PATH.
#[cfg(feature = "mpi")]
fn with_srun(work: &Workspace, list: &str) -> Output {
    script(work, "srun", &format!("[ \"$*\" = --mpi=list ] && printf '{list}' >&2"));
    let mut command = work.command(&["doctor", "--device", "cpu"]);
    let path = format!("{}:{}", work.path("").display(), std::env::var("PATH").unwrap());
    let job = [("SLURM_JOB_ID", "7"), ("SLURM_STEP_NUM_TASKS", "2"), ("SLURM_PROCID", "0"), ("PATH", &path)];
    finish({
        command.envs(job);
        command
    })
}

#[cfg(feature = "mpi")]
#[test]
fn the_remedy_is_one_that_this_slurm_has() {
    let work = Workspace::new();
    let said = with_srun(&work, "MPI plugin types are...\\n\\tnone\\n\\tpmi2\\n").fails(2, &[]);
    reports(&said, &["this Slurm has no PMIx (`srun --mpi=list`: none, pmi2)", "mpirun inside the job"]);
    let said = with_srun(&work, "MPI plugin types are...\\n\\tnone\\n\\tpmix_v4\\n").fails(2, &[]);
    reports(&said, &["start the ranks with `srun --mpi=pmix_v4`, which this Slurm has"]);
}

/// Writes an executable shell script into the folder.
#[cfg(feature = "mpi")]
fn script(work: &Workspace, name: &str, text: &str) -> std::path::PathBuf {
    let path = work.path(name);
    fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
    fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    path
}

/// The command that examines some ranks through `launch/local`, each of which becomes `lockstep` through this script.
#[cfg(feature = "mpi")]
fn ranks(work: &Workspace, ranks: usize, rank: &str) -> Command {
    let rank = format!("rank=\"$OMPI_COMM_WORLD_RANK$PMI_RANK\"\n{rank}\nexec {} \"$@\"", binary());
    let mut command = Command::new("timeout");
    command.arg("600").arg(std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("launch/local"));
    command.args([&ranks.to_string(), "doctor", "--device", "cpu"]).current_dir(work.path(""));
    command.env("LOCKSTEP_BIN", script(work, "rank", &rank)).env("OMP_NUM_THREADS", "1").stdin(Stdio::null());
    command
}

#[cfg(feature = "mpi")]
#[test]
fn ranks_that_are_well_can_train() {
    for n in 2..=3 {
        let work = Workspace::new();
        let said = finish(ranks(&work, n, "")).ok();
        reports(&said, &["PMI         PMI", "linked MPI  /", "fp32", "verdict:    this job can train"]);
        reports(&said, &[&format!("{n} of {n} ranks see rank 0's file there, and rank 0 sees theirs")]);
        assert!(!work.path("runs").exists());
        let rows = |columns: usize| {
            let rows = said.stdout.lines().map(|line| line.split_whitespace().map(String::from).collect::<Vec<_>>());
            rows.filter(move |row| row.len() == columns)
        };
        let layout: Vec<String> = rows(6).filter(|row| row[5] == "cpu").map(|row| row[0].clone()).collect();
        assert_eq!(layout, (0..n).map(|rank| rank.to_string()).collect::<Vec<_>>(), "{}", said.stdout);
        // bytes, ms, algbw, busbw
        let sums: Vec<Vec<f64>> = rows(6)
            .filter(|row| row[0] == "fp32")
            .map(|row| row[2..].iter().map(|x| x.parse().unwrap()).collect())
            .collect();
        assert_eq!(sums.iter().map(|row| row[0] as u64).collect::<Vec<_>>(), [4, 4_000_012, 1 << 20, 16 << 20]);
        let last = &sums[3];
        // Both are printed with three decimals.
        assert!((last[0] / last[1] / 1e6 - last[2]).abs() < 0.001 + 0.02 * last[2], "algbw is bytes by time: {last:?}");
        let busbw = last[2] * 2.0 * (n as f64 - 1.0) / n as f64;
        assert!((busbw - last[3]).abs() < 0.002, "busbw is algbw * 2(n-1)/n: {last:?}");
    }
}

#[cfg(feature = "mpi")]
#[test]
fn another_binary_on_one_rank_is_named() {
    let work = Workspace::new();
    let rank = format!("[ $rank = 1 ] && cp {} other && printf x >>other && exec ./other \"$@\"", binary());
    let said = finish(ranks(&work, 3, &rank)).fails(6, &["another binary"]);
    reports(&said, &["fault:      rank 1 on ", "with another binary (by SHA-256) than rank 0", "remedy: build once"]);
    reports(&said, &["verdict:    this job cannot train: 1 fault"]);
}

#[cfg(feature = "mpi")]
#[test]
fn a_rank_without_the_shared_folder_is_named() {
    let work = Workspace::new();
    // As on a node where the path is a folder of its own.
    let rank = "mkdir -p elsewhere/runs runs; [ $rank = 1 ] && cd elsewhere";
    let said = finish(ranks(&work, 2, rank)).fails(6, &["does not see"]);
    let place = work.path("elsewhere/runs").canonicalize().unwrap();
    let fault = format!(": does not see in {} what rank 0 wrote there: No such file", place.display());
    reports(&said, &["1 of 2 ranks see rank 0's file", "fault:      rank 1 on ", &fault, "remedy: name a folder"]);
    for folder in ["runs", "elsewhere/runs"] {
        assert!(snapshot(&work.path(folder)).is_empty(), "the probe left something in {folder}");
    }
}

#[cfg(feature = "mpi")]
#[test]
fn a_rank_that_may_not_write_is_named() {
    let work = Workspace::new();
    fs::create_dir(work.path("runs")).unwrap();
    let mount = "mount --bind runs runs && mount -o remount,bind,ro runs";
    let permitted = Command::new("unshare").args(["--mount", "sh", "-c", mount]).current_dir(work.path("")).status();
    if !permitted.is_ok_and(|status| status.success()) {
        return common::not_run("mounting a folder read-only in a namespace of its own is not permitted here");
    }
    let rank =
        format!("[ $rank = 1 ] && exec unshare --mount sh -c '{mount} && cd . && exec {} \"$@\"' sh \"$@\"", binary());
    let said = finish(ranks(&work, 2, &rank)).fails(6, &["cannot write there"]);
    reports(
        &said,
        &["fault:      rank 1 on ", "but cannot write there: Read-only file system", "remedy: name a folder"],
    );
    assert!(snapshot(&work.path("runs")).is_empty());
}

#[cfg(feature = "mpi")]
#[test]
fn a_wrong_interface_is_named_before_mpi_ends_the_job() {
    let work = Workspace::new();
    if !finish(ranks(&work, 2, "")).ok().stdout.contains("mpirun of Open MPI") {
        return common::not_run("the variable is Open MPI's, and this is another MPI");
    }
    let mut command = ranks(&work, 2, "");
    command.env("OMPI_MCA_btl_tcp_if_include", "nosuch0").env("OMPI_MCA_btl", "self,tcp");
    let said = finish(command).fails(6, &["OMPI_MCA_btl_tcp_if_include=nosuch0"]);
    reports(&said, &["OMPI_MCA_btl_tcp_if_include=nosuch0 names no interface of this node; it has "]);
    reports(&said, &["remedy: set OMPI_MCA_btl_tcp_if_include to the interface"]);
    // Where the ranks share a node's memory, it does no harm.
    let mut command = ranks(&work, 2, "");
    command.env("OMPI_MCA_btl_tcp_if_include", "nosuch0");
    reports(&finish(command).ok(), &["warning:    on ", "nosuch0 names no interface", "this job can train"]);
}

#[cfg(feature = "mpi")]
#[test]
fn a_rank_that_never_comes_is_given_up_at_the_deadline() {
    let work = Workspace::new();
    let said =
        finish(ranks(&work, 2, "[ $rank = 1 ] && exec sleep 1000")).fails(6, &["starting MPI took longer than 60 s"]);
    reports(&said, &["fault:      starting MPI took longer", "remedy:", "this job cannot train"]);
}
