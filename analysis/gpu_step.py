"""What a training step moves and computes on a GPU, part by part: the table of docs/gpu-step.md.

`python analysis/gpu_step.py` prints the table. tests/test_emulated_gpu.py holds the lists below to
what the emulated GPU sees: each operator's launches, and the bytes of each.

Pre-norm with biases, GELU, a tied head and no dropout, in bf16, packed text, one GPU.
"""

from dataclasses import dataclass

CHUNK, OWN_CHUNK = 1 << 26, 1 << 28  # logits of a chunk of the head: src/model/head/mod.rs
PIECE = 1 << 24  # gradients whose norm is one launch: src/optim/adamw.rs


@dataclass(frozen=True)
class Shape:
    """A model and its micro-steps."""

    layers: int  # L
    heads: int  # H
    width: int  # C
    words: int  # V
    tokens: int  # T, of a sequence
    sequences: int  # B, of a micro-step
    micro_steps: int

    @property
    def parameters(self):
        c = self.width
        return self.layers * (12 * c * c + 13 * c) + (self.tokens + self.words + 2) * c


@dataclass(frozen=True)
class Launches:
    """What one operator or kernel does in a part of a step."""

    part: str
    name: str
    times: float
    bytes: float  # of all of them together
    flop: float = 0


def chunks(rows, words, elements):
    """How many chunks the head takes its rows in."""
    return -(-rows // min(8192, max(16, elements // words)))


def of_micro_step(s, own):
    """The launches of one micro-step."""
    n, c, layers = s.tokens * s.sequences, s.width, s.layers
    state = 2 * n * c  # a state's bytes

    part = "data and embedding"
    yield Launches(part, "a copy to the device", 1, 16 * n)
    yield Launches(part, "aten::fill_.Scalar", 1, 4)
    yield Launches(part, "aten::index_select", 1, 8 * n + 2 * state)
    yield Launches(part, "aten::add.out", 1, 2 * state + 2 * s.tokens * c)
    yield Launches(part, "aten::copy_", 2, 5 * state)  # the gradient, and it in fp32
    yield Launches(part, "aten::sum.IntList_out", 1, 2 * state + 4 * s.tokens * c)
    yield Launches(part, "aten::add.out", 1, 12 * s.tokens * c)
    yield Launches(part, "aten::index_add.out", 1, 8 * n + 6 * state)

    part = "linear layers"
    for inner, outer in ((c, 3 * c), (c, c), (c, 4 * c), (4 * c, c)):
        flop = layers * 2 * n * inner * outer
        product = layers * 2 * (n * (inner + outer) + inner * outer)
        yield Launches(part, "aten::addmm.out", layers, product + layers * 2 * outer, flop)
        yield Launches(part, "aten::mm.out", layers, product, flop)
        if own:
            weights = layers * 6 * inner * outer
            yield Launches(part, "aten::addmm.dtype_out", layers, product + weights, flop)
        else:
            yield Launches(part, "aten::mm.out", layers, product, flop)
        wide = 4 if own else 2
        yield Launches(part, "aten::sum.IntList_out", layers, layers * outer * (2 * n + wide))
        if own:
            yield Launches(part, "aten::add.out", layers, layers * 12 * outer)

    part = "attention"
    sums = 4 * n * s.heads
    flop = layers * 2 * s.sequences * s.tokens**2 * c  # of a product, half of it masked, with both
    yield Launches(part, "attention", layers, layers * (4 * state + sums), flop)
    yield Launches(part, "attention, backward", layers, layers * (8 * state + sums), 2.5 * flop)
    yield Launches(part, "aten::cat.out", layers, layers * 6 * state)

    part = "GELU"
    yield Launches(part, "aten::gelu.out", layers, layers * 8 * state)
    yield Launches(part, "aten::gelu_backward.grad_input", layers, layers * 12 * state)

    yield from norms(s, own)
    yield from head(s, own)


def norms(s, own):
    """Layer norms and residual sums of a micro-step."""
    n, c, layers = s.tokens * s.sequences, s.width, s.layers
    state, stats = 2 * n * c, 8 * n
    part = "norms and sums"
    if own:
        blocks, parts = min(n, 2048), min(n, 512)
        norm = blocks * 4 * c + stats
        yield Launches(part, "add_norm", layers, layers * (2 * state + norm))
        yield Launches(part, "add_norm", layers, layers * (4 * state + norm))
        yield Launches(part, "add_norm", layers, layers * 3 * state)
        backward = 4 * state + stats + parts * (2 * c + 8 * c)
        yield Launches(part, "add_norm_backward", 2 * layers, 2 * layers * backward)
        yield Launches(part, "aten::sum.IntList_out", 2 * layers, 2 * layers * (parts + 1) * 8 * c)
        yield Launches(part, "aten::add.out", 4 * layers, 4 * layers * 12 * c)
    # The last norm is LibTorch's.
    norms = 1 if own else 2 * layers + 1
    yield Launches(part, "aten::native_layer_norm", norms, norms * (2 * state + 4 * c + stats))
    yield Launches(
        part, "aten::native_layer_norm_backward", norms, norms * (3 * state + 8 * c + stats)
    )
    yield Launches(part, "aten::add.out", 2, 12 * c)
    yield Launches(part, "aten::add.out", 1, 20 * c)
    yield Launches(part, "aten::zero_", 1, 4 * c)
    if not own:
        # Two sums forward, and the sums of two gradients each backward.
        yield Launches(part, "aten::add.out", 4 * layers, 4 * layers * 3 * state)
        # The bf16 gradients of twelve parameters, then of all of them into fp32.
        part, block = "gradients", layers * (12 * c * c + 13 * c)
        yield Launches(part, "aten::add.out", 12 * layers, 6 * block)
        yield Launches(part, "aten::add.out", layers, 10 * block)
        yield Launches(part, "aten::zero_", layers, 2 * block)


def head(s, own):
    """The head and the loss of a micro-step."""
    n, c, v = s.tokens * s.sequences, s.width, s.words
    state = 2 * n * c
    part = "head"
    flop = 2 * n * c * v
    if own:
        w = -(-v // 64) * 64
        times = chunks(n, w, OWN_CHUNK)
        product = state + times * 2 * w * c + 2 * n * w
        yield Launches(part, "aten::mm.out", times, product, flop)
        yield Launches(part, "cross_entropy", times, n * (2 * (-(-v // 8) * 8) + 4 * w + 16))
        yield Launches(
            part, "aten::addmm.dtype_out", times, state + 2 * n * v + times * 8 * v * c, flop
        )
        yield Launches(part, "aten::mm.out", times, product, flop)
        yield Launches(part, "aten::sum.IntList_out", 1, 4 * n + 8)
    else:
        times = chunks(n, v, CHUNK)
        product = state + times * 2 * v * c + 2 * n * v
        yield Launches(part, "aten::mm.out", 2 * times, 2 * product, 2 * flop)
        yield Launches(part, "aten::mm.out", times, product, flop)
        yield Launches(part, "aten::copy_", 2 * times, 12 * n * v)
        for name, wide, narrow in (
            ("amax.out", 4, 4),
            ("sub.out", 8, 4),
            ("exp.out", 8, 0),
            ("sum.IntList_out", 4, 4),
            ("mul.out", 8, 4),
            ("gather.out", 0, 16),
            ("log.out", 0, 8),
            ("sub.out", 0, 12),
            ("mul.out", 0, 8),
            ("sum.IntList_out", 0, 4),
            ("div.out", 0, 8),
            ("neg.out", 0, 4),
            ("scatter_add.out", 0, 20),
        ):
            yield Launches(part, f"aten::{name}", times, n * (v * wide + narrow))
        yield Launches(part, "aten::add.out", times, times * 24)
        yield Launches(part, "aten::add.out", times, times * 10 * v * c)
        yield Launches(part, "aten::zero_", 1, 8)
    yield Launches(part, "aten::cat.out", 1, 2 * state)
    yield Launches(part, "aten::mul.out", 1, 16)
    yield Launches(part, "aten::add.out", 2, 40)


def of_step(s, own):
    """The launches of a whole step: micro-steps, and the update."""
    for launches in of_micro_step(s, own):
        a = s.micro_steps
        yield Launches(
            launches.part, launches.name, a * launches.times, a * launches.bytes, a * launches.flop
        )
    p = s.parameters
    part = "update"
    pieces = -(-p // PIECE)
    yield Launches(part, "aten::zero_", 4, 6 * p + 16)
    yield Launches(part, "aten::norm.out", pieces, 4 * p + 4 * pieces)
    for name, moved in (("copy_", 12), ("pow.Tensor_Scalar_out", 16), ("add.out", 24)):
        yield Launches(part, f"aten::{name}", pieces, pieces * moved)
    yield Launches(part, "aten::sqrt.out", 1, 16)
    yield Launches(part, "aten::cat.out", 1, 32)
    if own:
        yield Launches(part, "adamw", 1, 30 * p)
    else:
        yield Launches(part, "aten::_fused_adamw_", 2, 32 * p)
        yield Launches(part, "aten::copy_", 1, 6 * p)
        # The scale and the skip, single numbers.
        for name in ("abs.out", "eq.Tensor_out", "ne.Scalar_out", "mul.out", "logical_not.out"):
            yield Launches(part, f"aten::{name}", 1, 9)
        for name in ("add.out", "div.out", "clamp_min.out", "fill_.Scalar"):
            yield Launches(part, f"aten::{name}", 1, 16)
        yield Launches(part, "aten::copy_", 3, 25)


# Bytes a second and bf16 FLOP a second of NVIDIA's data sheets: the SXM cards, without sparsity.
CARDS = {"A100 80GB": (2.039e12, 312e12), "H100": (3.35e12, 989e12), "H200": (4.8e12, 989e12)}
GPT2 = Shape(12, 12, 768, 50257, 1024, 32, 16)


def parts(s, own):
    """The launches of each part, in the order of a step."""
    found = {}
    for launches in of_step(s, own):
        found.setdefault(launches.part, []).append(launches)
    return found


def seconds(part, card):
    """What a part takes, if each launch takes what its bytes or its FLOP take."""
    bandwidth, peak = CARDS[card]
    return sum(max(one.bytes / bandwidth, one.flop / peak) for one in part)


def table(s):
    """The page's table, in Markdown."""
    head = ["part", "launches", "GB", "TFLOP", *(f"ms, {card}" for card in CARDS)]
    lines = [head, ["---"] * len(head)]
    before, after = parts(s, False), parts(s, True)

    def cells(old, new, digits):
        texts = [f"{x:,.{digits}f}" for x in (old, new)]
        return texts[0] if texts[0] == texts[1] else f"{texts[0]} → **{texts[1]}**"

    def row(name, old, new):
        yield name
        yield cells(sum(x.times for x in old), sum(x.times for x in new), 0)
        yield cells(sum(x.bytes for x in old) / 1e9, sum(x.bytes for x in new) / 1e9, 1)
        yield cells(sum(x.flop for x in old) / 1e12, sum(x.flop for x in new) / 1e12, 1)
        for card in CARDS:
            yield cells(1e3 * seconds(old, card), 1e3 * seconds(new, card), 0)

    for name in before:
        lines.append(list(row(name, before[name], after.get(name, []))))
    both = [[x for part in way.values() for x in part] for way in (before, after)]
    lines.append(list(row("**the step**", *both)))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    print(table(GPT2))
