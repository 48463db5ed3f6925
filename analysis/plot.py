#!/usr/bin/env python3
"""Draws the loss and perplexity curves of training runs, from their train.csv and eval.csv alone.

    .venv/bin/python analysis/plot.py runs/sample       writes runs/sample/plots/loss.png, ppl.png
    .venv/bin/python analysis/plot.py runs/a runs/b     both runs together, in plots/

Exit codes: 2 for a command line that cannot be run, 3 for CSVs that cannot be used, 4 for pictures
that cannot be written.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

try:
    import matplotlib

    matplotlib.use("Agg")  # no display is needed
    import numpy as np
    import pandas as pd
    from matplotlib import pyplot as plt
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
except ModuleNotFoundError as error:
    print(
        f"plot: {error.name} is not installed for {sys.executable}; "
        "run launch/setup, then this with .venv/bin/python",
        file=sys.stderr,
    )
    sys.exit(2)

TRAIN_COLUMNS = ["step", "loss", "ppl"]
EVAL_COLUMNS = ["step", "split", "loss", "ppl"]

# Okabe and Ito's palette: people who cannot tell red from green can tell these apart.
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]

# The trend averages over this part of a run, to show how the loss moves despite noisy batches.
TREND_WINDOW = 0.02

TREND = {"linewidth": 1.8}
EACH_STEP = {"linewidth": 0.8, "alpha": 0.25}
VALIDATION = {"linewidth": 1.2, "linestyle": "--", "marker": "o", "markersize": 5}


class Unusable(Exception):
    """A CSV that cannot be drawn; the message says which, why, and what to do."""


@dataclass
class Run:
    """One run directory's measurements.

    `train` has a row for each logged step. `valid` has one for each evaluation of the validation
    split; it is empty if the run has not reached one.
    """

    name: str
    train: pd.DataFrame
    valid: pd.DataFrame


def read_csv(path: Path, columns: list[str]) -> pd.DataFrame:
    """Reads `columns` of a CSV, all but `split` as numbers.

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
    for name in columns:
        if name != "split":
            table[name] = numbers(table[name], path)
    return table[columns]


def numbers(column: pd.Series, path: Path) -> pd.Series:
    """The column as numbers: an unknown measurement (an empty cell) and an infinite one become NaN.

    Raises Unusable for anything else that is not a number, and for an unknown step.
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
    return values.replace([np.inf, -np.inf], np.nan)


def read_run(folder: Path) -> Run:
    """Reads a run directory. Raises Unusable if there is nothing to draw."""
    if not folder.is_dir():
        raise Unusable(f"{folder} is not a folder; name a run directory, such as runs/sample")
    train = read_csv(folder / "train.csv", TRAIN_COLUMNS)
    if train.empty:
        raise Unusable(f"{folder / 'train.csv'} has no rows yet; train for a step at least")
    for name in ("loss", "ppl"):
        if train[name].isna().all():
            raise Unusable(f"{folder / 'train.csv'} has no finite {name}; there is nothing to draw")
    valid = pd.DataFrame(columns=EVAL_COLUMNS)
    # A run that has not reached an evaluation has no such file.
    if (folder / "eval.csv").exists():
        evaluations = read_csv(folder / "eval.csv", EVAL_COLUMNS)
        valid = evaluations[(evaluations["split"] == "valid") & evaluations["loss"].notna()]
    return Run(folder.resolve().name, train, valid)


def trend(values: pd.Series) -> pd.Series:
    """A centred running mean, which does not lag behind the curve that it smooths."""
    window = max(1, round(len(values) * TREND_WINDOW))
    return values.rolling(window, center=True, min_periods=1).mean()


def draw(runs: list[Run], column: str, path: Path) -> None:
    """Draws one measurement of all runs, `loss` or `ppl`, into a PNG.

    Each run has its own colour. A single run has two, one of them for its validation points.
    """
    alone = len(runs) == 1
    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    handles, shown = [], []
    for run, color in zip(runs, cycle(COLORS)):
        valid_color = COLORS[1] if alone else color
        shown += draw_run(axes, run, column, color, valid_color)
        if alone:
            handles += legend_of_styles(color, valid_color, best(run, column))
        else:
            label = f"{run.name}: {best(run, column)}"
            handles += [Line2D([], [], color=color, linewidth=4, label=label)]
    if not alone:
        handles += legend_of_styles("gray", "gray", "validation")
    scale(axes, pd.concat([part for part in shown if len(part)]), logarithmic=column == "ppl")
    what = "Loss" if column == "loss" else "Perplexity"
    whose = runs[0].name if alone else f"{len(runs)} runs"
    axes.set_title(f"{what} of {whose}", loc="left", fontweight="bold")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per token)" if column == "loss" else "perplexity (log scale)")
    axes.legend(handles=handles, frameon=False)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def draw_run(axes: Axes, run: Run, column: str, color: str, valid_color: str) -> list[pd.Series]:
    """Draws one run's curves; returns the values that the axes should be wide enough for."""
    steps, each = run.train["step"], run.train[column]
    # Perplexity is exp(loss), so the trend of its logarithm is the trend of the loss.
    smooth = trend(each) if column == "loss" else np.exp(trend(np.log(each)))
    axes.plot(steps, each, color=color, **EACH_STEP)
    # A line through a single point would be invisible.
    axes.plot(steps, smooth, color=color, **TREND, marker="o" if len(steps) == 1 else "")
    axes.plot(run.valid["step"], run.valid[column], color=valid_color, **VALIDATION)
    # A few extreme batches may lie outside the picture.
    return [smooth, run.valid[column], each.quantile([0.005, 0.995])]


def legend_of_styles(color: str, valid_color: str, valid_label: str) -> list[Line2D]:
    """Legend entries for the three kinds of lines."""
    return [
        Line2D([], [], color=color, **TREND, label="training, smoothed"),
        # Thicker than in the plot, where neighbouring steps add up to a band.
        Line2D([], [], color=color, **{**EACH_STEP, "linewidth": 3}, label="training, each step"),
        Line2D([], [], color=valid_color, **VALIDATION, label=valid_label),
    ]


def best(run: Run, column: str) -> str:
    """The run's lowest validation loss or perplexity, as text."""
    if run.valid.empty:
        return "no validation yet"
    row = run.valid.loc[run.valid["loss"].idxmin()]
    value = f"{row[column]:.3f}" if column == "loss" else f"{row[column]:,.1f}"
    return f"best validation {value} at step {int(row['step']):,}"


def scale(axes: Axes, values: pd.Series, *, logarithmic: bool) -> None:
    """Fits the axes to the values and labels them with plain numbers."""
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    low, high = values.min(), values.max()
    if high <= low * 1.001:  # a single value, give or take rounding
        low, high = low * 0.9, high * 1.1 + 0.01
    if logarithmic:
        axes.set_yscale("log")
        margin = (high / low) ** 0.05
        axes.set_ylim(low / margin, high * margin)
        # With powers of ten alone, a typical curve would have only one or two labels.
        wide = high / low > 5
        locator = LogLocator(subs=(1, 2, 5)) if wide else MaxNLocator(8, steps=[1, 2, 5, 10])
        axes.yaxis.set_major_locator(locator)
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    else:
        margin = (high - low) * 0.05
        axes.set_ylim(low - margin, high + margin)


def main(given: list[str] | None = None) -> int:
    """Runs the given command line, by default the process's own; returns the exit code."""
    parser = argparse.ArgumentParser(
        description="Draws the loss and perplexity curves of training runs.",
        epilog="example: .venv/bin/python analysis/plot.py runs/a runs/b --out runs/comparison",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run directory")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="where to write loss.png and ppl.png (default: RUN/plots, or plots for several runs)",
    )
    arguments = parser.parse_args(given)
    folders = arguments.runs
    out = arguments.out or (folders[0] / "plots" if len(folders) == 1 else Path("plots"))
    try:
        runs = [read_run(folder) for folder in folders]
    except Unusable as error:
        print(f"plot: {error}", file=sys.stderr)
        return 3
    # Runs with the same name in different folders are told apart by their paths.
    if len({run.name for run in runs}) < len(runs):
        for index, run in enumerate(runs):
            run.name = str(folders[index])
    for column in ("loss", "ppl"):
        path = out / f"{column}.png"
        try:
            draw(runs, column, path)
        except OSError as error:
            print(f"plot: cannot write {path}: {error}; name another --out", file=sys.stderr)
            return 4
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
