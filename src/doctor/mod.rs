//! `lockstep doctor`: looks at a job as its ranks see it, tries what training needs of it, and says what to mend.
//!
//! Rank 0 prints what all have found: a table, then each fault with its remedy. Faults that would end the process inside
//! MPI are looked for before MPI starts. No wait is longer than the deadline, and every rank ends with the same verdict.

use std::panic::{catch_unwind, AssertUnwindSafe};
use std::path::Path;
use std::time::Duration;

use tch::Device;

use crate::comm::{Comm, Deadlines};
use crate::error::{exit_code, from_panic, tell_end, Result};

mod facts;
mod judge;
mod launch;
mod libraries;
mod nccl_log;
mod network;
mod probes;
mod reach;
mod report;

use facts::Facts;
use launch::{network_remedy, Job};
pub use libraries::run as run_libraries;
use nccl_log::NcclLog;
use report::{Place, Report};

/// How much later than rank 0 the others fail, so that rank 0 can speak first.
const HEAD_START: Duration = Duration::from_secs(3);

/// Examines the job and shows the report, on rank 0 alone. `run_dir` is probed on all ranks; `device` is cpu, cuda or auto.
/// The ranks wait for each other until the deadline, at the start and in each exchange.
///
/// # Errors
/// Communication, if a fault is between the ranks; usage, if all are in how the job was started or in what a
/// machine has; what `show` returns.
pub fn run(run_dir: &Path, device: &str, deadline: Duration, show: impl Fn(&str) -> Result<()>) -> Result<()> {
    let mut report = Report::default();
    let launch = Job::from_environment();
    launch.describe(&mut report);
    launch.check_networks(run_dir, &mut report);
    // Before MPI's thread exists: it sets variables.
    let log = NcclLog::ask();
    let joined = if report.is_faulty() {
        None
    } else {
        launch.announce(deadline);
        let deadlines = Deadlines { startup: deadline, step: deadline, save: deadline };
        let joined = Comm::start(deadlines);
        let fault = |error| report.fault(place(&error), format!("{error:#}"), launch.remedy(place(&error)));
        joined.map_err(fault).ok()
    };
    let Some(mut comm) = joined else {
        match launch.is_first() {
            true => show(&report.text())?,
            // A launcher may end all ranks when the first of them fails.
            false => std::thread::sleep(HEAD_START),
        }
        return report.verdict();
    };
    let examined = catch_unwind(AssertUnwindSafe(|| examine(&mut comm, run_dir, device, &log, &mut report)));
    if let Err(error) = examined.unwrap_or_else(|panic| Err(from_panic(panic.as_ref()))) {
        report.fault(place(&error), format!("rank {}: {error:#}", comm.rank), network_remedy());
        return broken(&comm, &report, show);
    }
    let shown = if comm.is_root() { show(&report.text()) } else { Ok(()) };
    // Nobody leaves before rank 0 has spoken; the exit code is rank 0's.
    comm.barrier(comm.deadlines.step)?;
    shown?;
    if comm.is_root() {
        report.verdict()
    } else {
        Ok(())
    }
}

/// The end if the ranks can no longer exchange anything: each says what it knows.
fn broken(comm: &Comm, report: &Report, show: impl Fn(&str) -> Result<()>) -> Result<()> {
    let verdict = report.verdict();
    if comm.is_root() {
        show(&report.text())?;
    } else if let Err(error) = &verdict {
        tell_end(error, Some(comm.rank));
        std::thread::sleep(HEAD_START);
    }
    if let Err(error) = &verdict {
        comm.abort(exit_code(error));
    }
    verdict
}

fn place(error: &anyhow::Error) -> Place {
    if exit_code(error) == 2 {
        Place::Setup
    } else {
        Place::Peers
    }
}

fn examine(comm: &mut Comm, run_dir: &Path, wanted: &str, log: &NcclLog, report: &mut Report) -> Result<()> {
    let (mine, device) = Facts::collect(comm, wanted)?;
    let texts = comm.gather_text(&serde_json::to_string(&mine)?)?;
    let all: Vec<Facts> = texts.iter().map(|text| serde_json::from_str(text)).collect::<std::result::Result<_, _>>()?;
    judge::judge(&all, report);
    judge::clocks(&all, &probes::clocks(comm)?, report);
    let on_gpus = !report.is_faulty() && all.iter().all(|facts| matches!(facts.gpu, Ok(Some(_))));
    probes::shared_folder(comm, run_dir, &all, report)?;
    if !on_gpus {
        return probes::all_reduce(comm, Device::Cpu, &all, report);
    }
    comm.use_device(device)?;
    probes::all_reduce(comm, device, &all, report)?;
    if comm.is_joined() {
        let (network, transports) = log.read();
        let told = comm.gather_text(&format!("network {network}; transport {transports}"))?;
        for (facts, text) in all.iter().zip(told) {
            report.row("NCCL", &format!("{}: {text}", facts.name()));
        }
    }
    Ok(())
}
