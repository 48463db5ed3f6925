//! `lockstep doctor` of one process: what it finds, and that it leaves nothing behind.

use std::fs;
use std::process::Stdio;

use crate::common::{finish, not_run, snapshot, Output, Workspace};

#[test]
fn one_process_needs_no_launcher() {
    let work = Workspace::new();
    let said = work.lockstep("doctor --device cpu").ok();
    said.reports(&["launcher    none", "PMI         none", "LibTorch    2.", "one rank: nothing to add up"]);
    said.reports(&["1 of 1 ranks see", "verdict:    this job can train"]);
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
    said.reports(&["fault:", "cannot write", "file/runs", "Not a directory", "remedy: name a folder"]);
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
    if lockstep::torch::has_driver() {
        return not_run("this machine has an NVIDIA driver");
    }
    let said = Workspace::new().lockstep("doctor --device cuda").fails(2, &["no NVIDIA driver"]);
    said.reports(&["no GPU can be used", "launch/setup --cuda", "--device cpu"]);
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
                said.reports(&["launcher    srun, tasks: 2", "PMI         none", "fault:", "remedy: start the ranks"])
            }
            _ => assert_eq!(said.stdout, "", "every task prints the report"),
        }
    }
}

/// What doctor reports if the first `srun` on PATH answers `--mpi=list` with this text.
#[cfg(feature = "mpi")]
fn with_srun(work: &Workspace, list: &str) -> Output {
    work.script("srun", &format!("[ \"$*\" = --mpi=list ] && printf '{list}' >&2"));
    let mut command = work.command(&["doctor", "--device", "cpu"]);
    let path = format!("{}:{}", work.path("").display(), std::env::var("PATH").unwrap());
    let job = [("SLURM_JOB_ID", "7"), ("SLURM_STEP_NUM_TASKS", "2"), ("SLURM_PROCID", "0"), ("PATH", &path)];
    command.envs(job);
    finish(command)
}

#[cfg(feature = "mpi")]
#[test]
fn the_remedy_is_one_that_this_slurm_has() {
    let work = Workspace::new();
    let said = with_srun(&work, "MPI plugin types are...\\n\\tnone\\n\\tpmi2\\n").fails(2, &[]);
    said.reports(&["this Slurm has no PMIx (`srun --mpi=list`: none, pmi2)", "mpirun inside the job"]);
    let said = with_srun(&work, "MPI plugin types are...\\n\\tnone\\n\\tpmix_v4\\n").fails(2, &[]);
    said.reports(&["start the ranks with `srun --mpi=pmix_v4`, which this Slurm has"]);
}
