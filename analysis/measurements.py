"""Run directories as the plots and the report read them: their CSVs, and whether they go on."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

try:
    import numpy as np
    import pandas as pd
except ModuleNotFoundError as error:
    print(
        f"{Path(sys.argv[0]).stem}: {error.name} is not installed for {sys.executable}; "
        "run launch/setup, then this with .venv/bin/python",
        file=sys.stderr,
    )
    sys.exit(2)

TRAIN_COLUMNS = ["step", "loss", "ppl"]
EVAL_COLUMNS = ["step", "split", "loss", "ppl"]

# The parts of step_ms, in the order in which they are stacked, and what they are called.
PARTS = {
    "compute_ms": "forward and backward pass",
    "comm_exposed_ms": "communication not hidden",
    "optimizer_ms": "clipping and update",
    "data_ms": "reading the batch",
}

# What a run may lack, because an older or another program wrote it.
TRAIN_OPTIONAL = [
    *("tokens", "lr", "grad_norm", "step_ms", *PARTS),
    *("tokens_per_s", "mfu", "memory_mib", "world_size", "elapsed_s"),
]
EVAL_OPTIONAL = ["word_ppl", "tokens", "eval_s", "bits_per_byte"]

# What curves can be drawn against: the column, what an axis says, and how much of it is one unit.
AXES = {
    "step": ("step", "optimizer step", 1),
    "tokens": ("tokens", "tokens", 1),
    "hours": ("elapsed_s", "hours of training", 3600),
}

# The trend averages over this part of a run, to show where a curve goes in spite of noisy batches.
TREND_WINDOW = 0.02


@dataclass(frozen=True)
class Measure:
    """A column of train.csv that has a curve of its own."""

    column: str
    title: str
    unit: str
    noisy: bool
    logarithmic: bool


MEASURES = [
    Measure("loss", "Loss", "loss (nats per token)", True, False),
    Measure("ppl", "Perplexity", "perplexity", True, True),
    Measure("lr", "Learning rate", "learning rate", False, False),
    Measure("grad_norm", "Gradient norm", "gradient norm before clipping", True, True),
    Measure("tokens_per_s", "Speed", "tokens/s, all ranks together", True, False),
    Measure("memory_mib", "Memory", "most memory of a rank (MiB)", False, False),
    Measure("mfu", "Model FLOP/s utilisation", "share of the machine's peak", True, False),
]


class Unusable(Exception):
    """A file that cannot be drawn; the message says which, why, and what to do."""


@dataclass
class Run:
    """One run directory's measurements.

    `train` has a row for each logged step, its unknown columns all NaN; `evaluations` has one for
    each evaluation, and `valid` those of the validation split: none where the run has not come to
    one.
    """

    name: str
    folder: Path
    train: pd.DataFrame
    evaluations: pd.DataFrame

    @property
    def valid(self) -> pd.DataFrame:
        rows = self.evaluations
        return rows[(rows["split"] == "valid") & rows["loss"].notna()]

    def knows(self, column: str) -> bool:
        """Whether any row of train.csv has this measurement."""
        return bool(self.train[column].notna().any())

    def places(self, x: str, steps: pd.Series) -> np.ndarray:
        """Where steps lie on an axis: steps themselves, or between the rows before and after.

        Raises Unusable where train.csv does not say.
        """
        if x == "step":
            return steps.to_numpy(dtype=float)
        column, _, unit = AXES[x]
        known = self.train[["step", column]].dropna()
        if known.empty:
            raise Unusable(
                f"{self.folder / 'train.csv'} has no {column}, which --x {x} needs; use --x step"
            )
        return np.interp(steps.to_numpy(dtype=float), known["step"], known[column] / unit)


def read_csv(path: Path, columns: list[str], optional: list[str] | None = None) -> pd.DataFrame:
    """Reads `columns` of a CSV, and `optional` ones as NaN where it has none: numbers, but names.

    Raises Unusable for a file that is missing, empty or malformed.
    """
    try:
        table = pd.read_csv(path, index_col=False)
    except FileNotFoundError:
        raise Unusable(
            f"{path} is not there; name a run directory, as `lockstep train` writes it"
        ) from None
    except pd.errors.EmptyDataError:
        raise Unusable(f"{path} is empty; expected a line of column names") from None
    except (OSError, UnicodeDecodeError, pd.errors.ParserError) as error:
        raise Unusable(f"cannot read {path}: {str(error).strip()}") from None
    missing = [name for name in columns if name not in table]
    if missing:
        raise Unusable(
            f"{path} has no column {', '.join(missing)}; expected at least {', '.join(columns)}"
        )
    table = table.reindex(columns=[*columns, *(optional or [])])
    for name in table:
        if name not in ("split", "host", "device"):
            table[name] = numbers(table[name], path)
    return table


def numbers(column: pd.Series, path: Path) -> pd.Series:
    """The column as numbers: an unknown measurement (an empty cell) and an infinite one become NaN.

    Raises Unusable for anything else that is no number, and for a step that is unknown.
    """
    values = pd.to_numeric(column, errors="coerce")
    wrong = values.isna() & (column.notna() | (column.name == "step"))
    if wrong.any():
        row = int(wrong.to_numpy().argmax())
        # Line 1 has the names of the columns.
        raise Unusable(
            f"{path}, line {row + 2}: expected a number in column {column.name}, "
            f"found {column.iloc[row]!r}; mend or remove that line"
        )
    return values.astype(float).replace([np.inf, -np.inf], np.nan)


def read_run(folder: Path) -> Run:
    """Reads a run directory. Raises Unusable where there is nothing to draw."""
    if not folder.is_dir():
        raise Unusable(f"{folder} is not a folder; name a run directory, such as runs/sample")
    train = read_csv(folder / "train.csv", TRAIN_COLUMNS, TRAIN_OPTIONAL)
    if train.empty:
        raise Unusable(f"{folder / 'train.csv'} has no rows yet; train for a step at least")
    for name in ("loss", "ppl"):
        if train[name].isna().all():
            raise Unusable(f"{folder / 'train.csv'} has no finite {name}; there is nothing to draw")
    evaluations = pd.DataFrame(columns=[*EVAL_COLUMNS, *EVAL_OPTIONAL])
    # A run that came to no evaluation has no such file.
    if (folder / "eval.csv").exists():
        evaluations = read_csv(folder / "eval.csv", EVAL_COLUMNS, EVAL_OPTIONAL)
    return Run(folder.resolve().name, folder, train, evaluations)


def read_runs(folders: list[Path]) -> list[Run]:
    """Reads run directories, each with a name of its own. Raises Unusable."""
    runs = [read_run(folder) for folder in folders]
    # Runs of one name, in different folders, are told apart by their paths.
    if len({run.name for run in runs}) < len(runs):
        for run in runs:
            run.name = str(run.folder)
    return runs


def trend(values: pd.Series) -> pd.Series:
    """A centred running mean, which does not lag behind what it smooths."""
    window = max(1, round(len(values) * TREND_WINDOW))
    return values.rolling(window, center=True, min_periods=1).mean()


def smoothed(run: Run, measure: Measure) -> pd.Series:
    """The trend of a measurement."""
    each = run.train[measure.column]
    # Perplexity is exp(loss), so the trend of its logarithm is the loss's own.
    return np.exp(trend(np.log(each))) if measure.column == "ppl" else trend(each)


class Lease:
    """Whether a process trains in a run directory, by its lease.json: its holder renews it."""

    # The holder renews it each 2 seconds; another job takes a run over after 12.
    PATIENCE_S = 15

    def __init__(self, folder: Path, now: float) -> None:
        self.path = folder / "lease.json"
        self.seen = self.read()
        self.changed = now

    def read(self) -> bytes:
        try:
            return self.path.read_bytes()
        except OSError:  # nobody holds it
            return b""

    def is_held(self, now: float) -> bool:
        found = self.read()
        if found != self.seen:
            self.seen, self.changed = found, now
        return bool(found) and now - self.changed < self.PATIENCE_S
