//! The timing comparison: the same training on one device after another.
//!
//! Each device has a process of its own, `lockstep train`, so that nothing one run leaves behind (threads, warm caches, a
//! CUDA context) is part of another's figures, and what is timed is what a user runs. Seed, batches and weights are the
//! same: they follow from the configuration, not from the device.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use schemars::JsonSchema;
use serde::Serialize;
use signal_hook::consts::{SIGINT, SIGKILL, SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals;
use signal_hook::low_level::emulate_default_handler;
use tracing::{info, warn};

use crate::config::{in_place, Config, DeviceChoice};
use crate::error::{Error, Result};
use crate::files::write_durably;
use crate::launcher::{self, Launch};
use crate::run::tables::{header, rounded, with_header, Table, TrainRow};
use crate::stop::exit_now;

/// First steps that no median and no rate counts: kernels are chosen, memory is taken, and a GPU's clock rises. Of a run
/// of fewer than ten steps, the first half.
const WARM_UP: usize = 5;

/// What is compared, and where the table goes.
pub struct Comparison<'a> {
    /// The run's YAML file.
    pub config: &'a Path,
    /// `key=value`, as for `train`.
    pub overrides: &'a [String],
    /// Optimizer steps on each device.
    pub steps: usize,
    /// Each once; the others' speed-up is that over the first.
    pub devices: &'a [DeviceChoice],
    /// The table's file. The runs' folders are beside it.
    pub out: &'a Path,
    /// Options of the log for `train`, such as `-q`.
    pub log_options: &'a [&'a str],
}

/// A row of compare.csv.
#[derive(Debug, Clone, Default, PartialEq, Serialize, JsonSchema)]
pub struct CompareRow {
    /// `cpu` or `cuda`.
    pub device: &'static str,
    /// Number of ranks: 1.
    pub world_size: usize,
    /// Optimizer steps done.
    pub steps: usize,
    /// Training time of all steps, without the program's start and the last checkpoint.
    pub total_s: f64,
    /// Median of `step_ms` after the warm-up: the first 5 steps, or half of fewer than 10.
    pub step_ms_median: f64,
    /// Tokens predicted a second, after the warm-up.
    pub tokens_per_s: f64,
    /// Loss of the last step. On all devices it is nearly the same, or something is wrong.
    pub final_loss: f64,
    /// The first device's `step_ms_median` divided by this one's.
    pub speedup: f64,
}

impl CompareRow {
    /// Sums up a run, with a speed-up of 1; `None` if there are no rows.
    fn of(device: DeviceChoice, rows: &[TrainRow]) -> Option<Self> {
        let last = rows.last()?;
        let (warm_up, measured) = rows.split_at(warm_up(rows.len()));
        let mut step_ms: Vec<f64> = measured.iter().map(|row| row.step_ms).collect();
        let tokens = last.tokens - warm_up.last().map_or(0, |row| row.tokens);
        let seconds = step_ms.iter().sum::<f64>() / 1000.0;
        Some(Self {
            device: device.name(),
            world_size: last.world_size,
            steps: last.step,
            total_s: last.elapsed_s,
            step_ms_median: rounded(median(&mut step_ms)),
            tokens_per_s: rounded(tokens as f64 / seconds),
            final_loss: last.loss,
            speedup: 1.0,
        })
    }
}

/// Trains on each device in turn. After each, the table so far is in the file, and `show` gets what is new of it.
///
/// # Errors
/// Usage, before anything is run, for a configuration or a device list that cannot be compared; storage, if the table
/// cannot be written; that of `train`, if a run fails. Rows of the devices before it are kept.
pub fn compare(comparison: &Comparison<'_>, mut show: impl FnMut(&str) -> Result<()>) -> Result<()> {
    let Comparison { devices, out, steps, .. } = *comparison;
    comparison.check()?;
    // Once: a signal that nobody listens to any more would be lost.
    let signals = Signals::new([SIGINT, SIGTERM, SIGUSR1]);
    let mut signals = signals.map_err(|e| Error::Usage(format!("cannot handle signals: {e}")))?;
    let mut rows: Vec<CompareRow> = Vec::new();
    let mut shown = 0;
    for &device in devices {
        let folder = new_folder(out)?;
        info!("training {steps} steps on {}", device.name());
        let mut row = comparison.measure(device, &folder, &mut signals).map_err(|e| {
            // An empty one has nothing to tell.
            let kept = fs::remove_dir(&folder).is_err();
            let kept =
                if kept { format!(" (its run directory, {}, is kept)", folder.display()) } else { String::new() };
            e.context(format!("comparing on {}{kept}", device.name()))
        })?;
        remove(&folder);
        if let Some(first) = rows.first() {
            row.speedup = rounded(first.step_ms_median / row.step_ms_median);
        }
        rows.push(row);
        let table = with_header(&rows)?;
        write_durably(out, table.as_bytes())?;
        show(table[shown..].trim_end())?;
        shown = table.len();
    }
    Ok(())
}

impl Comparison<'_> {
    /// Refuses what can be known to fail, since a run may take long.
    fn check(&self) -> Result<()> {
        if let Some(ranks @ 2..) = Launch::from_environment().world_size {
            return usage(format!(
                "compare runs once, and found itself one of {ranks} ranks that would slow each other down; start it \
                 without a launcher, or with `srun --ntasks=1`"
            ));
        }
        for (number, device) in self.devices.iter().enumerate() {
            if self.devices[..number].contains(device) {
                return usage(format!(
                    "--devices: expected each device once, found {} twice; to see how much a device's times vary, \
                     compare again with another --out",
                    device.name()
                ));
            }
        }
        let own = own_overrides(DeviceChoice::Cpu, self.steps);
        for item in self.overrides {
            let key = |item: &str| item.split('=').next().unwrap_or_default().trim().to_owned();
            if own.iter().any(|own| key(own) == key(item)) {
                return usage(format!(
                    "--set {item}: compare sets this key itself; name the devices with --devices and the number of steps \
                     with --steps: each step is logged, and none is interrupted by an evaluation, a save or a sample"
                ));
            }
        }
        let overrides = [self.overrides, &own].concat();
        let plan = Config::load(self.config, &overrides)?.validate(1);
        plan.map_err(|e| in_place(e, self.config, &overrides))?;
        match fs::read(self.out) {
            Ok(bytes) if !bytes.is_empty() && !bytes.starts_with(header::<CompareRow>().as_bytes()) => {
                Err(Error::Storage(format!(
                    "{} exists and is not a comparison (expected it to begin with {}); name another --out",
                    self.out.display(),
                    header::<CompareRow>()
                ))
                .into())
            }
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::write(self.out, e)),
            _ => Ok(()),
        }
    }

    /// Trains on one device in an empty folder, and sums up what its train.csv says.
    fn measure(&self, device: DeviceChoice, folder: &Path, signals: &mut Signals) -> Result<CompareRow> {
        let program = std::env::current_exe()
            .map_err(|e| Error::Usage(format!("the system does not say where this program is: {e}")))?;
        let mut train = Command::new(&program);
        train.args(self.log_options).arg("train").arg("--config").arg(self.config).arg("--run-dir").arg(folder);
        for item in self.overrides.iter().chain(&own_overrides(device, self.steps)) {
            train.arg("--set").arg(item);
        }
        // It must not take this process's place among ranks, but be a world of one.
        let is_launchers = |name: &OsString| name.to_str().is_some_and(launcher::is_variable);
        for (name, _) in std::env::vars_os().filter(|(name, _)| is_launchers(name)) {
            train.env_remove(name);
        }
        // stdout is for the table.
        train.stdin(Stdio::null()).stdout(Stdio::null());
        let status = self.run(train, folder, device, signals)?;
        if !status.success() {
            return Err(failed(status, device));
        }
        let path = folder.join("train.csv");
        let rows: Vec<TrainRow> = Table::rows(&path)?;
        let row = CompareRow::of(device, &rows).filter(|_| rows.len() == self.steps);
        let row = row.ok_or_else(|| {
            let (path, found) = (path.display(), rows.len());
            Error::Storage(format!("{path}: expected the rows of {} steps, found {found}; compare again", self.steps))
        })?;
        info!(
            "{}: {} ms a step, {:.0} tokens/s, not counting the first {} steps",
            row.device,
            row.step_ms_median,
            row.tokens_per_s,
            warm_up(row.steps)
        );
        Ok(row)
    }

    /// Runs a command to its end. A signal that ends this process ends the command first: without its parent it would go
    /// on for nobody.
    fn run(
        &self,
        mut command: Command,
        folder: &Path,
        device: DeviceChoice,
        signals: &mut Signals,
    ) -> Result<ExitStatus> {
        let program = command.get_program().to_owned();
        let cannot = |e: io::Error| Error::Usage(format!("cannot run {}: {e}", program.display()));
        let mut child = command.spawn().map_err(cannot)?;
        loop {
            if let Some(signal) = signals.pending().next() {
                end(&mut child);
                remove(folder);
                warn!(
                    "stopped by a signal before {} was measured; {} has the devices before it",
                    device.name(),
                    self.out.display()
                );
                // Nothing is saved that could resume: the exit code is the signal's.
                let _ = emulate_default_handler(signal);
                exit_now(128 + signal as u8);
            }
            match child.try_wait() {
                Ok(None) => std::thread::sleep(Duration::from_millis(20)),
                Ok(Some(status)) => return Ok(status),
                Err(e) => {
                    end(&mut child);
                    return Err(cannot(e).into());
                }
            }
        }
    }
}

/// What makes a training a measurement. Only the end of the run is saved, outside of the time that counts.
fn own_overrides(device: DeviceChoice, steps: usize) -> Vec<String> {
    vec![
        format!("device={}", device.name()),
        format!("train.steps={steps}"),
        "train.log_every=1".into(),
        "train.eval_every=0".into(),
        "train.save_every=0".into(),
        "train.sample_every=0".into(),
        "train.tensorboard=false".into(),
    ]
}

fn failed(status: ExitStatus, device: DeviceChoice) -> anyhow::Error {
    let remedy = match device {
        DeviceChoice::Cuda => "correct that, or compare without it: --devices cpu",
        _ => "correct that, and compare again",
    };
    match (status.code(), status.signal().unwrap_or_default()) {
        (Some(code), _) => Error::with_code(
            code,
            format!("`lockstep train` ended with exit code {code}, for the reason it gives above; {remedy}"),
        ),
        (None, SIGKILL) => Error::Usage(format!(
            "`lockstep train` was killed, as the system does when memory runs short; a smaller data.micro_batch \
             takes less; {remedy}"
        ))
        .into(),
        (None, signal) => anyhow::anyhow!("`lockstep train` was ended by signal {signal}; {remedy}"),
    }
}

fn end(child: &mut Child) {
    // It may have ended by itself meanwhile.
    let _ = child.kill();
    let _ = child.wait();
}

/// Makes an empty folder beside a file: `compare.csv.run-1`, or the first higher number that is free. Not in /tmp, which
/// may be a part of the memory, and small: a large model's run ends with a checkpoint.
fn new_folder(out: &Path) -> Result<PathBuf> {
    let mut number = 1;
    loop {
        let mut name = out.as_os_str().to_owned();
        name.push(format!(".run-{number}"));
        let folder = PathBuf::from(name);
        match fs::create_dir(&folder) {
            Ok(()) => return Ok(folder),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => number += 1,
            Err(e) => return Err(Error::write(&folder, e)),
        }
    }
}

fn remove(folder: &Path) {
    if let Err(e) = fs::remove_dir_all(folder) {
        warn!("cannot remove {}: {e}; nothing needs it any more", folder.display());
    }
}

/// Steps at the beginning of a run of so many that are not counted.
fn warm_up(steps: usize) -> usize {
    WARM_UP.min(steps / 2)
}

/// The median of one number or more; sorts them.
fn median(numbers: &mut [f64]) -> f64 {
    numbers.sort_by(f64::total_cmp);
    let middle = numbers.len() / 2;
    match numbers.len() % 2 {
        1 => numbers[middle],
        _ => (numbers[middle - 1] + numbers[middle]) / 2.0,
    }
}

fn usage<T>(message: String) -> Result<T> {
    Err(Error::Usage(message).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(step_ms: &[f64]) -> Vec<TrainRow> {
        let row = |(index, &step_ms): (usize, &f64)| TrainRow {
            step: index + 1,
            tokens: 100 * (index as u64 + 1),
            loss: 10.0 - index as f64,
            ppl: 1.0,
            lr: 0.1,
            grad_norm: 1.0,
            step_ms,
            data_ms: 0.0,
            compute_ms: step_ms,
            comm_exposed_ms: 0.0,
            optimizer_ms: 0.0,
            tokens_per_s: 0.0,
            mfu: None,
            memory_mib: None,
            world_size: 1,
            elapsed_s: step_ms / 1000.0,
        };
        step_ms.iter().enumerate().map(row).collect()
    }

    #[test]
    fn the_first_steps_are_left_out() {
        let mut step_ms = vec![9000.0; WARM_UP];
        step_ms.extend([10.0, 30.0, 20.0, 40.0, 1000.0]);
        let row = CompareRow::of(DeviceChoice::Cpu, &rows(&step_ms)).unwrap();
        // 500 tokens in 1.1 seconds; neither the warm-up nor one slow step moves the median.
        assert_eq!((row.steps, row.step_ms_median, row.tokens_per_s), (10, 30.0, 454.545));
        assert_eq!((row.total_s, row.final_loss, row.speedup), (1.0, 1.0, 1.0));
        assert_eq!([1, 2, 3, 9, 10, 50].map(warm_up), [0, 1, 1, 4, 5, 5]);
        assert_eq!(CompareRow::of(DeviceChoice::Cpu, &rows(&[7.0])).unwrap().step_ms_median, 7.0);
        assert_eq!(CompareRow::of(DeviceChoice::Cpu, &rows(&[900.0, 900.0, 8.0, 7.0])).unwrap().step_ms_median, 7.5);
        assert_eq!(CompareRow::of(DeviceChoice::Cpu, &[]), None);
    }

    #[test]
    fn the_columns_are_those_written() {
        let row = CompareRow::of(DeviceChoice::Cuda, &rows(&[1.0])).unwrap();
        assert_eq!(with_header(&[row]).unwrap(), header::<CompareRow>() + "\ncuda,1,1,0.001,1.0,100000.0,10.0,1.0\n");
    }
}
