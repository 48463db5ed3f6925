"""The parts of peer.py that need no torch: shards, samples, schedules."""

import struct

import numpy as np
import pytest

import peer


def write_shard(path, lines, vocab_size=300, n_words=7):
    """Writes lines of token ids as docs/formats.md describes shards; digests are left zero."""
    tokens = [token for line in lines for token in line]
    width = 2 if vocab_size <= 65536 else 4
    header = struct.pack("<8sIIQQQ", b"LOCKSTEP", 1, width, len(tokens), len(lines), n_words)
    header += bytes(64) + struct.pack("<I", vocab_size) + bytes(20)
    payload = np.array(tokens, dtype=f"<u{width}").tobytes()
    payload += bytes(-len(payload) % 8)
    offsets = np.cumsum([0, *map(len, lines)]).astype("<u8").tobytes()
    path.write_bytes(header + payload + offsets)
    return path


LINES = [[1, 2, 3], [], [4], [5, 6, 7, 8, 9, 10, 11, 12, 13], [14, 15]]  # 15 tokens


@pytest.mark.parametrize("vocab_size", [300, 70000])
def test_packed_blocks_cover_the_stream(tmp_path, vocab_size):
    shard = write_shard(tmp_path / "train.bin", LINES, vocab_size)
    split = peer.Split(shard, "packed", block_size=4)
    inputs, targets = split.batch(np.array([2, 0]), padding=0)
    assert inputs.tolist() == [[9, 10, 11, 12], [1, 2, 3, 4]]
    assert targets.tolist() == [[10, 11, 12, 13], [2, 3, 4, 5]]
    assert split.lengths.tolist() == [4, 4, 4]
    assert split.words_and_lines == 7 + 5


def test_evaluation_keeps_the_last_block(tmp_path):
    shard = write_shard(tmp_path / "valid.bin", LINES)
    split = peer.Split(shard, "packed", block_size=4, tail=True)
    assert split.lengths.tolist() == [4, 4, 4, 2]
    inputs, targets = split.batch(slice(2, 4), padding=99)
    assert inputs.tolist() == [[9, 10, 11, 12], [13, 14, 99, 99]]
    assert targets.tolist() == [[10, 11, 12, 13], [14, 15, peer.IGNORED, peer.IGNORED]]


def test_paragraphs_stay_apart(tmp_path):
    shard = write_shard(tmp_path / "train.bin", LINES)
    split = peer.Split(shard, "paragraphs", block_size=4)
    # Nine tokens make pieces of 4, 4 and 1; the last, like the line of one token, has no target.
    assert split.starts.tolist() == [0, 4, 8, 13]
    assert split.lengths.tolist() == [2, 3, 3, 1]
    inputs, targets = split.batch(np.array([3, 1]), padding=0)
    assert inputs.tolist() == [[14, 0, 0], [5, 6, 7]]
    assert targets.tolist() == [[15, peer.IGNORED, peer.IGNORED], [6, 7, 8]]


def test_a_foreign_file_is_refused(tmp_path):
    for content in (b"", bytes(200)):
        (tmp_path / "train.bin").write_bytes(content)
        with pytest.raises(SystemExit, match="not a Lockstep shard"):
            peer.Split(tmp_path / "train.bin", "packed", 4)


def test_an_epoch_sees_every_sample_once():
    batches = peer.shuffled(n_samples=10, batch_size=4, seed=1)
    drawn = np.concatenate([next(batches) for _ in range(5)])
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10].tolist() != drawn[10:].tolist()
    assert next(peer.shuffled(10, 4, seed=1)).tolist() == drawn[:4].tolist()


# The same points as in src/optim/schedule.rs.
@pytest.mark.parametrize(
    ("schedule", "decay_steps", "points"),
    [
        ("constant", 0, {1: 0.1, 10: 1.0, 60: 1.0, 100: 1.0}),
        ("cosine", 0, {1: 0.1, 10: 1.0, 55: 0.55, 100: 0.1}),
        ("linear", 0, {1: 0.1, 10: 1.0, 55: 0.55, 100: 0.1}),
        ("linear", 50, {1: 0.1, 10: 1.0, 30: 0.55, 70: 0.1}),
        ("wsd", 20, {1: 0.1, 80: 1.0, 90: 0.55, 100: 0.1}),
    ],
)
def test_schedules_at_their_corners(schedule, decay_steps, points):
    config = {
        "optim.lr": 1.0,
        "optim.min_lr": 0.1,
        "optim.warmup_steps": 10,
        "optim.decay_steps": decay_steps,
        "optim.schedule": schedule,
        "train.steps": 100,
    }
    found = {step: peer.learning_rate(config, step) for step in points}
    assert found == pytest.approx(points)


def test_a_configuration_becomes_flat():
    text = "name: x\ndata: {layout: paragraphs}\nmodel: {preset: gpt-nano}\noptim: {lr: 3e-4}\n"
    config = peer.load_config(text, ["train.steps=7", "optim.min_lr=1e-5"])
    assert (config["data.layout"], config["train.steps"]) == ("paragraphs", 7)
    assert (config["optim.lr"], config["optim.min_lr"]) == (3e-4, 1e-5)
    assert [config[f"model.{k}"] for k in ("n_layer", "n_head", "n_embd")] == [3, 3, 48]
    with pytest.raises(SystemExit, match="stepz"):
        peer.load_config(text, ["train.stepz=7"])
