"""Real kills, signals, and disks that fail, in the short form; launch/faults has the long one."""

import pytest
from drills import DRILLS


@pytest.mark.parametrize(
    "drill", [drill for drill in DRILLS if drill.short], ids=lambda drill: drill.fault
)
def test_a_fault_does_no_harm(drill, tmp_path):
    row = drill.row(tmp_path / "drill", drill.short)
    if row.result == "NOT RUN":
        pytest.skip(row.seen)
    assert row.result == "PASS", row.seen
