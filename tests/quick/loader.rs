//! Who reads what: every number of ranks sees the same batches, each sample of an epoch once.

use std::collections::BTreeSet;

use lockstep::config::{Layout, Loss};
use lockstep::data::loader::{Loader, Samples};
use lockstep::data::shard::{Shard, ShardWriter};
use tch::{Device, Kind, Tensor};

const BLOCK: usize = 4;

/// A split of lines of 0 to 10 tokens; token i of the split is i, so a batch shows where it was read.
fn shard(folder: &tempfile::TempDir, lines: u32) -> Shard {
    let path = folder.path().join("split.bin");
    let mut writer = ShardWriter::create(&path, 60_000, [7; 32]).unwrap();
    let mut next = 0;
    for line in 0..lines {
        let length = line * 7 % 11;
        writer.write_line(&(next..next + length).collect::<Vec<_>>(), 1).unwrap();
        next += length;
    }
    writer.finish().unwrap();
    Shard::open(&path).unwrap()
}

fn loader(layout: Layout, loss: Loss, batch_size: usize, rank: usize, world_size: usize) -> Loader {
    let folder = tempfile::tempdir().unwrap();
    let samples = Samples::for_training(shard(&folder, 120), layout, BLOCK).unwrap();
    let micro_batch = batch_size / world_size;
    Loader { samples, seed: 3, batch_size, micro_batch, loss, padding: 59_999, rank, world_size }
}

#[test]
fn one_to_eight_ranks_share_each_batch_and_see_an_epochs_samples_once() {
    for layout in [Layout::Packed, Layout::Paragraphs] {
        for world_size in 1..=8 {
            // 840 is a multiple of 1 to 8. The epoch is shorter, so batches straddle its ends.
            let ranks: Vec<Loader> =
                (0..world_size).map(|rank| loader(layout, Loss::TokenMean, 840, rank, world_size)).collect();
            let alone = loader(layout, Loss::TokenMean, 840, 0, 1);
            let epoch = alone.samples.len();
            assert!(epoch > 100 && 840 % epoch != 0, "{epoch}");
            let mut read = Vec::new();
            for step in 0..3 {
                let global = alone.global_batch(step);
                let shares: Vec<Vec<usize>> = ranks.iter().map(|r| r.share(&r.global_batch(step)).to_vec()).collect();
                assert!(shares.iter().all(|share| share.len() == 840 / world_size));
                assert_eq!(shares.concat(), global, "{world_size} ranks, step {step}");
                read.extend(global);
            }
            for epoch in read.chunks_exact(epoch) {
                assert_eq!(epoch.iter().collect::<BTreeSet<_>>().len(), epoch.len(), "a sample twice in an epoch");
            }
        }
    }
}

#[test]
fn ranks_read_disjoint_samples_within_an_epoch() {
    for world_size in 2..=8 {
        let mut seen = BTreeSet::new();
        for rank in 0..world_size {
            let loader = loader(Layout::Packed, Loss::TokenMean, 3 * world_size, rank, world_size);
            for step in 0..loader.samples.len() / (3 * world_size) {
                for &sample in loader.share(&loader.global_batch(step)) {
                    assert!(seen.insert(sample), "{world_size} ranks: sample {sample} is read twice");
                }
            }
        }
    }
}

/// Inputs, targets and weights as (input, target, weight) of each position, row by row.
fn positions(loader: &Loader, step: usize) -> Vec<(i64, i64, f32)> {
    let global = loader.global_batch(step);
    let micro_steps = loader.batch_size / loader.world_size / loader.micro_batch;
    let mut all = Vec::new();
    for micro_step in 0..micro_steps {
        let batch = loader.micro_batch(&global, micro_step, Device::Cpu).unwrap();
        let ids = |tensor: &Tensor| Vec::<i64>::try_from(tensor.reshape([-1])).unwrap();
        let weights = Vec::<f32>::try_from(batch.weights.reshape([-1])).unwrap();
        assert_eq!(batch.inputs.size(), batch.targets.size());
        let both = ids(&batch.inputs).into_iter().zip(ids(&batch.targets));
        all.extend(both.zip(weights).map(|((input, target), weight)| (input, target, weight)));
    }
    all
}

#[test]
fn a_batch_holds_what_it_says() {
    for (layout, loss) in [
        (Layout::Packed, Loss::TokenMean),
        (Layout::Paragraphs, Loss::TokenMean),
        (Layout::Paragraphs, Loss::SequenceMean),
    ] {
        let alone = loader(layout, loss, 12, 0, 1);
        for step in [0, 5, 40] {
            let counted = |all: Vec<(i64, i64, f32)>| all.into_iter().filter(|p| p.2 != 0.0).collect::<Vec<_>>();
            let expected = counted(positions(&alone, step));
            assert_eq!(expected.len(), alone.targets(&alone.global_batch(step)));
            // Token i is i: each target follows its input. The weights of a global batch add up to one.
            assert!(expected.iter().all(|(input, target, _)| target - input == 1));
            let whole: f32 = expected.iter().map(|p| p.2).sum();
            assert!((whole - 1.0).abs() < 1e-5, "{layout:?} {loss:?}: {whole}");
            // Other numbers of ranks and micro-steps read the same, in the same order.
            for world_size in [2, 3, 4, 6] {
                let ranks = (0..world_size).flat_map(|rank| {
                    let mut loader = loader(layout, loss, 12, rank, world_size);
                    loader.micro_batch = 1;
                    counted(positions(&loader, step))
                });
                assert_eq!(ranks.collect::<Vec<_>>(), expected);
            }
        }
    }
}

#[test]
fn a_length_in_tokens_ends_with_the_step_that_reaches_it() {
    for layout in [Layout::Packed, Layout::Paragraphs] {
        let loader = loader(layout, Loss::TokenMean, 12, 0, 1);
        let epoch: usize = (0..loader.samples.len()).map(|sample| loader.samples.targets(sample)).sum();
        for tokens in [1, 2, 47, 48, 49, 1000, epoch - 1, epoch, epoch + 1, 3 * epoch, 3 * epoch + 500] {
            let counted =
                |steps: usize| (0..steps).map(|step| loader.targets(&loader.global_batch(step))).sum::<usize>();
            let steps = loader.steps_to_targets(tokens as u64);
            assert!(counted(steps) >= tokens, "{layout:?}: {tokens} tokens in {steps} steps");
            assert!(counted(steps - 1) < tokens, "{layout:?}: {tokens} tokens in {steps} steps");
        }
        assert_eq!(loader.steps_to_epochs(1), loader.samples.len().div_ceil(12));
        assert_eq!(loader.steps_to_epochs(5), (5 * loader.samples.len()).div_ceil(12));
    }
}

#[test]
fn padding_is_end_of_text_and_counts_nothing() {
    let loader = loader(Layout::Paragraphs, Loss::SequenceMean, 12, 0, 1);
    let batch = loader.micro_batch(&loader.global_batch(0), 0, Device::Cpu).unwrap();
    let padded = batch.inputs.eq(59_999);
    assert!(padded.sum(Kind::Int64).int64_value(&[]) > 0, "this batch has rows of several lengths");
    assert!(batch.weights.eq(0.0).equal(&padded));
    // sequence_mean: each row has equal weight, which its tokens share.
    let rows = batch.weights.sum_dim_intlist([1i64].as_slice(), false, Kind::Float);
    assert!((rows - 1.0 / 12.0).abs().max().double_value(&[]) < 1e-6);
}

#[test]
fn the_layouts_cut_as_they_promise() {
    let folder = tempfile::tempdir().unwrap();
    let open = || Shard::open(&folder.path().join("split.bin")).unwrap();
    let tokens = shard(&folder, 120).n_tokens();
    let packed = Samples::for_training(open(), Layout::Packed, BLOCK).unwrap();
    assert_eq!(packed.len(), (tokens - 1) / BLOCK);
    assert!((0..packed.len()).all(|sample| packed.targets(sample) == BLOCK));
    // Evaluation has every token but the first as a target.
    let evaluated = Samples::for_evaluation(open(), Layout::Packed, BLOCK).unwrap();
    assert_eq!((0..evaluated.len()).map(|sample| evaluated.targets(sample)).sum::<usize>(), tokens - 1);
    // A line of n tokens: n / 4 pieces of 4, and a rest that counts if it has at least two tokens.
    let pieces = Samples::for_training(open(), Layout::Paragraphs, BLOCK).unwrap();
    let expected: Vec<usize> = (0..120usize)
        .flat_map(|line| {
            let length = line * 7 % 11;
            std::iter::repeat_n(3, length / 4).chain((length % 4 > 1).then_some(length % 4 - 1))
        })
        .collect();
    assert_eq!((0..pieces.len()).map(|sample| pieces.targets(sample)).collect::<Vec<_>>(), expected);
}
