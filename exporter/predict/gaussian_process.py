"""Corrects a device's predicted speeds by its measured points, with a Gaussian process on log time.

All runs of a device share an error against the fitted times; runs of one kernel family or of similar size share more of
it. One point therefore shifts all predictions of the device, similar ones the most, and narrows their intervals
(Rasmussen and Williams 2006, section 2.2).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log, sqrt

import numpy as np

from exporter.predict.coefficients import UNKNOWN, Coefficients
from exporter.predict.token_cost import program_of
from exporter.predict.workload import Workload

MIDDLE_BYTES, MOST_SIZE = 3e9, 3.0
# Error that the backends of one device share through their common memory bandwidth.
SHARED_SPREAD = 0.1
# Tokens in the cache up to which the weights take most of the time.
SHORT_CONTEXT = 1024
# Runs of the same file on the same device differ by this.
LEAST_DEVIATION = 0.05


@dataclass(frozen=True)
class Point:
    """A measured time, as the error of the fitted time.

    Attributes:
        work: The measured workload.
        error: Logarithm of the measured time minus that of the fitted time.
        noise: Standard deviation of the measurement's logarithm.
    """

    work: Workload
    error: float
    noise: float


@dataclass(frozen=True)
class Residual:
    """The expected error of a fitted time: mean and standard deviation of its logarithm."""

    mean: float
    deviation: float


def residual(work: Workload, points: Sequence[Point], fitted: Coefficients) -> Residual:
    """Return the expected error of a workload's fitted time, given any points of the same device."""
    own = _covariance(work, work, fitted)
    if not points:
        return Residual(0.0, sqrt(own))
    among = np.array([[_covariance(one.work, other.work, fitted) for other in points] for one in points])
    among += np.diag([one.noise**2 for one in points])
    across = np.array([_covariance(work, one.work, fitted) for one in points])
    gain = np.linalg.solve(among, across)
    mean = float(gain @ [one.error for one in points])
    return Residual(mean, sqrt(max(own - float(gain @ across), LEAST_DEVIATION**2)))


def _covariance(one: Workload, other: Workload, fitted: Coefficients) -> float:
    shared = SHARED_SPREAD**2
    if (one.kind, one.is_compiled) != (other.kind, other.is_compiled):
        return shared
    size = fitted.size_spread**2 * _size(one) * _size(other)
    family = fitted.family_spread**2 if one.family == other.family else 0.0
    program = fitted.program_spread**2 if program_of(one) == program_of(other) else 0.0
    same = fitted.noise_of(one.kind) ** 2 if _is_same_run(one, other) else 0.0
    return shared + max(spread(one, fitted) ** 2 - shared, 0.0) + family + size + program + same


def _is_same_run(one: Workload, other: Workload) -> bool:
    """Return whether two runs are of one file in one program, and their caches cost alike or little."""
    if (one.file_bytes, one.parameters, one.format, one.backend) != (
        other.file_bytes, other.parameters, other.format, other.backend,
    ):  # fmt: skip
        return False
    short = max(one.context, other.context) <= SHORT_CONTEXT
    return (short or one.context == other.context) and program_of(one) == program_of(other)


def spread(work: Workload, fitted: Coefficients) -> float:
    """Return the standard deviation of a device's error; at least that of `other` for an unseen kind and machine."""
    exact = fitted.spread.get(f"{work.kind} {work.machine}")
    return exact if exact is not None else max(fitted.spread.get(work.kind, 0.0), fitted.spread[UNKNOWN])


def _size(work: Workload) -> float:
    # Clamp instead of extrapolating beyond published sizes.
    return max(-MOST_SIZE, min(log(work.file_bytes / MIDDLE_BYTES), MOST_SIZE))
