//! The tensors of a checkpoint: safetensors files, written from flat memory and read back into it.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt::Display;
use std::fs;
use std::ops::Range;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use safetensors::tensor::{Metadata, TensorView};
use safetensors::{Dtype, SafeTensors, View};
use tch::{no_grad, Device, Kind, Tensor};

use super::{damaged, digest, is_optimizer, read, sync, Entry, Manifest, MODEL};
use crate::error::{Error, Result};
use crate::model::gpt::WPE;
use crate::model::parameters::Parameters;
use crate::optim::adamw::AdamW;

/// The names of Adam's moments in the optimizer's files.
pub const MOMENTS: [&str; 2] = ["exp_avg", "exp_avg_sq"];
/// Where an optimizer file's elements are in the flat buffer: `0..4096,8192..12288`.
const RANGES: &str = "flat_range";
/// No longer header is read: a thousand layers' has 2 MB.
const MAX_HEADER: u64 = 8 << 20;
const ANOTHER_MODEL: &str = "it is of another model or vocabulary; give the configuration and data it was trained with";

/// Tensors copied to host memory, and what their file says about them.
pub struct Copied {
    tensors: Vec<(String, Tensor)>,
    metadata: Option<HashMap<String, String>>,
}

impl Copied {
    /// The weights under their names.
    pub fn of_model(parameters: &Parameters) -> Self {
        let flat = to_host(&parameters.flat);
        let named = parameters.specs.iter().map(|spec| (spec.name.clone(), spec.view(&flat)));
        Self { tensors: named.collect(), metadata: None }
    }

    /// The moments of an optimizer's ranges.
    pub fn of_optimizer(optimizer: &AdamW) -> Self {
        let moments = [&optimizer.exp_avg, &optimizer.exp_avg_sq];
        let named = MOMENTS.iter().zip(moments).map(|(name, flat)| (name.to_string(), to_host(flat)));
        let text: Vec<String> =
            optimizer.ranges.iter().map(|range| format!("{}..{}", range.start, range.end)).collect();
        let metadata = HashMap::from([(RANGES.to_string(), text.join(","))]);
        Self { tensors: named.collect(), metadata: Some(metadata) }
    }

    /// Writes a safetensors file, makes it durable, and says what was written.
    pub fn write(self, path: &Path) -> Result<Entry> {
        write_tensors(path, &self.tensors, self.metadata)?;
        digest(path).map_err(|e| Error::write(path, e))
    }
}

/// A copy that training does not change.
fn to_host(flat: &Tensor) -> Tensor {
    no_grad(|| flat.to_device_(Device::Cpu, Kind::Float, false, true))
}

/// Writes tensors of fp32 or bf16 in host memory, which need not be contiguous, as a durable safetensors file.
///
/// # Errors
/// Storage, if it cannot be written.
pub fn write_tensors(
    path: &Path,
    tensors: &[(String, Tensor)],
    metadata: Option<HashMap<String, String>>,
) -> Result<()> {
    let fail = |e: std::io::Error| Error::write(path, e);
    let views = tensors.iter().map(|(name, tensor)| (name, HostView::new(tensor)));
    safetensors::serialize_to_file(views, metadata, path).map_err(|e| Error::write(path, e))?;
    // safetensors makes files that only their owner may read; a run is as open as its folders are.
    let folder = fs::metadata(path.parent().unwrap_or(path)).map_err(fail)?.permissions();
    let mode = PermissionsExt::mode(&folder) & 0o666;
    fs::set_permissions(path, PermissionsExt::from_mode(mode)).map_err(fail)?;
    sync(path)
}

/// Reads a verified checkpoint's weights into parameters of the same names and shapes.
///
/// # Errors
/// Storage, naming the tensor that is missing, superfluous or of another shape or type.
pub fn load_model(checkpoint: &Path, parameters: &mut Parameters) -> Result<()> {
    load(checkpoint, parameters, |_| false).map(drop)
}

/// As [`load_model`], for a new run whose blocks may be shorter than the checkpoint's: the positions beyond are left out.
/// Returns how many positions the checkpoint has.
///
/// # Errors
/// As [`load_model`]; so if the blocks are longer.
pub fn load_first_positions(checkpoint: &Path, parameters: &mut Parameters) -> Result<usize> {
    load(checkpoint, parameters, |name| name == WPE)
}

/// Reads all rows of each tensor, or the first ones of those that `may_be_cut` names. Returns the rows of the position
/// embedding.
fn load(checkpoint: &Path, parameters: &mut Parameters, may_be_cut: impl Fn(&str) -> bool) -> Result<usize> {
    let path = checkpoint.join(MODEL);
    let bytes = read(&path)?;
    let tensors = parse_tensors(&path, &bytes)?;
    for name in tensors.names() {
        if !parameters.specs.iter().any(|spec| spec.name == name) {
            return damaged(&path, &format!("holds `{name}`, which this model does not have: {ANOTHER_MODEL}"));
        }
    }
    let mut positions = 0;
    for spec in &parameters.specs {
        let mut expected: Vec<usize> = spec.shape.iter().map(|&n| n as usize).collect();
        let rows = tensors.tensor(&spec.name).ok().and_then(|found| found.shape().first().copied()).unwrap_or(0);
        if may_be_cut(&spec.name) {
            if (1..expected[0]).contains(&rows) {
                let what = format!("has {rows} positions, and data.block_size is {}; use at most {rows}", expected[0]);
                return damaged(&path, &what);
            }
            // No row at all is no table of positions: the check below names it.
            expected[0] = expected[0].max(rows);
        }
        if spec.name == WPE {
            positions = rows;
        }
        let found = checked(&path, &tensors, &spec.name, &expected)?;
        let source = Tensor::from_data_size(&found.data()[..spec.numel() as usize * 4], &spec.shape, Kind::Float);
        no_grad(|| spec.view(&parameters.flat).copy_(&source));
    }
    parameters.publish();
    Ok(positions)
}

/// A verified checkpoint's optimizer state, in one file or in one of each rank that wrote it.
pub struct OptimizerFiles(Vec<(PathBuf, Vec<u8>, Vec<Range<i64>>)>);

impl OptimizerFiles {
    /// Reads the files; together they must hold each of `numel` elements once.
    ///
    /// # Errors
    /// Storage, naming the file that does not fit.
    pub fn open(checkpoint: &Path, numel: i64) -> Result<Self> {
        let manifest = Manifest::read(checkpoint)?;
        let mut files = Vec::new();
        for name in manifest.files.keys().filter(|name| is_optimizer(name)) {
            let path = checkpoint.join(name);
            let bytes = read(&path)?;
            let (_, header) = read_header(&path, &bytes)?;
            let text =
                header.metadata().as_ref().and_then(|metadata| metadata.get(RANGES)).cloned().unwrap_or_default();
            let Some(ranges) = parse_ranges(&text) else {
                return damaged(&path, &format!("has `{RANGES}` \"{text}\"; expected ranges such as 0..4096"));
            };
            files.push((path, bytes, ranges));
        }
        let mut all: Vec<&Range<i64>> = files.iter().flat_map(|(_, _, ranges)| ranges).collect();
        all.sort_by_key(|range| range.start);
        let end = all.iter().try_fold(0, |end, range| (range.start == end).then_some(range.end));
        if end != Some(numel) {
            let what =
                format!("holds the optimizer's state of {all:?}, this model has elements 0..{numel}: {ANOTHER_MODEL}");
            return damaged(checkpoint, &what);
        }
        Ok(Self(files))
    }

    /// Fills `into` with a moment of the flat elements from `start` on.
    ///
    /// # Errors
    /// As [`load_model`].
    pub fn read(&self, moment: &str, start: i64, into: &mut Tensor) -> Result<()> {
        let end = start + into.size()[0];
        for (path, bytes, ranges) in &self.0 {
            let tensors = parse_tensors(path, bytes)?;
            let length: i64 = ranges.iter().map(|range| range.end - range.start).sum();
            let found = checked(path, &tensors, moment, &[length as usize])?;
            let mut done = 0;
            for range in ranges {
                let (from, to) = (range.start.max(start), range.end.min(end));
                if from < to {
                    let first = ((done + from - range.start) * 4) as usize;
                    let bytes = &found.data()[first..first + ((to - from) * 4) as usize];
                    let source = Tensor::from_data_size(bytes, &[to - from], Kind::Float);
                    no_grad(|| into.narrow(0, from - start, to - from).copy_(&source));
                }
                done += range.end - range.start;
            }
        }
        Ok(())
    }
}

/// `0..4096,8192..12288`; empty if a rank updates nothing.
fn parse_ranges(text: &str) -> Option<Vec<Range<i64>>> {
    let number = |text: &str| text.parse::<i64>().ok().filter(|&n| n >= 0);
    let range = |text: &str| text.split_once("..").and_then(|(from, to)| Some(number(from)?..number(to)?));
    text.split(',').filter(|part| !part.is_empty()).map(|part| range(part).filter(|r| r.start < r.end)).collect()
}

/// A tensor of fp32 or bf16 as the bytes of a safetensors file; copied when it is written.
struct HostView {
    tensor: Tensor,
    dtype: Dtype,
    shape: Vec<usize>,
}

impl HostView {
    fn new(tensor: &Tensor) -> Self {
        let shape = tensor.size().iter().map(|&n| n as usize).collect();
        let dtype = if tensor.kind() == Kind::BFloat16 { Dtype::BF16 } else { Dtype::F32 };
        Self { tensor: tensor.detach(), dtype, shape }
    }
}

impl View for HostView {
    fn dtype(&self) -> Dtype {
        self.dtype
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        let mut bytes = vec![0; self.data_len()];
        self.tensor.contiguous().copy_data_u8(&mut bytes, self.tensor.numel());
        bytes.into()
    }
    fn data_len(&self) -> usize {
        self.tensor.numel() * self.tensor.kind().elt_size_in_bytes()
    }
}

/// The fp32 tensor of this name and shape.
fn checked<'a>(path: &Path, tensors: &SafeTensors<'a>, name: &str, expected: &[usize]) -> Result<TensorView<'a>> {
    let Ok(found) = tensors.tensor(name) else {
        return damaged(path, &format!("lacks `{name}`, which this model has: {ANOTHER_MODEL}"));
    };
    if found.dtype() != Dtype::F32 || found.shape() != expected {
        return damaged(
            path,
            &format!(
                "holds `{name}` as {:?} {:?}, this model has it as F32 {expected:?}: {ANOTHER_MODEL}",
                found.dtype(),
                found.shape()
            ),
        );
    }
    Ok(found)
}

/// The tensors of a safetensors file's bytes.
///
/// # Errors
/// Storage, if they are none.
pub fn parse_tensors<'a>(path: &Path, bytes: &'a [u8]) -> Result<SafeTensors<'a>> {
    read_header(path, bytes)?;
    SafeTensors::deserialize(bytes).map_err(|e| not_tensors(path, e))
}

/// Reads a file's header, which says where each tensor is; the library checks shapes, offsets and the file's size.
fn read_header(path: &Path, bytes: &[u8]) -> Result<(usize, Metadata)> {
    let length = bytes.first_chunk().map_or(0, |length| u64::from_le_bytes(*length));
    if length > MAX_HEADER {
        return Err(not_tensors(path, format!("its header has {length} bytes, expected at most {MAX_HEADER}")));
    }
    SafeTensors::read_metadata(bytes).map_err(|e| not_tensors(path, e))
}

fn not_tensors(path: &Path, reason: impl Display) -> anyhow::Error {
    Error::Storage(format!("{} is not a safetensors file: {reason}", path.display())).into()
}
