"""Reads run directories, and compares two of them bit by bit."""

import csv
import hashlib
import json
from contextlib import suppress
from pathlib import Path

from outcomes import Failed

# The columns that two equal runs have in common; the others are times.
CURVE = ("step", "tokens", "loss", "ppl", "lr", "grad_norm", "world_size")
EVALUATION = ("step", "split", "loss", "ppl", "word_ppl", "tokens")


def last_step(train_csv):
    """The last step in a log; 0 if it has none yet."""
    with suppress(OSError, ValueError, IndexError):
        return int(Path(train_csv).read_text().rsplit("\n", 2)[-2].split(",")[0])
    return 0


def heartbeat(run, rank):
    """The last heartbeat of a rank; None if it has left none. docs/formats.md has the format."""
    found = []
    for path in run.glob("heartbeats/node-*.txt"):
        for line in path.read_bytes().split(b"\n"):
            # The record before it may not have been written yet.
            check, _, text = line.strip(b"\0 ").partition(b" ")
            if hashlib.sha256(text).hexdigest()[:8].encode() == check:
                found.append(json.loads(text))
    return max((one for one in found if one["rank"] == rank), key=lambda b: b["beat"], default=None)


def rows(table, columns):
    """The cells of some columns of a CSV, as written; the file must be whole."""
    text = table.read_text()
    found = list(csv.DictReader(text.splitlines()))
    if not text.endswith("\n") or any(None in row or None in row.values() for row in found):
        raise Failed(f"{table} is not whole")
    return [tuple(row[column] for column in columns) for row in found]


def steps(run):
    """The number of steps in a run's log, which must have each once and in order."""
    found = [int(step) for (step,) in rows(run / "train.csv", ("step",))]
    if found != list(range(1, len(found) + 1)):
        raise Failed(f"{run / 'train.csv'} has the steps {found}")
    return len(found)


def same_rows(found, expected, columns):
    """Fails unless two CSVs have the same texts in these columns."""
    mine, theirs = rows(found, columns), rows(expected, columns)
    for here, there in zip(mine, theirs, strict=False):
        if here != there:
            raise Failed(f"{found}: found {here}, expected {there}")
    if len(mine) != len(theirs):
        raise Failed(f"{found} has {len(mine)} rows, expected {len(theirs)}")


def same_files(found, expected, pattern):
    """Fails unless the files of a pattern have the same names and bytes in both folders."""
    mine, theirs = (
        sorted(str(path.relative_to(folder)) for path in folder.glob(pattern))
        for folder in (found, expected)
    )
    if mine != theirs:
        raise Failed(f"{found}: expected the files {theirs or 'none'}, found {mine or 'none'}")
    for name in mine:
        if (found / name).read_bytes() != (expected / name).read_bytes():
            raise Failed(f"{found / name} differs from {expected / name}")
    return len(mine)


def same(found, expected, checkpoints="step-*"):
    """Fails unless a run has the same steps, losses, samples and tensors as another, bit for bit.

    A stopped run keeps checkpoints of other steps; `checkpoints` names those to compare.
    """
    same_rows(found / "train.csv", expected / "train.csv", CURVE)
    steps(found)
    if (expected / "eval.csv").exists():
        same_rows(found / "eval.csv", expected / "eval.csv", EVALUATION)
    for pattern in ("samples/*.txt", "best.json"):
        same_files(found, expected, pattern)
    if not same_files(found, expected, f"checkpoints/{checkpoints}/*.safetensors"):
        raise Failed(f"{found}: expected checkpoints {checkpoints}, found none")
