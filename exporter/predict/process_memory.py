"""Estimates the memory of a runtime's process while running and at its peak, from the file's size."""

from exporter.device.fit import UNIT
from exporter.device.profile import DeviceProfile
from exporter.predict.estimate import Estimate
from exporter.predict.memory_from_size import ERROR, Memory, predicted_peak
from exporter.predict.peak_memory import Peak, SizedModel
from exporter.predict.request import Request
from exporter.predict.token_cost import kv_bytes

# The process with its libraries and a vocabulary of 100,000, and the buffers of 512 prompt tokens for 10^9 parameters:
# 6 numbers per element of the residual stream and 2.6 per feed-forward channel. These widths (2048 and 8192 in Llama
# 3.2 1B, 4096 and 14336 in 8B) grow with a small power of the parameters. Published: llama.cpp held 55 MB more than the
# 0.8 GB of a 1B model (M1), and 180 MB more than the 1.3 GB of a 2B one (iPhone 17 Pro).
PROCESS_BYTES, BUFFERS_BYTES, BUFFERS_TOKENS, BUFFERS_POWER = 95e6, 69e6, 512, 0.3
# llama.cpp held 1.07 to 1.14 times the file, LiteRT 1.0 to 1.3 times.
LEAST_SHARE, MOST_SHARE = 0.97, 1.15


def held_bytes(request: Request, memory: Memory | Peak | None = None) -> Estimate:
    """Estimate the memory of a runtime while running: the weights once, the cache and the buffers.

    Args:
        request: The request.
        memory: The memory of the process, where the model is known.
    """
    if isinstance(memory, Peak):
        held = request.file_bytes + memory.process_bytes + memory.cache_bytes + memory.buffer_bytes
        made = _of_known_shape(held, "the file, the process, the cache and the buffers of this model")
        # The cache fills as the context does, and buffers of prompts are idle while tokens are generated.
        least = request.file_bytes * LEAST_SHARE + memory.cache_bytes / 2
        return made.model_copy(update={"low": min(made.low, least)})
    cache = request.kv_bytes_per_token * request.context or kv_bytes(request.parameters, request.context)
    tokens = min(request.context, BUFFERS_TOKENS) / BUFFERS_TOKENS
    buffers = PROCESS_BYTES + BUFFERS_BYTES * tokens * (request.parameters / 1e9) ** BUFFERS_POWER
    return Estimate(
        value=request.file_bytes + cache + buffers,
        low=request.file_bytes * LEAST_SHARE + cache / 2,
        high=request.file_bytes * MOST_SHARE + 2 * cache + 2 * buffers,
        unit=UNIT,
        how=f"the file, a float16 cache of {request.context:,} tokens as models of that size have it, and buffers",
    )


def peak_bytes(held: Estimate, request: Request, profile: DeviceProfile, memory: Memory | Peak | None) -> Estimate:
    """Estimate the peak resident memory, including pages of the mapped file, which can be dropped.

    Args:
        held: Memory while running.
        request: The request.
        profile: The device.
        memory: The memory of the runtime for this model, or a model of it; None if it has none.
    """
    if request.backend != "cpu" or memory is None:
        return held
    if isinstance(memory, Peak):
        how = "the process, this model's weights as the runtime loads and packs them, cache and buffers"
        return _within_ram(_of_known_shape(memory.bytes, how), profile)
    model = SizedModel(request.file_bytes, request.parameters, request.format.strip())
    found = predicted_peak(memory, model, request.context, profile.isa.features)
    how = "the process, weights as the runtime loads and packs them, cache and buffers of models of that size"
    estimated = Estimate(value=float(found.value), low=float(found.low), high=float(found.high), unit=UNIT, how=how)
    return _within_ram(estimated, profile)


def _of_known_shape(size: int, how: str) -> Estimate:
    return Estimate(value=float(size), low=(1 - ERROR) * size, high=(1 + ERROR) * size, unit=UNIT, how=how)


def _within_ram(peak: Estimate, profile: DeviceProfile) -> Estimate:
    """Return the peak of the resident memory: mapped pages are dropped before it exceeds the RAM."""
    value, low, high = (min(size, profile.ram_bytes.value) for size in (peak.value, peak.low, peak.high))
    return peak.model_copy(update={"value": value, "low": low, "high": high})
