"""The pictures: measured buckets, and clusters of GPUs on paper."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from measurements import Unusable
from plot import COLORS

from .clusters import ASSUMPTIONS, EACH, REFERENCE, TOGETHER, Study, failures, preset
from .cost import Model, useful_share


def adorn(axes: Axes, **legend) -> None:
    """Gives a picture what they all have: a legend, a grid, and no frame."""
    axes.legend(frameon=False, **legend)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def adorn_shares(axes: Axes, title: str, x: str, y: str) -> None:
    """For one of several pictures, whose curves are shares of a whole."""
    axes.set_title(title, loc="left", fontsize=10)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_ylim(0, 1.03)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    adorn(axes, fontsize=8, loc="lower left")


def save(figure: Figure, path: Path, dpi: int) -> None:
    """Writes a picture, and its folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)
    plt.close(figure)


def buckets(measured: pd.DataFrame, path: Path) -> None:
    """Draws measured exposed communication by bucket size and world size."""
    several = measured[(measured["world_size"] > 1) & np.isfinite(measured["bucket_mib"])]
    if several.empty:
        raise Unusable("there is no run of several ranks with comm.bucket_mib to draw")
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    groups = several.groupby(["world_size", "overlap"])
    sizes = sorted(several["world_size"].unique())
    for (world_size, overlap), rows in groups:
        axes.plot(
            rows["bucket_mib"],
            rows["comm_exposed_ms"],
            color=COLORS[sizes.index(world_size) % len(COLORS)],
            linestyle="-" if overlap else "--",
            marker="o",
            label=f"{world_size} ranks, {'with' if overlap else 'without'} overlap",
        )
    axes.set_title("Measured: communication that compute did not hide", loc="left", weight="bold")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("bucket (MiB)")
    axes.set_ylabel("comm_exposed_ms, median")
    adorn(axes)
    save(figure, path, dpi=140)


def clusters(study: Study, path: Path) -> None:
    """Draws what the model predicts for GPU clusters."""
    figure, axes = plt.subplots(2, 2, figsize=(13, 9.5), layout="constrained")
    figure.suptitle(
        f"Modelled, not measured: data parallel training of {study.preset} from published figures, "
        f"at an assumed MFU of {ASSUMPTIONS['MFU of large micro-batches']:.0%}",
        fontweight="bold",
    )
    h100 = REFERENCE.name
    for place, title, tables in (
        (axes[0, 0], f"algorithm and overlap\n{h100}, {EACH} sequences a GPU", study.ways),
        (
            axes[0, 1],
            f"kinds of GPU\nbetter algorithm, overlap, {EACH} sequences a GPU",
            study.kinds,
        ),
        (
            axes[1, 0],
            f"{TOGETHER} sequences in all\n{h100}, better algorithm, overlap",
            study.presets,
        ),
    ):
        efficiency(place, tables, f"Modelled: {title}")
    checkpoints(axes[1, 1], preset("gpt2-xl"))
    save(figure, path, dpi=110)


def efficiency(axes: Axes, tables: dict[str, pd.DataFrame], title: str) -> None:
    """Efficiency by number of GPUs, with a mark where a curve falls below nine tenths."""
    for index, (label, table) in enumerate(tables.items()):
        # Ever thinner, so that curves that coincide stay distinguishable.
        style = {"color": COLORS[index], "linewidth": 3.2 - 0.6 * index}
        low = table[table["efficiency"] < 0.9]
        if not low.empty:
            row = low.iloc[0]
            label = f"{label}: below 90% at {row['gpus']:,} by {row['loses_most_to']}"
            axes.plot(row["gpus"], row["efficiency"], "o", color=COLORS[index], markersize=6)
        dashed = "without" in label
        axes.plot(
            table["gpus"], table["efficiency"], ls="--" if dashed else "-", label=label, **style
        )
    axes.set_xscale("log", base=2)
    sizes = next(iter(tables.values()))["gpus"]
    axes.set_xticks(sizes if len(sizes) < 8 else sizes[1::2])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    adorn_shares(axes, title, "GPUs", "efficiency of a GPU")


def checkpoints(axes: Axes, model: Model) -> None:
    """The share of time that failures and checkpoints leave, by interval, and the best one."""
    restart = ASSUMPTIONS["seconds from a failure to the first step after it"]
    intervals = np.geomspace(20, 6 * 3600, 200)
    for n, color in zip((256, 1024, 4096, 16384), COLORS):  # noqa: B905  # Python 3.9
        found = failures(model, n)
        pause, mtbf = found["checkpoint_pause_s"], 3600 * found["mtbf_h"]
        shares = [useful_share(interval, pause, mtbf, restart) for interval in intervals]
        best = found["checkpoint_interval_s"]
        axes.plot(
            intervals / 60,
            shares,
            color=color,
            label=f"{n:,} GPUs: a failure each {found['mtbf_h']:.0f} h, best {best / 60:.0f} min",
        )
        axes.plot(best / 60, found["useful_share"], "o", color=color, markersize=5)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    title = f"Modelled: checkpoints of gpt2-xl, a pause of {pause:.0f} s each\n"
    title += "failures at the rate that Meta counted on H100"
    x, y = "minutes of training between checkpoints", "time that goes into kept training"
    adorn_shares(axes, title, x, y)
