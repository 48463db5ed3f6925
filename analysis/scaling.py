#!/usr/bin/env python3
"""How far Lockstep scales: a model of what a step costs, fitted to runs and checked on others.

    analysis/scaling.py report RUN...                 what was measured, as CSV
    analysis/scaling.py fit RUN... --out fit.json     fits the model to runs on one kind of link
    analysis/scaling.py check fit.json RUN...         predicts runs that it was not fitted to
    analysis/scaling.py predict                       GPU clusters of published links, on paper

The model is in cost_model.py, its fit in cost_fit.py, its use for GPU clusters in cluster_model.py.
Exit codes: 1 where a prediction of `check` is too far from the measurement, 2 for a command line
that cannot be run, 3 for runs that cannot be used, 4 for files that cannot be written.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path

from plot import COLORS, Unusable, read_csv  # first: it says how to install what is missing

# isort: split
import cluster_model
import numpy as np
import pandas as pd
import yaml
from cost_fit import BOUND, PARAMETERS, PARTS, Run, errors, fit, machine, milliseconds
from cost_model import GRADIENT_BYTES, Model, Setting, largest_micro_batch, step
from matplotlib import pyplot as plt

COLUMNS = ["step", "step_ms", *PARTS, "world_size"]

# Rows after the warm-up that a median needs.
LEAST_ROWS = 5


def read_run(folder: Path, warm_up: int, vocab_size: int | None) -> Run:
    """Reads a run directory. Raises Unusable where it is not one, or has too few rows."""
    if not folder.is_dir():
        raise Unusable(f"{folder} is not a folder; name a run directory, such as runs/sample")
    path = folder / "train.csv"
    train = read_csv(path, COLUMNS)
    twice = train["step"][train["step"].duplicated()]
    if not twice.empty:
        raise Unusable(
            f"{path} has step {int(twice.iloc[0])} twice; expected each step once: "
            "is it two files in one?"
        )
    sizes = sorted(train["world_size"].dropna().unique())
    if len(sizes) != 1:
        found = ", ".join(f"{size:g}" for size in sizes) or "none"
        raise Unusable(f"{path}: expected one world_size in all rows, found {found}")
    rows = train.iloc[warm_up:].dropna(subset=["step_ms", *PARTS])
    if len(rows) < LEAST_ROWS:
        raise Unusable(
            f"{path}: expected at least {LEAST_ROWS} rows with all times after the first {warm_up} "
            f"(--warm-up), found {len(rows)}; train for more steps"
        )
    model, setting = read_config(folder, int(sizes[0]), vocab_size)
    return Run(
        name=str(folder),
        digest=hashlib.sha256(path.read_bytes()).hexdigest(),
        model=model,
        setting=setting,
        steps=len(rows),
        measured={name: float(rows[name].median()) for name in ["step_ms", *PARTS]},
        spread=float(
            rows["step_ms"].quantile([0.25, 0.75]).diff().iloc[1] / rows["step_ms"].median()
        ),
    )


def read_config(folder: Path, world_size: int, vocab_size: int | None) -> tuple[Model, Setting]:
    """What config.yaml says of the model and of how its step was split.

    A run from before there were buckets summed the whole gradient after the backward pass.
    """
    path = folder / "config.yaml"
    try:
        config = yaml.safe_load(path.read_text())
        data, shape = config["data"], config["model"]
        comm, optim = config.get("comm"), config["optim"]
        model = Model(
            n_layer=int(shape["n_layer"]),
            n_embd=int(shape["n_embd"]),
            vocab_size=vocab_size or read_vocab_size(folder),
            block_size=int(data["block_size"]),
            tied_head=bool(shape.get("tied_head", True)),
            bias=bool(shape.get("bias", True)),
            pre_norm=shape.get("norm", "pre") == "pre",
            recompute=bool(shape.get("recompute", False)),
        )
        batch_size = int(data["batch_size"])
        share = max(1, batch_size // world_size)
        micro_batch = data.get("micro_batch", "auto")
        if micro_batch == "auto":
            micro_batch = largest_micro_batch(share, model.block_size)
        setting = Setting(
            world_size=world_size,
            batch_size=batch_size,
            accumulation=max(1, share // int(micro_batch)),
            bucket_mib=float(comm["bucket_mib"]) if comm else math.inf,
            overlap=bool(comm["overlap"]) if comm else False,
            zero1=bool(optim.get("zero1", False)),
            gradient_bytes=GRADIENT_BYTES[comm.get("grad_dtype", "fp32") if comm else "fp32"],
        )
    except FileNotFoundError:
        raise Unusable(
            f"{path} is not there; name a run directory, as `lockstep train` writes it"
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise Unusable(f"cannot read {path}: {' '.join(str(error).split())}") from None
    except KeyError as error:
        raise Unusable(
            f"{path}: there is no key {error}; expected a run's resolved config"
        ) from None
    except (AttributeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise Unusable(f"{path}: expected a run's resolved config; {error}") from None
    return model, setting


def read_vocab_size(folder: Path) -> int:
    """The number of tokens in the run's own copy of the vocabulary: the configuration has none."""
    path = folder / "tokenizer.json"
    try:
        vocabulary = json.loads(path.read_text())
        ids = [*vocabulary["model"]["vocab"].values()]
        ids += [token["id"] for token in vocabulary.get("added_tokens", [])]
        return max(ids) + 1
    except FileNotFoundError:
        raise Unusable(f"{path} is not there; give the vocabulary's size as --vocab-size") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Unusable(f"{path}: expected Hugging Face's tokenizer.json; {error!r}") from None


def read_runs(folders: list[Path], warm_up: int, vocab_size: int | None) -> list[Run]:
    """Reads runs that one fit can hold: no run twice, all of one model."""
    runs = [read_run(folder, warm_up, vocab_size) for folder in folders]
    for index, run in enumerate(runs):
        for other in runs[:index]:
            if run.digest == other.digest:
                raise Unusable(f"{run.name} and {other.name} are the same run; name it once")
        if run.model != runs[0].model:
            raise Unusable(
                f"{run.name} and {runs[0].name} train different models or block sizes, whose "
                "compute cannot be compared; fit each alone"
            )
    return runs


def table(runs: list[Run]) -> pd.DataFrame:
    """What was measured, a row for each run."""
    return pd.DataFrame(
        {
            "run": [run.name for run in runs],
            "world_size": [run.setting.world_size for run in runs],
            "batch_size": [run.setting.batch_size for run in runs],
            "bucket_mib": [run.setting.bucket_mib for run in runs],
            "overlap": [run.setting.overlap for run in runs],
            "zero1": [run.setting.zero1 for run in runs],
            "steps": [run.steps for run in runs],
            **{name: [run.measured[name] for run in runs] for name in ["step_ms", *PARTS]},
            "step_ms_spread": [run.spread for run in runs],
        }
    )


def compared(runs: list[Run], values: dict[str, float], ranks_at_once: float) -> pd.DataFrame:
    """Measured and predicted, side by side, with the errors that `check` judges."""
    result = table(runs)[["run", "world_size", "bucket_mib", "overlap", "zero1"]]
    for name in ("step_ms", "comm_exposed_ms"):
        predictions = [
            milliseconds(step(run.model, run.setting, machine(values, ranks_at_once)))
            for run in runs
        ]
        result[name] = [run.measured[name] for run in runs]
        result[f"{name}_predicted"] = [predicted[name] for predicted in predictions]
        result[f"{name}_error"] = [
            errors(predicted, run.measured)[name]
            for predicted, run in zip(predictions, runs)  # noqa: B905  # Python 3.9
        ]
    return result


def show(result: pd.DataFrame) -> str:
    """The comparison as a text table."""
    text = result.copy()
    for name in text.columns[text.columns.str.endswith("_error")]:
        text[name] = text[name].map("{:+.1%}".format)
    return text.round(1).to_string(index=False)


def report_command(arguments: argparse.Namespace) -> int:
    runs = [read_run(run, arguments.warm_up, arguments.vocab_size) for run in arguments.runs]
    measured = table(runs).sort_values(["world_size", "overlap", "bucket_mib"])
    print(measured.to_csv(index=False, float_format="%.3f"), end="")
    if arguments.out:
        draw_buckets(measured, arguments.out)
    return 0


def draw_buckets(measured: pd.DataFrame, path: Path) -> None:
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
    axes.legend(frameon=False)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def fit_command(arguments: argparse.Namespace) -> int:
    runs = read_runs(arguments.runs, arguments.warm_up, arguments.vocab_size)
    if not any(run.setting.world_size > 1 for run in runs):
        raise Unusable("expected a run of several ranks among them: one rank says nothing of links")
    values, spread = fit(runs, arguments.ranks_at_once)
    unknown = [name for name in values if spread[name] > 1]
    record = {
        "model": asdict(runs[0].model),
        "ranks_at_once": arguments.ranks_at_once if np.isfinite(arguments.ranks_at_once) else None,
        "warm_up": arguments.warm_up,
        "parameters": values,
        "relative_standard_error": spread,
        "not_determined": unknown,
        "bandwidth_gbit_s": 8e-9 / values["byte_s"],
        "runs": [{"name": run.name, "train_csv_sha256": run.digest} for run in runs],
    }
    print(show(compared(runs, values, arguments.ranks_at_once)), file=sys.stderr)
    if unknown:
        print(
            f"scaling: these runs do not determine {', '.join(unknown)}: such a parameter matters "
            "little in them; vary ranks, batch and buckets to learn it",
            file=sys.stderr,
        )
    text = json.dumps(record, indent=2) + "\n"
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text)
    else:
        print(text, end="")
    return 0


def check_command(arguments: argparse.Namespace) -> int:
    try:
        record = json.loads(arguments.fit.read_text())
        values = {name: float(record["parameters"][name]) for name in PARAMETERS}
        ranks_at_once = record["ranks_at_once"] or math.inf
        known = {run["train_csv_sha256"]: run["name"] for run in record["runs"]}
        model, warm_up = Model(**record["model"]), int(record["warm_up"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Unusable(f"{arguments.fit}: expected what `scaling.py fit` wrote; {error}") from None
    runs = read_runs(arguments.runs, warm_up, arguments.vocab_size)
    for run in runs:
        if run.digest in known:
            raise Unusable(
                f"{run.name} is {known[run.digest]}, which the model was fitted to; "
                "a check needs runs that it has not seen"
            )
    if runs[0].model != model:
        raise Unusable(f"{runs[0].name} trains another model than {arguments.fit} was fitted to")
    result = compared(runs, values, ranks_at_once)
    print(show(result))
    worst = {name: result[f"{name}_error"].abs().max() for name in ("step_ms", "comm_exposed_ms")}
    held = max(worst.values()) <= BOUND
    print(
        f"{'holds' if held else 'DOES NOT HOLD'}: largest error {worst['step_ms']:.1%} in step_ms, "
        f"{worst['comm_exposed_ms']:.1%} in comm_exposed_ms; {BOUND:.0%} is allowed"
    )
    return 0 if held else 1


def predict_command(arguments: argparse.Namespace) -> int:
    cluster_model.predict(arguments.out, arguments.preset, arguments.grad_dtype)
    return 0


def count(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def parse(given: list[str] | None) -> argparse.Namespace:
    """The command line: what was given, or the process's own."""
    parser = argparse.ArgumentParser(
        description="Measures, models and predicts how Lockstep scales.",
        epilog="example: analysis/scaling.py fit runs/n1 runs/n2 --out fit.json",
    )
    verbs = parser.add_subparsers(dest="verb", required=True)

    def verb(name: str, run, text: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=text, description=text)
        added.set_defaults(run=run)
        return added

    report = verb("report", report_command, "prints what runs measured, as CSV")
    report.add_argument("--out", type=Path, metavar="PNG", help="draw buckets and overlap, too")
    fitting = verb("fit", fit_command, "fits the model to CPU runs on one kind of link")
    fitting.add_argument("--out", type=Path, metavar="JSON", help="(default: standard output)")
    fitting.add_argument(
        "--ranks-at-once",
        type=count,
        default=math.inf,
        metavar="K",
        help="all ranks share one machine, such as a virtual cluster's, that can run K of them",
    )
    checking = verb("check", check_command, "predicts runs that the model was not fitted to")
    checking.add_argument("fit", type=Path, metavar="FIT", help="what `fit` wrote")
    for added in (report, fitting, checking):
        added.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run directory")
        added.add_argument(
            "--vocab-size", type=count, metavar="V", help="(default: tokenizer.json)"
        )
    for added in (report, fitting):
        added.add_argument(
            "--warm-up", type=int, default=5, metavar="ROWS", help="rows to leave out (default: 5)"
        )
    predict = verb("predict", predict_command, "predicts GPU clusters from published figures")
    predict.add_argument(
        "--out",
        type=Path,
        default=Path("docs/images/scaling.png"),
        metavar="PNG",
        help="the picture (default: docs/images/scaling.png); its numbers go into a CSV beside it",
    )
    predict.add_argument("--preset", choices=list(cluster_model.PRESETS), default="gpt2")
    predict.add_argument("--grad-dtype", choices=list(GRADIENT_BYTES), default="fp32")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    arguments = parse(given)
    try:
        return arguments.run(arguments)
    except Unusable as error:
        print(f"scaling: {error}", file=sys.stderr)
        return 3
    except OSError as error:
        print(
            f"scaling: cannot write {error.filename or 'standard output'}: {error.strerror}",
            file=sys.stderr,
        )
        return 4


if __name__ == "__main__":
    sys.exit(main())
