"""Effort levels: how much computation is spent on a smaller loss."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from exporter.foundation.errors import RequestError, did_you_mean
from exporter.foundation.fitted import fitted_value


@dataclass(frozen=True)
class Effort:
    """The settings of a level.

    Attributes:
        calibration_windows: Windows of the calibration text; with more of them, fitted values generalise better.
        prediction_windows: Most windows of the evaluation text on which the loss of formats is predicted.
        sweeps: Passes that improve codes and scales after error feedback.
        propagates_errors: Whether matrices compensate, on the calibration text, for the errors of earlier ones.
    """

    calibration_windows: Annotated[int, Field(ge=1, le=1 << 16)]
    prediction_windows: Annotated[int, Field(ge=1, le=1 << 16)]
    sweeps: Annotated[int, Field(ge=0, le=1000)]
    propagates_errors: bool


DEFAULT = "balanced"
BALANCED_WINDOWS = int(fitted_value("exporter.compress", "balanced_windows"))
EFFORTS = {
    "fast": Effort(5, 2, 0, False),
    "balanced": Effort(BALANCED_WINDOWS, 8, 2, True),
    "max": Effort(96, 8, 6, True),
}


def effort(name: str) -> Effort:
    """Return the level of that name.

    Raises:
        RequestError: there is no such level.
    """
    if name not in EFFORTS:
        raise RequestError(f"unknown effort {name!r}", next_step=did_you_mean(name, EFFORTS))
    return EFFORTS[name]
