"""The named mixes (Q4_K_M and so on): llama.cpp itself reports the type of each tensor.

llama.cpp chooses types by tensor name, width, position and a few hyperparameters, never by the weights. We therefore
run `llama_model_quantize` on a skeleton of the model, whose matrices keep their width but have only two rows, and read
the types back. This takes milliseconds and cannot diverge from the library.
"""

import math
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

import gguf
import numpy as np
from transformers import PretrainedConfig

from exporter.child.process import Child
from exporter.foundation.cache import scratch_folder
from exporter.foundation.errors import RequestError
from exporter.model.decoder import Decoder
from exporter.model.gguf_names import gguf_matrices, gguf_shape, gguf_vectors
from exporter.model.gguf_reader import open_gguf
from exporter.targets.gguf.feed_forward_widths import feed_forward_storage
from exporter.targets.gguf.header import write_header
from exporter.targets.gguf.quantise import quantise

# Names of `llama_ftype` that llama-quantize accepts and that make sense for a whole model.
MIXES = (
    "Q2_K", "Q2_K_S", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_0", "Q4_1", "Q4_K_S", "Q4_K_M", "Q5_0", "Q5_1", "Q5_K_S",
    "Q5_K_M", "Q6_K", "Q8_0", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "IQ3_S",
    "IQ3_M", "IQ4_NL", "IQ4_XS", "F16", "BF16", "F32",
)  # fmt: skip
# Two rows of each matrix take milliseconds, and as much memory as the widest two rows.
QUANTISE_S, QUANTISE_BYTES = 300.0, 1 << 30


def mix_types(mix: str, decoder: Decoder, config: PretrainedConfig, important: Iterable[str]) -> dict[str, str]:
    """Return GGUF tensor name -> type name as `llama_model_quantize` assigns them.

    Args:
        mix: A name of `MIXES`.
        decoder: Shape of the model.
        config: Its transformers config.
        important: GGUF names of the matrices that have importance; some mixes depend on it.

    Raises:
        RequestError: llama.cpp refuses the mix for this model (for example because importance is missing).
    """
    with scratch_folder() as scratch:
        skeleton, quantised = scratch / "skeleton.gguf", scratch / "quantised.gguf"
        widths = _write_skeleton(skeleton, decoder, config)
        uniform = {name: np.ones(widths[name], np.float32) for name in important if name in widths}
        with Child("llama.cpp's quantiser", QUANTISE_BYTES) as child:
            status, log = child.run(quantise, QUANTISE_S, skeleton, quantised, mix, uniform)
        if status:
            raise RequestError(f"llama.cpp refuses the mix {mix} for this model", got=log)
        return {tensor.name: tensor.tensor_type.name for tensor in open_gguf(quantised).tensors}


def _write_skeleton(path: Path, decoder: Decoder, config: PretrainedConfig) -> dict[str, int]:
    """Write the skeleton and return the numbers of importance that each matrix needs: its width, for each expert."""
    widths = {}
    with closing(gguf.GGUFWriter(path, feed_forward_storage(decoder).architecture)) as writer:
        write_header(writer, decoder, config)
        for name, groups in gguf_matrices(decoder).items():
            experts = (len(groups),) if groups[0].expert is not None else ()
            widths[name] = math.prod(experts) * groups[0].columns
            writer.add_tensor(name, np.zeros((*experts, 2, groups[0].columns), np.float32))
        for name, vector in gguf_vectors(decoder).items():
            writer.add_tensor(name, np.zeros(gguf_shape(vector), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    return widths
