"""A target in one file: float16 safetensors, and a runtime in NumPy that reads them."""

import json
import math
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from exporter.compress.compression import CompressedMatrix, Compression
from exporter.formats.floats import FLOAT16, FLOAT32
from exporter.formats.format import Float32
from exporter.formats.group import Decision, WeightGroup
from exporter.foundation.errors import RequestError
from exporter.model.chat import Chat, Rendered
from exporter.model.model import Model
from exporter.targets.artifact import Artifact
from exporter.targets.contract import Target, lower
from exporter.targets.facts import TargetFacts
from exporter.targets.intake import Read
from exporter.targets.runtime import Timing, resident_bytes

FORMATS = {one.name: one for one in (FLOAT16, FLOAT32)}
WEIGHTS, SHAPE, TOKENIZER = "model.safetensors", "shape.json", "tokenizer.json"


class Toy(Target):
    name = "toy"
    default_type = "F16"
    default_method = "rtn"
    most_rounding_kl = 0.1

    def types(self) -> list[str]:
        return list(FORMATS)

    def decide(self, model: Model, type: str, method: str) -> list[Decision]:
        if type not in FORMATS:
            raise RequestError(f"unknown type {type!r}", expected=" or ".join(FORMATS))
        return [Decision(group, method, FORMATS[type], f"{type} for every matrix") for group in model.groups()]

    def write(
        self, compression: Compression, matrices: Iterator[CompressedMatrix], type: str, folder: Path
    ) -> Artifact:
        model = compression.model
        tensors = {name: model.read(name) for name in model.decoder.vectors()}
        for matrix in matrices:
            kind = np.float16 if matrix.decision.format is FLOAT16 else np.float32
            tensors[matrix.name] = matrix.encoded.planned.astype(kind)
        save_file(tensors, folder / WEIGHTS)
        shape = model.decoder
        facts = {
            "layers": shape.layers, "heads": shape.heads, "kv_heads": shape.kv_heads, "width": shape.head_dim,
            "positions": shape.context_length, "epsilon": model.config.rms_norm_eps, "head": shape.head.name,
            "theta": model.config.rope_parameters["rope_theta"],
        }  # fmt: skip
        (folder / SHAPE).write_text(json.dumps(facts))
        (folder / TOKENIZER).write_bytes((model.folder / TOKENIZER).read_bytes())
        return Artifact(self.name, folder, (folder / WEIGHTS,))

    def write_float(self, model: Model, folder: Path) -> Artifact:
        return lower(self, Compression(model, self.decide(model, "F32", "rtn")), "F32", folder).artifact

    def read_back(self, artifact: Artifact, model: Model) -> Callable[[WeightGroup], Float32]:
        tensors = load_file(artifact.weights[0])
        return lambda group: tensors[group.name].astype(np.float32)

    def stored_types(self, artifact: Artifact, model: Model) -> dict[str, str]:
        tensors = load_file(artifact.weights[0])
        return {group.name: {2: "F16", 4: "F32"}[tensors[group.name].itemsize] for group in model.groups()}


class ToyText:
    title = "NumPy"

    def __init__(self, artifact: Artifact) -> None:
        self._tokenizer = Tokenizer.from_file(str(artifact.folder / TOKENIZER))

    def tokenize(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text).ids)

    def text(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens))

    def known_differences(self) -> dict[str, str]:
        return {}

    def ends(self) -> list[int]:
        return []

    def render_chat(self, chat: Chat, prompt: bool) -> Rendered:
        raise RequestError("this runtime has no chat templates")


class ToyRuntime(ToyText):
    """A Llama, all tokens at a time."""

    def __init__(self, artifact: Artifact, context: int, threads: int, exact: bool, sequences: int) -> None:
        before, started = resident_bytes(), time.perf_counter()
        super().__init__(artifact)
        self._shape = json.loads((artifact.folder / SHAPE).read_text())
        self._tensors = {name: one.astype(np.float32) for name, one in load_file(artifact.weights[0]).items()}
        self._loaded = time.perf_counter() - started, before

    def logits(self, tokens: list[int], first: int = 0) -> Float32:
        x = self._tensors["model.embed_tokens.weight"][tokens]
        for layer in range(self._shape["layers"]):
            part = f"model.layers.{layer}."
            x = x + self._attention(part, self._norm(x, f"{part}input_layernorm.weight"))
            inner = self._norm(x, f"{part}post_attention_layernorm.weight")
            gate, up = (inner @ self._tensors[f"{part}mlp.{role}_proj.weight"].T for role in ("gate", "up"))
            x = x + (gate / (1 + np.exp(-gate)) * up) @ self._tensors[f"{part}mlp.down_proj.weight"].T
        return np.ascontiguousarray(self._norm(x[first:], "model.norm.weight") @ self._tensors[self._shape["head"]].T)

    def _norm(self, x: Float32, name: str) -> Float32:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + np.float32(self._shape["epsilon"])) * self._tensors[name]

    def _attention(self, part: str, x: Float32) -> Float32:
        width, shared = self._shape["width"], self._shape["heads"] // self._shape["kv_heads"]
        q, k, v = (
            (x @ self._tensors[f"{part}self_attn.{role}_proj.weight"].T).reshape(len(x), -1, width) for role in "qkv"
        )
        q, k, v = self._turned(q), self._turned(k).repeat(shared, 1), v.repeat(shared, 1)
        scores = np.einsum("ihd,jhd->hij", q, k) / np.float32(math.sqrt(width))
        scores = np.where(np.tri(len(x), dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        mixed = np.einsum("hij,jhd->ihd", weights, v).reshape(len(x), -1)
        made: Float32 = mixed @ self._tensors[f"{part}self_attn.o_proj.weight"].T
        return made

    def _turned(self, x: Float32) -> Float32:
        half = x.shape[-1] // 2
        angles = np.outer(np.arange(len(x)), self._shape["theta"] ** (-np.arange(half) / half))[:, None]
        cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        left, right = x[..., :half], x[..., half:]
        return np.concatenate([left * cos - right * sin, right * cos + left * sin], -1)

    def generate(self, tokens: list[int], count: int) -> list[int]:
        made: list[int] = []
        while len(made) < count:
            made.append(int(self.logits(tokens + made)[-1].argmax()))
        return made

    def measure(self, prompt: list[int], decode: int, repeats: int) -> Timing:
        started = time.perf_counter()
        self.logits(prompt)
        read = time.perf_counter() - started
        load_s, before = self._loaded
        return Timing.of(len(prompt), [read], 1, [read], load_s, before)

    def positions(self) -> int:
        return int(self._shape["positions"])


class ToyIntake:
    weights = (WEIGHTS,)
    required = 1

    def admit(self, artifact: Artifact, names: Collection[str], read: Read, folder: Path) -> Artifact:
        return artifact


TARGET, RUNTIME, TEXT, INTAKE = Toy(), ToyRuntime, ToyText, ToyIntake()
FACTS = TargetFacts(schema_version=1, runtime="NumPy", libraries=("numpy",), runtime_libraries=("numpy",))
