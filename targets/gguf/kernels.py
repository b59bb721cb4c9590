"""How quickly llama.cpp multiplies with each type, against Q4_0 with many tokens at once.

Measured with llama-cpp-python 0.3.36 on two cores of x86-64 servers. One has AVX-512 VNNI; there Q4_0 made 208e9
products a second in matrices of 2048 x 8192. The other has AVX-VNNI besides, where it made 130e9 in the reference
model's matrices (`tests/benchmarks/test_llama_kernels.py`). That one's memory is slow, and not equally so every hour:
figures for one token are means of two days, and only what they are beside Q4_0's holds elsewhere, so that Q4_0's own is
the first server's.

What bits cost is not what kernels cost: Q4_1, Q5_0 and Q5_1 have none for many tokens at once, and take up to three
times as long for a prompt as types of more bits.

On Arm with dotprod or i8mm llama.cpp repacks Q4_0, IQ4_NL, Q4_K, Q5_K, Q6_K and Q8_0 (ggml-cpu/repack.cpp). What has to
do without there takes 3 to 4 times as long for a prompt: published prefills are 0.13 to 0.29 TOPS against 0.05 to 0.07
on the Raspberry Pi 5, 2.6 against 0.7 on the M4 Max. One token at a time is taken to be as on x86.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from exporter.device.speed import Throughput

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
    "Q3_K": Throughput(0.2389, 0.92),
    "IQ4_XS": Throughput(0.1927, 1.05),
    "IQ4_NL": Throughput(0.2296, 1.02),
    "Q4_0": Throughput(0.2370, 1.00),
    "Q4_1": Throughput(0.1890, 0.33),
    "Q4_K": Throughput(0.2672, 0.97),
    "Q5_0": Throughput(0.1507, 0.60),
    "Q5_1": Throughput(0.1441, 0.28),
    "Q5_K": Throughput(0.1606, 1.04),
    "Q6_K": Throughput(0.1724, 1.05),
    "Q8_0": Throughput(0.1420, 0.70),
    "F16": Throughput(0.1075, 0.68),
    "F32": Throughput(0.0848, 0.70),
}
# One token at a time: the head is by far the largest matrix, and is read more steadily than others.
IN_HEAD_ON_AVX_VNNI = {"IQ4_NL": 0.2332, "Q4_1": 0.1908, "Q5_0": 0.1615, "Q5_1": 0.1455, "Q8_0": 0.1499}
HEAD_ON_AVX_VNNI: Mapping[str, Throughput] = {
    name: replace(one, decode=IN_HEAD_ON_AVX_VNNI.get(name, one.decode)) for name, one in ON_AVX_VNNI.items()
}
REPACKED_ON_ARM = ("Q4_0", "IQ4_NL", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
# Of the speed of repacked kernels, by those figures.
PLAIN_ON_ARM = 0.28


@dataclass(frozen=True)
class Kernels:
    """How quick an instruction set is.

    Attributes:
        layers: The speed of each type in matrices of layers.
        head: The same in the head.
        decode_margin: See `exporter.targets.target.Target`.
    """

    layers: Mapping[str, Throughput]
    head: Mapping[str, Throughput]
    decode_margin: float


def kernels_on(features: Collection[str]) -> Kernels:
    """Return the kernels for such instructions, named as in device profiles."""
    if "avx-vnni" in features:
        return Kernels(ON_AVX_VNNI, HEAD_ON_AVX_VNNI, decode_margin=0.025)
    known = ON_AVX512_VNNI
    if "dotprod" in features or "i8mm" in features:
        known = {
            name: replace(one, prefill=1.0 if name in REPACKED_ON_ARM else PLAIN_ON_ARM) for name, one in known.items()
        }
    elif "neon" in features:
        known = {name: replace(one, prefill=one.decode) for name, one in known.items()}
    return Kernels(known, known, decode_margin=0.03)
