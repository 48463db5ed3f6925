"""The record of gpu_check.py: what was measured, and on which machine."""

import csv
import datetime
import hashlib
import os
import platform
import re
from contextlib import suppress
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from gpu_driver import find_gpu, nccl_version
from gpu_session import Unusable, output
from outcomes import aligned


@dataclass
class Row:
    """One check that was made; analysis/records/README.md documents the columns."""

    check: str
    what: str
    value: float | None
    unit: str
    bound: float | None
    result: str  # PASS, FAIL, NOT RUN
    seconds: float
    note: str


def has_gpu():
    return not find_gpu(os.environ).problem


def text_of(path):
    with suppress(OSError):
        return Path(path).read_text(errors="replace")
    return ""


def field(path, pattern):
    """The first group of a pattern in a file; empty if it is not found."""
    found = re.search(pattern, text_of(path), re.MULTILINE)
    return found[1].strip() if found else ""


def driver(session):
    """The driver's version from nvidia-smi, else the newest CUDA that the driver supports."""
    index = session.environment["CUDA_VISIBLE_DEVICES"]
    query = ("--query-gpu=name,driver_version", "--format=csv,noheader", "-i", index)
    name, _, version = output("nvidia-smi", *query).partition(", ")
    # Ignore nvidia-smi if it describes a GPU other than the one in use.
    return version if name == session.gpu.name else f"CUDA {session.gpu.cuda}"


def machine(session, version):
    """What the record holds about the machine and the program; unknown is empty."""
    cuda = session.device == "cuda"
    torch = session.libtorch
    libtorch = field(torch / "version.py", r"^__version__ = '(.*)'")
    memory = field("/proc/meminfo", r"^MemTotal:\s+(\d+) kB")
    mpi = (
        output(session.mpirun, "--version", environment=session.environment)
        if session.mpirun
        else ""
    )
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "device": session.device,
        "gpu": session.gpu.name,
        "gpu_memory_mib": session.gpu.memory_mib,
        "driver": driver(session) if cuda else "",
        "cuda": field(torch / "version.py", r"^cuda\b.*'(.*)'"),
        "libtorch": libtorch or text_of(torch / "build-version").strip(),
        "nccl": nccl_version(session.with_libtorch()) if cuda else "",
        "mpi": mpi.split("\n")[0],
        "cpu": field("/proc/cpuinfo", r"^model name\s*:(.*)"),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(int(memory) / 2**20) if memory else "",
        "kernel": platform.release(),
        "lockstep": version,
        "binary_sha256": hashlib.sha256(session.binary.read_bytes()).hexdigest()[:16],
    }


def default_path(folder, facts, kind="check"):
    """gpu-KIND-DATE-GPU.csv."""
    name = re.sub(r"[^a-z0-9]+", "-", (facts["gpu"] or facts["device"]).lower()).strip("-")
    return folder / f"gpu-{kind}-{facts['date'][:10]}-{name}.csv"


def write(path, facts, rows):
    """Writes the record, whole or not at all: the machine's columns are the same in every row."""
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([*facts, *(field.name for field in fields(Row))])
            writer.writerows([*facts.values(), *astuple(row)] for row in rows)
        part.replace(path)
    except OSError as error:
        message = f"cannot write {path}: {error.strerror}; name another file with --out"
        raise Unusable(message) from error


def table(facts, rows):
    """For people: the machine, then one line for each check, with a note if it did not pass."""
    lines = ["", *(f"{name:14} {value}" for name, value in facts.items() if value != ""), ""]
    cells = [("check", "what was measured", "value", "at most", "result", "s")]
    for row in rows:
        value = "" if row.value is None else f"{row.value:.4g} {row.unit}".strip()
        bound = "reported" if row.bound is None else f"{row.bound:g}"
        cells.append((row.check, row.what, value, bound, row.result, f"{row.seconds:.1f}"))
    said = None
    for line, row in zip(aligned(cells), [None, *rows], strict=True):
        lines.append(line)
        if row and row.result != "PASS" and row.note != said:
            lines.append(f"    {row.note}")
            said = row.note
    counts = (
        f"{sum(row.result == name for row in rows)} {name}" for name in ("PASS", "FAIL", "NOT RUN")
    )
    return "\n".join([*lines, "", ", ".join(counts)])
