"""Runs the drills and prints their table, for launch/faults."""

import argparse
import csv
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path

from drills import DRILLS
from drills.lab import BINARY, Row, table


def main():
    parser = argparse.ArgumentParser(
        prog="launch/faults",
        description="Disturbs real runs as it promises to survive, and says what was seen.",
    )
    parser.add_argument("--only", metavar="WORD", help="the drills whose name has this word")
    parser.add_argument(
        "--short",
        action="store_true",
        help="as launch/test --full does: few times, and only what no other test shows",
    )
    parser.add_argument("--times", type=int, metavar="N", help="how often each is done")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table as CSV, too")
    choice = parser.parse_args()
    if not BINARY.exists():
        parser.exit(2, f"faults: no {BINARY}; build it with `cargo build --release`\n")
    wanted = [drill for drill in DRILLS if not choice.only or choice.only in drill.fault]
    if choice.short:
        wanted = [drill for drill in wanted if drill.short]
    if not wanted:
        names = ", ".join(f'"{drill.fault}"' for drill in DRILLS)
        parser.exit(2, f"faults: no drill is called {choice.only}; there are {names}\n")
    folder = Path(tempfile.mkdtemp(prefix="lockstep-faults-"))
    rows = []
    for number, drill in enumerate(wanted):
        print(f"{drill.fault} ...", file=sys.stderr, flush=True)
        times = choice.times or (drill.short if choice.short else drill.long)
        rows.append(drill.row(folder / str(number), times))
        print(f"  {rows[-1].result} in {rows[-1].seconds} s: {rows[-1].seen}", file=sys.stderr)
        if choice.out:
            with choice.out.open("w", newline="") as file:
                writer = csv.DictWriter(file, [field.name for field in fields(Row)])
                writer.writeheader()
                writer.writerows(map(asdict, rows))
    with suppress(OSError):
        folder.rmdir()  # unless a drill has kept something in it
    print(table(rows))
    return int(any(row.result == "FAIL" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
