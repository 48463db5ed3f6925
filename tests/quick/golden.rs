//! The model against PyTorch: golden values, made by `tests/golden/model/make.py` from an independent implementation.
//!
//! Tensors are compared in norm: single elements change if sums are reordered, norms hardly do.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use lockstep::config::Shape;
use lockstep::config::{Activation, Norm, Optim};
use lockstep::model::Gpt;
use lockstep::optim::adamw::{self, squares, AdamW};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use tch::{Device, Kind, Tensor};

/// One golden file: its settings and its tensors.
struct Golden {
    settings: BTreeMap<String, String>,
    tensors: BTreeMap<String, Tensor>,
}

impl Golden {
    fn read(case: &str) -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/model").join(format!("{case}.safetensors"));
        let bytes = std::fs::read(path).unwrap();
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let settings = header.metadata().clone().unwrap().into_iter().collect();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let tensors = file.tensors().into_iter().map(|(name, view)| (name, tensor(&view))).collect();
        Self { settings, tensors }
    }

    fn number<T: std::str::FromStr>(&self, name: &str) -> T {
        self.settings[name].parse().unwrap_or_else(|_| panic!("{name}: {}", self.settings[name]))
    }

    fn config(&self) -> Shape {
        Shape {
            n_layer: self.number("n_layer"),
            n_head: self.number("n_head"),
            n_embd: self.number("n_embd"),
            block_size: self.number("block_size"),
            vocab_size: self.number("vocab_size"),
            dropout: 0.0,
            norm: if self.settings["norm"] == "pre" { Norm::Pre } else { Norm::Post },
            activation: if self.settings["activation"] == "gelu" { Activation::Gelu } else { Activation::Relu },
            tied_head: self.number("tied_head"),
            bias: self.number("bias"),
            recompute: false,
        }
    }

    fn optim(&self) -> Optim {
        Optim {
            lr: self.number("lr"),
            betas: [self.number("beta1"), self.number("beta2")],
            eps: self.number("eps"),
            weight_decay: self.number("weight_decay"),
            grad_clip: self.number("grad_clip"),
            ..Optim::default()
        }
    }

    /// The model with the golden weights.
    fn model(&self, config: Shape, kind: Kind) -> Gpt {
        let mut model = Gpt::new(config, Device::Cpu, kind);
        let named: Vec<&String> = self.tensors.keys().filter(|name| name.starts_with("param.")).collect();
        assert_eq!(named.len(), model.parameters.specs.len());
        for spec in &model.parameters.specs {
            tch::no_grad(|| {
                spec.view(&model.parameters.flat).copy_(&self.tensors[&format!("param.{}", spec.name)]);
            });
        }
        model.parameters.publish();
        model
    }

    /// inputs, targets, weights
    fn batch(&self) -> [&Tensor; 3] {
        ["inputs", "targets", "weights"].map(|name| &self.tensors[name])
    }
}

fn tensor(view: &TensorView) -> Tensor {
    let shape: Vec<i64> = view.shape().iter().map(|&n| n as i64).collect();
    let kind = if view.dtype() == Dtype::I64 { Kind::Int64 } else { Kind::Float };
    Tensor::from_data_size(view.data(), &shape, kind)
}

fn norm(tensor: &Tensor) -> f64 {
    tensor.to_kind(Kind::Double).norm().double_value(&[])
}

/// The distance of two tensors, relative to the expected one's norm.
fn distance(found: &Tensor, expected: &Tensor) -> f64 {
    assert_eq!(found.size(), expected.size());
    norm(&(found.to_kind(Kind::Double) - expected.to_kind(Kind::Double))) / norm(expected).max(f64::MIN_POSITIVE)
}

const CASES: [&str; 9] = [
    "pre-gelu-untied",
    "pre-gelu-tied",
    "pre-relu-untied",
    "pre-relu-tied",
    "post-gelu-untied",
    "post-gelu-tied",
    "post-relu-untied",
    "post-relu-tied",
    "pre-gelu-untied-nobias",
];

#[test]
fn logits_loss_and_gradients() {
    for case in CASES {
        let golden = Golden::read(case);
        for recompute in [false, true] {
            let mut model = golden.model(Shape { recompute, ..golden.config() }, Kind::Float);
            let [inputs, targets, weights] = golden.batch();
            let logits = model.logits(&model.hidden(inputs, None));
            assert!(distance(&logits, &golden.tensors["logits"]) < 1e-5, "{case}: logits");
            let expected = golden.tensors["loss"].double_value(&[0]);
            let losses = [
                model.scores(inputs, targets, weights, None).iter().map(|score| score.loss).sum(),
                model.forward_backward(inputs, targets, weights, None, 0, &mut |_, _| ()).double_value(&[0]),
            ];
            for loss in losses {
                assert!((loss / expected - 1.0).abs() < 1e-5, "{case}: loss {loss}, expected {expected}");
            }
            check_gradients(case, &golden, &model, 1.0);
            // A second micro-step adds to the first.
            let _ = model.forward_backward(inputs, targets, weights, None, 0, &mut |_, _| ());
            check_gradients(case, &golden, &model, 2.0);
        }
    }
}

fn check_gradients(case: &str, golden: &Golden, model: &Gpt, times: f64) {
    for spec in &model.parameters.specs {
        let found = spec.view(&model.parameters.grad);
        let expected = &golden.tensors[&format!("grad.{}", spec.name)] * times;
        if spec.name.ends_with("c_attn.bias") {
            // The keys' bias moves every score of a row alike: its gradient is zero but for rounding.
            let c = golden.config().n_embd;
            for part in [0, 2] {
                let part = |tensor: &Tensor| tensor.narrow(0, part * c, c);
                assert!(distance(&part(&found), &part(&expected)) < 1e-5, "{case}: gradient of {}", spec.name);
            }
            assert!(norm(&found.narrow(0, c, c)) < 1e-6 * times, "{case}: key bias of {}", spec.name);
        } else {
            let distance = distance(&found, &expected);
            assert!(distance < 1e-5, "{case}: gradient of {}: {distance:e}", spec.name);
        }
    }
}

/// Clips and updates; returns the gradient's norm before clipping.
fn update(model: &mut Gpt, optimizer: &mut AdamW, optim: &Optim, step: usize) -> f64 {
    let norm = adamw::norm(&squares(&model.parameters, &optimizer.ranges));
    optimizer.step(&mut model.parameters, step, optim.lr, &norm);
    model.parameters.publish();
    norm.double_value(&[0])
}

/// One range: all parameters.
fn whole(model: &Gpt) -> Vec<Range<i64>> {
    let all = 0..model.parameters.numel();
    vec![all]
}

#[test]
fn one_and_ten_adamw_steps() {
    for case in CASES {
        let golden = Golden::read(case);
        let mut model = golden.model(golden.config(), Kind::Float);
        let optim = golden.optim();
        let mut optimizer = AdamW::new(&model.parameters, whole(&model), &optim);
        let [inputs, targets, weights] = golden.batch();
        for step in 1..=10 {
            model.parameters.zero_grad();
            let _ = model.forward_backward(inputs, targets, weights, None, 0, &mut |_, _| ());
            let norm = update(&mut model, &mut optimizer, &optim, step);
            if step == 1 {
                let expected = golden.tensors["grad_norm"].double_value(&[0]);
                assert!((norm / expected - 1.0).abs() < 1e-5, "{case}: gradient's norm {norm}, expected {expected}");
            }
            if step == 1 || step == 10 {
                for spec in &model.parameters.specs {
                    // Adam turns the key bias's rounding noise into full-size steps.
                    let (from, length) = if spec.name.ends_with("c_attn.bias") {
                        (2 * golden.config().n_embd, golden.config().n_embd)
                    } else {
                        (0, spec.shape[0])
                    };
                    let part = |tensor: &Tensor| tensor.narrow(0, from, length);
                    let found = part(&spec.view(&model.parameters.flat));
                    let expected = part(&golden.tensors[&format!("after_{step}.{}", spec.name)]);
                    let distance = distance(&found, &expected);
                    assert!(distance < 1e-4, "{case}: {} after {step} steps: {distance:e}", spec.name);
                }
            }
        }
    }
}

#[test]
fn fifty_steps_follow_pytorchs_curve() {
    let golden = Golden::read("curve");
    let mut model = golden.model(golden.config(), Kind::Float);
    let optim = golden.optim();
    let mut optimizer = AdamW::new(&model.parameters, whole(&model), &optim);
    for step in 1..=50 {
        let batch = golden.tensors["curve_inputs"].get(step as i64 - 1); // (B, T + 1)
        let t = batch.size()[1] - 1;
        let (inputs, targets) = (batch.narrow(1, 0, t), batch.narrow(1, 1, t));
        let weights = Tensor::full(inputs.size(), 1.0 / inputs.numel() as f64, (Kind::Float, Device::Cpu));
        model.parameters.zero_grad();
        let loss = model.forward_backward(&inputs, &targets, &weights, None, 0, &mut |_, _| ()).double_value(&[0]);
        let expected = golden.tensors["curve"].double_value(&[step as i64 - 1]);
        assert!((loss / expected - 1.0).abs() < 1e-4, "step {step}: {loss}, PyTorch {expected}");
        update(&mut model, &mut optimizer, &optim, step);
    }
}

#[test]
fn bf16_stays_within_two_percent() {
    let golden = Golden::read("pre-gelu-untied");
    let mut model = golden.model(golden.config(), Kind::BFloat16);
    let [inputs, targets, weights] = golden.batch();
    let expected = golden.tensors["loss"].double_value(&[0]);
    let loss = model.forward_backward(inputs, targets, weights, None, 0, &mut |_, _| ()).double_value(&[0]);
    assert!((loss / expected - 1.0).abs() < 0.02, "{loss}, fp32 {expected}");
    let all = |prefix: &str| {
        let specs = &model.parameters.specs;
        Tensor::cat(
            &specs.iter().map(|s| golden.tensors[&format!("{prefix}.{}", s.name)].reshape([-1])).collect::<Vec<_>>(),
            0,
        )
    };
    assert!(distance(&model.parameters.grad, &all("grad")) < 0.02);
}
