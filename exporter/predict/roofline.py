"""Estimates the speed of matrices on a device's CPU with the roofline of its memory and kernels.

A matrix takes the longer of two times (Williams et al. 2009): reading its bytes, once for each generated token, or its
multiplications. The speed of llama.cpp's 4-bit kernels per core and cycle is inferred from published prefill speeds:
parameters x tokens/s over cores and clock. All of it is an estimate.
"""

from dataclasses import dataclass
from math import inf

from exporter.device.backend import TimedKernels
from exporter.device.profile import DeviceProfile

# Multiply-adds per core and cycle of the 4-bit kernels that repack weights; the first feature that a device has is
# used. Sources: i8mm, Snapdragon X Elite 2.9 TOPS and M4 Max 2.6 TOPS of CPU prefill; AVX-512 VNNI, Ryzen AI Max 4.0
# TOPS; AVX-VNNI, Core Ultra 200V 0.34 TOPS; dotprod, Raspberry Pi 5 0.13 to 0.29 TOPS; NEON, Raspberry Pi 4 about 0.02
# TOPS.
PRODUCTS_A_CYCLE = {
    "i8mm": 20.0, "avx512-vnni": 25.0, "avx-vnni": 8.0, "avx512": 8.0, "avx2": 5.0, "dotprod": 10.0, "neon": 1.5,
}  # fmt: skip
SLOWEST = 1.0


@dataclass(frozen=True)
class Throughput:
    """A kernel's multiply-adds per second with one token and with many, relative to llama.cpp's Q4_0 with many.

    Attributes:
        decode: With one token.
        prefill: With many.
        product_s: Seconds that each product with one token takes beside its weights, where that was timed.
    """

    decode: float = 1.0
    prefill: float = 1.0
    product_s: float = 0.0

    def times(self, other: "Throughput") -> "Throughput":
        """Return both ratios multiplied by those of the reference kernel."""
        return Throughput(self.decode * other.decode, self.prefill * other.prefill, self.product_s)


@dataclass(frozen=True)
class Cpu:
    """The parameters of a CPU's roofline.

    Attributes:
        bytes_per_s: Memory bandwidth reached in decoding; infinite where the speeds of kernels include the reading.
        products_per_s: Multiply-adds per second of llama.cpp's Q4_0 with many tokens, on all used cores together.
        decode_factor: What the roofline's times are multiplied by, so that a whole model takes as long as predicted.
        prefill_factor: The same for a prompt.
    """

    bytes_per_s: float
    products_per_s: float
    decode_factor: float = 1.0
    prefill_factor: float = 1.0

    def decode_s(self, weights: int, stored_bytes: int, throughput: Throughput) -> float:
        """Return the seconds of a matrix per generated token."""
        roofline = max(stored_bytes / self.bytes_per_s, weights / (self.products_per_s * throughput.decode))
        return self.decode_factor * (roofline + throughput.product_s)

    def prefill_s(self, weights: int, throughput: Throughput) -> float:
        """Return the seconds of a matrix per prompt token."""
        if throughput.prefill == inf:
            return 0.0
        return self.prefill_factor * weights / (self.products_per_s * throughput.prefill)


def timed_throughputs(timed: TimedKernels, reference: str) -> tuple[Cpu, dict[str, Throughput]]:
    """Return a CPU and format -> speed, as timed on it.

    Args:
        timed: The speeds.
        reference: The format whose speed with many tokens is the unit.
    """
    unit = timed.speeds[reference].prefill_weights_per_s
    return Cpu(inf, unit), {
        name: Throughput(one.decode_weights_per_s / unit, one.prefill_weights_per_s / unit, one.product_seconds)
        for name, one in timed.speeds.items()
    }


def cpu_of(device: DeviceProfile) -> Cpu:
    """Return the speeds of a device's CPU with the profile's threads on its fastest cores."""
    rate = next((rate for feature, rate in PRODUCTS_A_CYCLE.items() if feature in device.isa.features), SLOWEST)
    return Cpu(device.cpu_bandwidth.value, rate * cycles_of(device))


def cycles_of(device: DeviceProfile) -> float:
    """Return the cycles per second of the fastest cores that the profile's threads run on, together."""
    left, cycles = device.threads.count, 0.0
    for cluster in device.clusters:
        used = min(left, cluster.cores)
        cycles += used * cluster.clock_ghz.value * 1e9
        left -= used
    return cycles
