//! Times the sum of a vector over the ranks, on CPUs; rank 0 prints one JSON object.
//!
//! `LOCKSTEP_BIN=target/release/examples/bench_all_reduce launch/local RANKS MIB`. `all_reduce_s` is the median of the slowest
//! rank's times, `copy_s` that of copying the vector within a rank's memory, all ranks at the same time.

use std::time::{Duration, Instant};

use anyhow::Context;
use lockstep::comm::{Comm, Deadlines};
use lockstep::torch;
use tch::{Device, Kind, Tensor};

const ROUNDS: usize = 20;

fn main() -> anyhow::Result<()> {
    let mib: i64 = std::env::args().nth(1).context("expected one argument: how many MiB")?.parse()?;
    torch::set_threads(Some(1))?;
    let minute = Duration::from_secs(60);
    let comm = Comm::start(Deadlines::default())?;
    let mut vector = Tensor::zeros([mib << 18], (Kind::Float, Device::Cpu));
    let mut other = vector.zeros_like();
    let mut median = |act: &mut dyn FnMut(&mut Tensor) -> anyhow::Result<()>| -> anyhow::Result<f64> {
        let mut times = Vec::new();
        for _ in 0..ROUNDS {
            comm.barrier(minute)?;
            let start = Instant::now();
            act(&mut vector)?;
            let mine = start.elapsed().as_secs_f64();
            times.push(comm.gather(&[mine])?.into_iter().flatten().fold(0.0, f64::max));
        }
        times.sort_by(f64::total_cmp);
        Ok(times[ROUNDS / 2])
    };
    let all_reduce = median(&mut |vector| comm.all_reduce(vector))?;
    let copy = median(&mut |vector| {
        other.copy_(vector);
        Ok(())
    })?;
    if comm.is_root() {
        println!("{{\"all_reduce_s\": {all_reduce}, \"copy_s\": {copy}}}");
    }
    Ok(())
}
