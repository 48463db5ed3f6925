//! Kernels of our own against LibTorch's plain operators in double precision. They run on a GPU, or on the emulated one, which
//! executes the same source.

use std::path::Path;
use std::process::Command;

use lockstep::torch::{kernels, select, AdamWNumbers, Dropout, Kernels, Normed, Update};
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
    again.args(["--ignored", "--nocapture", "--test-threads=1", "kernels::on_a_gpu"]);
    again.env("LD_LIBRARY_PATH", libraries).env("XDG_CACHE_HOME", cache.path());
    let said = again.output().unwrap();
    let text = [said.stdout, said.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
    assert!(said.status.success() && text.contains("1 passed"), "{text}");
}

#[test]
#[ignore = "needs a GPU; the test above gives it the emulated one"]
fn on_a_gpu_every_kernel_is_compared() {
    let device = select("cuda", 0).unwrap();
    let kernels = kernels(device).expect("the kernels are compiled");
    cross_entropy_is_softmax_in_double_precision(kernels, device);
    what_is_not_finite_shows(kernels, device);
    sums_and_norms_are_those_of_double_precision(kernels, device);
    dropout_draws_the_same_again_and_evenly(kernels, device);
    adamw_is_that_of_double_precision(kernels, device);
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
                // A bf16 number is rounded by up to 2^-8 of itself; the rest is fp32's.
                let distance = excess(&found.narrow(1, 0, words), &gradient, 2f64.powi(-8) + 1e-4, 1e-7);
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

/// A GPU's tensor on the CPU, in double precision.
fn exact(tensor: &Tensor) -> Tensor {
    tensor.to_device(Device::Cpu).to_kind(Kind::Double)
}

/// What dropout leaves of a (n, C) tensor: 0, or the factor that makes up for it; seen from a tensor of ones.
fn mask(kernels: &Kernels, shape: [i64; 2], dropout: Option<Dropout>, device: Device) -> Tensor {
    let ones = Tensor::ones(shape, (Kind::BFloat16, device));
    match dropout {
        None => exact(&ones),
        Some(Dropout { probability, .. }) => {
            let (sum, ..) = kernels.add_norm(&ones.zeros_like(), Some(&ones), dropout, None);
            // Which are kept is what is asked; bf16 rounds the factor.
            exact(&sum).not_equal(0.0).to_kind(Kind::Double) / (1.0 - (probability * 65536.0).round() / 65536.0)
        }
    }
}

fn sums_and_norms_are_those_of_double_precision(kernels: &Kernels, device: Device) {
    // Narrower than a warp's share and GPT-2's; fewer rows than blocks and more.
    for (rows, width) in [(5, 48), (700, 48), (3, 768), (2, 1600), (2100, 8), (2, 4096)] {
        for (has_branch, has_bias, probability) in [(false, true, 0.0), (true, true, 0.0), (true, false, 0.1)] {
            let half = |spread: f64, shift: f64| {
                (numbers(&[rows, width], spread) + shift).to_kind(Kind::BFloat16).to_device(device)
            };
            let [x, branch, dsum, dnormed] = [(2.0, 0.3), (1.0, -0.1), (1.5, 0.0), (1.0, 0.2)].map(|(a, b)| half(a, b));
            let weight = (numbers(&[width], 0.5) + 1.0).to_kind(Kind::BFloat16).to_device(device);
            let bias = has_bias.then(|| numbers(&[width], 0.3).to_kind(Kind::BFloat16).to_device(device));
            let dropout = (probability > 0.0).then_some(Dropout { probability, key: 7 << 40 | 5 });
            let at = format!("{rows} x {width}, branch {has_branch}, bias {has_bias}, dropout {probability}");
            let (sum, normed, stats) =
                kernels.add_norm(&x, has_branch.then_some(&branch), dropout, Some((&weight, bias.as_ref())));

            let mask = mask(kernels, [rows, width], dropout, device);
            let sum = if has_branch { sum } else { x.shallow_clone() };
            let expected = if has_branch { exact(&x) + exact(&branch) * &mask } else { exact(&x) };
            let half_ulp = 2f64.powi(-8);
            assert!(excess(&sum, &expected, half_ulp + 1e-5, 1e-6) <= 0.0, "sum, {at}");

            // The norm and its gradients are those of the sum as it is kept, in bf16.
            let leaf = exact(&sum).set_requires_grad(true);
            let wide = exact(&weight).set_requires_grad(true);
            let shift = bias.as_ref().map_or(wide.zeros_like(), exact).detach().set_requires_grad(true);
            let expected = leaf.layer_norm([width], Some(&wide), Some(&shift), 1e-5, false);
            assert!(excess(&normed, &expected.detach(), half_ulp + 1e-4, 1e-5) <= 0.0, "norm, {at}");
            (expected * exact(&dnormed)).sum(Kind::Double).backward();

            let norm = Normed { grad: &dnormed, sum: &sum, stats: &stats, weight: &weight };
            let (dx, dbranch, parts) = kernels.add_norm_backward(&dsum, Some(norm), dropout);
            let expected = exact(&dsum) + leaf.grad();
            let scale = expected.abs().max().double_value(&[]);
            let distance = excess(&dx, &expected, half_ulp + 1e-4, 1e-4 * scale);
            assert!(distance <= 0.0, "gradient of the sum, {at}: {distance:e}");
            assert!(
                excess(&dbranch, &(exact(&dx) * &mask), half_ulp + 1e-4, 1e-6) <= 0.0,
                "gradient of the branch, {at}"
            );
            let sums = parts.sum_dim_intlist(0, false, Kind::Float);
            for (place, expected) in [wide.grad(), shift.grad()].iter().enumerate() {
                let scale = expected.abs().max().double_value(&[]);
                let distance = excess(&sums.get(place as i64), expected, 1e-4, 1e-4 * scale);
                assert!(distance <= 0.0, "gradient of weight or bias, {at}: {distance:e}");
            }
        }
    }
}

fn dropout_draws_the_same_again_and_evenly(kernels: &Kernels, device: Device) {
    let shape = [256, 768];
    let at = |key, probability| mask(kernels, shape, Some(Dropout { probability, key }), device);
    for probability in [0.1, 0.5] {
        let one = at(11, probability);
        assert!(one.equal(&at(11, probability)));
        let dropped = one.eq(0.0).to_kind(Kind::Double);
        // Of 196,608 draws 5 deviations.
        let bound = 5.0 * (probability * (1.0 - probability) / (256.0 * 768.0)).sqrt();
        assert!((dropped.mean(Kind::Double).double_value(&[]) - probability).abs() < bound);
        // Neither rows, nor columns, nor keys draw alike: what two of them drop together is the product of what each does.
        let (other, along) = (at(12, probability).eq(0.0).to_kind(Kind::Double), dropped.roll([1], [1]));
        for other in [other, along, dropped.roll([1], [0])] {
            let both = (&dropped * other).mean(Kind::Double).double_value(&[]);
            assert!((both - probability * probability).abs() < bound, "{both}");
        }
        // The backward pass leaves what the forward pass left, and no other.
        let ones = Tensor::ones(shape, (Kind::BFloat16, device));
        let (_, dbranch, _) = kernels.add_norm_backward(&ones, None, Some(Dropout { probability, key: 11 }));
        assert!(exact(&dbranch).not_equal(0.0).equal(&one.not_equal(0.0)));
    }
}

fn adamw_is_that_of_double_precision(kernels: &Kernels, device: Device) {
    let n = 9377;
    let numbers_of = || AdamWNumbers { lr: 1e-2, betas: [0.9, 0.95], weight_decay: 0.1, eps: 1e-8 };
    let AdamWNumbers { lr, betas: [beta1, beta2], weight_decay, eps } = numbers_of();
    // Of the weights from 4,096 on those before 5,000, from 6,000 to 7,001, and after 13,000 decay.
    let (from, step) = (4096, 3);
    let cuts = Tensor::from_slice(&[0i64, 5000, 6000, 7001, 13000, 20000]).to_device(device);
    let places = Tensor::arange_start(from, from + n, (Kind::Int64, Device::Cpu));
    let decays = places.less(5000) + places.greater_equal(6000) * places.less(7001) + places.greater_equal(13000);
    for (norm, clip) in [(3.0, 1.0), (0.5, 1.0), (3.0, 0.0), (f64::NAN, 1.0), (f64::INFINITY, 0.0)] {
        let drawn = |spread: f64, shift: f64| (numbers(&[n], spread) + shift).to_kind(Kind::Float).to_device(device);
        let parts = [drawn(1.0, 0.0), drawn(0.7, 0.1), drawn(0.3, 0.0), drawn(0.2, 0.0).abs()];
        let before = parts.each_ref().map(exact);
        let copy = Tensor::zeros([n], (Kind::BFloat16, device));
        let update = Update {
            parts: parts.each_ref().map(Tensor::shallow_clone),
            copy: copy.shallow_clone(),
            norm: &Tensor::from_slice(&[norm]).to_device(device),
            cuts: &cuts,
            from,
            numbers: numbers_of(),
            clip,
            step,
        };
        kernels.adamw(&update);
        let [weights, grads, means, squares] = before;
        if !f64::is_finite(norm) {
            let same = [&weights, &grads, &means, &squares].iter().zip(&parts).all(|(old, new)| exact(new).equal(old));
            assert!(same && exact(&copy).abs().max().double_value(&[]) == 0.0, "norm {norm}");
            continue;
        }
        let grads = grads * if clip > 0.0 { (clip / (norm + 1e-6)).min(1.0) } else { 1.0 };
        let means = means * beta1 + &grads * (1.0 - beta1);
        let squares = squares * beta2 + grads.square() * (1.0 - beta2);
        let [correction1, correction2] = [1.0 - beta1.powi(step as i32), (1.0 - beta2.powi(step as i32)).sqrt()];
        let shrink = decays.to_kind(Kind::Double) * (-lr * weight_decay) + 1.0;
        let weights = weights * shrink - &means * (lr / correction1) / (squares.sqrt() / correction2 + eps);
        for (found, expected) in parts.iter().zip([Some(weights), None, Some(means), Some(squares)]) {
            let distance = expected.map_or(0.0, |expected| excess(found, &expected, 2e-6, 2e-7));
            assert!(distance <= 0.0, "norm {norm}, clip {clip}: {distance:e}");
        }
        assert!(copy.equal(&parts[0].to_kind(Kind::BFloat16)), "the copy is that of the new weights");
    }
}
