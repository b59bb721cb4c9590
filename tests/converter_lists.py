"""Lists of what llama.cpp's own converter writes for the tests' small models: every key and every tensor.

    python -m tests.converter_lists FOLDER     makes data/converter_lists.json again

FOLDER is the unpacked source distribution of the installed llama-cpp-python, which holds the converter. Weights follow
from their names and have few digits, so that every machine makes the same.
"""

import argparse
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file, save_file
from transformers.utils import logging

from exporter.model.family import families
from tests.gguf_files import edited_gguf
from tests.models import tiny_model

PATH = Path(__file__).parent / "data" / "converter_lists.json"
PACKAGE = "llama-cpp-python"
# Vocabularies are compared in other tests, and `general` is about the file.
LEFT_OUT = ("GGUF.", "tokenizer.", "general.")
# Not copied but computed, so that its last bits depend on who computes it.
COMPUTED = "rope_freqs.weight"
# Types of keys -> what makes the value of a text.
KINDS: dict[str, Callable[[str], object]] = {
    "BOOL": lambda text: text == "True", "FLOAT32": float, "INT32": int, "STRING": str, "UINT32": int,
}  # fmt: skip
UNTIED_ONLY = ("olmo2", "olmo3")
# Enough for a layer of each kind.
LAYERS = {"gemma4_text": 5, "lfm2": 3, "olmo3": 4, "smollm3": 4}


@dataclass(frozen=True)
class Case:
    """A small model.

    Attributes:
        family: Its `model_type`.
        options: Arguments of `tiny_model`.
        published: Keys of config.json that the published models have otherwise than transformers saves them.
    """

    family: str
    options: Mapping[str, Any]
    published: Mapping[str, Any] = field(default_factory=dict)


def _with_rope(**parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10000.0, **parameters}}


LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75,
    "original_max_position_embeddings": 256,
    "short_factor": np.linspace(1, 3, 24).tolist(), "long_factor": np.linspace(1, 60, 24).tolist(),
}  # fmt: skip
# transformers renames the kinds of layers when it saves a config; the converter takes any number for experts.
GRANITE_4 = {"layer_types": ["attention"] * 2, "num_experts_per_tok": 0}
CASES = {
    f"{family.model_type} {'tied' if tied else 'untied'}": Case(
        family.model_type,
        {"tied": tied, "layers": LAYERS.get(family.model_type, 2)},
        GRANITE_4 if family.model_type == "granitemoehybrid" else {},
    )
    for family in families().values()
    for tied in (True, False)
    if not (tied and family.model_type in UNTIED_ONLY)
} | {
    "gemma3_text scaled": Case(
        "gemma3_text",
        {
            "changes": {
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                }
            }
        },
    ),
    "granitemoehybrid without rotary embeddings": Case(
        "granitemoehybrid", {"changes": {"position_embedding_type": None}}, GRANITE_4
    ),
    "llama linear": Case("llama", {"changes": _with_rope(rope_type="linear", factor=4.0)}),
    "llama dynamic": Case("llama", {"changes": _with_rope(rope_type="dynamic", factor=4.0)}),
    "llama yarn": Case(
        "llama", {"changes": _with_rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=256)}
    ),
    "llama llama3": Case(
        "llama",
        {
            "changes": _with_rope(
                rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=256,
            )
        },
    ),
    "mistral with a window": Case("mistral", {"changes": {"sliding_window": 64}}),
    "phi3 like Phi-4-mini": Case(
        "phi3",
        {
            "hidden": 256,
            "changes": {
                "original_max_position_embeddings": 256, "sliding_window": 2048, "partial_rotary_factor": 0.75,
                "rope_parameters": LONGROPE,
            },
        },
    ),
    "qwen2 with windows": Case(
        "qwen2", {"changes": {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}}
    ),
    "qwen3 with wide heads": Case("qwen3", {"changes": {"num_attention_heads": 8}}),
}  # fmt: skip


def make_model(case: Case, folder: Path) -> Path:
    """Write the model of a case; its weights follow from the names of its tensors."""
    tiny_model(folder, case.family, **case.options)
    path = folder / "model.safetensors"
    save_file({name: _weights(name, held.shape) for name, held in load_file(path).items()}, path, {"format": "pt"})
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text("utf-8")) | case.published), "utf-8")
    return folder


def _weights(name: str, shape: tuple[int, ...]) -> np.ndarray:
    drawn = hashlib.shake_256(name.encode()).digest(int(np.prod(shape)))
    return (np.frombuffer(drawn, np.int8) / np.float32(128)).reshape(shape)


def entries(path: Path) -> dict[str, str]:
    """Return each key of a GGUF file with its type and value, and each tensor with its type, shape and a digest.

    Keys of the architecture stand without its name. A tensor that is computed stands with its values, to 6 digits.
    """
    reader = gguf.GGUFReader(path)
    architecture = str(reader.fields["general.architecture"].contents())
    found = {"architecture": architecture}
    for name, stated in reader.fields.items():
        if not name.startswith(LEFT_OUT):
            found[name.removeprefix(f"{architecture}.")] = _value(stated)
    for tensor in reader.tensors:
        shape = "x".join(str(size) for size in reversed(tensor.shape.tolist()))
        held = hashlib.sha256(tensor.data).hexdigest()[:10]
        if tensor.name == COMPUTED:
            held = " ".join(f"{value:.6g}" for value in tensor.data.tolist())
        found[tensor.name] = f"{tensor.tensor_type.name} {shape} {held}"
    return dict(sorted(found.items()))


def with_converted_keys(source: Path, path: Path, theirs: Mapping[str, str]) -> Path:
    """Write a GGUF file anew with the keys that the converter writes in place of its own.

    Args:
        source: This exporter's file of a case.
        path: The new file.
        theirs: `entries` of the converter's file.
    """
    prefix = f"{theirs['architecture']}."
    own = [name for name in gguf.GGUFReader(source).fields if not name.startswith(LEFT_OUT)]
    stated = {f"{prefix}{name}": _parsed(text) for name, text in theirs.items() if text.split()[0] in KINDS}
    return edited_gguf(source, path, dict.fromkeys(own) | stated)


def _parsed(text: str) -> object:
    """Return the value of a key from what `_value` makes of it."""
    kind, _, rest = text.partition(" ")
    values = [KINDS[kind](one) for one in rest.strip("[]").split()]
    return values if rest.startswith("[") else values[0]


def _value(held: gguf.ReaderField) -> str:
    kind, contents = held.types[-1].name, held.contents()
    values = contents if isinstance(contents, list) else [contents]
    texts = [str(np.float32(value) if kind == "FLOAT32" else value) for value in values]
    return f"{kind} {texts[0]}" if len(held.types) == 1 else f"{kind} [{' '.join(texts)}]"


def converted() -> dict[str, dict[str, str]]:
    """Return case -> `entries` of the converter's file.

    Raises:
        ValueError: they are another version's.
    """
    held = json.loads(PATH.read_text("utf-8"))
    if held[PACKAGE] != version(PACKAGE):
        raise ValueError(f"{PATH.name} is of {PACKAGE} {held[PACKAGE]}: make it again, see {Path(__file__).name}")
    found: dict[str, dict[str, str]] = held["cases"]
    return found


# The converter recognises no tokenizer of the tests, so no vocabulary is written.
CONVERT = """
import runpy, sys
from pathlib import Path
converter, *jobs = sys.argv[1:]
sys.path[:0] = [converter, f"{converter}/gguf-py"]
import conversion
conversion.load_all_models()
def below(kind):
    yield kind
    for one in kind.__subclasses__():
        yield from below(one)
for kind in below(conversion.TextModel):
    kind.set_vocab = lambda self: None
for folder in jobs:
    sys.argv = ["convert", folder, "--outtype", "f32", "--outfile", f"{folder}.gguf"]
    runpy.run_path(f"{converter}/convert_hf_to_gguf.py", run_name="__main__")
"""


def main() -> None:
    """Convert the model of each case, and write the lists."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help=f"the unpacked source distribution of {PACKAGE}")
    source: Path = parser.parse_args().folder
    if f"\nVersion: {version(PACKAGE)}\n" not in (source / "PKG-INFO").read_text("utf-8"):
        sys.exit(f"{source}: not the source distribution of {PACKAGE} {version(PACKAGE)}, which is installed")
    logging.disable_progress_bar()
    with TemporaryDirectory() as scratch:
        folders = {name: make_model(case, Path(scratch, name)) for name, case in CASES.items()}
        command = [sys.executable, "-c", CONVERT, str(source / "vendor" / "llama.cpp"), *map(str, folders.values())]
        subprocess.run(command, check=True)
        found = {name: entries(folder.with_name(f"{name}.gguf")) for name, folder in folders.items()}
    PATH.write_text(json.dumps({PACKAGE: version(PACKAGE), "cases": found}, indent=0) + "\n", "utf-8")


if __name__ == "__main__":
    main()
