//! Kernels of our own against LibTorch's plain operators in double precision. They run on a GPU, or on the emulated one, which
//! executes the same source.

use std::path::Path;
use std::process::Command;

use lockstep::torch::{kernels, select, Kernels};
use tch::{Device, Kind, Tensor};

use crate::common::{finish, not_run};

#[test]
fn kernels_compute_what_libtorch_computes() {
    if std::env::var_os("LIBTORCH").is_none() {
        return not_run("LIBTORCH is not set (. .venv/lockstep.env)");
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let libraries = root.join("target/emulated-gpu");
    let mut build = Command::new(root.join("tests/emulated_gpu/build.sh"));
    build.arg(&libraries);
    finish(build).ok();
    let cache = tempfile::tempdir().unwrap();
    let mut again = Command::new(std::env::current_exe().unwrap());
    again.args(["--ignored", "--test-threads=1", "kernels::on_a_gpu"]);
    again.env("LD_LIBRARY_PATH", libraries).env("XDG_CACHE_HOME", cache.path());
    let said = finish(again).ok();
    assert!(said.stdout.contains("1 passed"), "{}", said.stdout);
}

#[test]
#[ignore = "needs a GPU; the test above gives it the emulated one"]
fn on_a_gpu_every_kernel_is_compared() {
    let device = select("cuda", 0).unwrap();
    let kernels = kernels(device).expect("the kernels are compiled");
    cross_entropy_is_softmax_in_double_precision(kernels, device);
    what_is_not_finite_shows(kernels, device);
}

/// Numbers that look drawn, the same each time.
fn numbers(shape: &[i64], spread: f64) -> Tensor {
    let numel: i64 = shape.iter().product();
    let places = Tensor::arange(numel, (Kind::Double, Device::Cpu));
    (((places * 12.9898).sin() * 43758.5453).frac() * spread).view(shape)
}

/// The largest excess of |found - expected| over `relative` * |expected| + `absolute`; not above 0 if all are near.
fn excess(found: &Tensor, expected: &Tensor, relative: f64, absolute: f64) -> f64 {
    let found = found.to_device(Device::Cpu).to_kind(Kind::Double);
    let bound = expected.abs() * relative + absolute;
    ((found - expected).abs() - bound).max().double_value(&[])
}

fn cross_entropy_is_softmax_in_double_precision(kernels: &Kernels, device: Device) {
    // Rows shorter and longer than a block, ends within eight numbers, and GPT-2's.
    for (words, stride) in [(1, 64), (64, 64), (509, 512), (4097, 4160), (50257, 50304)] {
        for spread in [1.0, 40.0] {
            let rows = 6;
            let logits = numbers(&[rows, stride], spread).to_kind(Kind::BFloat16);
            let exact = logits.narrow(1, 0, words).to_kind(Kind::Double);
            let targets: Vec<i64> = [0, words - 1, words / 2, words / 3, 7 % words, 8 % words].to_vec();
            let targets = Tensor::from_slice(&targets).view([rows, 1]);
            for one_weight in [false, true] {
                let weights = match one_weight {
                    true => Tensor::full([1, 1], 0.25, (Kind::Float, Device::Cpu)).expand([rows, 1], false),
                    false => Tensor::from_slice(&[1.0f32, 0.5, 0.0, 3.0, 1e-4, 0.25]).view([rows, 1]),
                };
                let exact_weights = weights.to_kind(Kind::Double);
                let log_softmax = exact.log_softmax(1, Kind::Double);
                let losses = -(log_softmax.gather(1, &targets, false) * &exact_weights).view([rows]);
                let one_hot = exact.zeros_like().scatter_value(1, &targets, 1.0);
                let gradient = (log_softmax.exp() - one_hot) * &exact_weights;

                let found = logits.to_device(device);
                let weights = match one_weight {
                    true => Tensor::full([1, 1], 0.25, (Kind::Float, device)).expand([rows, 1], false),
                    false => weights.to_device(device),
                };
                let found_losses = Tensor::full([rows], f64::NAN, (Kind::Float, device));
                kernels.cross_entropy(&found, words, &targets.to_device(device), &weights, &found_losses);
                let at = format!("{words} of {stride}, spread {spread}");
                assert!(excess(&found_losses, &losses, 1e-5, 1e-6) <= 0.0, "losses, {at}: {found_losses} {losses}");
                // A bf16 number is rounded by up to 2^-9 of itself; the rest is fp32's.
                let distance = excess(&found.narrow(1, 0, words), &gradient, 2f64.powi(-9) + 1e-4, 1e-7);
                assert!(distance <= 0.0, "gradient, {at}: {distance:e}");
                let beyond = found.narrow(1, words, stride - words).to_device(Device::Cpu).abs();
                assert!(words == stride || beyond.max().double_value(&[]) == 0.0, "beyond the words, {at}");
            }
        }
    }
}

fn what_is_not_finite_shows(kernels: &Kernels, device: Device) {
    for bad in [f64::NAN, f64::INFINITY] {
        let logits = numbers(&[1, 64], 1.0).to_kind(Kind::BFloat16).to_device(device);
        let _ = logits.narrow(1, 40, 1).fill_(bad);
        let targets = Tensor::from_slice(&[3i64]).view([1, 1]).to_device(device);
        let weights = Tensor::ones([1, 1], (Kind::Float, device));
        let losses = Tensor::zeros([1], (Kind::Float, device));
        kernels.cross_entropy(&logits, 60, &targets, &weights, &losses);
        assert!(!losses.double_value(&[0]).is_finite(), "{bad}");
        assert!(!logits.abs().max().double_value(&[]).is_finite(), "{bad}");
    }
}
