#!/usr/bin/env python3
"""What launch/homework tells of its folder: how its tokenizer learnt, and one page about it all.

    .venv/bin/python analysis/homework.py merges runs/homework    prints the first merges
    .venv/bin/python analysis/homework.py report runs/homework    writes runs/homework/homework.html

The page is one file that opens anywhere, without a network.

Exit codes: 2 for a command line that cannot be run, 3 for files that cannot be used, 4 for a page
that cannot be written.
"""

from __future__ import annotations

import argparse
import base64
import json
import re
import sys
from collections import Counter
from dataclasses import dataclass
from html import escape
from pathlib import Path

from measurements import Run, Unusable, read_csv, read_run
from presets import presets
from report import PAGE, conditions, grid, read_text

# After measurements, which says how to install what is missing.
import yaml  # isort: skip

ROOT = Path(__file__).resolve().parent.parent

# What the course measured and reached: 50 steps in seconds, and the end of its 20,000 steps.
COURSE_S = {"cpu": 137.67, "cuda": 11.85}
COURSE_LOSS, COURSE_PPL = 4.85, 130
COURSE_TEXT = "wikitext-103-raw"
DEVICES = {"cpu": "CPU", "cuda": "GPU"}

# What compare.csv must have.
COMPARED = ["device", "steps", "total_s", "step_ms_median", "tokens_per_s", "final_loss"]

# The merges that are shown one by one.
SHOWN = 12
# A space in a tokenizer.json, and here.
SPACE, SHOWN_SPACE = "Ġ", "␣"
# A word and the space before it, which no merge joins with another.
PIECE = re.compile(r" ?[^ ]+")


@dataclass(frozen=True)
class Merge:
    """One step of a tokenizer's training."""

    pair: tuple[str, str]
    # How often the pair stood in the sentences, which made it the one to join.
    count: int
    # Tokens of the first sentence afterwards.
    tokens: int


def merges(folder: Path) -> tuple[str, int, list[Merge]]:
    """The first sentence, its bytes, and the merges in the order in which they were learnt.

    Raises Unusable for a tokenizer that cannot be read.
    """
    path = folder / "tokenizer/tokenizer.json"
    try:
        pairs = [tuple(pair.split(" ")) for pair in json.loads(read_text(path))["model"]["merges"]]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Unusable(f"{path} is not a tokenizer.json; run launch/homework") from None
    lines = read_text(folder / "sentences/train.txt").splitlines()
    pieces = [[list(piece.replace(" ", SPACE)) for piece in PIECE.findall(line)] for line in lines]
    learnt = []
    for pair in pairs:
        seen = Counter(two for line in pieces for piece in line for two in neighbours(piece))
        for piece in (piece for line in pieces for piece in line):
            join(piece, pair)
        learnt.append(Merge(pair, seen[pair], sum(map(len, pieces[0]))))
    return lines[0], len(lines[0]), learnt


def neighbours(piece: list[str]):
    """The pairs of tokens that stand side by side."""
    return zip(piece, piece[1:])  # noqa: B905, RUF007  # Python 3.9


def join(piece: list[str], pair: tuple[str, str]) -> None:
    """Makes one token of each such pair in a piece, from its left to its right."""
    place = 0
    while place < len(piece) - 1:
        if (piece[place], piece[place + 1]) == pair:
            piece[place : place + 2] = ["".join(pair)]
        place += 1


MERGE_HEAD = ["Merge", "Pair", "Token", "Times in the text", "Tokens of the first sentence"]


def merge_rows(before: int, learnt: list[Merge]) -> list[list[str]]:
    """A row for each of the first merges, and for the last one."""

    def shown(token: str) -> str:
        return token.replace(SPACE, SHOWN_SPACE)

    rows = [["none", "", "", "", str(before)]]
    for number, merge in enumerate(learnt, 1):
        if number <= SHOWN or number == len(learnt):
            pair = " + ".join(map(shown, merge.pair))
            token = shown("".join(merge.pair))
            rows.append([str(number), pair, token, str(merge.count), str(merge.tokens)])
    return rows


def print_merges(folder: Path) -> None:
    """Prints how the tokenizer learnt."""
    sentence, before, learnt = merges(folder)
    print(f"The first sentence: {sentence}")
    print(f"Each byte is a token at first. {SHOWN_SPACE} is a space.\n")
    rows = [MERGE_HEAD, *merge_rows(before, learnt)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(MERGE_HEAD))]
    for row in rows:
        print("  ".join(f"{cell:{widths[at]}}" for at, cell in enumerate(row)).rstrip())


def tokenizer_section(folder: Path) -> str:
    sentence, before, learnt = merges(folder)
    return (
        "<p>Byte-level BPE begins with the 256 bytes and joins, again and again, the pair of "
        f"tokens that it sees most often. It learnt {len(learnt)} merges from three sentences, of "
        f"which the first is “{escape(sentence)}” It has {before} bytes, and {learnt[-1].tokens} "
        f"tokens at the end. {SHOWN_SPACE} is a space. The model itself has GPT-2's vocabulary, "
        "which was made in the same way.</p>\n"
        + grid("The first merges, and the last", MERGE_HEAD, merge_rows(before, learnt))
    )


def comparison_section(folder: Path, different: list[str], machine: str) -> str:
    table = read_csv(folder / "compare.csv", COMPARED)
    measured = {row.device: row for row in table.itertuples()}
    rows = []
    for device, name in DEVICES.items():
        cells = ["not measured", f"{COURSE_S[device]} s", *["not measured"] * 3]
        if device in measured:
            row = measured[device]
            cells[0] = f"{row.total_s:,.2f} s"
            cells[2:] = [f"{row.step_ms_median:,.1f} ms", f"{row.tokens_per_s:,.0f}"]
            cells.append(f"{row.final_loss:.4f}")
        rows.append([name, *cells])
    head = ["50 steps on", "Here", "The course", "A step, median", "Tokens/s", "Last loss"]
    said = "".join(
        f"The {DEVICES[device]} here took {row.total_s / COURSE_S[device]:.2g} times as long as "
        "the course's. "
        for device, row in measured.items()
    )
    if "cuda" in measured:
        speedup = measured["cpu"].step_ms_median / measured["cuda"].step_ms_median
        said += f"Here the GPU was {speedup:.1f} times as fast as the CPU. "
    else:
        said += "There was no GPU to measure, so the CPU is timed alone. "
    said += (
        "In the course the GPU, a slice of a shared one, was "
        f"{COURSE_S['cpu'] / COURSE_S['cuda']:.1f} times as fast as the CPU. The CPU here: "
        f"{machine}. The course's machines are not known in more detail, so its figures say only "
        "which order of magnitude to expect. "
    )
    if different:
        said += "The configuration is not the course's, see below: the times are of another task."
    return grid("50 steps", head, rows) + f"<p>{escape(said)}</p>\n"


def differences(run: Run) -> list[str]:
    """Keys of the course's configuration that the run changed, apart from its text and length."""
    theirs = yaml.safe_load((ROOT / "configs/homework.yaml").read_text())
    mine = yaml.safe_load(read_text(run.folder / "config.yaml")) or {}
    # The run's own configuration has the preset's numbers in its place.
    theirs["model"] |= presets()[theirs["model"].pop("preset")]
    del theirs["name"], theirs["device"], theirs["data"]["dir"]
    theirs["train"] = {"loss": theirs["train"]["loss"]}
    found = []
    for section, value in theirs.items():
        for key, expected in value.items() if isinstance(value, dict) else [(None, value)]:
            name, held = section, mine.get(section)
            if key:
                name, held = f"{section}.{key}", (held or {}).get(key)
            if held != expected:
                found.append(f"{name} is {held}, not {expected}")
    return found


def training_section(folder: Path, run: Run, different: list[str], minutes: float | None) -> str:
    try:
        meta = json.loads(read_text(folder / "data/meta.json"))
        source, tokens = meta["source"], meta["train"]["tokens"]
    except (ValueError, KeyError, TypeError):
        raise Unusable(f"{folder / 'data/meta.json'} cannot be read; prepare the text") from None
    steps, seen = int(run.train["step"].iloc[-1]), run.train["tokens"].iloc[-1]
    if run.valid.empty:
        raise Unusable(f"{run.folder} has no evaluation yet; train it to its end")
    best = run.valid.loc[run.valid["loss"].idxmin()]
    rows = [
        ["Text", source, COURSE_TEXT],
        ["Tokens of the training split", f"{tokens:,}", ""],
        ["Steps", f"{steps:,}", "20,000"],
        ["Tokens seen", f"{seen:,.0f}", ""],
        ["Best validation loss", f"{best['loss']:.4f}", f"near {COURSE_LOSS}"],
        ["Its perplexity", f"{best['ppl']:,.1f}", f"near {COURSE_PPL}"],
        ["Time of training", f"{run.train['elapsed_s'].iloc[-1]:,.0f} s", ""],
    ]
    reasons = [f"the text is {source}"] if source != COURSE_TEXT else []
    if steps != 20_000:
        reasons.append(f"it is {steps:,} steps long, not 20,000")
    reasons += different
    said = ""
    if minutes:
        said = (
            f"This is a rehearsal of {minutes:g} minutes: {steps:,} steps are what fits into them "
            "at the median time of a step that the comparison measured; evaluations come on top. "
        )
    if reasons:
        said += f"The loss is not comparable with the course's: {'; '.join(reasons)}. "
        said += (
            "Each text has a perplexity of its own, and a short run has not learnt all it could."
        )
    else:
        away = best["loss"] - COURSE_LOSS
        said += f"The loss is {abs(away):.2f} {'above' if away > 0 else 'below'} the course's."
    return grid("The training", ["", "Here", "The course"], rows) + f"<p>{escape(said)}</p>\n"


def pictures(run: Run) -> str:
    """Both curves, as parts of the page."""
    shown = ""
    for name, what in (("loss", "Loss"), ("ppl", "Perplexity")):
        path = run.folder / f"plots/{name}.png"
        try:
            data = base64.b64encode(path.read_bytes()).decode()
        except OSError:
            raise Unusable(f"{path} is not there; draw it: analysis/plot.py {run.folder}") from None
        shown += (
            f'<figure><img src="data:image/png;base64,{data}" '
            f'alt="{what} against steps, in training and in validation"></figure>\n'
        )
    return f'<div class="charts">\n{shown}</div>\n'


def completions(folder: Path) -> str:
    """What the model wrote for each prompt."""
    texts = read_text(folder / "completions.txt").split("\n---\n")
    return "".join(f"<pre>{escape(text.strip(chr(10)))}</pre>\n" for text in texts)


STYLE = """
img { width: 100%; height: auto; background: #ffffff; }
p { max-width: 48rem; }
tbody th { min-width: 0; overflow-wrap: break-word; }
tbody td { white-space: nowrap; }
"""


def page(folder: Path, minutes: float | None) -> str:
    """The whole page. Raises Unusable if a part of the homework is missing."""
    run = read_run(folder / "gpt-nano")
    different = differences(run)
    machine = conditions(run.folder).get("hardware", "unknown")
    title = "The homework, a rehearsal" if minutes else "The homework"
    sections = [
        ("A tokenizer learns", tokenizer_section(folder)),
        ("CPU and GPU", comparison_section(folder, different, machine)),
        ("Training", training_section(folder, run, different, minutes) + pictures(run)),
        ("Completions, with top-k 40", completions(folder)),
    ]
    body = "".join(f"<section>\n<h2>{name}</h2>\n{text}</section>\n" for name, text in sections)
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{title}</title>\n<style>\n{read_text(PAGE / 'report.css')}{STYLE}</style>\n"
        f"</head>\n<body>\n<h1>{title}</h1>\n<main>\n{body}</main>\n</body>\n</html>\n"
    )


def main(given: list[str] | None = None) -> int:
    """Runs the command line, the process's own if none is given; returns the exit code."""
    parser = argparse.ArgumentParser(
        description="What launch/homework tells of its folder.",
        epilog="example: .venv/bin/python analysis/homework.py report runs/homework",
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    show = verbs.add_parser("merges", help="print how the tokenizer learnt")
    write = verbs.add_parser("report", help="write homework.html")
    for verb in (show, write):
        verb.add_argument("folder", type=Path, metavar="DIR", help="launch/homework's --out")
    write.add_argument("--minutes", type=float, help="the rehearsal's, if it is one")
    arguments = parser.parse_args(given)
    folder = arguments.folder
    try:
        if arguments.verb == "merges":
            print_merges(folder)
            return 0
        text = page(folder, arguments.minutes)
    except Unusable as error:
        print(f"homework: {error}", file=sys.stderr)
        return 3
    out = folder / "homework.html"
    try:
        out.write_bytes(text.encode(errors="replace"))
    except OSError as error:
        print(f"homework: cannot write {out}: {error.strerror}", file=sys.stderr)
        return 4
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
