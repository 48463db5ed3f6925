"""The command line of analysis/scaling.

    .venv/bin/python analysis/scaling report RUN...            what was measured, as CSV
    .venv/bin/python analysis/scaling fit RUN... --out FIT     fits the model to runs on one link
    .venv/bin/python analysis/scaling check FIT RUN...         predicts runs it was not fitted to
    .venv/bin/python analysis/scaling predict                  GPU clusters, on paper
    .venv/bin/python analysis/scaling footprint [RUN...]       files and messages, by ranks

Exit codes: 1 if a prediction of `check` is too far from the measurement, 2 for a command line that
cannot be run, 3 for runs that cannot be used, 4 for files that cannot be written.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd

from measurements import Unusable

from . import clusters, draw, footprint
from .cost import BYTES, Model, step
from .fit import BOUND, PARAMETERS, errors, fit, machine, milliseconds
from .runs import Run, read_run, read_runs, table


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
        draw.buckets(measured, arguments.out)
    return 0


def fit_command(arguments: argparse.Namespace) -> int:
    runs = read_runs(arguments.runs, arguments.warm_up, arguments.vocab_size)
    if not any(run.setting.world_size > 1 for run in runs):
        raise Unusable("expected a run of several ranks among them: one rank says nothing of links")
    known = {"byte_s": 8e-9 / arguments.gbit_s} if arguments.gbit_s else {}
    values, spread = fit(runs, arguments.ranks_at_once, known)
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
        raise Unusable(f"{arguments.fit}: expected what `fit` wrote; {error}") from None
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
    name, path = arguments.preset, arguments.out
    study = clusters.study(name, BYTES[arguments.grad_dtype])
    draw.clusters(study, path)
    numbers = path.with_suffix(".csv")
    study.rows().to_csv(numbers, index=False, float_format="%.5g")
    for title, tables in study.parts().items():
        print(f"modelled: {title}")
        for label, curve in tables.items():
            print(f"  {label}: {clusters.bends(curve)}")
    print("assumed:")
    for what, value in clusters.ASSUMPTIONS.items():
        print(f"  {what}: {value:g}")
    for kind in clusters.PUBLISHED:
        print(f"published, {kind.name}: {kind.source}")
    print(path)
    print(numbers)
    return 0


def footprint_command(arguments: argparse.Namespace) -> int:
    found = footprint.table(arguments.runs, arguments.ranks_per_node, arguments.step_s)
    print(found.to_csv(index=False, float_format="%.5g"), end="")
    return 0


def count(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def rate(text: str) -> float:
    """A finite number above 0, for argparse."""
    if not 0 < float(text) < math.inf:
        raise ValueError
    return float(text)


def parse(given: list[str] | None) -> argparse.Namespace:
    """Parses the given command line, by default the process's own."""
    parser = argparse.ArgumentParser(
        prog="analysis/scaling",
        description="Measures, models and predicts how Lockstep scales.",
        epilog="example: .venv/bin/python analysis/scaling fit runs/n1 runs/n2 --out runs/fit.json",
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
    fitting.add_argument(
        "--gbit-s",
        type=rate,
        metavar="RATE",
        help="the rate of a rank's link, if it is known: runs alone hardly tell what of a byte's "
        "time is the link's and what is that of adding it up",
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
        default=Path("runs/scaling.png"),
        metavar="PNG",
        help="the picture (default: runs/scaling.png); its numbers go into a CSV beside it",
    )
    predict.add_argument("--preset", choices=clusters.PRESETS, default="gpt2")
    predict.add_argument("--grad-dtype", choices=list(BYTES), default="fp32")
    small = verb("footprint", footprint_command, "prints files and messages by ranks, as CSV")
    small.add_argument(
        "runs", nargs="*", type=Path, metavar="RUN", help="made with -v (default: the model's)"
    )
    small.add_argument("--ranks-per-node", type=count, default=8, metavar="N", help="(default: 8)")
    small.add_argument("--step-s", type=float, default=1.0, metavar="S", help="(default: 1)")
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
