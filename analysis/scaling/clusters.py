"""GPU clusters on paper: cost.py with published figures of GPUs and links, not fitted ones.

Nothing here was measured by Lockstep. Each figure is either published, with its source beside it,
or an assumption listed in ASSUMPTIONS.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pandas as pd

from presets import presets

from .cost import (
    BYTES,
    Machine,
    Model,
    NcclLink,
    Setting,
    daly,
    largest_micro_batch,
    step,
    useful_share,
)


@dataclass(frozen=True)
class Kind:
    """A kind of GPU, in nodes of eight, and its links. Rates are per GPU, in one direction."""

    name: str
    # Dense bf16, without sparsity.
    peak_flop: float
    memory_bytes: float
    # NVLink as NCCL counts it: links times what one carries in practice (src/graph/topo.h).
    nvlink_bytes: float
    # The published rate of the node's network adapters, divided by its GPUs.
    network_bytes: float
    source: str


# NVLink is published as the sum of both directions: 600, 900, 900 and 1,800 GB/s.
PUBLISHED = (
    Kind(
        "A100, HDR InfiniBand",
        312e12,
        2.039e12,
        12 * 20.0e9,
        25e9,
        "datasheets NVIDIA A100 Tensor Core GPU, NVIDIA DGX A100 (ConnectX-6, 200 Gb/s a GPU)",
    ),
    Kind(
        "H100, NDR InfiniBand",
        989e12,
        3.35e12,
        18 * 20.6e9,
        50e9,
        "datasheets NVIDIA H100 Tensor Core GPU, NVIDIA DGX H100 (ConnectX-7, 400 Gb/s a GPU)",
    ),
    Kind(
        "H200, NDR InfiniBand",
        989e12,
        4.8e12,
        18 * 20.6e9,
        50e9,
        "datasheets NVIDIA H200 Tensor Core GPU, NVIDIA DGX H200 (ConnectX-7, 400 Gb/s a GPU)",
    ),
    Kind(
        "B200, NDR InfiniBand",
        2250e12,
        8e12,
        18 * 40.1e9,
        50e9,
        "datasheet and user guide NVIDIA DGX B200 (ConnectX-7, 400 Gb/s a GPU)",
    ),
    Kind(
        "H100, 100 Gbit/s Ethernet a node",
        989e12,
        3.35e12,
        18 * 20.6e9,
        12.5e9 / 8,
        "datasheet NVIDIA H100 Tensor Core GPU; one adapter of 100 Gbit/s for all eight",
    ),
)
KINDS = {kind.name: kind for kind in PUBLISHED}
REFERENCE = KINDS["H100, NDR InfiniBand"]
GPUS_PER_NODE = 8

# How NCCL estimates its own latencies (its source, src/graph/tuning.cc of the 2.2x versions):
# algorithm, start, hop by NVLink, hop through the network, share of the bandwidth. The rows are its
# protocols: Simple for rings, and LL128, which carries 120 of 128 bytes, for both; a tree carries
# 92 % of a ring. What NCCL does in NVSwitches (NVLS) and in InfiniBand's (SHARP) is left out.
PROTOCOLS = (
    ("ring", 8.4e-6, 3.4e-6, 14.0e-6, 1.0),
    ("ring", 14.0e-6, 1.9e-6, 4.0e-6, 0.92),
    ("tree", 14.0e-6, 1.25e-6, 8.5e-6, 0.92 * 120 / 128),
)
# NCCL takes 48 GB/s from an adapter of 400 Gbit/s (src/graph/search.cc).
NETWORK_SHARE = 0.96

ASSUMPTIONS = {
    "MFU of large micro-batches": 0.40,
    "sequences of 1,024 tokens a GPU, where their number is not fixed": 16,
    "sequences of the global batch, where it is fixed": 512,
    "kernel launches a block, forward and backward": 45,
    "seconds a launch": 5e-6,
    "bytes of GPU memory touched a parameter by clipping and AdamW": 40,
    "share of the memory's bandwidth in use then": 0.8,
    "seconds for each doubling of the ranks in the collective that ends a step": 10e-6,
    "standard deviation of a rank's compute": 0.01,
    "bytes per second into storage, from one rank": 2e9,
    "seconds from a failure to the first step after it": 300.0,
}
EACH = ASSUMPTIONS["sequences of 1,024 tokens a GPU, where their number is not fixed"]
TOGETHER = ASSUMPTIONS["sequences of the global batch, where it is fixed"]
# Meta counted 419 unexpected interruptions in 54 days on 16,384 H100 (The Llama 3 Herd of Models,
# 2024, section 3.3.4).
GPU_HOURS_BETWEEN_FAILURES = 54 * 24 * 16384 / 419

PRESETS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
BLOCK_SIZE, VOCAB_SIZE = 1024, 50257
SIZES = [2**power for power in range(3, 15)]  # 8 to 16,384
BUCKET_MIB = 25.0


def preset(name: str) -> Model:
    """A preset of Lockstep's, with GPT-2's vocabulary and tied head."""
    shape = presets()[name]
    return Model(shape["n_layer"], shape["n_embd"], VOCAB_SIZE, BLOCK_SIZE)


def machine(kind: Kind, model: Model, algorithm: str = "best") -> Machine:
    """One GPU of this kind, its links, and the assumptions above."""
    assumed = ASSUMPTIONS
    launches = assumed["kernel launches a block, forward and backward"] * model.n_layer
    touched = assumed["bytes of GPU memory touched a parameter by clipping and AdamW"]
    in_use = assumed["share of the memory's bandwidth in use then"] * kind.memory_bytes
    speed = assumed["MFU of large micro-batches"] * kind.peak_flop
    return Machine(
        link=NcclLink(
            gpus_per_node=GPUS_PER_NODE,
            node_bandwidth=kind.nvlink_bytes,
            network_bandwidth=NETWORK_SHARE * GPUS_PER_NODE * kind.network_bytes,
            protocols=PROTOCOLS,
            algorithm=algorithm,
        ),
        compute_fixed=launches * assumed["seconds a launch"],
        compute_per_sequence=model.block_size * model.flop_per_token / speed,
        optimizer_per_parameter=touched / in_use,
        sync=assumed["seconds for each doubling of the ranks in the collective that ends a step"],
        jitter=assumed["standard deviation of a rank's compute"],
    )


def setting(n: int, batch_size: int, overlap: bool, zero1: bool, gradient_bytes: int) -> Setting:
    """N ranks with equal shares, in the micro-batches that `auto` chooses."""
    share = batch_size // n
    return Setting(
        world_size=n,
        batch_size=batch_size,
        accumulation=share // largest_micro_batch(share, BLOCK_SIZE),
        bucket_mib=BUCKET_MIB,
        overlap=overlap,
        zero1=zero1,
        gradient_bytes=gradient_bytes,
        weight_bytes=BYTES["bf16"],
    )


def sweep(
    kind: Kind,
    model: Model,
    scaling: str,
    algorithm: str = "best",
    overlap: bool = True,
    zero1: bool = False,
    gradient_bytes: int = 4,
) -> pd.DataFrame:
    """Steps on 8 to 16,384 GPUs, with a fixed batch for each GPU (`weak`) or for all (`strong`).

    Efficiency is the throughput of a GPU, as a share of that of a GPU alone with as many sequences
    (`weak`), or of one of the first eight (`strong`).
    """
    costs = machine(kind, model, algorithm)
    rows = []
    for n in SIZES:
        if scaling == "strong" and n > TOGETHER:
            break  # a GPU needs a sequence
        batch = n * EACH if scaling == "weak" else TOGETHER
        first, first_batch = (1, EACH) if scaling == "weak" else (SIZES[0], TOGETHER)
        base = step(model, setting(first, first_batch, overlap, zero1, gradient_bytes), costs)
        split = setting(n, batch, overlap, zero1, gradient_bytes)
        cost = step(model, split, costs)
        efficiency = (batch / n / cost.total) / (first_batch / first / base.total)
        rows.append(
            {
                "gpu": kind.name,
                "scaling": scaling,
                "algorithm": algorithm,
                "overlap": overlap,
                "zero1": zero1,
                "gpus": n,
                "sequences": batch,
                "step_ms": 1000 * cost.total,
                "compute_ms": 1000 * cost.compute,
                "comm_exposed_ms": 1000 * cost.exposed,
                "comm_hidden_ms": 1000 * cost.hidden,
                "optimizer_ms": 1000 * cost.optimizer,
                "efficiency": efficiency,
                "loses_most_to": loses_most(costs, model, split, scaling),
                **failures(model, n),
            }
        )
    return pd.DataFrame(rows)


def loses_most(costs: Machine, model: Model, split: Setting, scaling: str) -> str:
    """What costs the most efficiency, found by leaving out each cost in turn.

    A single GPU also launches kernels and updates weights, so in weak scaling these cost nothing.
    """
    link = costs.link
    at_once = tuple((name, 0.0, 0.0, 0.0, share) for name, *_, share in link.protocols)
    wide = replace(link, node_bandwidth=math.inf, network_bandwidth=math.inf)
    without = {
        "latency": replace(costs, link=replace(link, protocols=at_once), sync=0.0),
        "bandwidth": replace(costs, link=wide),
        "slowest rank": replace(costs, jitter=0.0),
    }
    if scaling == "strong":
        without["kernel launches"] = replace(costs, compute_fixed=0.0)
        without["optimizer"] = replace(costs, optimizer_per_parameter=0.0)
    return min(without, key=lambda name: step(model, split, without[name]).total)


def failures(model: Model, n: int) -> dict[str, float]:
    """The checkpoint interval that loses least, and the share of time that it keeps."""
    # Weights and two moments, fp32, written by rank 0.
    pause = 12 * model.parameters / ASSUMPTIONS["bytes per second into storage, from one rank"]
    mtbf = 3600 * GPU_HOURS_BETWEEN_FAILURES / n
    restart = ASSUMPTIONS["seconds from a failure to the first step after it"]
    interval = daly(pause, mtbf)
    return {
        "mtbf_h": mtbf / 3600,
        "checkpoint_pause_s": pause,
        "checkpoint_interval_s": interval,
        "useful_share": useful_share(interval, pause, mtbf, restart),
    }


@dataclass(frozen=True)
class Study:
    """The model's predictions for one preset: a table from `sweep` for each curve, by label."""

    preset: str
    ways: dict[str, pd.DataFrame]
    kinds: dict[str, pd.DataFrame]
    presets: dict[str, pd.DataFrame]
    zero1: pd.DataFrame

    def parts(self) -> dict[str, dict[str, pd.DataFrame]]:
        """The curves of each picture, by title."""
        h100 = REFERENCE.name
        return {
            f"{self.preset} on {h100}, {EACH} sequences a GPU": self.ways,
            f"{self.preset}, {EACH} sequences a GPU, better algorithm, overlap": self.kinds,
            f"{h100}, {TOGETHER} sequences in all, better algorithm, overlap": self.presets,
        }

    def rows(self) -> pd.DataFrame:
        """All tables as one, each row once."""
        tables = (*self.ways.values(), *self.kinds.values(), self.zero1)
        parts = [(self.preset, table) for table in tables]
        parts += self.presets.items()
        rows = pd.concat([table.assign(preset=name) for name, table in parts], ignore_index=True)
        rows = rows.drop_duplicates()
        return rows[["preset", *rows.columns.drop("preset")]]


def study(name: str, gradient_bytes: int) -> Study:
    """Sweeps over algorithms, kinds of GPU and presets."""
    model, given = preset(name), {"gradient_bytes": gradient_bytes}
    return Study(
        preset=name,
        ways={
            f"{algorithm}, {'with' if overlap else 'without'} overlap": sweep(
                REFERENCE, model, "weak", algorithm, overlap, **given
            )
            for algorithm in ("ring", "tree")
            for overlap in (True, False)
        },
        kinds={kind.name: sweep(kind, model, "weak", **given) for kind in PUBLISHED},
        presets={other: sweep(REFERENCE, preset(other), "strong", **given) for other in PRESETS},
        zero1=sweep(REFERENCE, model, "weak", zero1=True, **given),
    )


def bends(table: pd.DataFrame) -> str:
    """Where a curve falls below nine tenths and below a half, and why, as text."""
    found = []
    for share in (0.9, 0.5):
        low = table[table["efficiency"] < share]
        if not low.empty:
            row = low.iloc[0]
            found.append(f"below {share:.0%} at {row['gpus']:,} GPUs ({row['loses_most_to']})")
    last = table.iloc[-1]
    return ", ".join([*found, f"{last['efficiency']:.0%} at {last['gpus']:,}"])
