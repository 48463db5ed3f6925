"""What ranks leave in a run directory and tell each other, as a function of their number.

Both follow from the program: the ranks of a node share a file of heartbeats, whose interval grows
with the nodes (src/watch/heartbeats.rs); what is small travels up and down a binomial tree
(src/comm/tree.rs). The sums of gradients are not counted: cost.py has their time.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pandas as pd

from measurements import Unusable, read_csv

# Of src/watch/heartbeats.rs: what all nodes together write, at the most.
FILES_A_SECOND = 100

# What a rank of a run with -v says before its first step and at its end.
SAID = re.compile(r"rank (\d+) has sent (\d+) messages that carry no tensor")


def interval_s(nodes: int) -> int:
    """Seconds between two heartbeats of a rank."""
    return max(1, -(-nodes // FILES_A_SECOND))


def modelled(ranks: int, ranks_per_node: int, step_s: float) -> dict[str, float]:
    """A row of the table for a job on nodes of `ranks_per_node` ranks, with steps of `step_s`."""
    nodes = -(-ranks // ranks_per_node)
    every, levels = interval_s(nodes), (ranks - 1).bit_length()
    return {
        "ranks": ranks,
        "nodes": nodes,
        "logs": 1,
        "heartbeat_files": nodes,
        "heartbeat_s": every,
        "files_a_second": nodes / every,
        "heartbeats_a_second": ranks / every,
        # Up and down: every rank but the first has one neighbour above it.
        "messages_a_step": 2 * (ranks - 1),
        "most_sent_by_a_rank": levels,
        "hops_a_step": 2 * levels,
        "messages_a_second": 2 * (ranks - 1) / step_s,
    }


def measured(folder: Path) -> dict[str, float]:
    """The same of a run that was made with -v on this machine."""
    train = read_csv(folder / "train.csv", ["step", "step_ms", "world_size", "elapsed_s"])
    if train.empty:
        raise Unusable(f"{folder / 'train.csv'} has no rows")
    ranks = int(train["world_size"].iloc[-1])
    sent = {}
    for path in sorted((folder / "logs").glob("rank-*.log")):
        said = [(int(rank), int(count)) for rank, count in SAID.findall(path.read_text())]
        if len(said) == 2:
            (rank, before), (_, after) = said
            sent[rank] = after - before
    if len(sent) != ranks:
        raise Unusable(
            f"{folder}: {len(sent)} of {ranks} ranks say in logs/ what they have sent; expected a "
            "run that was started once, with -v, and has ended"
        )
    beats = heartbeats(folder)
    if len(beats) != ranks:
        raise Unusable(f"{folder}: expected heartbeats of {ranks} ranks, found {len(beats)}")
    files, every = len([*folder.glob("heartbeats/*")]), beats[0]["every_s"]
    steps, step_s = len(train), train["step_ms"].median() / 1000
    a_step = sum(sent.values()) / steps
    return {
        "ranks": ranks,
        "nodes": files,
        "logs": len([*folder.glob("logs/*")]),
        "heartbeat_files": files,
        "heartbeat_s": every,
        "files_a_second": files / every,
        "heartbeats_a_second": len(beats) / every,
        "messages_a_step": a_step,
        "most_sent_by_a_rank": max(sent.values()) / steps,
        "messages_a_second": a_step / step_s,
    }


def heartbeats(folder: Path) -> dict[int, dict]:
    """The last heartbeat of each rank; docs/formats.md has the format."""
    found = {}
    for path in folder.glob("heartbeats/node-*.txt"):
        for line in path.read_text(errors="replace").splitlines():
            text = line.partition(" ")[2].rstrip()
            if text.startswith("{"):
                beat = json.loads(text)
                known = found.get(beat["rank"], beat)
                found[beat["rank"]] = max(known, beat, key=lambda one: one["beat"])
    return found


def table(runs: list[Path], ranks_per_node: int, step_s: float) -> pd.DataFrame:
    """The rows of these runs, or else of 1 to 16,384 ranks."""
    if runs:
        return pd.DataFrame([measured(run) for run in runs]).sort_values("ranks")
    return pd.DataFrame([modelled(2**power, ranks_per_node, step_s) for power in range(15)])
