"""analysis/scaling footprint: what ranks leave and send, modelled, and read from runs."""

import hashlib
import json

import pandas as pd
import pytest
from command_line import call
from test_scaling import config, row, write_run

from scaling import command, footprint


def printed(tmp_path, *arguments):
    result = call(command.main, "footprint", *arguments)
    assert result.returncode == 0, result.stderr
    (tmp_path / "table.csv").write_text(result.stdout)
    return pd.read_csv(tmp_path / "table.csv")


def children(rank, ranks):
    """A rank's neighbours below it in a binomial tree, as src/comm/tree.rs has them."""
    steps = [2**bit for bit in range(20)]
    below = next((step for step in steps if rank & step), 2**20)
    return [rank + step for step in steps if step < below and rank + step < ranks]


@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 8, 64, 100, 16384])
def test_the_model_counts_what_the_tree_sends(ranks):
    row = footprint.modelled(ranks, 8, 0.5)
    sent = [len(children(rank, ranks)) + (rank > 0) for rank in range(ranks)]
    assert row["messages_a_step"] == sum(sent)
    assert row["messages_a_second"] == 2 * sum(sent)
    assert row["most_sent_by_a_rank"] == max(sent)


def test_the_table_stays_below_a_hundred_files_a_second(tmp_path):
    table = printed(tmp_path)
    assert [*table["ranks"]] == [2**power for power in range(15)]
    assert table["files_a_second"].max() <= 100
    assert [*table["logs"].unique()] == [1]
    last = table.iloc[-1]
    assert (last["nodes"], last["heartbeat_s"], last["hops_a_step"]) == (2048, 21, 28)
    wide = printed(tmp_path, "--ranks-per-node", "1").iloc[-1]
    assert (wide["nodes"], wide["heartbeat_s"]) == (16384, 164)


def run_of(folder, ranks, steps, before=13):
    """A run made with -v: each rank sends two messages a step and three more at its end."""
    write_run(folder, [row(step, (1, 50, 20, 29), ranks) for step in range(1, steps + 1)], config())
    (folder / "logs").mkdir()
    (folder / "heartbeats").mkdir()
    for rank in range(ranks):
        says = f"12:00:00Z DEBUG rank {rank} has sent {{}} messages that carry no tensor\n"
        log = says.format(before) + "12:00:01Z  INFO more\n" + says.format(before + 2 * steps + 3)
        (folder / f"logs/rank-{rank:04}.log").write_text(log)
        with (folder / f"heartbeats/node-{rank // 4 * 4:04}.txt").open("a") as file:
            for beat in (7, 8):
                text = json.dumps({"rank": rank, "beat": beat, "every_s": 1})
                file.write(
                    f"{hashlib.sha256(text.encode()).hexdigest()[:8]} {text}".ljust(511) + "\n"
                )
    return folder


def test_runs_are_read(tmp_path):
    runs = [run_of(tmp_path / name, ranks, 30) for name, ranks in (("eight", 8), ("two", 2))]
    two, eight = printed(tmp_path, *runs).to_dict("records")
    assert (two["ranks"], two["nodes"], two["logs"], two["heartbeats_a_second"]) == (2, 1, 2, 2)
    assert (eight["ranks"], eight["nodes"], eight["files_a_second"]) == (8, 2, 2)
    assert eight["messages_a_step"] == pytest.approx(8 * 63 / 30, rel=1e-3)
    assert eight["most_sent_by_a_rank"] == pytest.approx(63 / 30, rel=1e-3)
    # A step takes 100 ms.
    assert eight["messages_a_second"] == pytest.approx(10 * 8 * 63 / 30, rel=1e-3)


def test_a_run_that_says_too_little_is_told(tmp_path):
    run = run_of(tmp_path / "run", 2, 30)
    (run / "logs/rank-0001.log").unlink()
    result = call(command.main, "footprint", run)
    assert result.returncode == 3
    assert "1 of 2 ranks say" in result.stderr
    assert "with -v" in result.stderr
    beats = run_of(tmp_path / "silent", 2, 30)
    (beats / "heartbeats/node-0000.txt").write_text("")
    assert (
        "expected heartbeats of 2 ranks, found 0" in call(command.main, "footprint", beats).stderr
    )
