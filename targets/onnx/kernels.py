"""How quickly ONNX Runtime multiplies with each `MatMulNBits` format, against int4-b32.

Measured by `tests/benchmarks/test_onnx_kernels.py`: onnxruntime 1.32.0 on one core of an x86-64 server with AVX-512
VNNI, at accuracy level 4, geometric means over the shapes 576x576, 1536x576 and 576x1536. Those matrices stay in the
cache, so the figures are the kernels' own; a matrix that is read from memory also costs its bytes. For 2 bits there are
kernels for blocks of 32, 64 and 128 alone: in other blocks a token takes a hundred times as long. At level 0 or 1, that
is where nothing multiplies in int8, 4 bits take three times as long for a token, and 2 and 8 bits a hundred times.
"""

from exporter.device.speed import Throughput

# What int4-b32 itself makes of the products a second of llama.cpp's Q4_0, with many tokens, on the same core.
INT4_B32 = Throughput(0.41, 0.63)
THROUGHPUT = {
    "int2-b16": Throughput(0.01, 0.61),
    "int2-b16-asymmetric": Throughput(0.01, 0.53),
    "int2-b32": Throughput(0.62, 0.53),
    "int2-b32-asymmetric": Throughput(0.62, 0.52),
    "int2-b64": Throughput(0.92, 0.86),
    "int2-b64-asymmetric": Throughput(0.92, 0.86),
    "int2-b128": Throughput(1.06, 1.03),
    "int2-b128-asymmetric": Throughput(1.08, 1.04),
    "int2-b256": Throughput(0.01, 0.64),
    "int2-b256-asymmetric": Throughput(0.01, 0.55),
    "int4-b16": Throughput(0.81, 0.85),
    "int4-b16-asymmetric": Throughput(0.80, 0.83),
    "int4-b32": Throughput(1.01, 1.00),
    "int4-b32-asymmetric": Throughput(0.98, 1.02),
    "int4-b64": Throughput(1.08, 1.06),
    "int4-b64-asymmetric": Throughput(1.07, 1.07),
    "int4-b128": Throughput(1.33, 1.31),
    "int4-b128-asymmetric": Throughput(1.30, 1.33),
    "int4-b256": Throughput(1.34, 1.36),
    "int4-b256-asymmetric": Throughput(1.31, 1.37),
    "int8-b16": Throughput(0.88, 1.03),
    "int8-b16-asymmetric": Throughput(0.88, 1.03),
    "int8-b32": Throughput(1.03, 1.15),
    "int8-b32-asymmetric": Throughput(1.04, 1.15),
    "int8-b64": Throughput(1.13, 1.28),
    "int8-b64-asymmetric": Throughput(1.14, 1.29),
    "int8-b128": Throughput(1.21, 1.46),
    "int8-b128-asymmetric": Throughput(1.23, 1.46),
    "int8-b256": Throughput(1.18, 1.46),
    "int8-b256-asymmetric": Throughput(1.15, 1.46),
}
# From which formats are chosen for a budget: quick ones, each the best of its size on the reference model's matrices.
# At 2 bits zero points gain less than their bytes do elsewhere, and 8 bits have no need of them. Rows are not padded:
# at a width of 576, blocks of 128 would take 640 columns, more bytes than blocks of 64 and coarser scales.
ALPHABET = (
    "int2-b128", "int2-b64", "int2-b32",
    "int4-b256", "int4-b128", "int4-b128-asymmetric", "int4-b64", "int4-b64-asymmetric", "int4-b32",
    "int4-b32-asymmetric", "int4-b16", "int4-b16-asymmetric",
    "int8-b128", "int8-b64", "int8-b32",
)  # fmt: skip
