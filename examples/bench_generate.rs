//! Times the generation of text by an untrained GPT-2 on this CPU; prints one JSON object.
//!
//! `cargo run --release --example bench_generate -- PRESET fp32|bf16 SEQUENCES TOKENS`. `tokens_per_s` counts the tokens of
//! all sequences after a prompt of one, `read_gb_per_s` is how fast all threads together read the weights and do nothing
//! with them, `gb_per_token` the weights that a step reads.

use std::time::Instant;

use anyhow::{bail, Context};
use lockstep::config::Config;
use lockstep::model::generate::{generate, Sampling};
use lockstep::model::Gpt;
use lockstep::torch;
use rayon::prelude::*;
use tch::{Device, Kind};

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [preset, dtype, sequences, tokens] = &arguments[..] else {
        bail!("expected four arguments: a preset, fp32 or bf16, how many sequences, and how many tokens of each");
    };
    let (sequences, tokens): (usize, usize) = (sequences.parse()?, tokens.parse()?);
    let (kind, bytes) = match dtype.as_str() {
        "fp32" => (Kind::Float, 4),
        "bf16" => (Kind::BFloat16, 2),
        other => bail!("expected fp32 or bf16, found {other}"),
    };
    torch::bound_waiting(None);
    torch::set_threads(None)?;
    let config = format!("{{name: bench, data: {{block_size: 1024}}, model: {{preset: {preset}}}}}");
    let plan = Config::parse(&config, &[])?.validate(1).context("no such preset")?;
    let mut model = Gpt::new(plan.shape(50_257), Device::Cpu, Kind::Float);
    model.initialize(1);
    let sampling = Sampling { temperature: 0.8, top_k: Some(40), top_p: None, seed: 1 };
    let prompts = vec![vec![464]; sequences];
    let time = |tokens| {
        let start = Instant::now();
        generate(&model, &prompts, tokens, &sampling, 50_256, kind);
        start.elapsed().as_secs_f64()
    };
    time(4);
    // What a prompt costs, and how the weights are laid out, is in both.
    let (few, many) = (time(1), time(tokens + 1));
    let read = || {
        let start = Instant::now();
        let add = |part: &[f32]| {
            let mut sums = [0f32; 64];
            part.chunks_exact(64).for_each(|chunk| sums.iter_mut().zip(chunk).for_each(|(sum, x)| *sum += x));
            sums.iter().sum::<f32>()
        };
        let weights = torch::floats(&model.parameters.flat);
        std::hint::black_box(weights.par_chunks(1 << 18).map(add).sum::<f32>());
        4e-9 * weights.len() as f64 / start.elapsed().as_secs_f64()
    };
    let mut reads: Vec<f64> = (0..9).map(|_| read()).collect();
    reads.sort_by(f64::total_cmp);
    // All matrices but the table of positions, of which a step reads one row.
    let matrices =
        model.parameters.specs.iter().filter(|spec| spec.shape.len() == 2 && !spec.name.ends_with("wpe.weight"));
    let weights: i64 = matrices.map(|spec| spec.numel()).sum();
    println!(
        "{{\"tokens_per_s\": {}, \"read_gb_per_s\": {}, \"gb_per_token\": {}}}",
        (sequences * tokens) as f64 / (many - few),
        reads[4],
        1e-9 * (bytes * weights) as f64
    );
    Ok(())
}
