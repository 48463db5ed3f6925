"""The record of gpu_check.py: what was measured, and on which machine."""

import csv
import ctypes
import datetime
import hashlib
import os
import platform
import re
from contextlib import suppress
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from gpu_session import Unusable, output


@dataclass
class Row:
    """A check that was made; docs in records/README.md."""

    check: str
    what: str
    value: float | None
    unit: str
    bound: float | None
    result: str  # PASS, FAIL, NOT RUN
    seconds: float
    note: str


def has_gpu():
    return Path("/dev/nvidiactl").exists() or bool(output("nvidia-smi", "-L"))


def text_of(path):
    with suppress(OSError):
        return Path(path).read_text(errors="replace")
    return ""


def field(path, pattern):
    """The first group of a pattern in a file; empty where it is not found."""
    found = re.search(pattern, text_of(path), re.MULTILINE)
    return found[1].strip() if found else ""


def nccl_version(library):
    """As NCCL itself says it, for example 2.28.9."""
    number = ctypes.c_int()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(str(library or "libnccl.so.2")).ncclGetVersion(ctypes.byref(number))
    major, rest = divmod(number.value, 10000)
    return f"{major}.{rest // 100}.{rest % 100}" if major else ""


def machine(session, version):
    """What the record says of the machine and the program; unknown is empty."""
    gpu = {}
    if session.device == "cuda":
        names = ("name", "memory.total", "driver_version")
        index = session.environment["CUDA_VISIBLE_DEVICES"]
        query = (f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits", "-i", index)
        said = output("nvidia-smi", *query).split("\n")[0].split(", ")
        gpu = dict(zip(names, said, strict=False))
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
        "gpu": gpu.get("name", ""),
        "gpu_memory_mib": gpu.get("memory.total", ""),
        "driver": gpu.get("driver_version", ""),
        "cuda": field(torch / "version.py", r"^cuda\b.*'(.*)'"),
        "libtorch": libtorch or text_of(torch / "build-version").strip(),
        "nccl": nccl_version(session.nccl) if session.device == "cuda" else "",
        "mpi": mpi.split("\n")[0],
        "cpu": field("/proc/cpuinfo", r"^model name\s*:(.*)"),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(int(memory) / 2**20) if memory else "",
        "kernel": platform.release(),
        "lockstep": version,
        "binary_sha256": hashlib.sha256(session.binary.read_bytes()).hexdigest()[:16],
    }


def default_path(folder, facts):
    """gpu-check-DATE-GPU.csv."""
    name = re.sub(r"[^a-z0-9]+", "-", (facts["gpu"] or facts["device"]).lower()).strip("-")
    return folder / f"gpu-check-{facts['date'][:10]}-{name}.csv"


def write(path, facts, rows):
    """Writes the record: the machine's columns are the same in every row."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([*facts, *(field.name for field in fields(Row))])
            writer.writerows([*facts.values(), *astuple(row)] for row in rows)
    except OSError as error:
        message = f"cannot write {path}: {error.strerror}; name another file with --out"
        raise Unusable(message) from error


def table(facts, rows):
    """For people: the machine, then a line a check, with a note where one did not pass."""
    lines = ["", *(f"{name:14} {value}" for name, value in facts.items() if value != ""), ""]
    cells = [("check", "what was measured", "value", "at most", "result", "s")]
    for row in rows:
        value = "" if row.value is None else f"{row.value:.4g} {row.unit}".strip()
        bound = "reported" if row.bound is None else f"{row.bound:g}"
        cells.append((row.check, row.what, value, bound, row.result, f"{row.seconds:.1f}"))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    said = None
    for line, row in zip(cells, [None, *rows], strict=True):
        padded = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        lines.append("  ".join(padded).rstrip())
        if row and row.result != "PASS" and row.note != said:
            lines.append(f"    {row.note}")
            said = row.note
    counts = (
        f"{sum(row.result == name for row in rows)} {name}" for name in ("PASS", "FAIL", "NOT RUN")
    )
    return "\n".join([*lines, "", ", ".join(counts)])
