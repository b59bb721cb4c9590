"""What measured points of a device say about its other speeds: a Gaussian process on the logarithm of the time.

A device is off the fitted times by an error that its runs share, more so runs with kernels of one family and of one
size. So one point moves all predictions of the device, those for its like the most, and narrows their intervals
(Rasmussen and Williams 2006, section 2.2).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log, sqrt

import numpy as np

from exporter.predict.coefficients import UNKNOWN, Coefficients
from exporter.predict.workload import Workload

MIDDLE_BYTES, MOST_SIZE = 3e9, 3.0
# What backends of one device have in common: an error of the bandwidth that they share.
SHARED_SPREAD = 0.1


@dataclass(frozen=True)
class Point:
    """A time that was measured, as what the fitted time is off by.

    Attributes:
        work: What ran.
        error: Logarithm of the measured time less that of the fitted one.
        noise: Standard deviation of the measurement's logarithm.
    """

    work: Workload
    error: float
    noise: float


@dataclass(frozen=True)
class Residual:
    """What a fitted time is expected to be off by: mean and standard deviation of its logarithm."""

    mean: float
    deviation: float


def residual(work: Workload, points: Sequence[Point], fitted: Coefficients) -> Residual:
    """Return what the time of a workload is off by, given points of the same device; none is needed."""
    own = _covariance(work, work, fitted) + fitted.noise**2
    if not points:
        return Residual(0.0, sqrt(own))
    among = np.array([[_covariance(one.work, other.work, fitted) for other in points] for one in points])
    among += np.diag([one.noise**2 for one in points])
    across = np.array([_covariance(work, one.work, fitted) for one in points])
    gain = np.linalg.solve(among, across)
    mean = float(gain @ [one.error for one in points])
    return Residual(mean, sqrt(max(own - float(gain @ across), fitted.noise**2)))


def _covariance(one: Workload, other: Workload, fitted: Coefficients) -> float:
    shared = SHARED_SPREAD**2
    if one.kind != other.kind:
        return shared
    size = fitted.size_spread**2 * _size(one) * _size(other)
    family = fitted.family_spread**2 if one.family == other.family else 0.0
    return shared + max(spread(one, fitted) ** 2 - shared, 0.0) + family + size


def spread(work: Workload, fitted: Coefficients) -> float:
    """Return the standard deviation of a device's error; at least others' for a processor in a machine not seen."""
    exact = fitted.spread.get(f"{work.kind} {work.machine}")
    return exact if exact is not None else max(fitted.spread.get(work.kind, 0.0), fitted.spread[UNKNOWN])


def _size(work: Workload) -> float:
    # Beyond what was published, sizes are taken to be alike rather than extrapolated.
    return max(-MOST_SIZE, min(log(work.file_bytes / MIDDLE_BYTES), MOST_SIZE))
