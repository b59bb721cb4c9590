"""Predicts whether a model stays in a device's memory while it runs, and its speed if it does not.

Decoding reads all weights in the same order for each token. If they do not fit, the system drops pages before they are
read again: a Raspberry Pi 5 fell from 0.92 to 0.02 tokens/s within 50 MB of file (nyunai/edge-llm-leaderboard). Each
token then reads from storage: only the missing part at best, the whole file at worst.
"""

from collections.abc import Mapping
from math import exp, log
from typing import Literal

from exporter.device.fit import reserved_bytes
from exporter.device.profile import DeviceClass, DeviceProfile
from exporter.foundation.quantities import Basis, Document
from exporter.predict.estimate import Estimate

Status = Literal["fits", "uncertain", "pages", "ended"]
VERDICTS: Mapping[Status, str] = {
    "fits": "It fits", "uncertain": "It may not fit", "pages": "It does not stay in memory", "ended": "It does not fit",
}  # fmt: skip
GB = 1e9
# Sequential read speed of a class's storage, if the profile has none: SD cards, UFS 3, NVMe.
USUAL_STORAGE: Mapping[DeviceClass, float] = {"board": 90e6, "phone": 2.5e9, "tablet": 2.5e9, "laptop": 2.5e9}
# Share of that speed in a cold load, and the time besides reading: 1.3 GB loaded in 0.3 to 1.2 s (iPhone 17 Pro).
LOAD_SHARES, LOAD_SECONDS = (0.25, 0.6, 1.0), (1.0, 0.1, 0.0)


class Residence(Document):
    """Whether a running model fits in memory.

    Attributes:
        status: `fits`; `uncertain` if the ends of the interval disagree; `pages` if weights are read from storage for
            each token; `ended` if the system kills an app of this size.
        limit_bytes: The memory limit.
        detail: The same in a sentence.
        decode_in_memory: Tokens/s if all weights stayed in memory; given unless the model fits.
        decode_from_storage: Tokens/s if weights are read from storage; given unless the model fits.
    """

    status: Status
    limit_bytes: float
    detail: str
    decode_in_memory: Estimate | None = None
    decode_from_storage: Estimate | None = None

    @property
    def sentence(self) -> str:
        """Whether it fits, and how sure that is, in one sentence."""
        return f"{VERDICTS[self.status]}: {self.detail}."


def residence(profile: DeviceProfile, held: Estimate) -> Residence:
    """Compare the memory of a running model with a device's limit for one app."""
    reserve = reserved_bytes(profile)
    limit, what = profile.ram_bytes.value - reserve, "what the RAM leaves beside the system"
    basis: Basis = "estimated"
    known = profile.app_memory_limit_bytes
    app = known.value
    if app < limit:
        limit, what, basis = app, "what one app may use", known.basis
    ends = app == limit and profile.device_class in ("phone", "tablet")
    # Systems give up part of their reserve before they page: files of up to 8.5 GB ran on a board of 8 GiB.
    beyond = held.value > limit if ends else held.low > limit + reserve / 2
    status: Status = "fits" if held.high <= limit else "uncertain"
    if beyond:
        status = "ended" if ends else "pages"
    interval = f"{held.low / GB:.2f} to {held.high / GB:.2f}"
    numbers = f"it holds {held.value / GB:.2f} GB ({interval} in 80 % of cases), which"
    return Residence(
        status=status,
        limit_bytes=limit,
        detail=_sentence(status, numbers, f"{what}, {limit / GB:.2f} GB ({basis})", profile),
    )


def _sentence(status: Status, numbers: str, against: str, profile: DeviceProfile) -> str:
    if status == "fits":
        return f"{numbers} is within {against}"
    if status == "uncertain":
        return f"{numbers} may exceed {against}"
    if status == "pages":
        return f"{numbers} exceeds {against}: each token waits for storage; take a smaller file or context"
    wider = profile.app_memory_limit_with_entitlement_bytes
    more = f", {wider.value / GB:.2f} GB with the system's entitlement for more" if wider is not None else ""
    return f"{numbers} exceeds {against}{more}: the system ends the app; take a smaller file or context"


def paged(decode: Estimate, profile: DeviceProfile, file_bytes: int, missing_bytes: float) -> Estimate:
    """Return the decode speed from storage, reading the missing part per token at best, the whole file at worst."""
    read = storage_bytes_per_s(profile)
    least = min(max(missing_bytes, 0.05 * file_bytes), 0.5 * file_bytes)
    seconds = [1 / decode.value + lost / read for lost in (least, file_bytes)]
    best, worst = 1 / seconds[0], 1 / seconds[1]
    return Estimate(
        value=exp((log(best) + 2 * log(worst)) / 3),
        low=worst / 2,
        high=best,
        unit=decode.unit,
        how=f"weights are read from storage, {read / 1e6:,.0f} MB/s, for each token",
    )


def load_ms(profile: DeviceProfile, file_bytes: int) -> Estimate:
    """Return the time of a first load from storage."""
    read = storage_bytes_per_s(profile)
    high, value, low = (
        1e3 * (file_bytes / (share * read) + extra) for share, extra in zip(LOAD_SHARES, LOAD_SECONDS, strict=True)
    )
    known = profile.storage_read_bytes_per_s is not None
    source = "the profile's storage" if known else f"a usual storage of a {profile.device_class}"
    how = f"a first load from {source}, {read / 1e6:,.0f} MB/s; a file that the system still holds loads at once"
    return Estimate(value=value, low=low, high=high, unit="ms", how=how)


def storage_bytes_per_s(profile: DeviceProfile) -> float:
    """Return the sequential read speed of the profile, or else of its device class."""
    storage = profile.storage_read_bytes_per_s
    return storage.value if storage is not None else USUAL_STORAGE[profile.device_class]
