"""Speed of llama.cpp's matrix multiplication per type, relative to Q4_0 with many tokens at once.

Measured with llama-cpp-python 0.3.36 on two cores of x86-64 servers. The first server has AVX-512 VNNI; there Q4_0
made 208e9 multiplications per second in matrices of 2048 x 8192. The second also has AVX-VNNI; there Q4_0 made 130e9
in the reference model's matrices (`tests/benchmarks/test_llama_kernels.py`). Its memory is slow, and its speed varies
by the hour. Its figures for one token are therefore means of two or three days. Only their ratios to Q4_0 apply to
other machines, so Q4_0's own figure is the first server's.

Fewer bits are not always faster: Q4_1, Q5_0 and Q5_1 have no kernels for many tokens at once, and take up to three
times as long for a prompt as types of more bits.

On Arm with dotprod or i8mm llama.cpp repacks Q4_0, IQ4_NL, Q4_K, Q5_K, Q6_K and Q8_0 (ggml-cpu/repack.cpp). Other
types take 3 to 4 times as long for a prompt: published prefills are 0.13 to 0.29 TOPS against 0.05 to 0.07 on the
Raspberry Pi 5, 2.6 against 0.7 on the M4 Max. Speeds for one token at a time are assumed to be as on x86.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from exporter.formats.group import WeightGroup
from exporter.predict.roofline import Throughput

ON_AVX512_VNNI: Mapping[str, Throughput] = {
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
ON_AVX_VNNI: Mapping[str, Throughput] = {
    "IQ2_XXS": Throughput(0.1088, 1.14),
    "IQ2_S": Throughput(0.2287, 1.01),
    "Q2_K": Throughput(0.2230, 0.79),
    "IQ3_XXS": Throughput(0.1020, 1.02),
    "IQ3_S": Throughput(0.0862, 1.11),
    "Q3_K": Throughput(0.2481, 0.92),
    "IQ4_XS": Throughput(0.1875, 1.05),
    "IQ4_NL": Throughput(0.2354, 1.02),
    "Q4_0": Throughput(0.2370, 1.00),
    "Q4_1": Throughput(0.1870, 0.33),
    "Q4_K": Throughput(0.2950, 0.97),
    "Q5_0": Throughput(0.1507, 0.60),
    "Q5_1": Throughput(0.1441, 0.28),
    "Q5_K": Throughput(0.1634, 1.04),
    "Q6_K": Throughput(0.1729, 1.05),
    "Q8_0": Throughput(0.1398, 0.70),
    "F16": Throughput(0.1075, 0.68),
    "F32": Throughput(0.0848, 0.70),
}
# One token at a time: the head is by far the largest matrix, and its reads are steadier than others.
IN_HEAD_ON_AVX_VNNI = {"IQ4_NL": 0.2332, "Q4_1": 0.1908, "Q5_0": 0.1615, "Q5_1": 0.1455, "Q8_0": 0.1499}
# The same in down projections, which have few and long rows. Types without repacking are split into chunks of 64 rows
# (ggml-cpu.c); 576 rows make nine chunks, which two threads cannot share evenly.
IN_DOWN_ON_AVX_VNNI = {"Q4_1": 0.1718, "Q5_0": 0.1380, "Q5_1": 0.1243, "Q8_0": 0.1049}
REPACKED_ON_ARM = ("Q4_0", "IQ4_NL", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
# Speed of other kernels relative to repacked ones, from the figures above.
PLAIN_ON_ARM = 0.28


@dataclass(frozen=True)
class Kernels:
    """Kernel speeds of an instruction set.

    Attributes:
        layers: Speed of each type in matrices of layers.
        decode_in_down: Speed with one token in down projections, where it differs.
        decode_in_head: The same in the head.
    """

    layers: Mapping[str, Throughput]
    decode_in_down: Mapping[str, float]
    decode_in_head: Mapping[str, float]

    def speed(self, group: WeightGroup, type: str) -> Throughput:
        """Return the speed of a type in a matrix; only the last token of a prompt goes through the head."""
        known = self.layers[type]
        if group.layer is None:
            return Throughput(self.decode_in_head.get(type, known.decode), math.inf)
        elsewhere = self.decode_in_down if group.role == "down" else {}
        return replace(known, decode=elsewhere.get(type, known.decode))


def kernels_on(features: Collection[str]) -> Kernels:
    """Return the kernels for an instruction set, whose features are named as in device profiles."""
    if "avx-vnni" in features:
        return Kernels(ON_AVX_VNNI, IN_DOWN_ON_AVX_VNNI, IN_HEAD_ON_AVX_VNNI)
    known = ON_AVX512_VNNI
    if "dotprod" in features or "i8mm" in features:
        known = {
            name: replace(one, prefill=1.0 if name in REPACKED_ON_ARM else PLAIN_ON_ARM) for name, one in known.items()
        }
    elif "neon" in features:
        known = {name: replace(one, prefill=one.decode) for name, one in known.items()}
    return Kernels(known, {}, {})
