"""Speed of ONNX Runtime's matrix multiplication per `MatMulNBits` format, relative to int4-b32.

Measured by `tests/benchmarks/test_onnx_kernels.py`: onnxruntime 1.32.0 on an x86-64 server with AVX-512 VNNI, at
accuracy level 4. Prompt speeds are geometric means over the shapes 576x576, 1536x576 and 576x1536 on one core.
One-token speeds are of matrices larger than the caches, on two cores. They depend on the bytes read. Scales are float32
in memory, whatever they are in the file, so blocks of 16 take nearly twice as long as blocks of 32. 2 bits have kernels
only for blocks of 32, 64 and 128; with other blocks a token takes a hundred times as long. Level 0 or 1 does not
multiply in int8: 4 bits take three times as long for a token, and 2 and 8 bits a hundred times.
"""

from exporter.predict.roofline import Throughput

# Speed of int4-b32 relative to llama.cpp's Q4_0 with many tokens, on the same cores.
INT4_B32 = Throughput(0.155, 0.63)
THROUGHPUT = {
    "int2-b16": Throughput(0.01, 0.61),
    "int2-b16-asymmetric": Throughput(0.01, 0.53),
    "int2-b32": Throughput(1.00, 0.53),
    "int2-b32-asymmetric": Throughput(1.00, 0.52),
    "int2-b64": Throughput(1.75, 0.86),
    "int2-b64-asymmetric": Throughput(1.35, 0.86),
    "int2-b128": Throughput(2.00, 1.03),
    "int2-b128-asymmetric": Throughput(1.60, 1.04),
    "int2-b256": Throughput(0.01, 0.64),
    "int2-b256-asymmetric": Throughput(0.01, 0.55),
    "int4-b16": Throughput(0.55, 0.85),
    "int4-b16-asymmetric": Throughput(0.55, 0.83),
    "int4-b32": Throughput(1.00, 1.00),
    "int4-b32-asymmetric": Throughput(0.97, 1.02),
    "int4-b64": Throughput(1.20, 1.06),
    "int4-b64-asymmetric": Throughput(1.10, 1.07),
    "int4-b128": Throughput(1.30, 1.31),
    "int4-b128-asymmetric": Throughput(1.30, 1.33),
    "int4-b256": Throughput(1.50, 1.36),
    "int4-b256-asymmetric": Throughput(1.50, 1.37),
    "int8-b16": Throughput(0.58, 1.03),
    "int8-b16-asymmetric": Throughput(0.56, 1.03),
    "int8-b32": Throughput(0.62, 1.15),
    "int8-b32-asymmetric": Throughput(0.61, 1.15),
    "int8-b64": Throughput(0.72, 1.28),
    "int8-b64-asymmetric": Throughput(0.71, 1.29),
    "int8-b128": Throughput(0.80, 1.46),
    "int8-b128-asymmetric": Throughput(0.80, 1.46),
    "int8-b256": Throughput(0.82, 1.46),
    "int8-b256-asymmetric": Throughput(0.78, 1.46),
}
# The formats offered for a budget: fast ones, each the best of its size on the reference model's matrices. At 2 bits,
# zero points gain less than their bytes do elsewhere; 8 bits do not need them. Rows are not padded: at a width of 576,
# blocks of 128 would take 640 columns, which is more bytes than blocks of 64, with coarser scales.
ALPHABET = (
    "int2-b128", "int2-b64", "int2-b32",
    "int4-b256", "int4-b128", "int4-b128-asymmetric", "int4-b64", "int4-b64-asymmetric", "int4-b32",
    "int4-b32-asymmetric", "int4-b16", "int4-b16-asymmetric",
    "int8-b128", "int8-b64", "int8-b32",
)  # fmt: skip
