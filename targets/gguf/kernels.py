"""How quickly llama.cpp multiplies with each type, against Q4_0 with many tokens at once.

Measured by `tests/benchmarks/test_llama_kernels.py`: llama-cpp-python 0.3.36 on two cores of an x86-64 server with
AVX-512 VNNI, where Q4_0 made 208e9 products a second, with more weights than the caches hold. What bits cost is not
what kernels cost: Q4_1, Q5_0 and Q5_1 have none for many tokens at once, and take up to three times as long for a
prompt as types of more bits.

On Arm with dotprod or i8mm llama.cpp repacks Q4_0, IQ4_NL, Q4_K, Q5_K, Q6_K and Q8_0 (ggml-cpu/repack.cpp). What has to
do without there takes 3 to 4 times as long for a prompt: published prefills are 0.13 to 0.29 TOPS against 0.05 to 0.07
on the Raspberry Pi 5, 2.6 against 0.7 on the M4 Max. One token at a time is taken to be as on x86.
"""

from collections.abc import Mapping
from dataclasses import replace

from exporter.device.profile import DeviceProfile
from exporter.device.speed import Throughput

ON_X86: Mapping[str, Throughput] = {
    "IQ2_XXS": Throughput(0.119, 1.40),
    "IQ2_S": Throughput(0.114, 1.33),
    "Q2_K": Throughput(0.243, 0.78),
    "IQ3_XXS": Throughput(0.088, 1.32),
    "IQ3_S": Throughput(0.077, 1.43),
    "Q3_K": Throughput(0.190, 1.40),
    "IQ4_XS": Throughput(0.174, 1.67),
    "IQ4_NL": Throughput(0.234, 1.00),
    "Q4_0": Throughput(0.237, 1.00),
    "Q4_1": Throughput(0.112, 0.32),
    "Q4_K": Throughput(0.265, 1.04),
    "Q5_0": Throughput(0.122, 0.66),
    "Q5_1": Throughput(0.113, 0.29),
    "Q5_K": Throughput(0.167, 1.73),
    "Q6_K": Throughput(0.188, 1.33),
    "Q8_0": Throughput(0.135, 0.81),
    "F16": Throughput(0.078, 0.68),
    "F32": Throughput(0.038, 0.60),
}
REPACKED_ON_ARM = ("Q4_0", "IQ4_NL", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
# Of the speed of repacked kernels, by those figures.
PLAIN_ON_ARM = 0.28


def throughput_on(device: DeviceProfile) -> Mapping[str, Throughput]:
    """Return the speed of each type on a device's instruction set."""
    features = device.isa.features
    if "dotprod" in features or "i8mm" in features:
        return {
            name: replace(known, prefill=1.0 if name in REPACKED_ON_ARM else PLAIN_ON_ARM)
            for name, known in ON_X86.items()
        }
    if "neon" in features:
        return {name: replace(known, prefill=known.decode) for name, known in ON_X86.items()}
    return ON_X86
