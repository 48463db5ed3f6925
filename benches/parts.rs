//! The parts of a step, each alone, on this machine's CPU: `cargo bench`, or `cargo bench -- head` for some.
//!
//! For finding where time goes and whether a change helps; `launch/bench` compares whole programs.

use criterion::{criterion_group, criterion_main, Criterion, Throughput};
use lockstep::config::{Config, Layout, Loss, Shape};
use lockstep::data::loader::{Loader, Samples};
use lockstep::data::shard::{Shard, ShardWriter};
use lockstep::model::head::{loss_and_gradients, Targets};
use lockstep::model::Gpt;
use lockstep::optim::adamw::{norm, squares, AdamW};
use lockstep::tokenizer::Tokenizer;
use lockstep::torch;
use tch::{Device, Kind, Tensor};

const KINDS: [(&str, Kind); 2] = [("fp32", Kind::Float), ("bf16", Kind::BFloat16)];

/// A shape of this many blocks, else GPT-2's smallest.
fn shape(n_layer: usize, vocab_size: usize) -> Shape {
    let sizes = format!("n_layer: {n_layer}, n_head: 12, n_embd: 768");
    let config = Config::parse(&format!("{{name: bench, data: {{block_size: 256}}, model: {{{sizes}}}}}"), &[]);
    config.and_then(|config| config.validate(1)).unwrap().shape(vocab_size)
}

/// Random ids below `words`, (4, 256), and equal weights.
fn batch(words: i64) -> [Tensor; 3] {
    let ids = || Tensor::randint(words, [4, 256], (Kind::Int64, Device::Cpu));
    [ids(), ids(), Tensor::full([4, 256], 1.0 / 1024.0, (Kind::Float, Device::Cpu))]
}

/// 1,024 rows against GPT-2's vocabulary: products, softmax, loss, and both gradients.
fn head(criterion: &mut Criterion) {
    let [_, targets, weights] = batch(50_257);
    for (name, kind) in KINDS {
        let random = |shape: [i64; 2]| Tensor::randn(shape, (Kind::Float, Device::Cpu)).to_kind(kind);
        let (hidden, head) = (random([1024, 768]), random([50_257, 768]) * 0.02);
        let mut grad = Tensor::zeros([50_257, 768], (Kind::Float, Device::Cpu));
        let targets = Targets { ids: &targets, weights: &weights, counted: None };
        criterion.bench_function(&format!("head/{name}"), |bencher| {
            bencher.iter(|| loss_and_gradients(&hidden, &head, &targets, &mut grad));
        });
    }
}

/// Attention, norms and the two linear layers of two blocks, forward and backward; the head has 64 words.
fn blocks(criterion: &mut Criterion) {
    let [inputs, targets, weights] = batch(64);
    for (name, kind) in KINDS {
        let mut model = Gpt::new(shape(2, 64), Device::Cpu, kind);
        model.initialize(1);
        criterion.bench_function(&format!("blocks/{name}"), |bencher| {
            bencher.iter(|| model.forward_backward(&inputs, &targets, &weights, None, 1, &mut |_, _| ()));
        });
    }
}

/// Causal attention of 4 sequences of 256 tokens, 12 heads of 64 channels, forward and backward.
fn attention(criterion: &mut Criterion) {
    for (name, kind) in KINDS {
        let random = || Tensor::randn([4, 12, 256, 64], (Kind::Float, Device::Cpu)).to_kind(kind);
        let [q, k, v] = [random(), random(), random()].map(|tensor| tensor.set_requires_grad(true));
        let grad = random();
        criterion.bench_function(&format!("attention/{name}"), |bencher| {
            bencher.iter(|| {
                let y = Tensor::scaled_dot_product_attention(&q, &k, &v, None::<&Tensor>, 0.0, true, None, false);
                torch::backward(&y, &grad);
            });
        });
    }
}

/// The gradient's norm and an update of 14 million weights.
fn adamw(criterion: &mut Criterion) {
    let mut model = Gpt::new(shape(2, 64), Device::Cpu, Kind::Float);
    model.initialize(1);
    let _ = model.parameters.grad.normal_(0.0, 0.01);
    let every = std::iter::once(0..model.parameters.numel()).collect::<Vec<_>>();
    let optim = Config::parse("name: bench", &[]).unwrap().optim;
    let mut optimizer = AdamW::new(&model.parameters, every.clone(), &optim);
    criterion.bench_function("adamw", |bencher| {
        bencher.iter(|| {
            let norm = norm(&squares(&model.parameters, &every));
            optimizer.step(&mut model.parameters, 10, 1e-4, &norm);
        });
    });
}

/// A batch of 32 blocks of 1,024 tokens.
fn loader(criterion: &mut Criterion) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("train.bin");
    let mut writer = ShardWriter::create(&path, 50_257, [0; 32]).unwrap();
    for line in 0..1000 {
        writer.write_line(&(0..1024).map(|n| (line * 7 + n) % 50_257).collect::<Vec<_>>(), 1).unwrap();
    }
    writer.finish().unwrap();
    let samples = Samples::for_training(Shard::open(&path).unwrap(), Layout::Packed, 1024).unwrap();
    let loader = Loader {
        samples,
        seed: 1,
        batch_size: 32,
        micro_batch: 32,
        loss: Loss::TokenMean,
        padding: 0,
        rank: 0,
        world_size: 1,
    };
    let mut step = 0;
    criterion.bench_function("loader", |bencher| {
        bencher.iter(|| {
            step += 1;
            loader.micro_batch(&loader.global_batch(step), 0, Device::Cpu).unwrap()
        });
    });
}

/// Lines of English with GPT-2's vocabulary, on all threads, once the tokenizer knows their words.
fn encoder(criterion: &mut Criterion) {
    let tokenizer = Tokenizer::gpt2().unwrap();
    let text = include_str!("../docs/guide.md").repeat(20);
    let mut group = criterion.benchmark_group("encoder");
    group.throughput(Throughput::Bytes(text.len() as u64));
    group.bench_function("gpt2", |bencher| bencher.iter(|| tokenizer.encode_lines(&[&text])));
    group.finish();
}

/// All parts with this process's threads, as a rank has them.
fn parts(criterion: &mut Criterion) {
    torch::set_threads(None).unwrap();
    torch::keep_memory();
    for part in [head, blocks, attention, adamw, loader, encoder] {
        part(criterion);
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10);
    targets = parts
}
criterion_main!(benches);
