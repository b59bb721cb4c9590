"""The command line: the only place that prints or exits."""

import os

# NumPy's BLAS reads it when it is loaded: its threads sleep at once, where by default they would spin for a tenth of a
# second and take cores from ggml's quantisers.
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")
