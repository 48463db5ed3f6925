"""What an optimizer step costs, as a function of model, ranks, buckets and links.

A step is data loading, compute, communication that compute did not hide, and the update:

- compute is linear in the sequences of a rank, plus a fixed part;
- gradients travel in buckets of the flat buffer, which has the order in which the backward pass
  finishes: head, final norm, blocks from last to first, positions, token embedding. A bucket is
  ready once its last gradient is, and the link serves one bucket after another. What is left when
  the compute ends is exposed. Gradients of several micro-steps are summed first, so only the last
  micro-step overlaps;
- under ZeRO-1 the gradients are scattered, each rank updates its part, the weights are gathered;
- on CPUs the communication thread takes time from the compute, in proportion to its bytes.

Units are seconds and bytes, unless a name says otherwise. Nothing here reads or writes a file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

BYTES = {"fp32": 4, "bf16": 2}
MIB = 1 << 20

# Lockstep's MPI all-reduce takes a bucket piece by piece: a MiB for each rank, but at most 16.
MPI_PART_BYTES, MPI_CHUNK_BYTES = MIB, 16 * MIB


@dataclass(frozen=True)
class Model:
    """A GPT's shape: how large its gradients are, and when each is ready."""

    n_layer: int
    n_embd: int
    vocab_size: int
    block_size: int
    tied_head: bool = True
    bias: bool = True
    pre_norm: bool = True
    recompute: bool = False

    def segments(self) -> list[tuple[str, int, float, float]]:
        """(name, parameters, forward FLOP a token, backward FLOP a token), in the buffer's order.

        The head's forward pass counts as backward: head and loss are one function that also
        computes the gradients, so its whole time comes after the last block's forward pass.
        """
        c, bias = self.n_embd, int(self.bias)
        head = self.vocab_size * c
        block = 12 * c * c + 2 * c + bias * 11 * c
        block_flop = 2.0 * block + 4.0 * c * self.block_size
        backward = (3 if self.recompute else 2) * block_flop
        norm = c * (1 + bias) if self.pre_norm else 0
        return [
            ("head", 0 if self.tied_head else head, 0.0, 6.0 * head),
            ("ln_f", norm, 0.0, 0.0),
            *((f"block {i}", block, block_flop, backward) for i in reversed(range(self.n_layer))),
            ("wpe", self.block_size * c, 0.0, 0.0),
            ("wte", head, 0.0, 0.0),
        ]

    @property
    def parameters(self) -> int:
        """P, elements of the flat buffer."""
        return sum(count for _, count, _, _ in self.segments())

    @property
    def flop_per_token(self) -> float:
        """Forward and backward pass, as train.csv's `mfu` counts them (no recomputation)."""
        return sum(
            forward + backward
            for _, _, forward, backward in replace(self, recompute=False).segments()
        )

    def ready(self) -> list[tuple[int, float]]:
        """(end in the buffer, share of a micro-step's compute after which it is ready)."""
        segments = self.segments()
        done = sum(forward for _, _, forward, _ in segments)
        total = done + sum(backward for _, _, _, backward in segments)
        end, result = 0, []
        for _, count, _, backward in segments:
            end, done = end + count, done + backward
            result.append((end, done / total))
        return result


@dataclass(frozen=True)
class Setting:
    """How a run splits its work."""

    world_size: int
    batch_size: int
    accumulation: int = 1
    bucket_mib: float = 25.0
    overlap: bool = True
    zero1: bool = False
    gradient_bytes: int = 4
    weight_bytes: int = 4  # of those that ZeRO-1 gathers: what the model computes with

    @property
    def sequences(self) -> float:
        """Of one rank, in one step."""
        return self.batch_size / self.world_size


def largest_micro_batch(share: int, block_size: int) -> int:
    """What `data.micro_batch: auto` means: a share's largest divisor of at most 8,192 tokens."""
    fits = (n for n in range(share, 0, -1) if share % n == 0 and n * block_size <= 8192)
    return next(fits, 1)


def bucket_sizes(parameters: int, bucket_mib: float) -> list[int]:
    """Elements of each bucket of the flat buffer; a bucket is measured in fp32."""
    if not math.isfinite(bucket_mib):
        return [parameters]
    size = max(1, int(bucket_mib * MIB) // 4)
    whole, rest = divmod(parameters, size)
    return [size] * whole + ([rest] if rest else [])


@dataclass(frozen=True)
class MpiLink:
    """Lockstep's CPU collectives, between ranks that each have a link of their own.

    Each rank sends the r-th part of a message to rank r, which sums the parts and sends the result
    to all: (N-1)/N of the bytes each way. Summing the parts takes `work_per_byte`, whatever N; it
    belongs to the first half alone. `latency` is for each message and each further rank;
    `crowd_latency` is for each rank beyond those that can run at once: it waits for a core. A half
    alone, as ZeRO-1 has it, is one message; both together are one for each piece of a bucket.
    """

    byte_s: float
    latency: float
    work_per_byte: float = 0.0
    crowd_latency: float = 0.0
    ranks_at_once: float = math.inf

    def all_gather(self, size: float, n: int, messages: int = 1) -> float:
        if n == 1:
            return 0.0
        waiting = self.latency * (n - 1) + self.crowd_latency * max(0.0, n - self.ranks_at_once)
        return (n - 1) / n * size * self.byte_s + messages * waiting / 2

    def reduce_scatter(self, size: float, n: int, messages: int = 1) -> float:
        summing = size * self.work_per_byte if n > 1 else 0.0
        return self.all_gather(size, n, messages) + summing

    def all_reduce(self, size: float, n: int) -> float:
        pieces = math.ceil(size / min(n * MPI_PART_BYTES, MPI_CHUNK_BYTES))
        return self.reduce_scatter(size, n, pieces) + self.all_gather(size, n, pieces)


@dataclass(frozen=True)
class NcclLink:
    """NCCL on nodes of several GPUs: the better of ring and tree, or the one that is named.

    `protocols` has a row for each way that NCCL can choose: algorithm, seconds to start, seconds
    for each hop within a node, seconds for each hop between nodes, share of the bandwidth. The
    bandwidth is that of a GPU's links within the node, or of all network adapters of a node
    together, since NCCL builds a ring for each of them.
    """

    gpus_per_node: int
    node_bandwidth: float
    network_bandwidth: float
    protocols: tuple[tuple[str, float, float, float, float], ...]
    algorithm: str = "best"

    def all_reduce(self, size: float, n: int) -> float:
        if n == 1:
            return 0.0
        times = [
            self._ring(size, n, row, 2) if row[0] == "ring" else self._tree(size, n, row)
            for row in self.protocols
            if self.algorithm in ("best", row[0])
        ]
        return min(times)

    def all_gather(self, size: float, n: int) -> float:
        """For this and for a reduce-scatter NCCL has only rings."""
        if n == 1:
            return 0.0
        return min(self._ring(size, n, row, 1) for row in self.protocols if row[0] == "ring")

    def reduce_scatter(self, size: float, n: int) -> float:
        return self.all_gather(size, n)

    def _nodes(self, n: int) -> int:
        return math.ceil(n / self.gpus_per_node)

    def _bandwidth(self, n: int) -> float:
        within = self.node_bandwidth
        return within if self._nodes(n) == 1 else min(within, self.network_bandwidth)

    def _ring(self, size: float, n: int, row: tuple, rounds: int) -> float:
        """`rounds` passes around the ring, n-1 steps each (Patarasuk and Yuan 2009)."""
        _, start, hop, network_hop, share = row
        steps = rounds * (n - 1)
        nodes = self._nodes(n)
        between = rounds * nodes if nodes > 1 else 0
        waiting = start + max(0, steps - between) * hop + between * network_hop
        return waiting + steps / n * size / (share * self._bandwidth(n))

    def _tree(self, size: float, n: int, row: tuple) -> float:
        """Up and down two binary trees over the nodes, each with half of the bytes (Sanders, Speck
        and Träff 2009), and a chain within each node."""
        _, start, hop, network_hop, share = row
        nodes = self._nodes(n)
        within = min(n, self.gpus_per_node) - 1
        waiting = start + 2 * (within * hop + math.log2(nodes) * network_hop)
        return waiting + 2 * size / (share * self._bandwidth(n))


@dataclass(frozen=True)
class Machine:
    """What one rank's machine and its links cost."""

    link: MpiLink | NcclLink
    compute_fixed: float
    compute_per_sequence: float
    optimizer_per_parameter: float = 0.0
    data_fixed: float = 0.0
    data_per_sequence: float = 0.0
    # Seconds of the collective that ends a step, for each doubling of the ranks.
    sync: float = 0.0
    # Compute lost to the communication thread for each byte that it sends meanwhile.
    slow_down_per_byte: float = 0.0
    # Standard deviation of a rank's compute, as a share of it; all ranks wait for the slowest.
    jitter: float = 0.0
    # If all ranks share one machine: how many run at once, and how much slower each is then, as a
    # share of its time alone.
    ranks_at_once: float = math.inf
    crowding: float = 0.0

    def crowd(self, n: int) -> float:
        """How much slower a rank computes beside n-1 others on the same machine."""
        if not math.isfinite(self.ranks_at_once):
            return 1.0
        beside = (min(n, self.ranks_at_once) - 1) / max(1.0, self.ranks_at_once - 1)
        return (1 + self.crowding * beside) * max(1.0, n / self.ranks_at_once)


@dataclass(frozen=True)
class Step:
    """A step's parts, in seconds. `hidden` is communication behind compute, outside the total."""

    data: float
    compute: float
    exposed: float
    optimizer: float
    hidden: float = 0.0

    @property
    def total(self) -> float:
        return self.data + self.compute + self.exposed + self.optimizer


def finish(ready: np.ndarray, durations: np.ndarray) -> float:
    """When a link that serves one bucket after another finishes the last one."""
    end = 0.0
    for start, duration in np.column_stack([ready, durations]):
        end = max(end, start) + duration
    return end


def slowest_of(n: int) -> float:
    """The expected largest of n draws of a standard normal (Blom 1958), for n of 1 and more."""
    if n == 1:
        return 0.0
    # The normal distribution's quantile at (n - 0.375) / (n + 0.25), by bisection.
    target, low, high = (n - 0.375) / (n + 0.25), 0.0, 10.0
    for _ in range(60):
        middle = (low + high) / 2
        below = 0.5 * (1 + math.erf(middle / math.sqrt(2))) < target
        low, high = (middle, high) if below else (low, middle)
    return low


def step(model: Model, setting: Setting, machine: Machine) -> Step:
    """The model: what one optimizer step costs."""
    n, link = setting.world_size, machine.link
    crowd = machine.crowd(n)
    sizes = np.array(bucket_sizes(model.parameters, setting.bucket_mib))
    collective = link.reduce_scatter if setting.zero1 else link.all_reduce
    durations = np.array([collective(size * setting.gradient_bytes, n) for size in sizes])

    compute = machine.compute_fixed + machine.compute_per_sequence * setting.sequences
    if setting.overlap and n > 1:
        halves = 1 if setting.zero1 else 2
        sent = halves * (n - 1) / n * model.parameters * setting.gradient_bytes
        compute += machine.slow_down_per_byte * sent
    compute *= crowd
    if setting.overlap:
        ends, shares = np.array(model.ready()).T
        # The segment that holds a bucket's last element.
        last = np.searchsorted(ends, np.cumsum(sizes))
        micro_step = compute / setting.accumulation
        ready = compute - micro_step * (1 - shares[last])
    else:
        ready = np.full(len(sizes), compute)
    exposed = max(0.0, finish(ready, durations) - compute)
    hidden = max(0.0, durations.sum() - exposed)

    if n > 1:
        exposed += machine.sync * math.log2(n) + machine.jitter * compute * slowest_of(n)
    updated = model.parameters
    if setting.zero1:
        updated /= n
        exposed += sum(link.all_gather(setting.weight_bytes * size, n) for size in sizes)
    return Step(
        data=crowd * (machine.data_fixed + machine.data_per_sequence * setting.sequences),
        compute=compute,
        exposed=exposed,
        optimizer=crowd * machine.optimizer_per_parameter * updated,
        hidden=hidden,
    )


def young(pause: float, mtbf: float) -> float:
    """The checkpoint interval that loses least, to first order (Young 1974)."""
    return math.sqrt(2 * pause * mtbf)


def daly(pause: float, mtbf: float) -> float:
    """The same to higher order (Daly 2006), for pauses that are not small beside `mtbf`."""
    if pause >= 2 * mtbf:
        return mtbf
    ratio = pause / (2 * mtbf)
    return young(pause, mtbf) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - pause


def useful_share(interval: float, pause: float, mtbf: float, restart: float) -> float:
    """The share of wall time that goes into training that is kept (Daly 2006).

    A checkpoint of `pause` seconds follows each `interval` of training. Failures occur at random,
    one in `mtbf` seconds on average, also during checkpoints and restarts. `restart` is the time
    from a failure to the first step after it.
    """
    lost = mtbf * math.exp(restart / mtbf) * math.expm1((interval + pause) / mtbf)
    return interval / lost
