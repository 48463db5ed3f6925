//! `lockstep export` and `lockstep import`: Hugging Face's folders.

use std::path::Path;

use tch::Device;
use tracing::info;

use super::args::{Dtype, Run};
use super::inference::{load_on, Loaded};
use super::print;
use crate::config::Precision;
use crate::error::Result;
use crate::files::resolve_new;
use crate::interop;
use crate::run::checkpoint;
use crate::run::RunDir;

/// Writes a checkpoint's model as a folder that `transformers` loads.
pub fn export(run: &Run, out: &Path, dtype: Dtype) -> Result<()> {
    // Before a large model is read.
    resolve_new(out)?;
    let Loaded { plan, tokenizer, model, state, .. } = load_on(run, None, 1, |_| Ok(Device::Cpu))?;
    let dir = RunDir(run.run_dir.clone());
    let config = &plan.config;
    let precision = match dtype {
        Dtype::Fp32 => Precision::Fp32,
        Dtype::Bf16 => Precision::Bf16,
    };
    let exported = interop::Exported { dir: &dir, config, tokenizer: &tokenizer, state: &state, model: &model };
    interop::export(&exported, out, precision)?;
    print::line(&format!(
        "{}: {} parameters, vocabulary {}, from {}",
        out.display(),
        model.parameters.numel(),
        tokenizer.vocab_size(),
        dir.checkpoints().join(checkpoint::name(state.step)).display()
    ))
}

/// Makes a run directory of a folder with a GPT-2.
pub fn import(from: &Path, out: &Path) -> Result<()> {
    let config = interop::import(from, out)?;
    let data = config.data.dir.display();
    info!(
        "to evaluate it: lockstep prepare --source SOURCE --tokenizer {} --out {data} (or change data.dir in {})",
        RunDir(out.to_path_buf()).tokenizer().display(),
        RunDir(out.to_path_buf()).config().display()
    );
    let sizes = [config.model.n_layer, config.model.n_head, config.model.n_embd].map(Option::unwrap_or_default);
    print::line(&format!(
        "{}: {} layers, {} heads, width {}, {} positions",
        out.display(),
        sizes[0],
        sizes[1],
        sizes[2],
        config.data.block_size
    ))
}
