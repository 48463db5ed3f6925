//! What the model promises beyond its golden values.

use lockstep::config::Shape;
use lockstep::config::{Activation, Norm};
use lockstep::model::generate::{generate, Sampling};
use lockstep::model::Gpt;
use tch::{Device, Kind, Tensor};

const SMALL: Shape = Shape {
    n_layer: 3,
    n_head: 2,
    n_embd: 16,
    block_size: 12,
    vocab_size: 40,
    dropout: 0.0,
    norm: Norm::Pre,
    activation: Activation::Gelu,
    tied_head: true,
    bias: true,
    recompute: false,
};

/// LibTorch has one random generator per process, so tests that seed it take turns.
fn generator() -> std::sync::MutexGuard<'static, ()> {
    static GENERATOR: std::sync::Mutex<()> = std::sync::Mutex::new(());
    GENERATOR.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// A model whose weights are large enough that its output depends on its input.
fn model(config: Shape) -> Gpt {
    let mut model = Gpt::new(config, Device::Cpu, Kind::Float);
    model.initialize(5);
    tch::no_grad(|| {
        for spec in model.parameters.specs.iter().filter(|spec| spec.shape.len() == 2) {
            let _ = spec.view(&model.parameters.flat).g_mul_scalar_(8.0);
        }
    });
    model
}

fn ids(shape: [i64; 2]) -> Tensor {
    Tensor::arange(shape[0] * shape[1], (Kind::Int64, Device::Cpu)).multiply_scalar(17).remainder(37).view(shape)
}

fn assert_close(found: &Tensor, expected: &Tensor, tolerance: f64) {
    let distance = (found - expected).norm().double_value(&[]) / expected.norm().double_value(&[]);
    assert!(distance < tolerance, "{distance:e}");
}

fn batch(shape: [i64; 2]) -> [Tensor; 3] {
    let tokens = ids([shape[0], shape[1] + 1]);
    let weights = Tensor::full(shape, 1.0 / (shape[0] * shape[1]) as f64, (Kind::Float, Device::Cpu));
    [tokens.narrow(1, 0, shape[1]), tokens.narrow(1, 1, shape[1]), weights]
}

/// An evaluation's loss.
fn loss(model: &Gpt, [inputs, targets, weights]: [&Tensor; 3], counted: Option<&Tensor>) -> f64 {
    model.scores(inputs, targets, weights, counted).iter().map(|score| score.loss).sum()
}

#[test]
fn scores_are_those_of_whole_rows_of_logits() {
    let _turn = generator();
    let [inputs, targets, weights] = batch([3, 12]);
    let counted = Tensor::from_slice(&[1i64, 2, 11, 12, 30]);
    for kind in [Kind::Float, Kind::BFloat16] {
        let mut model = Gpt::new(SMALL, Device::Cpu, kind);
        model.initialize(3);
        let logits = model.logits(&model.hidden(&inputs, None)).view([-1, 40]).to_kind(Kind::Double);
        let nll = -logits.log_softmax(1, Kind::Double).gather(1, &targets.reshape([-1, 1]), false);
        let likeliest = logits.argmax(1, false).eq_tensor(&targets.reshape([-1]));
        for rows in [None, Some(&counted)] {
            let scores = model.scores(&inputs, &targets, &weights, rows);
            let expected = rows.map_or_else(|| (0..36).collect(), |rows| Vec::<i64>::try_from(rows).unwrap());
            assert_eq!(scores.len(), expected.len());
            for (score, row) in scores.iter().zip(expected) {
                assert!((score.loss * 36.0 / nll.double_value(&[row, 0]) - 1.0).abs() < 1e-5, "{kind:?}, row {row}");
                assert_eq!(score.is_likeliest, likeliest.int64_value(&[row]) == 1, "{kind:?}, row {row}");
            }
        }
    }
    let none = Tensor::from_slice::<i64>(&[]);
    assert_eq!(model(SMALL).scores(&inputs, &targets, &weights, Some(&none)), []);
}

#[test]
fn the_cache_changes_nothing() {
    let _turn = generator();
    for norm in [Norm::Pre, Norm::Post] {
        let model = model(Shape { norm, ..SMALL });
        let ids = ids([3, 12]);
        let whole = model.hidden(&ids, None);
        let mut cache = model.cache(3);
        let first = model.hidden(&ids.narrow(1, 0, 5), Some(&mut cache));
        let rest = (5..12).map(|t| model.hidden(&ids.narrow(1, t, 1), Some(&mut cache)));
        let parts: Vec<Tensor> = std::iter::once(first).chain(rest).collect();
        assert_eq!(cache.len(), 12);
        assert_close(&Tensor::cat(&parts, 1), &whole, 1e-5);
    }
}

/// Greedy continuation without a cache, with the same window as [`generate`].
fn uncached(model: &Gpt, prompt: &[u32], tokens: usize) -> Vec<u32> {
    let block = model.shape.block_size as usize;
    let mut row = prompt[prompt.len().saturating_sub(block)..].to_vec();
    let (start, mut seen_from) = (row.len(), 0);
    for length in start..start + tokens {
        if length - seen_from > block {
            seen_from = length - block / 2;
        }
        let window: Vec<i64> = row[seen_from..length].iter().map(|&id| i64::from(id)).collect();
        let hidden = model.hidden(&Tensor::from_slice(&window).unsqueeze(0), None);
        let last = model.logits(&hidden.select(1, hidden.size()[1] - 1));
        row.push(last.argmax(1, false).int64_value(&[0]) as u32);
    }
    row[start..].to_vec()
}

const GREEDY: Sampling = Sampling { temperature: 0.0, top_k: None, top_p: None, seed: 0 };

#[test]
fn generation_equals_the_uncached_result_over_and_past_the_block() {
    let _turn = generator();
    let model = model(SMALL);
    let prompts: Vec<Vec<u32>> = vec![vec![3, 1, 4], vec![9], (0..30).collect(), vec![7; 12]];
    for prompt in &prompts {
        let alone = generate(&model, std::slice::from_ref(prompt), 40, &GREEDY, 0, Kind::Float);
        assert_eq!(alone, [uncached(&model, prompt, 40)], "prompt {prompt:?}");
    }
    // A batch continues each prompt as if it were alone, as long as all fit the block.
    let short = &prompts[..2];
    let together = generate(&model, short, 9, &GREEDY, 0, Kind::Float);
    for (prompt, continuation) in short.iter().zip(together) {
        assert_eq!(continuation, uncached(&model, prompt, 9));
    }
}

#[test]
fn every_kind_of_model_generates_what_libtorch_computes() {
    let _turn = generator();
    let other = Shape { norm: Norm::Post, activation: Activation::Relu, tied_head: false, bias: false, ..SMALL };
    // One whose rows are odd, and no multiple of any vector's length.
    let odd = Shape { n_head: 3, n_embd: 33, ..SMALL };
    for shape in [SMALL, other, odd] {
        let mut model = model(shape);
        for kind in [Kind::Float, Kind::BFloat16] {
            tch::no_grad(|| {
                for spec in model.parameters.specs.iter().filter(|spec| spec.shape.len() == 2) {
                    let mut weights = spec.view(&model.parameters.flat);
                    weights.copy_(&weights.to_kind(kind).to_kind(Kind::Float));
                }
            });
            model.parameters.publish();
            let prompts: Vec<Vec<u32>> = (0..11).map(|first| vec![first, 5]).collect();
            for (prompt, continuation) in prompts.iter().zip(generate(&model, &prompts, 10, &GREEDY, 0, kind)) {
                assert_eq!(continuation, uncached(&model, prompt, 10), "{kind:?}");
            }
        }
    }
}

#[test]
fn a_seed_fixes_the_samples_and_rows_differ() {
    let _turn = generator();
    let model = model(SMALL);
    let sampling = |seed| Sampling { temperature: 1.0, top_k: Some(20), top_p: Some(0.95), seed };
    let prompts = vec![vec![3, 1, 4]; 3];
    let first = generate(&model, &prompts, 20, &sampling(1), 0, Kind::Float);
    assert_eq!(first, generate(&model, &prompts, 20, &sampling(1), 0, Kind::Float));
    assert_ne!(first, generate(&model, &prompts, 20, &sampling(2), 0, Kind::Float));
    assert_ne!(first[0], first[1]);
    assert_eq!(generate(&model, &[Vec::new()], 3, &sampling(1), 39, Kind::Float)[0].len(), 3);
}

#[test]
fn recomputed_blocks_draw_the_same_dropout() {
    let _turn = generator();
    let [inputs, targets, weights] = batch([2, 12]);
    let gradient = |recompute, seed| {
        let mut model = model(Shape { dropout: 0.3, recompute, ..SMALL });
        let loss = model.forward_backward(&inputs, &targets, &weights, None, seed, &mut |_, _| ()).double_value(&[0]);
        (loss, model.parameters.grad)
    };
    let (loss, kept) = gradient(false, 1);
    let (same_loss, recomputed) = gradient(true, 1);
    assert_eq!(loss, same_loss);
    assert!(kept.equal(&recomputed));
    assert_ne!(loss, gradient(false, 2).0, "dropout must depend on the seed");
}

#[test]
fn padding_changes_neither_loss_nor_gradient() {
    let _turn = generator();
    let [inputs, targets, weights] = batch([2, 9]);
    let mut plain = model(SMALL);
    let expected = plain.forward_backward(&inputs, &targets, &weights, None, 0, &mut |_, _| ()).double_value(&[0]);
    let pad = |tensor: &Tensor, value: f64| tensor.f_pad([0, 3], "constant", value).unwrap();
    let (ids, goals, weights) = (pad(&inputs, 39.0), pad(&targets, 0.0), pad(&weights, 0.0));
    let counted = weights.reshape([-1]).nonzero().reshape([-1]);
    // Padding is left out of the head, or computed there with a weight of 0.
    for counted in [Some(&counted), None] {
        let mut padded = model(SMALL);
        let found = padded.forward_backward(&ids, &goals, &weights, counted, 0, &mut |_, _| ()).double_value(&[0]);
        assert!((found / expected - 1.0).abs() < 1e-6);
        assert_close(&padded.parameters.grad, &plain.parameters.grad, 1e-5);
        assert!((loss(&padded, [&ids, &goals, &weights], counted) / expected - 1.0).abs() < 1e-6);
    }
}

#[test]
fn a_weight_seen_everywhere_is_that_weight_at_each_target() {
    let _turn = generator();
    let [inputs, targets, _] = batch([2, 9]);
    for kind in [Kind::Float, Kind::BFloat16] {
        let computed = |weights: &Tensor| {
            let mut model = Gpt::new(SMALL, Device::Cpu, kind);
            model.initialize(1);
            let loss = loss(&model, [&inputs, &targets, weights], None);
            (
                loss,
                model.forward_backward(&inputs, &targets, weights, None, 0, &mut |_, _| ()).double_value(&[0]),
                model.parameters.grad,
            )
        };
        let one = Tensor::full([1, 1], 0.125, (Kind::Float, Device::Cpu)).expand([2, 9], false);
        let (loss, objective, grad) = computed(&one.copy());
        let found = computed(&one);
        assert_eq!((found.0, found.1), (loss, objective));
        assert!(found.2.equal(&grad));
    }
}

#[test]
fn initialisation_has_gpt2s_deviations() {
    let _turn = generator();
    let mut model = Gpt::new(Shape { n_embd: 128, vocab_size: 1000, ..SMALL }, Device::Cpu, Kind::Float);
    model.initialize(1);
    for spec in &model.parameters.specs {
        let view = spec.view(&model.parameters.flat);
        let expected = match (spec.shape.len(), spec.name.as_str()) {
            (1, name) => {
                let value = if name.ends_with("weight") { 1.0 } else { 0.0 };
                assert!(view.eq(value).all().int64_value(&[]) == 1, "{name}");
                continue;
            }
            (_, name) if name.ends_with("c_proj.weight") => 0.02 / 6f64.sqrt(),
            _ => 0.02,
        };
        let deviation = view.std(true).double_value(&[]);
        assert!((deviation / expected - 1.0).abs() < 0.06, "{}: {deviation}", spec.name);
    }
}

/// A score of minus infinity for the right token makes the loss infinite, although every gradient computed from it is
/// finite.
#[test]
fn a_loss_that_is_not_finite_makes_the_gradient_so() {
    let _turn = generator();
    let mut model = Gpt::new(Shape { n_layer: 1, tied_head: false, ..SMALL }, Device::Cpu, Kind::Float);
    model.initialize(5);
    let (token, target) = (ids([1, 1]), 7);
    let hidden = model.hidden(&token, None).view([-1]);
    let view = |model: &Gpt, name: &str, all: &Tensor| {
        model.parameters.specs.iter().find(|spec| spec.name == name).unwrap().view(all)
    };
    tch::no_grad(|| {
        view(&model, "lm_head.weight", &model.parameters.flat).get(target).copy_(&(hidden.sign() * -3e38));
        for name in ["transformer.h.0.attn.c_proj.weight", "transformer.h.0.mlp.c_proj.weight"] {
            let _ = view(&model, name, &model.parameters.flat).zero_();
        }
    });
    let targets = Tensor::from_slice(&[target]).view([1, 1]);
    let weights = Tensor::full([1, 1], 1e-6, (Kind::Float, Device::Cpu));
    let loss = model.forward_backward(&token, &targets, &weights, None, 0, &mut |_, _| ()).double_value(&[0]);
    assert_eq!(loss, f64::INFINITY);
    let bad = model.parameters.grad.isfinite().logical_not().nonzero();
    assert_eq!(Vec::<i64>::try_from(bad.view([-1])).unwrap(), [0]);
}
