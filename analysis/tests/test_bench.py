"""The record of launch/bench: whose figures stand where, and which way a ratio goes."""

import csv
import importlib.util
from pathlib import Path

import pytest

MAIN = Path(__file__).resolve().parents[1] / "bench/__main__.py"


@pytest.fixture
def bench(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("bench_main", MAIN)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    machine = {"date": "2026-01-02", "cpu": "CPU (TM) 7", "cores": 2, "memory_gib": 8}
    machine |= {"kernel": "6.1", "lockstep": "0.1.0"}
    monkeypatch.setattr(module, "machine", lambda binary: machine)
    return module, module.Bench(tmp_path, 3, "lockstep", ["training", "generation"])


def rows(bench):
    with bench.record.open() as file:
        return list(csv.DictReader(file))


def test_programs_take_turns_and_ratios_say_how_many_times_ours_is_as_good(bench):
    module, bench = bench
    turns = []

    def program(name, seconds, speeds):
        def measure():
            turns.append(name)
            return {"step": (seconds.pop(0), "s"), "speed": (speeds.pop(0), "MB/s")}

        return measure

    ours = program("ours", [1.0, 2.0, 4.0], [10.0, 20.0, 30.0])
    theirs = program("theirs", [3.0, 4.0, 6.0], [5.0, 5.0, 5.0])
    module.PACKAGES["a peer"] = "matplotlib"
    bench.compare("training", "a model", ours, "a peer", theirs, ["step", "speed"])
    assert turns == ["ours", "theirs"] * 3
    step, speed = rows(bench)
    assert list(step) == module.COLUMNS
    assert (step["what"], step["unit"], step["rounds"]) == ("a model: step", "s", "3")
    assert [step[name] for name in ("ours", "ours_min", "ours_max")] == ["2", "1", "4"]
    assert [step[name] for name in ("theirs", "theirs_min", "theirs_max")] == ["4", "3", "6"]
    # The median of 3, 2 and 1.5, round by round; of 2, 4 and 6, where more is better.
    assert (step["ratio"], speed["ratio"]) == ("2", "4")
    assert step["peer_version"]
    assert bench.record.name == "bench-2026-01-02-CPU--TM--7.csv"


def test_the_picture_has_a_bar_for_each_row(bench):
    module, bench = bench
    spreads = (31.0, 30.0, 32.0), "the memory", (40.0, 40.0, 40.0)
    bench.write("generation", "weights read", "GB/s", *spreads, 0.775)
    assert rows(bench)[0]["ratio"] == "0.775"
    module.draw(bench)
    assert (bench.out / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_groups_that_are_not_measured_again_stay(bench):
    module, bench = bench
    spread = (1.0, 1.0, 1.0)
    for group in ("training", "generation", "ranks"):
        bench.write(group, group, "s", spread, "a peer", spread, 1.0)
    again = module.Bench(bench.out, 3, "lockstep", ["generation"])
    again.write("generation", "anew", "s", spread, "a peer", spread, 2.0)
    assert [row["what"] for row in rows(again)] == ["training", "ranks", "anew"]
    module.draw(again)
