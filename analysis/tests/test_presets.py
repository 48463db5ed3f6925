"""The presets that Python knows are the program's."""

import re
from pathlib import Path

from presets import presets

ROOT = Path(__file__).resolve().parents[2]


def test_presets_are_those_of_the_program():
    source = "".join(path.read_text() for path in (ROOT / "src").rglob("config/*.rs"))
    rows = re.findall(r'\("([\w-]+)", (\d+), (\d+), (\d+)\)', source)
    assert len(rows) == 8
    told = {name: tuple(map(int, size)) for name, *size in rows}
    assert {name: tuple(shape.values()) for name, shape in presets().items()} == told
