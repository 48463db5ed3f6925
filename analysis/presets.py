"""The sizes of the named models, as in the program."""

import functools
import json
import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@functools.cache
def presets() -> dict[str, dict[str, int]]:
    """Each preset's n_layer, n_head and n_embd."""
    binary = os.environ.get("LOCKSTEP_BIN", str(ROOT / "target/release/lockstep"))
    try:
        told = subprocess.run([binary, "config", "--presets"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(
            f"the presets' sizes come from lockstep, and {binary} does not tell them ({error}); "
            "build it (cargo build --release), or name it in LOCKSTEP_BIN"
        ) from None
    return json.loads(told.stdout)
