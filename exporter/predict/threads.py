"""Chooses the number of threads on cores of several kinds: all wait for the slowest, so little cores cost speed.

A Snapdragon 778G decoded at 7.5 tokens/s with four threads and 4.5 with eight; an RK3588 at 6.9 and 3.8. A Snapdragon
8 Gen 2 was fastest with its five larger cores (sources: `devices/`).
"""

from exporter.device.profile import DeviceProfile
from exporter.foundation.quantities import Document

# A core with a clock below this share of the fastest slows the others more than it helps.
LEAST_CLOCK = 0.8


class ThreadChoice(Document):
    """The number of threads to use.

    Attributes:
        decode: Threads for decoding, which is memory-bound.
        prefill: Threads for prompts, which are compute-bound.
        detail: The reason.
    """

    decode: int
    prefill: int
    detail: str


def threads(profile: DeviceProfile) -> ThreadChoice:
    """Choose threads for a device's CPU: the profile's for decoding, all cores near the top clock for prompts."""
    fastest = max(cluster.clock_ghz.value for cluster in profile.clusters)
    large = [cluster for cluster in profile.clusters if cluster.clock_ghz.value >= LEAST_CLOCK * fastest]
    little = sum(cluster.cores for cluster in profile.clusters if cluster not in large)
    detail = profile.threads.reason
    if little:
        detail += f"; {little} little core{'s' * (little > 1)} would hold up the others"
    return ThreadChoice(
        decode=profile.threads.count,
        prefill=max(profile.threads.count, sum(cluster.cores for cluster in large)),
        detail=detail,
    )
