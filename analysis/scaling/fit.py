"""Fits the parameters of cost.py to measured runs, and tells how far off a prediction is."""

from __future__ import annotations

import numpy as np

from .cost import Machine, MpiLink, Step, step
from .runs import PARTS, Run

# A prediction holds if step_ms and comm_exposed_ms are within this share of the measurement. If
# little is exposed, its error counts as a share of a tenth of the step: the noise of a median does
# not allow more precision.
BOUND = 0.10
LEAST_EXPOSED = 0.10

# The parameters of a fit, and where the search for each begins, in seconds unless said otherwise.
PARAMETERS = {
    "data_fixed": 1e-4,
    "data_per_sequence": 1e-5,
    "compute_fixed": 5e-3,
    "compute_per_sequence": 5e-3,
    "crowding": 0.1,  # a share
    "slow_down_per_byte": 1e-10,
    "optimizer_per_parameter": 2e-9,
    "latency": 1e-3,
    "crowd_latency": 1e-3,
    "byte_s": 1e-8,
    "work_per_byte": 1e-9,
    "sync": 1e-3,
    "jitter": 0.01,  # a share
}


def machine(values: dict[str, float], ranks_at_once: float) -> Machine:
    """The machine that a fit's parameters describe."""
    link = {name: values[name] for name in ("byte_s", "work_per_byte", "latency", "crowd_latency")}
    rest = {name: value for name, value in values.items() if name not in link}
    return Machine(
        link=MpiLink(**link, ranks_at_once=ranks_at_once), ranks_at_once=ranks_at_once, **rest
    )


def milliseconds(predicted: Step) -> dict[str, float]:
    """A prediction under the names of train.csv's columns."""
    parts = (predicted.data, predicted.compute, predicted.exposed, predicted.optimizer)
    named = {name: 1000 * part for name, part in zip(PARTS, parts)}  # noqa: B905  # Python 3.9
    return {"step_ms": 1000 * predicted.total, **named}


def errors(predicted: dict[str, float], measured: dict[str, float]) -> dict[str, float]:
    """The relative errors that a prediction is judged by."""
    exposed = max(measured["comm_exposed_ms"], LEAST_EXPOSED * measured["step_ms"])
    return {
        "step_ms": predicted["step_ms"] / measured["step_ms"] - 1,
        "comm_exposed_ms": (predicted["comm_exposed_ms"] - measured["comm_exposed_ms"]) / exposed,
    }


def residuals(runs: list[Run], values: dict[str, float], ranks_at_once: float) -> np.ndarray:
    """What a fit minimises: the judged errors, and those of the other parts, as shares."""
    found = []
    for run in runs:
        predicted = milliseconds(step(run.model, run.setting, machine(values, ranks_at_once)))
        found += errors(predicted, run.measured).values()
        for name in ("data_ms", "compute_ms", "optimizer_ms"):
            found.append((predicted[name] - run.measured[name]) / run.measured["step_ms"])
    return np.array(found)


def fit(
    runs: list[Run], ranks_at_once: float, known: dict[str, float] | None = None
) -> tuple[dict[str, float], dict[str, float]]:
    """The parameters that predict `runs` best, and each one's standard error as a share of it.
    Those that are `known` keep their values.

    Least squares by Levenberg's and Marquardt's method, in the parameters' logarithms, so none
    becomes negative. The times of links differ by orders of magnitude, and buckets that overlap
    hide them in part, so the search begins at several places.
    """
    best, known = None, known or {}
    free = [name for name in PARAMETERS if name not in known]
    for latency in (1e-4, 1e-2):
        for byte_s in (1e-10, 1e-8, 1e-7):
            start = {**PARAMETERS, "latency": latency, "crowd_latency": latency, "byte_s": byte_s}
            start["compute_per_sequence"] = np.median(
                [run.measured["compute_ms"] / 1000 / run.setting.sequences for run in runs]
            )
            start.update(known)
            found = descend(runs, start, free, ranks_at_once)
            if best is None or found[0] < best[0]:
                best = found
    cost, logarithms, slopes, count = best
    fitted = dict(zip(free, map(float, np.exp(logarithms))))  # noqa: B905  # Python 3.9
    variance = cost / max(1, count - len(free))
    spread = np.sqrt(
        variance * np.diag(np.linalg.pinv(slopes.T @ slopes + 1e-9 * np.eye(len(free))))
    )
    doubts = dict(zip(free, map(float, spread)))  # noqa: B905  # Python 3.9
    values = {name: known.get(name, fitted.get(name)) for name in PARAMETERS}
    return values, {name: doubts.get(name, 0.0) for name in PARAMETERS}


def descend(
    runs: list[Run], start: dict[str, float], free: list[str], ranks_at_once: float
) -> tuple:
    """(sum of squares, logarithms of the free parameters, slopes of the residuals, their number).
    The other parameters stay where they start.
    """
    origin = np.log(np.array([start[name] for name in free]))

    def evaluate(at: np.ndarray) -> np.ndarray:
        moved = dict(zip(free, np.exp(np.clip(at, -40, 10))))  # noqa: B905  # Python 3.9
        values = {**start, **moved}
        # A weak pull to the start fixes what these runs do not determine.
        return np.append(residuals(runs, values, ranks_at_once), 1e-4 * (at - origin))

    def slopes_at(at: np.ndarray, here: np.ndarray) -> np.ndarray:
        nudged = [evaluate(at + 1e-5 * unit) for unit in np.eye(len(at))]
        return (np.array(nudged).T - here[:, None]) / 1e-5

    at, damping = origin, 1e-2
    here = evaluate(at)
    slopes = slopes_at(at, here)
    for _ in range(200):
        curvature = slopes.T @ slopes
        damped = curvature + damping * np.diag(np.diag(curvature) + 1e-8)
        move = np.clip(-np.linalg.solve(damped, slopes.T @ here), -1.5, 1.5)
        there = evaluate(at + move)
        if there @ there < here @ here:
            gained = 1 - (there @ there) / (here @ here)
            at, here, damping = at + move, there, max(damping / 5, 1e-9)
            slopes = slopes_at(at, here)
            if gained < 1e-7:
                break
        else:
            damping *= 4
            if damping > 1e9:
                break
    return float(here @ here), at, slopes, len(here) - len(at)
