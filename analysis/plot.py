#!/usr/bin/env python3
"""Draws the curves of training runs, from their train.csv and eval.csv alone.

    .venv/bin/python analysis/plot.py runs/sample       loss.png, ppl.png ... in runs/sample/plots
    .venv/bin/python analysis/plot.py runs/a runs/b     both runs together, in plots/

Exit codes: 2 for a command line that cannot be run, 3 for CSVs that cannot be used, 4 for pictures
that cannot be written.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path

from measurements import AXES, MEASURES, PARTS, Lease, Measure, Run, Unusable, read_runs, smoothed

try:
    import matplotlib

    matplotlib.use("Agg")  # no display is needed
    import numpy as np
    import pandas as pd
    from matplotlib import pyplot as plt
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
except ModuleNotFoundError as error:
    print(
        f"plot: {error.name} is not installed for {sys.executable}; "
        "run launch/setup, then this with .venv/bin/python",
        file=sys.stderr,
    )
    sys.exit(2)

# Okabe and Ito's palette: people who cannot tell red from green can tell these apart. The last
# three are Tol's.
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
COLORS += ["#882255", "#999933", "#AA4499"]

TREND = {"linewidth": 1.8}
EACH_STEP = {"linewidth": 0.8, "alpha": 0.25}
# Of many runs, whose steps would hide all trends.
EACH_STEP_OF_MANY = {"linewidth": 0.8, "alpha": 0.06}
VALIDATION = {"linewidth": 1.2, "linestyle": "--", "marker": "o", "markersize": 4}

# Inches, so that the letters, of 10 points, can be read where a picture fills the width of a page.
SIZE = (7, 4.3)
# More runs than this are many: their legend is below the picture.
FEW = 4
# Columns that the stacked parts of a step's time have.
STACK_COLUMNS = 150

# Names of runs are no formulas.
plt.rcParams["text.parse_math"] = False

# How often --watch looks whether there is something new.
WATCH_S = 10


def draw(runs: list[Run], measure: Measure, x: str) -> Figure:
    """Draws one measurement of all runs.

    Each run has a colour; a run alone has two, one of them for its validation points.
    """
    alone = len(runs) == 1
    many = len(runs) > FEW
    # Room for the legend, two runs in a line.
    size = (SIZE[0], SIZE[1] + 0.1 * len(runs)) if many else SIZE
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    handles, shown = [], []
    validates = measure.column in ("loss", "ppl")
    for run, color in zip(runs, cycle(COLORS)):
        valid_color = COLORS[1] if alone else color
        each_step = EACH_STEP_OF_MANY if many else EACH_STEP
        shown += draw_run(axes, run, measure, x, (color, valid_color), each_step)
        if not alone:
            label = f"{run.name}: {best(run, measure.column)}" if validates else run.name
            handles += [Line2D([], [], color=color, linewidth=4, label=label)]
    if measure.noisy:
        color, valid_color = COLORS[:2] if alone else ("gray", "gray")
        handles += legend_of_styles(color)
        if validates:
            label = best(runs[0], measure.column) if alone else "validation"
            handles += [Line2D([], [], color=valid_color, **VALIDATION, label=label)]
    scale_x(axes, x)
    scale(axes, pd.concat([part for part in shown if len(part)]), logarithmic=measure.logarithmic)
    adorn(axes, title(measure.title, runs), x)
    axes.set_ylabel(measure.unit + " (log scale)" * measure.logarithmic)
    if many:
        below = {"loc": "outside lower center", "ncols": 2, "fontsize": 8}
        figure.legend(handles=handles, frameon=False, **below)
    elif handles:
        axes.legend(handles=handles, frameon=False)
    return figure


def draw_run(
    axes: Axes, run: Run, measure: Measure, x: str, colors: tuple[str, str], each_step: dict
) -> list[pd.Series]:
    """Draws one run's curves, of training and validation.

    Returns the values that the axes should be wide enough for.
    """
    color, valid_color = colors
    each = run.train[measure.column]
    places = run.places(x, run.train["step"])
    # A line through a single point would be invisible.
    marker = "o" if len(each) == 1 else ""
    if not measure.noisy:
        axes.plot(places, each, color=color, **TREND, marker=marker)
        return [each]
    smooth = smoothed(run, measure)
    axes.plot(places, each, color=color, **each_step)
    axes.plot(places, smooth, color=color, **TREND, marker=marker)
    # A few extreme batches may stick out of the picture.
    shown = [smooth, each.quantile([0.005, 0.995])]
    if measure.column in ("loss", "ppl"):
        valid = run.valid
        at = run.places(x, valid["step"])
        axes.plot(at, valid[measure.column], color=valid_color, **VALIDATION)
        shown.append(valid[measure.column])
    return shown


def draw_parts(runs: list[Run], x: str) -> Figure:
    """Draws the time of a step in its parts, stacked, each run in a panel of its own."""
    columns = min(len(runs), 3)
    rows = math.ceil(len(runs) / columns)
    size = (max(SIZE[0], 3.5 * columns), SIZE[1] if rows == 1 else 2.8 * rows + 0.6)
    figure, panels = plt.subplots(
        rows, columns, figsize=size, layout="constrained", sharey=True, squeeze=False
    )
    for axes in panels.flat[len(runs) :]:
        axes.remove()
    for run, axes in zip(runs, panels.flat):  # noqa: B905  # Python 3.9
        # Single steps would be a comb: each column is the mean of its neighbours.
        each = max(1, math.ceil(len(run.train) / STACK_COLUMNS))
        group = np.arange(len(run.train)) // each
        means = run.train[[*PARTS]].fillna(0).groupby(group).mean()
        places = pd.Series(run.places(x, run.train["step"])).groupby(group)
        # One column alone has its width from the next, which is a copy.
        edges, means = [*places.min(), places.max().iloc[-1]], pd.concat([means, means[-1:]])
        if edges[0] == edges[-1]:
            edges = [edges[0] - 0.5, edges[0] + 0.5]
        axes.stackplot(
            edges, means.T.to_numpy(), labels=PARTS.values(), colors=COLORS, step="post", alpha=0.85
        )
        scale_x(axes, x)
        shown = title("Time of a step", runs) if len(runs) == 1 else run.name
        adorn(axes, shown, x)
        if each > 1:
            axes.set_xlabel(f"{axes.get_xlabel()} (mean of each {each} rows)")
    for axes in panels[:, 0]:
        axes.set_ylabel("time of a step (ms)")
    panels[0, 0].set_ylim(bottom=0)
    figure.legend(
        *panels[0, 0].get_legend_handles_labels(),
        frameon=False,
        loc="outside lower center",
        ncols=2,
    )
    return figure


def title(what: str, runs: list[Run]) -> str:
    return f"{what} of {runs[0].name if len(runs) == 1 else f'{len(runs)} runs'}"


def adorn(axes: Axes, heading: str, x: str) -> None:
    """What all pictures have."""
    axes.set_title(heading, loc="left", fontweight="bold")
    axes.set_xlabel(AXES[x][1])
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def legend_of_styles(color: str) -> list[Line2D]:
    """What the two lines of training are."""
    return [
        Line2D([], [], color=color, **TREND, label="training, smoothed"),
        # Thicker than it is drawn: there, neighbouring steps add up to a band.
        Line2D([], [], color=color, **{**EACH_STEP, "linewidth": 3}, label="training, each step"),
    ]


def best(run: Run, column: str) -> str:
    """The run's lowest validation loss or perplexity, in words."""
    valid = run.valid
    if valid.empty:
        return "no validation yet"
    row = valid.loc[valid["loss"].idxmin()]
    value = f"{row[column]:.3f}" if column == "loss" else f"{row[column]:,.1f}"
    return f"best validation {value} at step {int(row['step']):,}"


def short(value: float) -> str:
    """A large number as axes say it: 250k, 1.5M, 2B."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:,.6g}{letter}"
    return f"{value:,.6g}"


def scale_x(axes: Axes, x: str) -> None:
    """Labels of a horizontal axis: plain numbers, and whole ones for steps."""
    write = {
        "step": lambda value, _: f"{value:,.0f}",
        "tokens": lambda value, _: short(value),
        "hours": lambda value, _: f"{value:,.6g}",
    }
    axes.xaxis.set_major_formatter(FuncFormatter(write[x]))
    axes.xaxis.set_major_locator(
        MaxNLocator(6, steps=[1, 2, 5, 10], integer=x == "step", min_n_ticks=1)
    )


def scale(axes: Axes, values: pd.Series, *, logarithmic: bool) -> None:
    """Fits the vertical axis to the values, with labels that are plain numbers."""
    if logarithmic:
        values = values[values > 0]
    low, high = values.min(), values.max()
    if values.empty:  # zeros only
        low, high = 0.1, 1
    elif high <= low * 1.001:  # a single value, give or take rounding
        low, high = low * 0.9, high * 1.1 + (0.01 if high == 0 else 0)
    if logarithmic:
        axes.set_yscale("log")
        margin = (high / low) ** 0.05
        axes.set_ylim(low / margin, high * margin)
        # Powers of ten alone would leave a usual curve with one or two labels.
        wide = high / low > 5
        locator = LogLocator(subs=(1, 2, 5)) if wide else MaxNLocator(8, steps=[1, 2, 5, 10])
        axes.yaxis.set_major_locator(locator)
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        margin = (high - low) * 0.05
        axes.set_ylim(low - margin, high + margin)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))


def draw_all(folders: list[Path], x: str, out: Path, kind: str) -> Iterator[Path]:
    """Draws all that the runs have measured; yields the path of each picture once it is written.

    Raises Unusable, and OSError for a picture that cannot be written.
    """
    runs = read_runs(folders)
    for measure in MEASURES:
        having = [run for run in runs if run.knows(measure.column)]
        if having:
            yield save(draw(having, measure, x), out / f"{measure.column}.{kind}")
    having = [run for run in runs if all(run.knows(part) for part in PARTS)]
    if having:
        yield save(draw_parts(having, x), out / f"step_time.{kind}")


def save(figure: Figure, path: Path) -> Path:
    """Writes a picture whole, and its folder if need be: somebody may be looking at the old one."""
    unfinished = path.with_name(f".{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(unfinished, dpi=180, format=path.suffix[1:])
        unfinished.replace(path)
    except OSError as error:
        if unfinished.is_file():
            unfinished.unlink()
        error.filename = path
        raise
    finally:
        plt.close(figure)
    return path


def watch(folders: list[Path], redraw: Callable[[], None], clock=time) -> None:
    """Draws whenever there are new rows, until nobody trains in any of the folders.

    Raises what `redraw` raises; a CSV that is unusable while its run goes on is looked at again.
    """
    leases = [Lease(folder, clock.monotonic()) for folder in folders]
    drawn = None
    while True:
        # Asked first: what a run writes before it ends is then drawn.
        going_on = [lease.is_held(clock.monotonic()) for lease in leases]
        files = [folder / name for folder in folders for name in ("train.csv", "eval.csv")]
        sizes = [file.stat().st_size if file.exists() else 0 for file in files]
        if sizes != drawn or not any(going_on):
            try:
                redraw()
                drawn = sizes
            except Unusable:
                if not any(going_on):
                    raise
        if not any(going_on):
            return
        clock.sleep(WATCH_S)


def main(given: list[str] | None = None) -> int:
    """Runs the command line, the process's own if none is given; returns the exit code."""
    parser = argparse.ArgumentParser(
        description="Draws the curves of training runs: loss, perplexity, learning rate, gradient "
        "norm, speed, memory, and the time of a step in its parts.",
        epilog="example: .venv/bin/python analysis/plot.py runs/a runs/b --out runs/comparison",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run directory")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="where to write the pictures (default: RUN/plots, or plots for several runs)",
    )
    parser.add_argument(
        "--x", choices=[*AXES], default="step", help="what to draw against (default: step)"
    )
    parser.add_argument(
        "--format", choices=["png", "svg"], default="png", help="kind of picture (default: png)"
    )
    parser.add_argument(
        "--watch", action="store_true", help="draw anew while the runs go on, until they end"
    )
    arguments = parser.parse_args(given)
    folders = arguments.runs
    out = arguments.out or (folders[0] / "plots" if len(folders) == 1 else Path("plots"))

    told = set()

    def draw_now():
        for path in draw_all(folders, arguments.x, out, arguments.format):
            if path not in told:
                print(path, flush=True)
                told.add(path)

    try:
        if arguments.watch:
            watch(folders, draw_now)
        else:
            draw_now()
    except KeyboardInterrupt:
        if not arguments.watch:
            raise
    except Unusable as error:
        print(f"plot: {error}", file=sys.stderr)
        return 3
    except OSError as error:
        print(
            f"plot: cannot write {error.filename}: {error.strerror}; name another --out",
            file=sys.stderr,
        )
        return 4
    return 0


if __name__ == "__main__":
    sys.exit(main())
