"""What is fuzzed: for each kind of input, what is mutated and the code of the product that a user hands it to.

A subject writes its inputs into a folder, takes them once unchanged, and returns an attempt: one mutation, drawn from a
random generator, handed to the product. It returns whether it was accepted; what the product raises tells the rest.
"""

import hashlib
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

import numpy as np
from onnx import GraphProto, ModelProto, helper

from exporter.bundle.manifest import MANIFEST, FileEntry, Manifest, ManifestHeader
from exporter.bundle.opening import opened_bundle
from exporter.bundle.reading import read_manifest
from exporter.bundle.transport import code_beside
from exporter.bundle.verify import verify_bundle
from exporter.bundle.write import write_bundle
from exporter.calibrate.windows import Windows
from exporter.cli.show import bundle_facts, gguf_facts
from exporter.coding.container import PROFILES, SUFFIX, check_file, code_file, original_of, restore_file
from exporter.coding.in_memory import FileSection, ResidentFile
from exporter.coding.layout import array_part
from exporter.device.fit import check_fit
from exporter.device.profile import device_names, load_device
from exporter.foundation.errors import ExporterError
from exporter.foundation.quantities import Quantity
from exporter.model import gguf_source
from exporter.model.ends import special_ids
from exporter.model.gguf_file import GgufFile
from exporter.model.gguf_source import open_gguf_model
from exporter.model.gguf_tokenizer import build_backend, read_file_vocabulary
from exporter.model.llama_vocabulary import VocabularyFacts
from exporter.model.model import Model
from exporter.model.sources import load_config, open_model
from exporter.model.tokenizer import load_tokenizer, try_tokenizer
from exporter.planning.job import Job
from exporter.planning.plan import read_plan
from exporter.planning.recipe import load_recipe, recipe_names
from exporter.planning.resolve import resolve
from exporter.report.data import canonical_json, to_json
from exporter.targets.coded_layout import layout_of
from exporter.targets.contract import load_target
from exporter.targets.gguf.vocabulary import read_vocabulary
from exporter.targets.onnx.companions import write_text_alone
from exporter.targets.onnx.graph_partition import cut
from tests.adapters import tiny_adapter
from tests.fuzz.mutations import (
    changed_value,
    gguf_numbers,
    mutated_bytes,
    mutated_coded,
    mutated_gguf,
    mutated_json,
    mutated_safetensors,
    mutated_toml,
)
from tests.gguf_files import float_gguf, split_gguf
from tests.models import TEMPLATE, VOCAB, tiny_model
from tests.plans import with_plan

Attempt = Callable[[Random], bool]
DATA = Path(__file__).parents[1] / "data"
ROOT = Path(__file__).parents[2]
DEVICE = "raspberry-pi-5"
# One of so many mutations goes the whole way of a command, processes of its runtimes included.
WHOLE_EVERY = 100


@contextmanager
def _replaced(path: Path, data: bytes) -> Iterator[None]:
    """Give a file other content for a while."""
    before = path.read_bytes() if path.is_file() else None
    path.write_bytes(data)
    try:
        yield
    finally:
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        path.unlink(missing_ok=True)
        if before is not None:
            path.write_bytes(before)


# Bundles


def _bundles(folder: Path) -> list[Path]:
    """Return old bundles of each target, and one of them with coded files."""
    made = []
    for target in ("gguf", "onnx", "onnx-qdq"):
        with tarfile.open(DATA / "bundles-0.1.0" / f"{target}.tar.xz") as packed:
            packed.extractall(folder / target, filter="data")
        made.append(folder / target)
    for target, profile in (("gguf", "small"), ("onnx", "fast")):
        staging, coded = folder / f"{target}-staging", folder / f"{target}-coded"
        shutil.copytree(folder / target, staging)
        manifest = read_manifest(staging)
        (staging / MANIFEST).unlink()
        with_plan(staging)
        models = [staging / entry.path for entry in manifest.files if entry.role == "model"]
        code_beside(models, profile, lambda name, done, total: None)  # type: ignore[arg-type]
        write_bundle(staging, coded, _header(manifest))
        made.append(coded)
    return made


def _header(manifest: Manifest) -> ManifestHeader:
    return ManifestHeader(**{name: getattr(manifest, name) for name in ManifestHeader.model_fields})


def _used(bundle: Path) -> bool:
    """Do with a bundle what every command does before it runs a model; return whether it is sound."""
    checks = verify_bundle(bundle)
    for ask in (partial(_opened, may_be_coded=True), _opened, bundle_facts):
        try:
            ask(bundle)
        except ExporterError as error:
            if error.exit_code not in (1, 2, 3):
                raise
    return all(check.status == "passed" for check in checks)


def _opened(bundle: Path, may_be_coded: bool = False) -> None:
    with opened_bundle(bundle, may_be_coded):
        pass


def _files(bundle: Path) -> dict[str, bytes]:
    return {
        path.relative_to(bundle).as_posix(): path.read_bytes()
        for path in sorted(bundle.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }


def _sealed(bundle: Path, path: str, data: bytes) -> bytes:
    """Return a manifest that lists other content for a file, as if the bundle had been made with it."""
    manifest = read_manifest(bundle)
    digest = hashlib.sha256(data).hexdigest()

    def listed(entry: FileEntry) -> FileEntry:
        if entry.coded is not None and path == entry.path + SUFFIX:
            coded = entry.coded.model_copy(update={"size": len(data), "sha256": digest})
            return entry.model_copy(update={"coded": coded})
        return entry.model_copy(update={"size": len(data), "sha256": digest}) if path == entry.path else entry

    made = Manifest.of(_header(manifest), map(listed, manifest.files))
    return canonical_json(made.model_dump(mode="json")).encode()


def _mutated_file(path: str, data: bytes, chance: Random) -> bytes:
    if path.endswith(".json") and chance.random() < 0.7:
        return mutated_json(json.loads(data), chance)
    return mutated_coded(data, chance) if path.endswith(SUFFIX) else mutated_bytes(data, chance)


def bundle(folder: Path) -> Attempt:
    """Any file of a bundle: changed, taken away, added, or listed anew by who changed it."""
    bundles = {made: _files(made) for made in _bundles(folder)}
    assert all(map(_used, bundles))

    def attempt(chance: Random) -> bool:
        where = chance.choice(list(bundles))
        files = bundles[where]
        path = chance.choice(list(files))
        data = _mutated_file(path, files[path], chance)
        kind = chance.random()
        if kind < 0.08:
            added = ("x", "model/x.bin", "model/genai_config.json.", "manifest.json ", "model/.x")
            extra = where / chance.choice(added)
            with _replaced(extra, data):
                return _must_fail(where, True)
        with _replaced(where / path, data):
            if kind < 0.14:
                (where / path).unlink()
                if kind < 0.11:
                    (where / path).symlink_to(chance.choice(("manifest.json", "/dev/null", "/dev/zero", "..")))
                elif kind < 0.12:
                    (where / path).mkdir()
                return _must_fail(where, True)
            if kind < 0.5 and path != MANIFEST:
                with _replaced(where / MANIFEST, files[MANIFEST]):
                    (where / MANIFEST).write_bytes(_sealed(where, path, data))
                    return _used(where)
            return _must_fail(where, data != files[path])

    return attempt


def _must_fail(where: Path, changed: bool) -> bool:
    sound = _used(where)
    assert not (sound and changed), f"a changed bundle was accepted: {where.name}"
    return sound


def manifest(folder: Path) -> Attempt:
    """The manifest in the spelling of this tool, its digest right again in half of them."""
    bundles = {made: _files(made) for made in _bundles(folder)}
    assert all(map(_used, bundles))

    def attempt(chance: Random) -> bool:
        where = chance.choice(list(bundles))
        before = bundles[where][MANIFEST]
        mutated = _spelled if chance.random() < 0.8 else mutated_json
        made = mutated(json.loads(before), chance)
        with _replaced(where / MANIFEST, made):
            sound = _used(where)
            read = read_manifest(where)
            listed = {"name": read.name, "device": read.device, "target": read.target}
            assert not sound or made == before or _digest_changed(before, made), f"accepted: {listed}"
            return sound

    return attempt


def _spelled(content: Any, chance: Random) -> bytes:
    made = changed_value(content, chance)
    if chance.random() < 0.5:
        # Where the rest is as it must be, so is the digest.
        try:
            read = Manifest.model_validate_json(json.dumps(made))
            made = Manifest.of(_header(read), read.files).model_dump(mode="json")
        except ValueError:
            pass
    try:
        return canonical_json(made).encode()
    except (ValueError, TypeError):
        return json.dumps(made).encode("utf-8", "surrogatepass")


def _digest_changed(before: bytes, after: bytes) -> bool:
    """Return whether whoever compares the digest sees that the bundle is another."""
    return bool(json.loads(before)["content_digest"] != json.loads(after)["content_digest"])


# Coded files


def coded(folder: Path) -> Attempt:
    """Coded files: restored, checked, and held coded in memory."""
    source = tiny_model(folder / "model")
    seeds: list[tuple[Path, Sequence[FileSection]]] = []
    for path in (float_gguf(source, folder / "model.gguf"), source / "tokenizer.json"):
        for profile in PROFILES:
            seeds.append((folder / f"{path.name}-{profile}{SUFFIX}", layout_of(path)))
            code_file(path, seeds[-1][0], profile, layout_of(path))
    small = folder / "small"
    small.write_bytes(Random(0).randbytes(600) + bytes(900) + bytes(range(250)) * 4)
    layout = [FileSection(0, array_part((20, 30), _dtype("u1"))), FileSection(700, array_part((9, 20), _dtype("<f4")))]
    for profile in PROFILES:
        seeds += [(folder / f"small-{profile}{SUFFIX}", layout)] * 6
        code_file(small, seeds[-1][0], profile, layout)
    data = {path: path.read_bytes() for path, _ in seeds}
    scratch = folder / "scratch"
    scratch.mkdir()

    def use(path: Path, sections: Sequence[FileSection]) -> bool:
        restored = scratch / "restored"
        stated = original_of(path)
        restore_file(path, restored)
        assert hashlib.sha256(restored.read_bytes()).digest() == stated.sha256
        assert check_file(path) == stated
        held = ResidentFile(path, sections)
        assert held.held_bytes >= 0
        return True

    def attempt(chance: Random) -> bool:
        path, sections = chance.choice(seeds)
        changed = scratch / path.name
        changed.write_bytes(mutated_coded(data[path], chance))
        return use(changed, sections)

    assert all(use(path, sections) for path, sections in seeds)
    return attempt


def _dtype(name: str) -> Any:
    import numpy as np

    return np.dtype(name)


# Models


def gguf(folder: Path) -> Attempt:
    """GGUF files, also split ones: opened, planned for, every tensor read; llama.cpp's own view on a sample."""
    source = tiny_model(folder / "model")
    whole = float_gguf(source, folder / "whole.gguf")
    quantised = folder / "gguf"
    with tarfile.open(DATA / "bundles-0.1.0" / "gguf.tar.xz") as packed:
        packed.extractall(quantised, filter="data")
    (folder / "parts").mkdir()
    seeds = [whole, quantised / "model" / "model.gguf", *split_gguf(whole, folder / "parts", 2)]
    data = {path: path.read_bytes() for path in seeds}
    numbers = {path: gguf_numbers(data[path]) for path in seeds}

    def use(path: Path, all_of_it: bool) -> bool:
        gguf_facts(path)
        layout_of(path)
        if all_of_it:
            with open_model(str(path)) as model:
                return _planned(model)
        shutil.rmtree(os.environ["EDGE_EXPORTER_CACHE"], ignore_errors=True)
        with patch.object(gguf_source, "unpack_tokenizer", _unpacked):
            return _planned(open_gguf_model(path, "", "model", load_config))

    def attempt(chance: Random) -> bool:
        path = chance.choice(seeds)
        with _replaced(path, mutated_gguf(data[path], numbers[path], chance)):
            return use(path, chance.random() < 1 / WHOLE_EVERY)

    assert use(whole, True)
    assert all(use(path, False) for path in seeds)
    return attempt


def _unpacked(file: GgufFile, rows: int, folder: Path) -> dict[str, Any]:
    """Rebuild the tokenizer of a GGUF file without asking llama.cpp about it."""
    vocabulary = read_file_vocabulary(file, rows)
    facts = VocabularyFacts(tuple(8 * (i < 3) for i in range(rows)), (), True, False, 0, 1)
    build_backend(vocabulary, facts, file.path).save(str(folder / "tokenizer.json"))
    return {}


def _planned(model: Model, target: str = "onnx") -> bool:
    """Plan for a model and read its tensors."""
    load_target("gguf").as_stored(model)
    resolve(Job("model", DEVICE, target, "int8", context=64), model).draft()
    for name in model.tensors.shapes():
        model.read(name)
    return True


def safetensors(folder: Path) -> Attempt:
    """Files of weights and their index: opened, planned for, every tensor read."""
    single = tiny_model(folder / "single", layers=1)
    shards = tiny_model(folder / "shards", shards=2, layers=1)
    index = shards / "model.safetensors.index.json"
    seeds = [single / "model.safetensors", *sorted(shards.glob("*.safetensors")), index]
    data = {path: path.read_bytes() for path in seeds}

    def use(path: Path) -> bool:
        with open_model(str(path.parent)) as model:
            return _planned(model)

    def attempt(chance: Random) -> bool:
        path = chance.choice(seeds)
        indexed = path.suffix == ".json"
        made = mutated_json(json.loads(data[path]), chance) if indexed else mutated_safetensors(data[path], chance)
        with _replaced(path, made):
            return use(path)

    assert all(map(use, seeds))
    return attempt


def config(folder: Path) -> Attempt:
    """config.json and its neighbours: the model opened and planned for."""
    seeds = [tiny_model(folder / family, family, layers=1) / "config.json" for family in ("llama", "qwen3")]
    # Files that a folder may hold besides, with content that passes.
    for name in ("generation_config.json", "adapter_config.json", "quantize_config.json"):
        seeds.append(seeds[0].with_name(name))
    content: dict[Path, Any] = {path: json.loads(path.read_bytes()) if path.is_file() else {} for path in seeds}

    def use(path: Path) -> bool:
        with open_model(str(path.parent)) as model:
            special_ids(path.parent, {}, VOCAB)
            return _planned(model)

    def attempt(chance: Random) -> bool:
        path = chance.choice((*seeds[:2], *seeds))
        with _replaced(path, mutated_json(content[path], chance)):
            return use(path)

    assert all(map(use, seeds))
    return attempt


def adapter(folder: Path) -> Attempt:
    """The two files of a LoRA adapter: merged into its base, planned for, every tensor read."""
    base = tiny_model(folder / "base", layers=1)
    made = tiny_adapter(folder / "adapter", base, rank_pattern={"q_proj": 4}, alpha_pattern={"up_proj": 3})
    settings, weights = made / "adapter_config.json", made / "adapter_model.safetensors"
    content, data = json.loads(settings.read_bytes()), weights.read_bytes()

    def use() -> bool:
        with open_model(str(made)) as model:
            return _planned(model)

    def attempt(chance: Random) -> bool:
        if chance.random() < 0.6:
            with _replaced(settings, mutated_json(content, chance)):
                return use()
        with _replaced(weights, mutated_safetensors(data, chance)):
            return use()

    assert use()
    return attempt


def tokenizer(folder: Path) -> Attempt:
    """Files of a tokenizer: loaded, and written for each target; in a process of their own on a sample."""
    model_folder = tiny_model(folder / "model", layers=1)
    (model_folder / "chat_template.jinja").unlink()
    path = model_folder / "tokenizer_config.json"
    more = {"chat_template": TEMPLATE, "extra_special_tokens": ["<|im_end|>"], "add_bos_token": False}
    path.write_text(json.dumps(json.loads(path.read_text()) | more))
    (model_folder / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 1, "<x>": 310}))
    (model_folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    names = ("tokenizer.json", "tokenizer.json", path.name, "added_tokens.json", "special_tokens_map.json")
    content = {name: json.loads((model_folder / name).read_bytes()) for name in names}
    scratch = folder / "scratch"

    def use(all_of_it: bool) -> bool:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        if all_of_it:
            try_tokenizer(model_folder)
        with open_model(str(model_folder)) as model:
            made = load_tokenizer(model_folder, VOCAB)
            special_ids(model_folder, made.roles, VOCAB)
            read_vocabulary(made, model_folder, VOCAB)
            write_text_alone(model, scratch)
        return True

    def attempt(chance: Random) -> bool:
        name = chance.choice(names)
        with _replaced(model_folder / name, mutated_json(content[name], chance)):
            return use(chance.random() < 1 / WHOLE_EVERY)

    assert use(True)
    return attempt


def onnx(folder: Path) -> Attempt:
    """Graphs of bundles: cut into parts, and the layout of their data."""
    path = _bundles(folder)[1] / "model" / "model.onnx"
    before = path.read_bytes()
    data = path.with_name("model.onnx.data")

    def use() -> bool:
        layout_of(data)
        parts = cut(path.read_bytes(), path)
        for part in (parts.lookup, *parts.parts):
            assert part.model
        assert parts.weights
        return True

    def attempt(chance: Random) -> bool:
        with _replaced(path, _mutated_graph(before, chance)):
            return use()

    assert use()
    return attempt


def _mutated_graph(data: bytes, chance: Random) -> bytes:
    if chance.random() < 0.25:
        return mutated_bytes(data, chance)
    model = ModelProto.FromString(data)
    for _ in range(chance.choice((1, 1, 2, 3))):
        chance.choice((_change_node, _change_tensor, _change_tensor, _change_values))(model.graph, chance)
    return bytes(model.SerializeToString())


def _names(graph: GraphProto) -> list[str]:
    return [*(one.name for one in graph.initializer), *(name for one in graph.node for name in one.output), "", "x"]


def _change_node(graph: GraphProto, chance: Random) -> None:
    node, kind = chance.choice(graph.node), chance.randrange(7)
    if kind == 0:
        node.name = chance.choice(("", "/model/layers.7/x", "/model/layers.٣/x", "/lm_head/x", "/model/layers.0/x"))
    elif kind == 1:
        node.op_type = chance.choice(("Cast", "MatMulNBits", "Gather", "Constant", "", "If"))
    elif kind == 2:
        del node.input[:]
    elif kind == 3:
        graph.node.remove(node)
    elif kind == 4:
        graph.node.append(node)
    else:
        names = node.input if kind == 5 else node.output
        if names:
            names[chance.randrange(len(names))] = chance.choice(_names(graph))


def _change_tensor(graph: GraphProto, chance: Random) -> None:
    tensor, kind = chance.choice(graph.initializer), chance.randrange(6)
    if kind == 0:
        tensor.dims[:] = chance.choice(([], [0], [-1], [1 << 40, 4], [1 << 62] * 4, [2, 3], [1] * 300))
    elif kind == 1:
        tensor.data_type = chance.choice((0, 1, 2, 8, 10, 16, 22, 23, 99, 1 << 30))
    elif kind == 2:
        tensor.data_location = chance.choice((0, 1))
        del tensor.external_data[:]
    elif kind == 3:
        tensor.raw_data = chance.randbytes(chance.choice((0, 3, 4000)))
    elif kind == 4:
        graph.initializer.append(tensor)
    elif tensor.external_data:
        entry = chance.choice(tensor.external_data)
        entry.value = chance.choice(("", "-1", "x", "9" * 5000, "0", str(1 << 62), "../../x", "٣"))


def _change_values(graph: GraphProto, chance: Random) -> None:
    values = chance.choice((graph.input, graph.output, graph.value_info))
    values.append(helper.make_tensor_value_info(chance.choice(_names(graph)), chance.choice((0, 1, 7, 99)), [1, "x"]))
    if chance.random() < 0.5:
        del values[chance.randrange(len(values))]


# Documents of users


def recipes(folder: Path) -> Attempt:
    """Recipes: read, and planned with."""
    # Wide enough for what recipes take away and put beside.
    model_folder = tiny_model(folder / "model", hidden=256, intermediate=1024, layers=1)
    seeds = [(ROOT / "exporter" / "recipes" / f"{name}.toml").read_bytes() for name in recipe_names()]
    path = folder / "own.toml"

    def use(model: Model) -> bool:
        load_recipe(str(path))
        job = Job("model", DEVICE, "onnx", context=64, recipe=str(path))
        resolve(job, model).draft()
        return True

    def attempt(chance: Random) -> bool:
        path.write_bytes(mutated_toml(chance.choice(seeds), chance))
        with open_model(str(model_folder)) as model:
            return use(model)

    with open_model(str(model_folder)) as model:
        for seed in seeds:
            path.write_bytes(seed)
            assert use(model)
    return attempt


def plans(folder: Path) -> Attempt:
    """Plans: read, and the recipe and the decisions in them held against a model."""
    model_folder = tiny_model(folder / "model", hidden=256, intermediate=1024, layers=1)
    text = Windows.of(np.arange(128).reshape(2, 64), "file", 100)
    path = folder / "plan.json"

    def use(model: Model) -> bool:
        resolved = resolve(Job("model").repeating(read_plan(path)), model)
        assert resolved.job.repeats is not None
        resolved.job.repeats.require_text("calibration", text)
        resolved.job.repeats.decisions(resolved.draft(), resolved.target.alternatives)
        return True

    def planned(model: Model, **options: Any) -> bytes:
        resolved = resolve(Job("model", DEVICE, context=64, **options), model)
        decisions = resolved.draft().decisions
        return to_json(resolved.plan(decisions, ["a note"], text, text)).encode()

    def attempt(chance: Random) -> bool:
        path.write_bytes(mutated_json(json.loads(chance.choice(seeds)), chance))
        with open_model(str(model_folder)) as model:
            return use(model)

    with open_model(str(model_folder)) as model:
        seeds = [
            planned(model, target="onnx", bits=6.0),
            planned(model, target="onnx", recipe="caldera"),
            planned(model, target="onnx-qdq", transport="small"),
            planned(model, target="onnx", recipe="prune-rate"),
        ]
        for seed in seeds:
            path.write_bytes(seed)
            assert use(model)
    return attempt


def profiles(folder: Path) -> Attempt:
    """Profiles of devices: read, and held against a model's needs."""
    seeds = {name: (ROOT / "devices" / f"{name}.toml").read_bytes() for name in device_names()}

    def use(path: Path) -> bool:
        profile = load_device(str(path))
        check_fit(profile, 1 << 28, Quantity(value=1e9, unit="bytes", basis="estimated"), "estimated")
        return True

    def attempt(chance: Random) -> bool:
        name = chance.choice(list(seeds))
        path = folder / f"{name}.toml"
        path.write_bytes(mutated_toml(seeds[name], chance))
        return use(path)

    for name in seeds:
        assert use(ROOT / "devices" / f"{name}.toml")
    return attempt


SUBJECTS: dict[str, Callable[[Path], Attempt]] = {
    subject.__name__: subject
    for subject in (
        bundle,
        manifest,
        coded,
        gguf,
        safetensors,
        config,
        adapter,
        tokenizer,
        onnx,
        recipes,
        plans,
        profiles,
    )
}
