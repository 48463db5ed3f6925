"""The cost model's properties, against formulas, published values and a simulation."""

import math
from dataclasses import replace

import numpy as np
import pytest

from scaling import clusters, cost
from scaling.cost import Machine, Model, MpiLink, Setting, step

GPT2 = Model(n_layer=12, n_embd=768, vocab_size=50257, block_size=1024)
NANO = Model(n_layer=3, n_embd=48, vocab_size=8192, block_size=64, tied_head=False)
LINK = MpiLink(byte_s=8e-9, latency=2e-3)
MACHINE = Machine(
    link=LINK,
    compute_fixed=5e-3,
    compute_per_sequence=4e-3,
    optimizer_per_parameter=2e-9,
    data_fixed=1e-4,
    data_per_sequence=1e-5,
    sync=1e-3,
)
SETTINGS = [
    Setting(n, 24, accumulation, bucket, overlap, zero1)
    for n in (1, 2, 3, 4, 8)
    for accumulation in (1, 3)
    for bucket in (0.1, 1.0, 25.0, math.inf)
    for overlap in (True, False)
    for zero1 in (True, False)
]


def h100(algorithm="best"):
    return clusters.machine(clusters.KINDS["H100, NDR InfiniBand"], GPT2, algorithm)


def test_the_layout_is_gpt2s():
    # The published number of parameters; the head ends the buffer only if it is tied.
    assert GPT2.parameters == 124_439_808
    untied = replace(GPT2, tied_head=False)
    assert untied.parameters == 124_439_808 + 50257 * 768
    assert untied.ready()[0] == (50257 * 768, pytest.approx(0.5, abs=0.2))
    for model in (GPT2, untied, replace(GPT2, recompute=True), replace(GPT2, pre_norm=False)):
        ends, shares = np.array(model.ready()).T
        assert (np.diff(ends) >= 0).all() and ends[-1] == model.parameters
        assert (np.diff(shares) >= 0).all() and shares[-1] == pytest.approx(1)


def test_the_flop_of_a_token_are_those_of_train_csv():
    # 6 N + 12 L C T, with N without the embedding tables but with the head; final norm aside.
    n = GPT2.parameters - 1024 * 768 - 2 * 768
    assert GPT2.flop_per_token == pytest.approx(6 * n + 12 * 12 * 768 * 1024, rel=1e-9)
    assert replace(GPT2, recompute=True).flop_per_token == GPT2.flop_per_token


def test_recomputing_blocks_makes_gradients_ready_later():
    first = GPT2.ready()[2][1], replace(GPT2, recompute=True).ready()[2][1]
    assert first[0] != first[1]


@pytest.mark.parametrize("bucket_mib", [0.01, 1.0, 25.0, math.inf])
def test_buckets_hold_every_gradient_once(bucket_mib):
    sizes = cost.bucket_sizes(NANO.parameters, bucket_mib)
    assert sum(sizes) == NANO.parameters
    assert max(sizes) * 4 <= max(bucket_mib * cost.MIB, 4)
    assert min(sizes) > 0


def test_auto_micro_batches_are_those_of_the_trainer():
    assert cost.largest_micro_batch(12, 128) == 12
    assert cost.largest_micro_batch(16, 1024) == 8
    assert cost.largest_micro_batch(7, 4096) == 1
    assert cost.largest_micro_batch(5, 10_000) == 1


@pytest.mark.parametrize("link", [LINK, h100("ring").link, h100("tree").link, h100().link])
def test_one_rank_sends_nothing(link):
    assert link.all_reduce(1e9, 1) == 0
    assert link.reduce_scatter(1e9, 1) == link.all_gather(1e9, 1) == 0
    alone = step(GPT2, Setting(1, 8), replace(MACHINE, link=link, slow_down_per_byte=1e-9))
    assert alone.exposed == 0
    assert alone == step(
        GPT2, Setting(1, 8, overlap=False, zero1=True), replace(MACHINE, link=link)
    )


def test_zero1_gathers_what_the_model_computes_with():
    machine = replace(h100("ring"), sync=0.0, jitter=0.0)
    plain, fp32, bf16 = (
        step(GPT2, Setting(8, 128, overlap=False, zero1=zero1, weight_bytes=bytes_), machine)
        for zero1, bytes_ in ((False, 4), (True, 4), (True, 2))
    )
    link, sizes = machine.link, cost.bucket_sizes(GPT2.parameters, 25.0)
    saved = sum(link.all_gather(4 * size, 8) - link.all_gather(2 * size, 8) for size in sizes)
    assert fp32.exposed - bf16.exposed == pytest.approx(saved)
    assert bf16.exposed < plain.exposed


def test_a_ring_moves_what_the_formula_says():
    link = replace(h100("ring").link, protocols=(("ring", 0.0, 1e-6, 1e-5, 1.0),))
    within = 2 * 7 / 8 * 1e9 / link.node_bandwidth + 2 * 7 * 1e-6
    assert link.all_reduce(1e9, 8) == pytest.approx(within)
    slow = min(link.node_bandwidth, link.network_bandwidth)
    between = 2 * 63 / 64 * 1e9 / slow + (126 - 16) * 1e-6 + 16 * 1e-5
    assert link.all_reduce(1e9, 64) == pytest.approx(between)
    for half in (link.reduce_scatter, link.all_gather):
        assert half(1e9, 64) == pytest.approx(between / 2)


def test_mpi_moves_what_the_formula_says():
    link = MpiLink(byte_s=8e-9, latency=2e-3)
    assert link.all_reduce(1e6, 4) == pytest.approx(2 * 3 / 4 * 1e6 * 8e-9 + 3 * 2e-3)
    # A bucket of more than 1 MiB for each rank, or 16 for all, is several messages.
    large = 25 * cost.MIB
    assert link.all_reduce(large, 2) == pytest.approx(large * 8e-9 + 13 * 2e-3)
    assert link.all_reduce(large, 32) == pytest.approx(2 * 31 / 32 * large * 8e-9 + 31 * 2 * 2e-3)
    # Half of it alone is one, however large.
    assert link.all_gather(large, 2) == pytest.approx(large / 2 * 8e-9 + 2e-3 / 2)
    assert link.reduce_scatter(large, 2) == link.all_gather(large, 2)
    busy = MpiLink(byte_s=0.0, latency=0.0, work_per_byte=2e-9)
    assert busy.all_reduce(1e6, 2) == busy.all_reduce(1e6, 8) == pytest.approx(2e-3)
    # Whoever gathers has nothing to add up.
    assert busy.reduce_scatter(1e6, 2) == busy.all_reduce(1e6, 2)
    assert busy.all_gather(1e6, 2) == 0
    crowded = MpiLink(byte_s=0.0, latency=2e-3, crowd_latency=5e-3, ranks_at_once=2)
    assert crowded.all_reduce(1e6, 2) == pytest.approx(2e-3)
    assert crowded.all_reduce(1e6, 4) == pytest.approx(3 * 2e-3 + 2 * 5e-3)


def test_rings_are_for_few_and_trees_for_many():
    ring, tree, best = (h100(name).link for name in ("ring", "tree", "best"))
    size = 25 * cost.MIB
    assert ring.all_reduce(size, 8) < tree.all_reduce(size, 8)
    assert ring.all_reduce(size, 16384) > 100 * tree.all_reduce(size, 16384)
    for n in clusters.SIZES:
        times = ring.all_reduce(size, n), tree.all_reduce(size, n)
        assert best.all_reduce(size, n) == min(times)


@pytest.mark.parametrize("setting", SETTINGS)
def test_properties_of_a_step(setting):
    whole = step(NANO, setting, MACHINE)
    assert whole.exposed >= 0 and whole.hidden >= 0
    assert whole.total == whole.data + whole.compute + whole.exposed + whole.optimizer
    # More bandwidth and less latency never make it slower.
    for better in (replace(LINK, byte_s=LINK.byte_s / 2), replace(LINK, latency=1e-3)):
        assert step(NANO, setting, replace(MACHINE, link=better)).total <= whole.total
    # Overlap never makes it slower if the communication thread takes no time from the compute.
    if setting.overlap:
        after = step(NANO, replace(setting, overlap=False), MACHINE)
        assert whole.total <= after.total + 1e-12
        assert after.hidden == pytest.approx(0, abs=1e-12)
        if setting.world_size > 1 and not setting.zero1:
            # All communication is either hidden or exposed.
            small = MACHINE.sync * math.log2(setting.world_size)
            assert whole.hidden + whole.exposed - small == pytest.approx(after.exposed - small)
    more = replace(setting, accumulation=setting.accumulation + 1)
    assert step(NANO, more, MACHINE).total >= whole.total - 1e-12
    if setting.overlap and setting.world_size > 1:
        slowed = step(NANO, setting, replace(MACHINE, slow_down_per_byte=1e-9))
        assert slowed.compute > whole.compute


@pytest.mark.parametrize("tied", [True, False])
def test_the_last_buckets_cannot_be_hidden(tied):
    # However long the compute takes, the gradients that the backward pass finishes last are sent
    # after it: those of the first block and the embedding.
    model = replace(NANO, tied_head=tied)
    sizes = cost.bucket_sizes(model.parameters, 0.1)
    early = model.ready()[-4][0]
    waiting = np.array(sizes)[np.cumsum(sizes) > early]
    assert 1 < len(waiting) < len(sizes)
    patient = replace(MACHINE, compute_fixed=100.0, sync=0.0)
    whole = step(model, Setting(2, 24, bucket_mib=0.1), patient)
    assert whole.exposed == pytest.approx(sum(LINK.all_reduce(4 * size, 2) for size in waiting))


def test_only_the_last_micro_step_hides_communication():
    settings = [Setting(2, 24, accumulation, bucket_mib=0.1) for accumulation in (1, 2, 1000)]
    hidden = [step(NANO, setting, MACHINE).hidden for setting in settings]
    assert hidden[0] > hidden[1] > hidden[2]
    # A thousandth of the compute leaves time for next to nothing.
    assert hidden[2] < 0.01 * hidden[0]


def test_the_link_serves_one_bucket_after_another():
    assert cost.finish(np.array([1.0, 2.0, 9.0]), np.array([3.0, 1.0, 1.0])) == 10
    assert cost.finish(np.array([1.0, 2.0, 3.0]), np.array([3.0, 1.0, 1.0])) == 6


def test_zero1_divides_the_optimizer_and_gathers_the_weights():
    whole, parts = (
        step(NANO, Setting(4, 24, overlap=False, zero1=zero1), replace(MACHINE, sync=0.0))
        for zero1 in (False, True)
    )
    assert parts.optimizer == pytest.approx(whole.optimizer / 4)
    # The weights are also gathered bucket by bucket: two halves of an all-reduce.
    assert parts.exposed == pytest.approx(whole.exposed)


def test_ranks_that_share_a_machine_take_turns():
    shared = replace(MACHINE, ranks_at_once=2, crowding=0.3)
    assert [shared.crowd(n) for n in (1, 2, 3, 4)] == pytest.approx([1, 1.3, 1.95, 2.6])
    assert MACHINE.crowd(4) == 1


@pytest.mark.parametrize("n", [1, 2, 10, 1000])
def test_the_slowest_rank(n):
    draws = np.random.default_rng(5).standard_normal((4000, n)).max(axis=1)
    assert cost.slowest_of(n) == pytest.approx(draws.mean() if n > 1 else 0, abs=0.04)


@pytest.mark.parametrize(("hours", "minutes"), [(24, 117), (6, 57), (0.25, 9.1)])
def test_dalys_interval_is_the_one_that_he_published(hours, minutes):
    # The captions of figures 3 to 5 of his paper: pauses of 5 minutes.
    assert cost.daly(300, hours * 3600) / 60 == pytest.approx(minutes, rel=0.006)


def test_a_pause_beyond_reason_does_not_break_the_formulas():
    assert cost.daly(100, 10) == 10
    assert cost.young(2, 100) == 20


def simulated_share(interval, pause, mtbf, restart, seed, segments=4000):
    """The share of wall time kept, from simulated failures."""
    rng = np.random.default_rng(seed)
    wall, next_failure = 0.0, rng.exponential(mtbf)
    for _ in range(segments):
        while True:
            if next_failure >= interval + pause:
                next_failure -= interval + pause
                wall += interval + pause
                break
            wall += next_failure
            next_failure = rng.exponential(mtbf)
            while next_failure < restart:  # a failure while it restarts
                wall += next_failure
                next_failure = rng.exponential(mtbf)
            next_failure -= restart
            wall += restart
    return segments * interval / wall


@pytest.mark.parametrize(("pause", "mtbf", "restart"), [(5, 600, 30), (60, 3600, 300)])
def test_the_checkpoint_interval_against_a_simulation(pause, mtbf, restart):
    best = cost.daly(pause, mtbf)
    expected = cost.useful_share(best, pause, mtbf, restart)
    assert simulated_share(best, pause, mtbf, restart, seed=7) == pytest.approx(expected, rel=0.02)
    # By brute force, no interval keeps noticeably more, and half or twice as long keeps less.
    shares = {
        interval: np.mean(
            [simulated_share(interval, pause, mtbf, restart, seed) for seed in range(8)]
        )
        for interval in best * np.array([0.4, 0.7, 1.0, 1.4, 2.5])
    }
    assert max(shares, key=shares.get) == pytest.approx(best, rel=0.45)
    assert shares[best] > 1.005 * shares[best * 0.4]
    assert shares[best] > 1.005 * shares[best * 2.5]
    # The formula's own optimum agrees with Daly's series to one percent.
    grid = best * np.linspace(0.5, 2, 3001)
    found = max(grid, key=lambda each: cost.useful_share(each, pause, mtbf, restart))
    assert best == pytest.approx(found, rel=0.01)
    assert abs(best - found) < abs(cost.young(pause, mtbf) - found)


def test_clusters_on_paper():
    for kind in clusters.KINDS.values():
        weak = clusters.sweep(kind, GPT2, "weak")
        assert weak["gpus"].tolist() == [2**power for power in range(3, 15)]
        assert weak["efficiency"].between(0, 1).all()
        assert (weak["efficiency"].diff().dropna() < 0).all()
        assert set(weak["loses_most_to"]) <= {"latency", "bandwidth", "slowest rank"}
        late = clusters.sweep(kind, GPT2, "weak", overlap=False)
        assert (weak["step_ms"] <= late["step_ms"]).all()
        assert kind.source
    strong = clusters.sweep(kind, GPT2, "strong")
    assert strong["gpus"].max() == 512
    assert strong["efficiency"].iloc[0] == 1


def test_rings_bend_by_latency_and_slow_networks_by_bandwidth():
    ring = clusters.sweep(clusters.KINDS["H100, NDR InfiniBand"], GPT2, "weak", "ring")
    assert ring["loses_most_to"].iloc[-1] == "latency"
    assert ring["efficiency"].iloc[-1] < 0.1
    kind = clusters.KINDS["H100, 100 Gbit/s Ethernet a node"]
    slow = clusters.sweep(kind, GPT2, "weak", "tree")
    assert slow["loses_most_to"].iloc[1] == "bandwidth"


def test_more_gpus_want_more_frequent_checkpoints():
    found = [clusters.failures(GPT2, n) for n in clusters.SIZES]
    intervals = [each["checkpoint_interval_s"] for each in found]
    assert intervals == sorted(intervals, reverse=True)
    # 16,384 GPUs fail as often as Meta counted: 419 times in 54 days.
    assert found[-1]["mtbf_h"] == pytest.approx(54 * 24 / 419)
