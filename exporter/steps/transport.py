"""The step `transport`: the model files are shipped coded, and restored on the device by `edge-exporter unpack`."""

from typing import Literal

from exporter.coding.profiles import Profile
from exporter.foundation.quantities import Document


class Transport(Document):
    """Options of the step, which comes after all that changes weights.

    Attributes:
        profile: `small` for the least bytes, `fast` for quick restoring.
    """

    method: Literal["transport"]
    profile: Profile = "small"


STEP = Transport
