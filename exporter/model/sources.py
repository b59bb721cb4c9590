"""Opens a `Model` from a Hugging Face folder, a hub id, a GGUF file, or `demo`."""

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from exporter.foundation.config_files import shown
from exporter.foundation.errors import InputError, RequestError
from exporter.model.adapter_folder import adapted_folder, tokenizer_note
from exporter.model.adapter_settings import AdapterSettings, read_adapter_settings
from exporter.model.checkpoint import Checkpoint, open_checkpoint
from exporter.model.config import CONFIG, checked_config, code_notes, load_config, multimodal_form, read_config
from exporter.model.decoder import HEAD, Decoder
from exporter.model.gguf_file import whole_name
from exporter.model.gguf_packages import DEMOS
from exporter.model.gguf_source import open_gguf_model
from exporter.model.licences import PATTERNS as LICENCES
from exporter.model.licences import licence_files
from exporter.model.lora import Merged, open_adapter
from exporter.model.model import METADATA, Model, SourceFiles, metadata_files
from exporter.model.recognised import ADAPTER, is_adapter, refuse_quantised, refuse_quantised_tensors
from exporter.model.rotary import rotary_notes
from exporter.model.tensors import INDEX, sliced

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILES = ("*.safetensors", *METADATA, *LICENCES)
UNTIED = (
    "config.json ties the head to the embedding, but both are stored and differ: the head is its own, "
    "as transformers loads it"
)


@contextmanager
def open_model(source: str, base: str | None = None) -> Iterator[Model]:
    """Open a model; the config and tokenizer of a GGUF file, and of an adapter, are unpacked into the cache.

    Args:
        source: A folder, a `.gguf` file, `demo`, or a hub id such as `Qwen/Qwen3-0.6B`. A folder may hold a LoRA
            adapter, which is merged into its base.
        base: The base of an adapter, a folder or a hub id; None for the one that the adapter names.

    Raises:
        RequestError: there is no such model, or the adapter's base is not at hand.
        InputError: the model is damaged or of an unsupported kind.
    """
    path = Path(source)
    if source in DEMOS or source.endswith(".gguf"):
        if base is not None:
            raise _no_adapter(source)
        yield _open_gguf(source)
        return
    folder, name = (path, path.resolve().name) if path.is_dir() else (_hub_folder(source), _hub_name(source))
    if is_adapter(folder):
        yield _open_adapter(folder, name, base)
    elif base is not None:
        raise _no_adapter(source)
    else:
        yield _open_folder(folder, name)


def _no_adapter(source: str) -> RequestError:
    return RequestError(
        "a base was named, but the model is no adapter", where=source, expected=f"a folder with {ADAPTER}",
        next_step="leave out --base",
    )  # fmt: skip


def _open_gguf(source: str) -> Model:
    if source in DEMOS:
        demo = DEMOS[source]
        model = open_gguf_model(demo.file(), demo.origin, demo.name, load_config)
        return replace(model, licences=demo.licence_files()).noting([demo.note] if demo.note else [])
    path = Path(source)
    if not path.is_file():
        raise RequestError("there is no such GGUF file", where=source, next_step="check the path")
    return open_gguf_model(path, f"GGUF file {path.name}", whole_name(path), load_config)


@dataclass(frozen=True)
class _Read:
    """A model folder as it is stored.

    Attributes:
        raw: Content of config.json.
        config: The transformers config; it ties embedding and head only if the weights allow that.
        decoder: Its sizes and blocks.
        checkpoint: Its tensors; those of several matrices are whole.
        notes: Notes for the report.
    """

    raw: dict[str, Any]
    config: PretrainedConfig
    decoder: Decoder
    checkpoint: Checkpoint
    notes: tuple[str, ...]


def _open_folder(folder: Path, name: str) -> Model:
    source = SourceFiles(lambda: _files(folder))
    read = _read_folder(folder)
    tensors = sliced(read.checkpoint, read.decoder.stored_matrices)
    origin = f"Hugging Face folder {name}"
    return Model(
        name,
        origin,
        folder,
        None,
        read.config,
        read.decoder,
        tensors,
        read.notes,
        source=source,
        licences=licence_files(folder),
    )


def _files(folder: Path) -> list[Path]:
    return [*metadata_files(folder), *folder.glob("*.safetensors"), *folder.glob(INDEX)]


def _read_folder(folder: Path) -> _Read:
    raw = read_config(folder)
    refuse_quantised(raw, folder / CONFIG)
    config = checked_config(raw, folder / CONFIG, lambda: _tensor_names(folder))
    decoder = Decoder.of(config, folder / CONFIG)
    checkpoint = open_checkpoint(folder)
    form = multimodal_form(raw)
    # Scales of an encoder that is left out say nothing of the decoder.
    types = {name: held.dtype for name, held in checkpoint.tensors.items() if form is None or not form.leaves_out(name)}
    refuse_quantised_tensors(folder, types)
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
    return _Read(raw, config, decoder, checkpoint, (*checkpoint.notes, *code_notes(raw), *rotary_notes(config)))


def _tensor_names(folder: Path) -> list[str]:
    """Return the names of a folder's tensors; none if it holds none that can be read."""
    with suppress(InputError):
        return list(open_checkpoint(folder).tensors)
    return []


def _open_adapter(folder: Path, name: str, named: str | None) -> Model:
    settings = read_adapter_settings(folder)
    base, base_name = _base_of(folder, settings, named)
    source = SourceFiles(lambda: [*_files(base), *_files(folder)])
    read = _read_folder(base)
    adapter = open_adapter(settings, read.decoder)
    config, decoder = read.config, adapter.decoder
    config.vocab_size, config.tie_word_embeddings = decoder.vocab, decoder.tied
    changed = {"vocab_size": decoder.vocab, "tie_word_embeddings": decoder.tied}
    metadata = adapted_folder(base, folder, read.raw | changed)
    tensors = sliced(Merged(read.checkpoint, adapter), decoder.stored_matrices)
    origin = f"LoRA adapter {name}, merged into Hugging Face folder {base_name}"
    notes = (*read.notes, adapter.note, tokenizer_note(base, folder))
    return Model(
        name, origin, metadata, None, config, decoder, tensors, notes, source=source, licences=licence_files(metadata)
    )


def _base_of(folder: Path, settings: AdapterSettings, named: str | None) -> tuple[Path, str]:
    """Return the folder of an adapter's base, and its name: the one on the command line, or the one in the settings.

    Nothing is downloaded for a name that only the adapter's settings hold.

    Raises:
        RequestError: there is no such folder.
        InputError: the folder holds an adapter too.
    """
    if named is not None:
        path = Path(named)
        found = (path, path.resolve().name) if path.is_dir() else (_hub_folder(named), _hub_name(named))
    else:
        found = _named_base(folder, settings)
    if is_adapter(found[0]):
        raise InputError(
            "the adapter's base is an adapter itself", where=found[0], expected="a model",
            next_step="merge the two with PEFT, or name the model that both stand on with --base",
        )  # fmt: skip
    return found


def _named_base(folder: Path, settings: AdapterSettings) -> tuple[Path, str]:
    name = settings.base
    if not name:
        raise RequestError(f"{ADAPTER} names no base", where=settings.path, next_step="name it with --base")
    # An absolute path stays as it is.
    places = dict.fromkeys(place / name for place in (folder.resolve(), folder.resolve().parent))
    for place in places:
        if _is_folder(place):
            return place, place.resolve().name
    looked = ", ".join(f"{place!s:.300}" for place in places)
    if HUB_ID.fullmatch(name):
        with suppress(RequestError):
            return _hub_folder(name, settings.revision, local=True), _hub_name(name)
        looked += ", and the local hub cache"
    raise RequestError(
        f"the adapter's base {shown(name)} is not at hand", where=settings.path, got=f"nothing in {looked}",
        next_step="name its folder or hub id with --base",
    )  # fmt: skip


def _is_folder(place: Path) -> bool:
    try:
        return place.is_dir()
    except OSError:
        # A name that is too long for a file.
        return False


def _hub_name(source: str) -> str:
    return source.rsplit("/", maxsplit=1)[-1]


def _hub_folder(source: str, revision: str | None = None, local: bool = False) -> Path:
    """Return the local folder of a model of the hub, which is fetched unless only `local` files may be used."""
    if not HUB_ID.fullmatch(source):
        raise RequestError(
            "there is no such model",
            where=source,
            expected="a Hugging Face folder, a .gguf file, 'demo', 'demo-gemma', or a hub id such as Qwen/Qwen3-0.6B",
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        patterns = list(HUB_FILES)
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns, local_files_only=local))
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise RequestError(
            "the model is not in the local hub cache and could not be fetched",
            where=source,
            got=str(error).splitlines()[0],
            next_step="check the name and the connection, or give a local folder",
        ) from error
