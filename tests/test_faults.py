"""Short drills that no other test covers; launch/faults runs all drills, and their long forms."""

import pytest

from drills import DRILLS

pytestmark = [pytest.mark.full, pytest.mark.slurm]


@pytest.mark.parametrize(
    "drill", [drill for drill in DRILLS if drill.short], ids=lambda drill: drill.fault
)
def test_a_fault_does_no_harm(drill, tmp_path):
    row = drill.row(tmp_path / "drill", drill.short)
    if row.result == "NOT RUN":
        pytest.skip(f"NOT RUN: {row.seen}")
    assert row.result == "PASS", row.seen
