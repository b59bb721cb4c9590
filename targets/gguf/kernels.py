"""How quickly llama.cpp multiplies with each type, against Q4_0 with many tokens at once.

Measured by `tests/benchmarks/test_llama_kernels.py`: llama-cpp-python 0.3.36 on one core of an x86-64 server with
AVX-512 VNNI, where Q4_0 made 98e9 products a second. What bits cost is not what kernels cost: Q4_1, Q5_0 and Q5_1 have
none for many tokens at once, and take up to three times as long for a prompt as types of more bits.

On Arm with dotprod or i8mm llama.cpp repacks Q4_0, IQ4_NL, Q4_K, Q5_K, Q6_K and Q8_0 (ggml-cpu/repack.cpp). What has to
do without there takes 3 to 4 times as long for a prompt: published prefills are 0.13 to 0.29 TOPS against 0.05 to 0.07
on the Raspberry Pi 5, 2.6 against 0.7 on the M4 Max. One token at a time is taken to be as on x86.
"""

from collections.abc import Mapping
from dataclasses import replace

from exporter.device.profile import DeviceProfile
from exporter.device.speed import Throughput

ON_X86: Mapping[str, Throughput] = {
    "IQ2_XXS": Throughput(0.128, 1.32),
    "IQ2_S": Throughput(0.121, 1.32),
    "Q2_K": Throughput(0.280, 0.81),
    "IQ3_XXS": Throughput(0.097, 1.40),
    "IQ3_S": Throughput(0.081, 1.40),
    "Q3_K": Throughput(0.199, 1.26),
    "IQ4_XS": Throughput(0.186, 1.54),
    "IQ4_NL": Throughput(0.252, 1.00),
    "Q4_0": Throughput(0.252, 1.00),
    "Q4_1": Throughput(0.130, 0.33),
    "Q4_K": Throughput(0.306, 1.06),
    "Q5_0": Throughput(0.145, 0.66),
    "Q5_1": Throughput(0.132, 0.30),
    "Q5_K": Throughput(0.183, 1.57),
    "Q6_K": Throughput(0.223, 1.25),
    "Q8_0": Throughput(0.169, 0.80),
    "F16": Throughput(0.115, 0.66),
    "F32": Throughput(0.059, 0.60),
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
