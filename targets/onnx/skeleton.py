"""Builds a decoder's graph with onnxruntime-genai's model builder, without weights."""

import contextlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnxruntime_genai.models import builder as genai_builder
from onnxruntime_genai.models import builders
from torch import nn
from transformers import PretrainedConfig

from exporter.foundation.quantities import from_json
from exporter.model.json_file import read_json_object_if_there
from exporter.model.model import Model
from exporter.model.module import weightless_module
from exporter.model.rotary import rope_parameters, rotary_frequencies
from exporter.model.tokenizer import ModelTokenizer, load_tokenizer
from exporter.targets.onnx.companions import genai_ids, write_text_files
from exporter.targets.onnx.memory import CHUNK
from exporter.targets.onnx.settings import CONFIGURATION, GenaiConfig
from exporter.targets.onnx.supported import context_length, declared_by, runtime_type

GENERATION = "generation_config.json"
# Keys that the builder copies from it, and their types.
NUMBERS: dict[str, tuple[type, ...]] = {"temperature": (int, float), "top_k": (int,), "top_p": (int, float)}


@dataclass(frozen=True)
class Skeleton:
    """A float32 decoder graph whose matrices are placeholders, and the builder that made it.

    Attributes:
        graph: The model; initialisers of matrices hold no data, all others are complete.
        builder: onnxruntime-genai's builder, for the files next to the graph.
        tokenizer: The model's tokenizer, for the same files.
    """

    graph: ir.Model
    builder: Any
    tokenizer: ModelTokenizer

    def write_companions(self, model: Model, folder: Path, session_options: dict[str, str]) -> None:
        """Write genai_config.json, with entries for the session's configuration, and the tokenizer's files."""
        with _quiet():
            self.builder.make_genai_config(self.builder.hf_config, {}, str(folder))
        write_text_files(self.tokenizer, self.builder.context_length, folder)
        path = folder / CONFIGURATION
        settings = json.loads(path.read_text(encoding="utf-8"))
        settings["model"].pop("bos_token_id")
        settings["model"]["type"] = runtime_type(model.decoder)
        settings["model"] |= genai_ids(model, self.tokenizer)
        settings["model"]["decoder"]["session_options"] |= session_options
        # A prompt is processed in chunks: the graph computes logits for every token, but only the last are used.
        settings["search"]["chunk_size"] = CHUNK
        path.write_text(from_json(GenaiConfig, json.dumps(settings), path).to_text(), encoding="utf-8")


def build_skeleton(model: Model, scratch: Path, fuse_qkv: bool, share_embedding: bool) -> Skeleton:
    """Run the builder on a model of the right shape whose matrices take no memory.

    Args:
        model: The source; its norms and biases are read, its matrices are not.
        scratch: A folder for the builder's own files.
        fuse_qkv: Use one matrix multiplication for query, key and value.
        share_embedding: Make the float32 graph gather its embedding from the transposed head.
    """
    options = [f"shared_embeddings={str(share_embedding).lower()}", f"fuse_qkv={str(fuse_qkv).lower()}"]
    tokenizer = load_tokenizer(model.folder, model.decoder.vocab)
    config = _shown_to_builder(model, tokenizer)
    folder = str(_checked_folder(model, config, tokenizer, scratch))
    with _quiet(), _configured_by(config), torch.no_grad():
        extra = genai_builder.parse_extra_options(folder, folder, str(scratch), "fp32", "cpu", str(scratch), options)
        del extra["hf_details"]
        extra.pop("_effective_builder_config", None)

        builder = _builder_class(model)(config, ir.DataType.FLOAT, ir.DataType.FLOAT, "cpu", str(scratch), extra)
        builder.load_weights = lambda input_path: _weightless(model)
        builder.make_packed_matmul_float_class = _packed
        # Otherwise the builder would mistake every matrix with as many rows as the vocabulary for the head.
        builder.has_lm_head = lambda module: module is builder.weights.lm_head
        builder.embed_attrs["scale"] = model.decoder.embedding_scale
        _build_each_as_wide_as_it_is(builder, model.decoder.intermediate)
        builder.hf_config = config
        builder.make_model(folder)
    builder.model.graph.sort()
    return Skeleton(builder.model, builder, tokenizer)


def _checked_folder(model: Model, config: PretrainedConfig, tokenizer: ModelTokenizer, scratch: Path) -> Path:
    """Return a folder with checked files for the builder, without weights; the model's own files are untrusted."""
    folder = scratch / "checked"
    folder.mkdir()
    write_text_files(tokenizer, context_length(model), folder)
    config.save_pretrained(folder)
    (folder / GENERATION).write_text(json.dumps(_sampling(model.folder)), encoding="utf-8")
    return folder


def _sampling(folder: Path) -> dict[str, Any]:
    """Return the valid sampling settings of generation_config.json."""
    given = read_json_object_if_there(folder / GENERATION) or {}
    wanted = {key: value for key, value in given.items() if key in NUMBERS and _is_number(value, NUMBERS[key])}
    return wanted | ({"do_sample": given["do_sample"]} if isinstance(given.get("do_sample"), bool) else {})


def _is_number(value: object, kinds: tuple[type, ...]) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool) and value >= 0  # type: ignore[operator]


def _shown_to_builder(model: Model, tokenizer: ModelTokenizer) -> PretrainedConfig:
    """Return the config without values that the builder would recompute: rotary tables, windows no context exceeds.

    `write_companions` corrects the ids of special tokens; the builder only needs some.
    """
    config = model.own_config()
    kept = {key: rope_parameters(model.config).get(key) for key in ("rope_theta", "partial_rotary_factor")}
    config.rope_parameters = {"rope_type": "default"} | {key: value for key, value in kept.items() if value is not None}
    config.partial_rotary_factor = model.decoder.rotary_width / model.decoder.head_dim
    if not model.decoder.family.carries_windows:
        config.layer_types = config.sliding_window = None
    config.max_position_embeddings = context_length(model)
    config.__dict__.pop("original_max_position_embeddings", None)
    ids = genai_ids(model, tokenizer)
    config.bos_token_id, config.pad_token_id = ids.get("bos_token_id"), ids["pad_token_id"]
    config.eos_token_id = ids["eos_token_id"] or [0]
    declared_by(model.decoder).shim(config, model.config)
    return config


@contextlib.contextmanager
def _configured_by(config: PretrainedConfig) -> Iterator[None]:
    """Make the builder use the checked config; otherwise it would read config.json again with all its keys."""
    original = genai_builder.AutoConfig
    genai_builder.AutoConfig = SimpleNamespace(from_pretrained=lambda *_, **__: config)
    try:
        yield
    finally:
        genai_builder.AutoConfig = original


def _builder_class(model: Model) -> Any:
    """Return the builder of a family, with transformers' own rotary tables and caches that hold every position."""
    kinds = iter(model.decoder.family.rotary_kinds)

    def tables(builder: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return _rotary_tables(model, next(kinds), builder.rope_attrs["cache_length"])

    changes = {"make_rotary_embedding_caches_from_scratch": tables, "uses_windowed_kv_cache": lambda builder: False}
    own = getattr(builders, declared_by(model.decoder).builder)
    return type(own.__name__, (own,), changes | _unrotated_layers(own))


def _unrotated_layers(own: Any) -> dict[str, Any]:
    """Return what makes a builder leave queries and keys as they are where it does not turn them in the attention.

    Its class for SmolLM3 asks for no rotary embedding in the attention of some layers. The builder then makes one
    before the attention, and fails, since the graph has no input of positions.
    """

    def turned(builder: Any, layer: int, **given: Any) -> tuple[str, str]:
        if builder.attention_attrs["use_rope_in_attn"] or "position_ids" in builder.input_names:
            tables: tuple[str, str] = own.make_attention_qk_rope(builder, layer, **given)
            return tables
        return "", ""

    return {"make_attention_qk_rope": turned}


def _rotary_tables(model: Model, attention: str, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and sines as transformers computes them, float32 [positions, rotary width].

    The builder turns queries and keys of every model: where the model does not, it is by no angle.
    """
    frequencies, factor = rotary_frequencies(model.config, attention)
    if not model.decoder.family.rotates(model.config):
        frequencies, factor = np.zeros_like(frequencies), 1.0
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), torch.from_numpy(frequencies)).repeat(1, 2)
    return angles.cos() * factor, angles.sin() * factor


def _build_each_as_wide_as_it_is(builder: Any, widths: tuple[int, ...]) -> None:
    """Make the builder, which supports one feed-forward width, use each layer's own."""
    make_layer = builder.make_layer

    def make(layer: int, module: nn.Module) -> None:
        # The builder of Granite 4.0 has an attribute of its own for the width at which gate and up are split.
        builder.intermediate_size = builder._mlp_intermediate_size = widths[layer]
        make_layer(layer, module)

    builder.make_layer = make


def _weightless(model: Model) -> nn.Module:
    """Return the transformers module with real vectors; each matrix is a single zero, repeated by stride."""
    module = weightless_module(model)
    vectors = model.decoder.vectors()
    for name, parameter in list(module.named_parameters()):
        owner, _, attribute = name.rpartition(".")
        value = torch.from_numpy(model.read(name)) if name in vectors else torch.zeros(()).expand(parameter.shape)
        setattr(module.get_submodule(owner), attribute, nn.Parameter(value, requires_grad=False))
    return module


def _packed(*matrices: nn.Linear) -> SimpleNamespace:
    """Replace the builder's stacking of query, key and value, which would fill memory with zeros."""
    rows, columns = sum(len(matrix.weight) for matrix in matrices), matrices[0].weight.shape[1]
    return SimpleNamespace(weight=torch.zeros(()).expand(rows, columns))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the builder's prints from the user's terminal."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
