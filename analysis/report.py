#!/usr/bin/env python3
"""Writes one HTML file about one or several runs, which opens anywhere, without a network.

    .venv/bin/python analysis/report.py runs/sample       writes runs/sample/plots/report.html
    .venv/bin/python analysis/report.py runs/a runs/b     both runs together, in plots/report.html

`page/` has the page's own style and program, and uPlot, which draws the curves. All text of a run
is escaped, and the page's policy lets no script run but those two.

Exit codes: 2 for a command line that cannot be run, 3 for CSVs that cannot be used, 4 for a report
that cannot be written.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import re
import sys
from html import escape
from pathlib import Path

from measurements import (
    AXES,
    MEASURES,
    PARTS,
    Run,
    Unusable,
    read_csv,
    read_runs,
    smoothed,
)

# After measurements, which says how to install what is missing.
import numpy as np  # isort: skip
import pandas as pd  # isort: skip
import yaml  # isort: skip

PAGE = Path(__file__).resolve().parent / "page"

# Points of one curve: what all runs share, and what each has at least. A screen has fewer pixels.
POINTS_TOGETHER, POINTS_LEAST = 20_000, 400
# Points of a trend, which has no spikes.
TREND_POINTS = 300

# More samples than this are thinned evenly; a longer one is cut.
SAMPLES, SAMPLE_LENGTH = 24, 8_000
EVENTS = 200

# What rank 0's log says of the steps that it has come to, and at a restart.
STEP = re.compile(r"\bstep(?:s \d+ to)? (\d+)")
RESUMED = re.compile(r"resuming from .+ after (\d+) steps?$")


def thin(values: np.ndarray, points: int) -> np.ndarray:
    """The indices of at most about `points` values that draw the same curve: all spikes stay.

    Of each bucket they are the lowest value, the highest, and the first that is unknown; and the
    first and last of all.
    """
    if len(values) <= points:
        return np.arange(len(values))
    kept = {0, len(values) - 1}
    for bucket in np.array_split(np.arange(len(values)), points // 2):
        part = values[bucket]
        unknown = np.isnan(part)
        if unknown.any():
            kept.add(bucket[unknown.argmax()])
        if not unknown.all():
            kept.update((bucket[np.nanargmin(part)], bucket[np.nanargmax(part)]))
    return np.array(sorted(kept))


def numbers(values, digits: int = 6) -> list[float | None]:
    """Numbers for JSON, of so many digits; unknown ones become null."""
    return [None if np.isnan(value) else float(f"{value:.{digits}g}") for value in values]


def whole(steps) -> list[int]:
    """Steps for JSON."""
    return [int(step) for step in steps]


def curves(run: Run, points: int) -> dict:
    """What the page draws of a run: its curves, its parts of a step, and its evaluations."""
    train = run.train
    steps = train["step"].to_numpy()
    drawn = {}
    for measure in MEASURES:
        if not run.knows(measure.column):
            continue
        each = train[measure.column].to_numpy()
        kept = thin(each, points)
        curve = {"each": [whole(steps[kept]), numbers(each[kept])]}
        if measure.noisy:
            some = np.unique(np.linspace(0, len(steps) - 1, TREND_POINTS).astype(int))
            curve["trend"] = [whole(steps[some]), numbers(smoothed(run, measure).iloc[some])]
        if measure.column in ("loss", "ppl") and not run.valid.empty:
            curve["valid"] = [whole(run.valid["step"]), numbers(run.valid[measure.column])]
        drawn[measure.column] = curve
    parts = None
    if all(run.knows(part) for part in PARTS):
        kept = thin(train[[*PARTS]].sum(axis=1).to_numpy(), points)
        parts = [whole(steps[kept]), *(numbers(train[part].iloc[kept]) for part in PARTS)]
    # Where steps lie on the other axes; between these the page interpolates.
    some = np.unique(np.linspace(0, len(steps) - 1, points).astype(int))
    axes = {
        x: numbers(run.places(x, train["step"].iloc[some]), 9)
        for x, (column, _, _) in AXES.items()
        if run.knows(column)
    }
    return {"name": run.name, "curves": drawn, "parts": parts, "axes": axes}


def read_text(path: Path) -> str:
    """A file's text, whatever bytes are in it; none if there is no such file."""
    try:
        return path.read_bytes().decode(errors="replace")
    except OSError:
        return ""


def events(run: Run) -> list[dict]:
    """Ends and restarts that rank 0's log tells of, changes of the configuration, and ranks that
    became slow, in order of steps.

    Raises Unusable for a ranks.csv that cannot be read.
    """
    found, step = [], 0
    for line in read_text(run.folder / "logs/rank-0000.log").splitlines():
        if seen := STEP.search(line):
            step = int(seen[1])
        if resumed := RESUMED.search(line):
            step = int(resumed[1])
            found.append({"kind": "restart", "step": step, "text": line})
        elif " ERROR " in line:
            found.append({"kind": "end", "step": step, "text": line})
    path = run.folder / "ranks.csv"
    if path.exists():
        for row in read_csv(path, ["step", "rank", "host", "factor"]).itertuples():
            text = f"rank {row.rank:g} on {row.host} took {row.factor:.3g} times the median's time"
            found.append({"kind": "slow rank", "step": int(row.step), "text": text})
    found += changes(run.folder)
    return sorted(found, key=lambda event: event["step"])


def changes(folder: Path) -> list[dict]:
    """What became of the configuration, of which a run keeps those that were in force before."""
    earlier = sorted(folder.glob("config.step-*.yaml"))
    found = []
    for path, later in zip(earlier, [*earlier, folder / "config.yaml"][1:], strict=True):
        step = path.stem.removeprefix("config.step-")
        before, after = read_config(path), read_config(later)
        if not (step.isdigit() and before and after):
            continue
        for key in sorted(before.keys() | after.keys()):
            old, new = before.get(key, "unset"), after.get(key, "unset")
            if old != new:
                text = f"{key} {old} -> {new}"
                found.append({"kind": "change", "step": int(step), "text": text})
    return found


def read_config(path: Path) -> dict[str, str]:
    """A configuration with its keys as `--set` takes them; empty if it cannot be read."""
    try:
        nested = yaml.safe_load(read_text(path))
    except yaml.YAMLError:
        return {}
    flat = {}

    def flatten(value, key: str) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                flatten(inner, f"{key}.{name}" if key else str(name))
        else:
            flat[key] = json.dumps(value, ensure_ascii=False, default=str)

    flatten(nested if isinstance(nested, dict) else {}, "")
    return flat


def conditions(folder: Path) -> dict[str, str]:
    """What the newest checkpoint says that its arithmetic ran on; empty if there is none."""
    states = sorted(folder.glob("checkpoints/step-*/state.json"))
    try:
        found = json.loads(read_text(states[-1]))["conditions"]
        return {str(name): str(value) for name, value in found.items()}
    except (IndexError, ValueError, KeyError, TypeError, AttributeError):
        return {}


# The final table's figures of train.csv and eval.csv: their name, column and form.
OF_BEST = [
    ("Best validation loss", "loss", "{:.4f}"),
    ("Its step", "step", "{:,.0f}"),
    ("Its perplexity", "ppl", "{:,.2f}"),
    ("Its perplexity for each word", "word_ppl", "{:,.2f}"),
    ("Its bits per byte", "bits_per_byte", "{:.4f}"),
]
OF_TEST = [("Test loss", "loss", "{:.4f}"), ("Test perplexity", "ppl", "{:,.2f}")]
AT_END = [
    ("Tokens", "tokens", "{:,.0f}"),
    ("Ranks", "world_size", "{:,.0f}"),
    ("Seconds of training", "elapsed_s", "{:,.0f}"),
]
MEDIANS = [
    ("Tokens/s, median", "tokens_per_s", "{:,.0f}"),
    ("Milliseconds a step, median", "step_ms", "{:,.1f}"),
    ("Share of the machine's peak, median", "mfu", "{:.1%}"),
]


def results(run: Run, happened: list[dict], config: dict[str, str]) -> dict[str, str]:
    """The figures of the final table; what is unknown is left out."""
    train, valid = run.train, run.valid
    tested = run.evaluations[run.evaluations["split"] == "test"]
    steps = f"{train['step'].iloc[-1]:,.0f}"
    if config.get("train.steps", "").isdigit():
        steps += f" of {int(config['train.steps']):,}"
    loss = smoothed(run, MEASURES[0]).dropna()
    shown = {"Steps": steps, "Training loss at the end, smoothed": f"{loss.iloc[-1]:.4f}"}
    sources = [(train.ffill().iloc[-1], AT_END), (train.median(), MEDIANS)]
    sources += [(train.max(), [("Most memory of a rank (MiB)", "memory_mib", "{:,.0f}")])]
    if not tested.empty:
        sources.insert(0, (tested.iloc[-1], OF_TEST))
    if not valid.empty:
        sources.insert(0, (valid.loc[valid["loss"].idxmin()], OF_BEST))
    for row, figures in sources:
        for name, column, form in figures:
            if pd.notna(row[column]):
                shown[name] = form.format(row[column])
    shown["Restarts"] = str(sum(event["kind"] == "restart" for event in happened))
    return shown


def part_shares(run: Run) -> dict[str, str]:
    """The mean time of each part of a step, and its share."""
    means = run.train[[*PARTS]].mean()
    if means.isna().any():
        return {}
    shares = means / max(means.sum(), 1e-9)
    return {name: f"{means[part]:,.2f} ms, {shares[part]:.1%}" for part, name in PARTS.items()}


def grid(caption: str, head: list[str], rows: list[list[str]]) -> str:
    """A table, which scrolls where it is too wide; the first cell of a row names the row."""
    heads = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = ""
    for name, *cells in rows:
        texts = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        body += f'<tr><th scope="row">{escape(name)}</th>{texts}</tr>\n'
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table>\n'
        f"<caption>{escape(caption)}</caption>\n<thead><tr>{heads}</tr></thead>\n"
        f"<tbody>\n{body}</tbody></table></div>\n"
    )


def table(caption: str, runs: dict[str, dict[str, str]], differing: bool = False) -> str:
    """A column for each run, a row for each name in any of them, or only where they differ."""
    rows = []
    for name in dict.fromkeys(name for column in runs.values() for name in column):
        cells = [column.get(name, "unknown") for column in runs.values()]
        if len(set(cells)) > 1 or not differing:
            rows.append([name, *cells])
    return grid(caption, ["", *runs], rows) if rows else ""


def event_table(happened: dict[str, list[dict]]) -> str:
    """What happened to the runs, besides learning."""
    rows = [
        [name, f"{event['step']:,}", event["kind"], event["text"]]
        for name, found in happened.items()
        for event in found
    ]
    if not rows:
        return "<p>No restart, no change and no slow rank is on record.</p>\n"
    left = len(rows) - EVENTS
    more = f"<p>{left:,} more are not shown.</p>\n" if left > 0 else ""
    head = ["Run", "After step", "What", "Record"]
    return grid("Restarts, changes and slow ranks", head, rows[:EVENTS]) + more


def sample_list(run: Run) -> str:
    """The text that a run wrote while it learnt, the newest open."""
    paths = sorted(run.folder.glob("samples/step-*.txt"))
    some = np.unique(np.linspace(0, len(paths) - 1, SAMPLES).astype(int)) if paths else []
    shown = ""
    for place in some:
        text = read_text(paths[place])
        cut = "\n… cut here" if len(text) > SAMPLE_LENGTH else ""
        step = paths[place].stem.removeprefix("step-").lstrip("0") or "0"
        shown += (
            f"<details{' open' if place == some[-1] else ''}><summary>after step {escape(step)}"
            f"</summary><pre>{escape(text[:SAMPLE_LENGTH] + cut)}</pre></details>\n"
        )
    if not shown:
        return ""
    left = len(paths) - len(some)
    more = f"<p>{left} more are in the folder samples.</p>\n" if left else ""
    return f"<h3>{escape(run.name)}</h3>\n{shown}{more}"


def report(runs: list[Run]) -> str:
    """The whole page."""
    happened = {run.name: events(run) for run in runs}
    points = max(POINTS_LEAST, POINTS_TOGETHER // len(runs))
    data = {
        "axes": {x: label for x, (_, label, _) in AXES.items()},
        "measures": [vars(measure) for measure in MEASURES],
        "parts": [*PARTS.values()],
        "runs": [
            {
                **curves(run, points),
                "events": [[event["kind"], event["step"]] for event in happened[run.name]],
            }
            for run in runs
        ],
    }
    configurations = {run.name: read_config(run.folder / "config.yaml") for run in runs}
    figures = {run.name: results(run, happened[run.name], configurations[run.name]) for run in runs}
    shares = {run.name: part_shares(run) for run in runs}
    machines = {run.name: conditions(run.folder) for run in runs}
    stacks = '<div id="parts" class="charts"></div>\n' if any(shares.values()) else ""
    sections = [
        ("Results", table("Results", figures)),
        ("Differences", differences(configurations)),
        ("Curves", (PAGE / "curves.html").read_text()),
        ("Time of a step", stacks + table("Mean time of the parts of a step", shares)),
        ("Restarts, changes and slow ranks", event_table(happened)),
        ("Samples", "".join(sample_list(run) for run in runs)),
        ("Machine and versions", table("Machine and versions", machines)),
        ("Configuration", configuration(configurations)),
    ]
    shown = [(name, body) for name, body in sections if body]
    identifier = {name: name.lower().replace(",", "").replace(" ", "-") for name, _ in shown}
    title = f"Report: {runs[0].name}" if len(runs) == 1 else f"Report: {len(runs)} runs"
    scripts = [(PAGE / "uplot/uPlot.iife.min.js").read_text(), (PAGE / "report.js").read_text()]
    hashes = " ".join(f"'sha256-{digest(script)}'" for script in scripts)
    parts = {
        "title": escape(title),
        "policy": f"default-src 'none'; style-src 'unsafe-inline'; script-src {hashes}",
        "style": (PAGE / "uplot/uPlot.min.css").read_text() + (PAGE / "report.css").read_text(),
        "contents": "".join(
            f'<li><a href="#{identifier[name]}">{name}</a></li>' for name, _ in shown
        ),
        "sections": "".join(
            f'<section id="{identifier[name]}">\n<h2>{name}</h2>\n{body}</section>\n'
            for name, body in shown
        ),
        # No text of a run can end the script's element.
        "data": json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
        "licence": (PAGE / "uplot/LICENSE").read_text(),
        "uplot": scripts[0],
        "program": scripts[1],
    }
    page = (PAGE / "report.html").read_text()
    return re.sub(r"\{\{(\w+)\}\}", lambda name: parts[name[1]], page)


def differences(configurations: dict[str, dict[str, str]]) -> str:
    """The keys in which runs differ, if several runs have a configuration."""
    read = {name: found for name, found in configurations.items() if found}
    if len(read) < 2:
        return ""
    return (
        table("Keys that differ", read, differing=True) or "<p>All keys have the same values.</p>\n"
    )


def configuration(configurations: dict[str, dict[str, str]]) -> str:
    """All keys, and a word on runs whose keys are unknown."""
    unread = [name for name, found in configurations.items() if not found]
    note = f"<p>There is no config.yaml that can be read of {escape(', '.join(unread))}.</p>\n"
    return table("Configuration", configurations) + (note if unread else "")


def digest(script: str) -> str:
    """A script's SHA-256, as a content security policy names it."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def main(given: list[str] | None = None) -> int:
    """Runs the command line, the process's own if none is given; returns the exit code."""
    parser = argparse.ArgumentParser(
        description="Writes one HTML file about runs: what was run, the curves, the samples, what "
        "happened, and the results.",
        epilog="example: .venv/bin/python analysis/report.py runs/a runs/b --out runs/report.html",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run directory")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="the file to write (default: RUN/plots/report.html, or plots/report.html for several)",
    )
    arguments = parser.parse_args(given)
    folders = arguments.runs
    out = arguments.out
    if out is None:
        out = (folders[0] if len(folders) == 1 else Path()) / "plots/report.html"
    try:
        page = report(read_runs(folders))
    except Unusable as error:
        print(f"report: {error}", file=sys.stderr)
        return 3
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(page.encode(errors="replace"))
    except OSError as error:
        print(f"report: cannot write {out}: {error.strerror}; name another --out", file=sys.stderr)
        return 4
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
