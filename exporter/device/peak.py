"""The most memory that a runtime is expected to hold: weights, cache, buffers."""

from exporter.device.estimate import Estimate
from exporter.device.fit import UNIT
from exporter.device.request import Request
from exporter.device.terms import kv_bytes

# Of the process and its working buffers, beside what grows with the model: llama.cpp held 55 MB more than the 0.8 GB
# file of a 1B model (M1), and 180 MB more than the 1.3 GB of a 2B one (iPhone 17 Pro).
BUFFERS_BYTES, BUFFERS_SHARE = 64e6, 0.03
# llama.cpp held 1.07 to 1.14 times the file, LiteRT 1.0 to 1.3 times.
LEAST_SHARE, MOST_SHARE = 0.97, 1.15


def peak_bytes(request: Request) -> Estimate:
    """Estimate the peak memory of a model's file in a runtime that maps or copies it once."""
    cache = kv_bytes(request.parameters, request.context)
    value = request.file_bytes * (1 + BUFFERS_SHARE) + cache + BUFFERS_BYTES
    return Estimate(
        value=value,
        low=request.file_bytes * LEAST_SHARE + cache / 2,
        high=request.file_bytes * MOST_SHARE + 2 * cache + 2 * BUFFERS_BYTES,
        unit=UNIT,
        how=f"the file, a float16 cache of {request.context:,} tokens as models of that size have it, and buffers",
    )
