"""How many threads to run on cores of several kinds: all work waits for the slowest, so little cores cost speed.

Four threads of a Snapdragon 778G decoded at 7.5 tokens/s and eight at 4.5; those of an RK3588 at 6.9 and 3.8; a
Snapdragon 8 Gen 2 was best with its five larger cores (sources: `devices/`).
"""

from exporter.device.profile import DeviceProfile
from exporter.foundation.quantities import Document

# A core slower than this share of the fastest holds up the others more than it helps.
LEAST_CLOCK = 0.8


class ThreadChoice(Document):
    """Threads to run with.

    Attributes:
        decode: For generation, which waits for the memory.
        prefill: For prompts, which are bound by arithmetic.
        detail: Why.
    """

    decode: int
    prefill: int
    detail: str


def threads(profile: DeviceProfile) -> ThreadChoice:
    """Choose threads for a device's CPU: the profile's for decoding, all cores of nearly the top clock for prompts."""
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
