//! Kernels of our own, `kernels.cu`, launched on LibTorch's tensors. They are compiled for the GPU at hand when they are first
//! asked for.

use std::sync::{Arc, OnceLock};

use cudarc::driver::sys::CUdevice_attribute as Attribute;
use cudarc::driver::{CudaContext, CudaFunction, CudaStream, LaunchConfig, PushKernelArg};
use tch::{Device, Kind, Tensor};
use tracing::warn;

use super::compile::load_module;
use super::libtorch::AdamWNumbers;

/// At most so many threads of a block of [`Kernels::cross_entropy`], as its __launch_bounds__ say.
const ROW_THREADS: u32 = 512;

/// The kernels, on this process's GPU. They run on the stream on which LibTorch computes, after what it was given before.
pub struct Kernels {
    stream: Arc<CudaStream>,
    cross_entropy: CudaFunction,
    add_norm: CudaFunction,
    add_norm_backward: CudaFunction,
    adamw: CudaFunction,
}

/// The kernels for this device: `None` on a CPU, and if they cannot be had, which the log says once. Then LibTorch's do.
pub fn kernels(device: Device) -> Option<&'static Kernels> {
    // A process computes on one GPU.
    static KERNELS: OnceLock<Option<Kernels>> = OnceLock::new();
    let Device::Cuda(index) = device else { return None };
    let load =
        || Kernels::load(index).map_err(|reason| warn!("LibTorch computes without kernels of our own: {reason}"));
    KERNELS.get_or_init(|| load().ok()).as_ref()
}

impl Kernels {
    fn load(gpu: usize) -> Result<Self, String> {
        let failed = |what: &str| {
            let what = what.to_string();
            move |e: cudarc::driver::DriverError| format!("{what}: {e}")
        };
        let context = CudaContext::new(gpu).map_err(failed("opening the GPU"))?;
        let ask = |attribute| context.attribute(attribute).map_err(failed("asking for the GPU's architecture"));
        let major = ask(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = ask(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        let module = load_module(&context, 10 * major + minor)?;
        let function = |name| module.load_function(name).map_err(failed(name));
        Ok(Self {
            cross_entropy: function("cross_entropy")?,
            add_norm: function("add_norm")?,
            add_norm_backward: function("add_norm_backward")?,
            adamw: function("adamw")?,
            stream: context.default_stream(),
        })
    }

    /// Turns rows of logits into the gradients of their losses, in place and in one pass.
    ///
    /// Of each row of `logits` (n, S) bf16 the first `words` count; S is a multiple of 8. With `targets` (n, 1) int64 and
    /// `weights` (n, 1) fp32, `losses` (n,) fp32 become weight times negative log-likelihood, and the logits its gradient,
    /// weight * (softmax - one-hot), and 0 beyond the words.
    ///
    /// # Panics
    /// If the tensors are not as described; if the GPU fails.
    pub fn cross_entropy(&self, logits: &Tensor, words: i64, targets: &Tensor, weights: &Tensor, losses: &Tensor) {
        let (rows, stride) = (logits.size()[0], logits.size()[1]);
        assert!(words <= stride && stride % 8 == 0, "{words} of {stride} logits");
        assert!([targets, weights, losses].iter().all(|tensor| tensor.numel() as i64 == rows));
        let weight_stride = weights.stride()[0] as i32;
        let [logits, targets, losses] =
            [(logits, Kind::BFloat16), (targets, Kind::Int64), (losses, Kind::Float)].map(|(tensor, kind)| {
                assert!(tensor.is_contiguous());
                address(tensor, kind)
            });
        let weights = address(weights, Kind::Float);
        let (words, stride) = (words as i32, stride as i32);
        let mut launch = self.stream.launch_builder(&self.cross_entropy);
        launch.arg(&logits).arg(&targets).arg(&weights).arg(&losses).arg(&words).arg(&stride).arg(&weight_stride);
        let threads = whole_warps(stride / 8).min(ROW_THREADS);
        let blocks = LaunchConfig { grid_dim: (rows as u32, 1, 1), block_dim: (threads, 1, 1), shared_mem_bytes: 0 };
        // SAFETY: the arguments are the kernel's by number and type, and the tensors have the shapes and types that it reads
        // and writes, as checked above. LibTorch gives memory back to itself in the order of this stream.
        unsafe { launch.launch(blocks) }.unwrap_or_else(|e| panic!("CUDA: launching cross_entropy: {e}"));
    }

    /// The sum of rows x + dropout(branch) and its layer norm, all (n, C) bf16, with `norm`'s weight and bias (C,); and each
    /// row's mean and reciprocal deviation, (n, 2) fp32. Without a branch, `x` is the sum; what is not asked for is undefined.
    ///
    /// # Panics
    /// As [`Kernels::cross_entropy`].
    pub fn add_norm(
        &self,
        x: &Tensor,
        branch: Option<&Tensor>,
        dropout: Option<Dropout>,
        norm: Option<(&Tensor, Option<&Tensor>)>,
    ) -> (Tensor, Tensor, Tensor) {
        let rows = Rows::of(x);
        let sum = if branch.is_some() { x.empty_like() } else { Tensor::new() };
        let (normed, stats) = match norm {
            Some(_) => (x.empty_like(), Tensor::empty([rows.rows.into(), 2], (Kind::Float, x.device()))),
            None => (Tensor::new(), Tensor::new()),
        };
        let [x, branch, sum_at, normed_at] =
            [Some(x), branch, Some(&sum), Some(&normed)].map(|tensor| tensor.map_or(0, |tensor| rows.address(tensor)));
        let (weight, bias) =
            norm.map_or((0, 0), |(weight, bias)| (rows.of_width(weight), bias.map_or(0, |b| rows.of_width(b))));
        let stats_at = address(&stats, Kind::Float);
        let (key, dropped) = dropout.map_or((0, 0), |dropout| dropout.numbers());
        let mut launch = self.stream.launch_builder(&self.add_norm);
        launch.arg(&x).arg(&branch).arg(&sum_at).arg(&weight).arg(&bias).arg(&normed_at).arg(&stats_at);
        launch.arg(&rows.rows).arg(&rows.width).arg(&key).arg(&dropped);
        // SAFETY: as in `cross_entropy`; what is null, the kernel leaves out.
        unsafe { launch.launch(rows.in_blocks(MOST_BLOCKS)) }
            .unwrap_or_else(|e| panic!("CUDA: launching add_norm: {e}"));
        (sum, normed, stats)
    }

    /// The backward pass of [`Kernels::add_norm`]: from the gradients of the sum's other uses `dsum` and of its norm the
    /// gradients of x and of the branch, all (n, C) bf16, and those of weight and bias in parts that are to be added up,
    /// (parts, 2, C) fp32. Without a norm, only the branch's is not `dsum` itself.
    ///
    /// # Panics
    /// As [`Kernels::cross_entropy`].
    pub fn add_norm_backward(
        &self,
        dsum: &Tensor,
        norm: Option<Normed>,
        dropout: Option<Dropout>,
    ) -> (Tensor, Tensor, Tensor) {
        let rows = Rows::of(dsum);
        let blocks = rows.in_blocks(if norm.is_some() { MOST_PARTS } else { MOST_BLOCKS });
        let (dx, parts) = match &norm {
            Some(_) => {
                let shape = [i64::from(blocks.grid_dim.0), 2, i64::from(rows.width)];
                (dsum.empty_like(), Tensor::empty(shape, (Kind::Float, dsum.device())))
            }
            None => (Tensor::new(), Tensor::new()),
        };
        let dbranch = if dropout.is_some() { dsum.empty_like() } else { Tensor::new() };
        let (dsum_at, dx_at, dbranch_at) = (rows.address(dsum), rows.address(&dx), rows.address(&dbranch));
        let [dnormed, sum, stats, weight] = norm.map_or([0; 4], |norm| {
            let stats = address(norm.stats, Kind::Float);
            [rows.address(norm.grad), rows.address(norm.sum), stats, rows.of_width(norm.weight)]
        });
        let parts_at = address(&parts, Kind::Float);
        let (key, dropped) = dropout.map_or((0, 0), |dropout| dropout.numbers());
        let mut launch = self.stream.launch_builder(&self.add_norm_backward);
        launch
            .arg(&dsum_at)
            .arg(&dnormed)
            .arg(&sum)
            .arg(&stats)
            .arg(&weight)
            .arg(&dx_at)
            .arg(&dbranch_at)
            .arg(&parts_at);
        launch.arg(&rows.rows).arg(&rows.width).arg(&key).arg(&dropped);
        // SAFETY: as in `cross_entropy`; what is null, the kernel leaves out.
        unsafe { launch.launch(blocks) }.unwrap_or_else(|e| panic!("CUDA: launching add_norm_backward: {e}"));
        let dbranch = if dropout.is_some() { dbranch } else { dx.shallow_clone() };
        (dx, dbranch, parts)
    }

    /// One AdamW update, in place. Nothing changes if the norm is not finite, for which the host does not wait.
    ///
    /// # Panics
    /// As [`Kernels::cross_entropy`].
    pub fn adamw(&self, update: &Update) {
        let Update { parts, copy, norm, cuts, from, numbers, clip, step } = update;
        let n = copy.numel() as i64;
        assert!(parts.iter().all(|part| part.numel() as i64 == n && part.is_contiguous()));
        let [weights, grads, means, squares] = parts.each_ref().map(|part| address(part, Kind::Float));
        let (copy, norm, cuts_at) =
            (address(copy, Kind::BFloat16), address(norm, Kind::Double), address(cuts, Kind::Int64));
        let cuts = cuts.numel() as i32;
        let AdamWNumbers { lr, betas, weight_decay, eps } = *numbers;
        let step = *step as f64;
        let corrections = [1.0 - betas[0].powf(step), (1.0 - betas[1].powf(step)).sqrt()];
        let [lr, beta1, beta2, decay, eps, clip, correction1, correction2] =
            [lr, betas[0], betas[1], weight_decay, eps, *clip, corrections[0], corrections[1]].map(|x| x as f32);
        let mut launch = self.stream.launch_builder(&self.adamw);
        launch.arg(&weights).arg(&grads).arg(&means).arg(&squares).arg(&copy).arg(&norm).arg(&cuts_at).arg(&cuts);
        launch.arg(from).arg(&n).arg(&lr).arg(&beta1).arg(&beta2).arg(&decay).arg(&eps).arg(&clip);
        launch.arg(&correction1).arg(&correction2);
        let blocks = LaunchConfig {
            grid_dim: (((n - 1) / i64::from(UPDATE_THREADS) + 1) as u32, 1, 1),
            block_dim: (UPDATE_THREADS, 1, 1),
            shared_mem_bytes: 0,
        };
        // SAFETY: as in `cross_entropy`.
        unsafe { launch.launch(blocks) }.unwrap_or_else(|e| panic!("CUDA: launching adamw: {e}"));
    }
}

/// What [`Kernels::adamw`] updates, and by what.
pub struct Update<'a> {
    /// Weights, their gradient and both moments, (n,) fp32 each.
    pub parts: [Tensor; 4],
    /// The weights' bf16 copy (n,), which the update makes anew.
    pub copy: Tensor,
    /// The norm of the whole gradient, (1,) fp64.
    pub norm: &'a Tensor,
    /// Numbers of weights, (2 m,) int64: from the first of each pair to the second they decay.
    pub cuts: &'a Tensor,
    /// The number of the first weight.
    pub from: i64,
    #[allow(missing_docs)]
    pub numbers: AdamWNumbers,
    /// The norm that the gradient is scaled down to, if it has a larger one; 0 for any.
    pub clip: f64,
    /// Counts from 1, and corrects the moments' bias.
    pub step: usize,
}

/// Threads of a block of [`Kernels::adamw`], each of which updates one weight.
const UPDATE_THREADS: u32 = 256;
/// Most channels of [`Kernels::add_norm`]'s rows, which are a multiple of eight.
pub const MOST_CHANNELS: i64 = 8 * 512;
/// Blocks that fill every GPU, each of which takes one row after another;
const MOST_BLOCKS: u32 = 2048;
/// and of those that leave a part of a sum each.
const MOST_PARTS: u32 = 512;

/// A norm, as [`Kernels::add_norm_backward`] needs it.
#[derive(Clone, Copy)]
pub struct Normed<'a> {
    /// The gradient of its result, (n, C) bf16.
    pub grad: &'a Tensor,
    /// What was normed, (n, C) bf16.
    pub sum: &'a Tensor,
    /// Its rows' means and deviations, (n, 2) fp32.
    pub stats: &'a Tensor,
    /// (C,) bf16
    pub weight: &'a Tensor,
}

/// Dropout: its probability, to 1/65,536, and what fixes its draws.
#[derive(Debug, Clone, Copy)]
pub struct Dropout {
    /// Of 0 to 1.
    pub probability: f64,
    /// Equal keys draw the same.
    pub key: u64,
}

impl Dropout {
    /// The key, and of 65,536 numbers how many are dropped.
    fn numbers(self) -> (u64, u32) {
        (self.key, ((self.probability * 65536.0).round() as u32).min(65535))
    }
}

/// The rows of a contiguous (n, C) bf16 tensor.
struct Rows {
    rows: i32,
    width: i32,
}

impl Rows {
    fn of(tensor: &Tensor) -> Self {
        let [rows, width] = [0, 1].map(|d| tensor.size()[d]);
        assert!(width % 8 == 0 && width <= MOST_CHANNELS, "{width} channels");
        Self { rows: rows as i32, width: width as i32 }
    }

    /// Where another tensor of the same shape lies; null if it is undefined.
    fn address(&self, tensor: &Tensor) -> u64 {
        let is_like = || tensor.size() == [i64::from(self.rows), i64::from(self.width)] && tensor.is_contiguous();
        assert!(!tensor.defined() || is_like(), "{tensor:?}");
        address(tensor, Kind::BFloat16)
    }

    /// Where a tensor of one row lies.
    fn of_width(&self, tensor: &Tensor) -> u64 {
        assert!(tensor.size() == [i64::from(self.width)], "{tensor:?}");
        address(tensor, Kind::BFloat16)
    }

    /// At most so many blocks of a thread for each eight channels, in whole warps.
    fn in_blocks(&self, most: u32) -> LaunchConfig {
        let threads = whole_warps(self.width / 8);
        LaunchConfig { grid_dim: ((self.rows as u32).min(most), 1, 1), block_dim: (threads, 1, 1), shared_mem_bytes: 0 }
    }
}

/// So many threads, and more up to a multiple of a warp's 32.
fn whole_warps(threads: i32) -> u32 {
    (threads as u32).next_multiple_of(32)
}

/// Where a GPU's tensor of this kind lies; null if it is undefined.
fn address(tensor: &Tensor, kind: Kind) -> u64 {
    if !tensor.defined() {
        return 0;
    }
    assert!(tensor.device().is_cuda() && tensor.kind() == kind, "{tensor:?}");
    tensor.data_ptr() as u64
}
