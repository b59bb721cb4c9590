"""The memory of a runtime's process, from the file's size alone: what it holds while it runs, and its peak."""

import re

from exporter.device.estimate import Estimate
from exporter.device.fit import UNIT
from exporter.device.profile import DeviceProfile
from exporter.device.request import Request
from exporter.device.terms import kv_bytes

# The process with its libraries and a vocabulary of 100,000, and the buffers of 512 tokens of a prompt for 10^9
# parameters: six numbers for each of the residual stream and 2.6 for each feed-forward channel, whose widths (2048 and
# 8192 in Llama 3.2 1B, 4096 and 14336 in 8B) grow as so small a power. Published: llama.cpp held 55 MB more than the
# 0.8 GB of a 1B model (M1), and 180 MB more than the 1.3 GB of a 2B one (iPhone 17 Pro).
PROCESS_BYTES, BUFFERS_BYTES, BUFFERS_TOKENS, BUFFERS_POWER = 95e6, 69e6, 512, 0.3
# llama.cpp held 1.07 to 1.14 times the file, LiteRT 1.0 to 1.3 times.
LEAST_SHARE, MOST_SHARE = 0.97, 1.15
# While it loads, llama.cpp has the mapped file and beside it, rearranged for the CPU's instructions, those of its
# matrices that have kernels for that (ggml's ggml-cpu/repack.cpp): all but embeddings, in mixes fewer.
REPACKED_ON_ARM, REPACKED_ON_X86 = r"(UD-)?(Q4_0|Q8_0|IQ4_NL|Q[456]_K)", r"(UD-)?(Q4_0|Q4_K|IQ4_NL)"
LEAST_COPIED, COPIED, MOST_COPIED = 0.5, 0.8, 1.0


def held_bytes(request: Request) -> Estimate:
    """Estimate what a runtime holds while it runs: the weights once, the cache and the buffers."""
    cache = kv_bytes(request.parameters, request.context)
    tokens = min(request.context, BUFFERS_TOKENS) / BUFFERS_TOKENS
    buffers = PROCESS_BYTES + BUFFERS_BYTES * tokens * (request.parameters / 1e9) ** BUFFERS_POWER
    return Estimate(
        value=request.file_bytes + cache + buffers,
        low=request.file_bytes * LEAST_SHARE + cache / 2,
        high=request.file_bytes * MOST_SHARE + 2 * cache + 2 * buffers,
        unit=UNIT,
        how=f"the file, a float16 cache of {request.context:,} tokens as models of that size have it, and buffers",
    )


def peak_bytes(held: Estimate, request: Request, profile: DeviceProfile) -> Estimate:
    """Estimate the most that is resident at any time, pages of the mapped file included, which can be dropped."""
    if not _is_rearranged(request, profile):
        return held

    def loading(copied: float, rest: float) -> float:
        # What is mapped is dropped before more is resident than there is memory.
        return min(request.file_bytes * (1 + copied) + rest, profile.ram_bytes.value)

    value = loading(COPIED, PROCESS_BYTES)
    copying = "the mapped file, and its matrices rearranged for the CPU beside it, while the model loads"
    return Estimate(
        value=max(held.value, value),
        low=max(held.low, loading(LEAST_COPIED, 0)),
        high=max(held.high, loading(MOST_COPIED, 2 * PROCESS_BYTES)),
        unit=UNIT,
        how=copying if value > held.value else held.how,
    )


def _is_rearranged(request: Request, profile: DeviceProfile) -> bool:
    features, runtime = set(profile.isa.features), request.runtime.lower()
    if request.backend != "cpu" or not (runtime == "" or "llama" in runtime or "termux" in runtime):
        return False
    pattern = REPACKED_ON_X86 if "avx2" in features else REPACKED_ON_ARM if "dotprod" in features else None
    return pattern is not None and re.match(pattern, request.format.strip().upper()) is not None
