//! `train --dry-run`: what a run will take, before it takes anything.
//!
//! No model is made and nothing is written. Memory is counted from shapes ([`super::memory`]), on top of what this process
//! holds; time is what the step's arithmetic takes at the speed of matrix products of its own shapes, which are measured.

use tch::{Device, Kind, Tensor};

use super::gradients::kept_elements;
use super::kind;
use super::memory::{self, Setting};
use super::start::{open, Opened};
use crate::comm::Comm;
use crate::config::{Config, DeviceChoice, GradDtype, Layout, Plan, Shape};
use crate::data::loader::Loader;
use crate::error::Result;
use crate::model::Gpt;
use crate::torch;

const MIB: f64 = 1048576.0;

/// Says what a run would take. Every rank opens the data and measures; rank 0 shows lines of text.
///
/// # Errors
/// As [`super::train`], for what can be wrong before a model is made.
pub fn dry_run(comm: &mut Comm, mut plan: Plan, mut show: impl FnMut(&str) -> Result<()>) -> Result<()> {
    // A machine without the GPU that is asked for can plan all the same: then nothing is measured.
    let device = torch::select(plan.config.device.name(), comm.local_rank).ok();
    let Opened { threads, tokenizer, loader, .. } = open(comm, &mut plan, || ())?;
    let shape = plan.shape(tokenizer.vocab_size());
    let kind = kind(plan.config.precision);
    let planned_for = device.unwrap_or(Device::Cuda(0));
    let setting = setting(comm, &plan, &shape, threads, planned_for);
    let program_mib = program_mib(&shape, kind);
    let work = Work::of(&plan, &shape, &loader);
    let seconds = device.map_or(f64::NAN, |device| work.seconds(&plan, &shape, device, kind));
    // The ranks of one machine measure at the same time, as they would compute.
    let ranks = comm.gather(&[seconds, program_mib.unwrap_or(f64::NAN)])?;
    if !comm.is_root() {
        return Ok(());
    }
    // NaN, if any rank does not know.
    let most = |column: usize| {
        let numbers = ranks.iter().map(|rank| rank[column]);
        numbers.reduce(|a, b| if a.is_nan() || a > b { a } else { b }).unwrap_or(f64::NAN)
    };
    let (seconds, program_mib) = (most(0), most(1));
    plan.oddities().iter().for_each(|odd| tracing::warn!("{odd}"));
    for line in model_lines(&plan, &shape, &loader, &work) {
        show(&line)?;
    }
    for line in memory_lines(&shape, &setting, program_mib) {
        show(&line)?;
    }
    for line in time_lines(&plan, &shape, &work, seconds) {
        show(&line)?;
    }
    Ok(())
}

/// What the program and its libraries hold once they have trained: as much of them is in memory as a step uses, and LibTorch
/// has started its threads. `None` if the system does not say.
fn program_mib(shape: &Shape, kind: Kind) -> Option<f64> {
    let small = Shape { n_layer: 1, n_head: 1, n_embd: 8, block_size: 2, vocab_size: 8, ..*shape };
    let mut model = Gpt::new(small, Device::Cpu, kind);
    let ids = Tensor::zeros([1, 2], (Kind::Int64, Device::Cpu));
    let weights = Tensor::ones([1, 2], (Kind::Float, Device::Cpu));
    let _ = model.forward_backward(&ids, &ids, &weights, None, 0, &mut |_, _| ());
    torch::measure_peak(Device::Cpu, kind);
    torch::resident_mib()
}

fn setting(comm: &Comm, plan: &Plan, shape: &Shape, threads: usize, device: Device) -> Setting {
    let Config { data, comm: options, optim, train, .. } = &plan.config;
    Setting {
        micro_batch: plan.micro_batch as i64,
        kind: kind(plan.config.precision),
        device,
        has_wire: comm.world_size > 1 && options.grad_dtype == GradDtype::Bf16 && device != Device::Cpu,
        moments: kept_elements(shape.parameters(), options, optim.zero1, comm.rank, comm.world_size),
        threads: threads as i64,
        is_padded: data.layout == Layout::Paragraphs,
        saves_meanwhile: [train.save_every, train.eval_every].iter().any(|&every| (1..train.steps).contains(&every)),
    }
}

/// The arithmetic of one step, all ranks together.
struct Work {
    /// Positions that the blocks compute, padding included.
    positions: f64,
    /// Targets: what the head computes, and what train.csv counts.
    targets: f64,
}

impl Work {
    fn of(plan: &Plan, shape: &Shape, loader: &Loader) -> Self {
        let sequences = plan.config.data.batch_size as f64;
        let width = match plan.config.data.layout {
            Layout::Packed => shape.block_size,
            // A micro-batch is as wide as the longest of its lines, and some line nearly always is too long for a block.
            Layout::Paragraphs => shape.block_size - 1,
        };
        let all: f64 = (0..loader.samples.len()).map(|sample| loader.samples.targets(sample) as f64).sum();
        Self { positions: sequences * width as f64, targets: sequences * all / loader.samples.len() as f64 }
    }

    /// FLOP of the blocks and of the head.
    fn flop(&self, shape: &Shape) -> [f64; 2] {
        let head = 6.0 * (shape.vocab_size * shape.n_embd) as f64;
        let again = if shape.recompute { 4.0 / 3.0 } else { 1.0 };
        [(shape.flop_per_token() - head) * self.positions * again, head * self.targets]
    }

    /// Seconds of a step on this rank, if all of its arithmetic were matrix products of these shapes.
    fn seconds(&self, plan: &Plan, shape: &Shape, device: Device, kind: Kind) -> f64 {
        let (rows, c) = (plan.micro_batch as i64 * shape.block_size, shape.n_embd);
        let blocks = torch::measure_product([rows, c, 4 * c], device, kind);
        let head = torch::measure_product([rows.min(1024), c, shape.vocab_size], device, kind);
        let share = 1.0 / plan.world_size as f64;
        let [in_blocks, in_head] = self.flop(shape);
        share * (in_blocks / blocks + in_head / head)
    }
}

/// A label, and what it is about.
fn line(label: &str, text: &str) -> String {
    format!("{label:<12}{text}")
}

fn model_lines(plan: &Plan, shape: &Shape, loader: &Loader, work: &Work) -> Vec<String> {
    let Config { data, train, .. } = &plan.config;
    let embeddings = (shape.vocab_size + shape.block_size) * shape.n_embd;
    let sequences = train.steps as f64 * data.batch_size as f64;
    let tokens = train.steps as f64 * work.targets;
    vec![
        line("parameters", &format!("{}, of which {embeddings} are embeddings", shape.parameters())),
        line(
            "batch",
            &format!(
                "{} sequences a step: {} x {} x {} (ranks, micro-steps, sequences of at most {} tokens)",
                data.batch_size, plan.world_size, plan.accumulation, plan.micro_batch, data.block_size
            ),
        ),
        line(
            "length",
            &format!(
                "{} steps, {} tokens, {:.2} epochs of {} sequences",
                train.steps,
                short(tokens),
                sequences / loader.samples.len() as f64,
                loader.samples.len()
            ),
        ),
    ]
}

fn memory_lines(shape: &Shape, setting: &Setting, program_mib: f64) -> Vec<String> {
    let parts = memory::parts(shape, setting);
    let counted = parts.iter().map(|(_, bytes)| *bytes as f64).sum::<f64>() / MIB;
    let of = match setting.device {
        Device::Cpu => "resident memory",
        _ => "GPU memory, without CUDA's own",
    };
    let mut lines = vec![line("memory", &format!("MiB of each rank, {of}:"))];
    let mut part = |name: &str, mib: f64| lines.push(format!("{:12}{mib:>9.1}  {name}", ""));
    let program = Some(program_mib).filter(|mib| mib.is_finite() && setting.device == Device::Cpu);
    if let Some(mib) = program {
        part("program and libraries", mib);
    }
    for (name, bytes) in parts.iter().filter(|(_, bytes)| *bytes > 0) {
        part(name, *bytes as f64 / MIB);
    }
    part("in all", counted + program.unwrap_or(0.0));
    lines
}

fn time_lines(plan: &Plan, shape: &Shape, work: &Work, seconds: f64) -> Vec<String> {
    let Config { train, device, .. } = &plan.config;
    let flop: f64 = work.flop(shape).iter().sum();
    let steps = train.steps as f64;
    let time = match seconds.is_finite() {
        true => format!(
            "{} a step, {} in all, if every step were matrix products of its own shapes at {} on each rank; not counted: the \
             rest of its arithmetic, waiting, evaluation, saving",
            duration(seconds),
            duration(seconds * steps),
            format_args!("{}FLOP/s", short(flop / seconds / plan.world_size as f64))
        ),
        false => match device {
            DeviceChoice::Cuda => "not known here: this machine has no GPU to measure".into(),
            _ => "not known: the device has no memory for a product of a step's shape".into(),
        },
    };
    // Weights and both moments in fp32.
    let checkpoint = 12.0 * shape.parameters() as f64;
    let every = if train.save_every == 0 { train.steps } else { train.save_every };
    // The newest, the best, and the one being written.
    let kept = (train.steps.div_ceil(every)).min(train.keep_last + 2);
    vec![
        line("compute", &format!("{}FLOP a step, {}FLOP in all", short(flop), short(flop * steps))),
        line("time", &time),
        line(
            "disk",
            &format!(
                "{}B for a checkpoint, {}B for the {kept} that may lie side by side",
                short(checkpoint),
                short(checkpoint * kept as f64)
            ),
        ),
    ]
}

/// A large number with three digits and a unit's letter.
fn short(number: f64) -> String {
    const UNITS: [(f64, &str); 6] = [(1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")];
    let (size, letter) = UNITS.into_iter().find(|(size, _)| number >= *size).unwrap_or((1.0, ""));
    let value = number / size;
    let digits = if value >= 99.95 {
        0
    } else if value >= 9.995 {
        1
    } else {
        2
    };
    format!("{value:.digits$} {letter}")
}

/// Seconds in the unit that suits them.
fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 1.0 => format!("{:.1} ms", s * 1e3),
        s if s < 120.0 => format!("{s:.1} s"),
        s if s < 7200.0 => format!("{:.1} minutes", s / 60.0),
        s => format!("{:.1} hours", s / 3600.0),
    }
}
