"""Effort levels: how much work goes into a smaller loss of behaviour."""

from dataclasses import dataclass

from exporter.errors import RequestError, did_you_mean


@dataclass(frozen=True)
class Effort:
    """What a level spends.

    Attributes:
        calibration_windows: Windows of the calibration text; more of them make what is fitted to it generalise better.
        foretold_windows: Most windows of the evaluation text that what formats cost there is foretold from.
        sweeps: How often codes and scales are improved after error feedback.
        corrects: Whether matrices make up, on the calibration text, for what those before them lost.
    """

    calibration_windows: int
    foretold_windows: int
    sweeps: int
    corrects: bool


EFFORTS = {"fast": Effort(5, 2, 0, False), "balanced": Effort(27, 8, 2, True), "max": Effort(96, 8, 6, True)}


def effort(name: str) -> Effort:
    """Return the level of that name.

    Raises:
        RequestError: there is no such level.
    """
    if name not in EFFORTS:
        raise RequestError(f"unknown effort {name!r}", next_step=did_you_mean(name, EFFORTS))
    return EFFORTS[name]
