"""Bundles made to do harm, sealed so that every hash is right: nothing of them runs, and one sentence is said."""

import hashlib
import json
import os
import shutil
import subprocess
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import ModelProto, TensorProto, helper

from exporter.bench.bundle_under_test import subject_of
from exporter.bench.engine import Settings
from exporter.bench.measurement import measure_here
from exporter.bundle import digests
from exporter.bundle.installed import answer, self_test
from exporter.bundle.manifest import VOLATILE, ManifestHeader, role_of
from exporter.bundle.opening import opened_bundle
from exporter.bundle.reading import MOST_BYTES, read_manifest
from exporter.bundle.transport import unpack_bundle
from exporter.bundle.verify import verify_bundle
from exporter.cli.main import app
from exporter.coding.container import Original, _header, code_file, restore_file
from exporter.foundation.cache import cache_folder
from exporter.foundation.errors import ExporterError, InputError
from exporter.foundation.progress import silent
from exporter.foundation.quantities import Check
from exporter.model.family import families
from exporter.report.data import canonical_json
from exporter.targets.onnx.intake import MOST_GRAPH_BYTES
from exporter.targets.onnx.settings import _of_a_family
from tests.commands import cli
from tests.plans import with_plan

pytestmark = pytest.mark.slow

BUNDLES = Path(__file__).parents[1] / "data" / "bundles-0.1.0"
SETTINGS, TOKENIZER, GRAPH = "model/genai_config.json", "model/tokenizer_config.json", "model/model.onnx"
QUICK = Settings(prompt=2, generate=2, depth=0, context=64, repeats=1, sustain_s=0, threads=1)
Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return unpacked("onnx", tmp_path)


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    return unpacked("gguf", tmp_path)


def unpacked(target: str, folder: Path) -> Path:
    with tarfile.open(BUNDLES / f"{target}.tar.xz") as packed:
        packed.extractall(folder / target, filter="data")
    return folder / target


def edit(path: Path, change: Change) -> None:
    document = json.loads(path.read_text("utf-8"))
    change(document)
    path.write_text(json.dumps(document), encoding="utf-8")


def seal(bundle: Path, change: Change = lambda manifest: None) -> None:
    """Make the manifest anew, so that it lists the bundle as it now is; then change it, and make its digests anew."""
    document = json.loads((bundle / "manifest.json").read_text("utf-8"))
    coded = {entry["path"]: entry["coded"] for entry in document["files"]}
    document["files"] = [
        {
            "path": path, "role": role_of(path), "coded": coded.get(path), "size": (bundle / path).stat().st_size,
            "sha256": hashlib.sha256((bundle / path).read_bytes()).hexdigest(),
        }
        for path in sorted(found.relative_to(bundle).as_posix() for found in bundle.rglob("*") if found.is_file())
        if path != "manifest.json"
    ]  # fmt: skip
    change(document)
    content = {
        "header": {name: document[name] for name in ManifestHeader.model_fields},
        "files": [entry for entry in document["files"] if entry["path"] not in VOLATILE],
        "schema_version": document["schema_version"],
    }
    document["content_digest"] = hashlib.sha256(canonical_json(content).encode()).hexdigest()
    if document["schema_version"] > 1:
        evidence = [
            {name: entry[name] for name in ("path", "size", "sha256")}
            for entry in document["files"]
            if entry["path"] in VOLATILE
        ]
        document["evidence_digest"] = hashlib.sha256(canonical_json(evidence).encode()).hexdigest()
    (bundle / "manifest.json").write_text(canonical_json(document), encoding="utf-8")


def failed(bundle: Path) -> dict[str, Check]:
    return {check.name: check for check in verify_bundle(bundle) if check.status == "failed"}


def refusal(bundle: Path) -> str:
    """Return why a sealed bundle is not used; `verify` finds the same."""
    with pytest.raises(InputError) as info, opened_bundle(bundle):
        pass
    assert failed(bundle)["model"].detail == str(info.value)
    return str(info.value)


def test_an_honest_bundle_can_be_sealed(bundle: Path, gguf: Path) -> None:
    for one in (bundle, gguf):
        before = (one / "manifest.json").read_bytes()
        seal(one)
        assert (one / "manifest.json").read_bytes() == before
        assert not failed(one)


# Settings of onnxruntime-genai


def assert_nothing_runs(bundle: Path, named: str) -> None:
    assert named in failed(bundle)["model"].detail
    for use in (lambda: answer(bundle, "a", 2, False, 1), lambda: measure_here(bundle, QUICK, None)):
        with pytest.raises(InputError, match=named):
            use()
    done = cli(bundle.parent, "run", str(bundle), "-p", "a")
    assert (done.returncode, done.stderr.count("\n")) == (3, 1)


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_no_library_of_a_bundle_is_loaded(bundle: Path, tmp_path: Path) -> None:
    mark, library = tmp_path / "mark", bundle / "model/extra.so"
    source = f'#include <stdio.h>\n__attribute__((constructor)) void load(void) {{ fopen("{mark}", "w"); }}\n'
    subprocess.run(["cc", "-shared", "-fPIC", "-x", "c", "-o", str(library), "-"], input=source, text=True, check=True)
    edit(bundle / SETTINGS, lambda s: s["model"]["decoder"]["session_options"].update(custom_ops_library="extra.so"))
    seal(bundle)
    assert_nothing_runs(bundle, "custom_ops_library")
    assert not mark.exists()


def test_no_file_of_the_user_is_written_over(bundle: Path, tmp_path: Path) -> None:
    mine, option = tmp_path / "mine.txt", "session.collect_node_memory_stats_to_file"
    mine.write_text("mine")
    edit(bundle / SETTINGS, lambda s: s["model"]["decoder"]["session_options"].update({option: str(mine)}))
    seal(bundle)
    assert_nothing_runs(bundle, option)
    assert mine.read_text() == "mine"


@pytest.mark.parametrize(
    ("place", "key", "value"),
    [
        ("", "ep", {}),
        ("", "engine", {"dynamic_batching": {}}),
        ("model", "vision", {"filename": "x.onnx"}),
        ("model", "type", "whisper"),
        ("model", "context_length", 1 << 40),
        ("model", "vocab_size", "320"),
        ("model", "eos_token_id", 320),
        ("model", "eos_token_id", [0] * 1000),
        ("model", "pad_token_id", -1),
        ("model.decoder", "pipeline", []),
        ("model.decoder", "filename", "../model.onnx"),
        ("model.decoder", "head_size", 1 << 30),
        ("model.decoder", "num_key_value_heads", 2),
        ("model.decoder", "num_hidden_layers", 2),
        ("model.decoder", "layer_types", ["conv"]),
        ("model.decoder", "conv_cache_size", 2),
        ("model.decoder", "run_options", {"enable_profiling": "x"}),
        ("model.decoder.session_options", "enable_profiling", "x"),
        ("model.decoder.session_options", "provider_options", [{"cuda": {}}]),
        ("model.decoder.session_options", "mlas.disable_kleidiai", "x"),
        ("model.decoder.session_options", "log_id", "x"),
        ("model.decoder.inputs", "past_key_names", "x"),
        ("model.decoder.inputs", "past_conv_names", "past.%d.conv"),
        ("search", "num_beams", 1000),
        ("search", "temperature", 1e300),
    ],
)
def test_settings_that_are_not_ours_are_refused(bundle: Path, place: str, key: str, value: object) -> None:
    def change(document: dict[str, Any]) -> None:
        for part in place.split(".") if place else ():
            document = document[part]
        document[key] = value

    edit(bundle / SETTINGS, change)
    seal(bundle)
    assert "genai_config.json" in (sentence := refusal(bundle)) or "other keys and values" in sentence


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '{"model": NaN}', "[" * 100_000, " " * (1 << 21)])
def test_what_is_no_settings_file_is_refused(bundle: Path, text: str) -> None:
    (bundle / SETTINGS).write_text(text)
    seal(bundle)
    assert "genai_config.json" in refusal(bundle)


@pytest.mark.parametrize(
    ("key", "value"),
    [("auto_map", {"AutoTokenizer": ["x.py"]}), ("tiktoken_file", "x"), ("tokenizer_class", "X"), ("a_token", 1)],
)
def test_settings_of_the_tokenizer_that_are_not_ours_are_refused(bundle: Path, key: str, value: object) -> None:
    edit(bundle / TOKENIZER, lambda settings: settings.update({key: value}))
    seal(bundle)
    assert f"tokenizer_config.json: not a TokenizerConfig document: {key}" in refusal(bundle)


def test_settings_are_written_anew_to_a_private_folder(bundle: Path) -> None:
    with opened_bundle(bundle) as artifact:
        folder = artifact.folder
        for name in (SETTINGS, TOKENIZER):
            place = folder / Path(name).name
            assert not place.is_symlink()
            assert json.loads(place.read_text("utf-8")) == json.loads((bundle / name).read_text("utf-8"))
        assert [path.resolve() for path in artifact.weights] == [bundle / GRAPH, bundle / f"{GRAPH}.data"]
        assert (folder.parent.stat().st_mode & 0o777, folder.parent.stat().st_uid) == (0o700, os.getuid())
    assert not folder.exists()


def test_a_device_is_sent_the_settings_as_they_were_written_anew(bundle: Path) -> None:
    with subject_of(bundle) as subject:
        uploads = {upload.name: upload for upload in subject.uploads()}
        assert sorted(uploads) == [SETTINGS, GRAPH, f"{GRAPH}.data"]
        assert uploads[SETTINGS].source == subject.loaded.folder / "genai_config.json"
        assert uploads[SETTINGS].sha256 == hashlib.sha256(uploads[SETTINGS].source.read_bytes()).hexdigest()


def test_settings_know_every_family() -> None:
    for family in families().values():
        assert _of_a_family(family.model_type) == family.model_type
    for name in ("", "gpt2", "llama ", "LLAMA", "../llama", "gemma3-text"):
        with pytest.raises(ValueError, match="a family of decoders is expected: gemma3_text, "):
            _of_a_family(name)


# The graph


def loop(model: ModelProto) -> None:
    body = helper.make_graph([], "body", [], [])
    model.graph.node.append(helper.make_node("If", ["x"], ["y"], then_branch=body, else_branch=body))


def nested(model: ModelProto) -> None:
    model.graph.node[0].attribute.append(helper.make_attribute("body", helper.make_graph([], "body", [], [])))


def place(model: ModelProto, **changes: str) -> None:
    tensor = next(one for one in model.graph.initializer if one.data_location == TensorProto.EXTERNAL)
    for entry in tensor.external_data:
        entry.value = changes.get(entry.key, entry.value)


def constant_elsewhere(model: ModelProto) -> None:
    tensor = TensorProto(name="c", data_type=1, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="/etc/passwd")
    model.graph.node.append(helper.make_node("Constant", [], ["c"], value=tensor))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda m: m.graph.node.append(helper.make_node("Evil", [], [], domain="evil")),
            "not known here; got evil:Evil",
        ),
        (lambda m: m.graph.node.append(helper.make_node("EPContext", [], [], domain="com.microsoft")), "EPContext"),
        (loop, "operator that is not known here; got :If"),
        (nested, "another form of AttributeProto; got g"),
        (constant_elsewhere, "takes its values from elsewhere; got Constant"),
        (lambda m: m.opset_import.append(helper.make_opsetid("evil", 1)), "operators of another domain"),
        (lambda m: m.functions.add(name="f"), "another form of ModelProto; got functions"),
        (
            lambda m: m.metadata_props.add(key="ort_config", value="{}"),
            "another form of ModelProto; got metadata_props",
        ),
        (lambda m: place(m, location="/etc/passwd"), "lies outside its data file; got /etc/passwd"),
        (lambda m: place(m, location="../bundle/model.onnx.data"), "lies outside its data file"),
        (lambda m: place(m, offset=str(1 << 40)), "lies beyond its data"),
        (lambda m: place(m, length="-1"), "lies beyond its data"),
        (lambda m: m.graph.node.extend([onnx.NodeProto()] * 60_000), "too many parts"),
    ],
)
def test_graphs_that_are_not_ours_are_refused(
    bundle: Path, change: Callable[[ModelProto], object], sentence: str
) -> None:
    model = ModelProto.FromString((bundle / GRAPH).read_bytes())
    change(model)
    (bundle / GRAPH).write_bytes(model.SerializeToString())
    seal(bundle)
    assert sentence in refusal(bundle)


@pytest.mark.parametrize(
    "data", [b"", b"\xff" * 99, b"\x0a\x00" * (MOST_GRAPH_BYTES // 2), bytes(MOST_GRAPH_BYTES + 1)]
)
def test_what_is_no_graph_is_refused(bundle: Path, data: bytes) -> None:
    (bundle / GRAPH).write_bytes(data)
    seal(bundle)
    assert "model.onnx" in refusal(bundle)


# GGUF


def test_a_modelfile_that_is_not_ours_is_refused(gguf: Path) -> None:
    (gguf / "model/Modelfile").write_text("FROM /etc/passwd\n")
    seal(gguf)
    assert "the Modelfile is not one that edge-exporter writes" in refusal(gguf)


def test_files_of_other_names_are_not_opened(gguf: Path) -> None:
    for name in ("model/more.gguf", "adapter.gguf", "model/deeper/adapter.gguf"):
        (gguf / name).parent.mkdir(exist_ok=True)
        (gguf / name).write_bytes(b"GGUF")
    seal(gguf)
    with opened_bundle(gguf) as artifact:
        assert artifact.weights == (gguf / "model/model.gguf",)


# The manifest


@pytest.mark.parametrize(
    "name", ["CON", "nul.txt", "Com1", "lpt9.gguf", "aux .x", "COM\u00b9", "a<b", "a|b", "a*", "a?", 'a"b']
)
def test_names_that_windows_cannot_hold_are_refused(bundle: Path, name: str) -> None:
    listed = {"path": f"licences/{name}", "role": "licence", "coded": None, "size": 0, "sha256": "0" * 64}
    seal(bundle, lambda manifest: manifest["files"].append(listed))
    with pytest.raises(InputError, match=r"files\.10\.path: Value error, a path must"):
        read_manifest(bundle)


@pytest.mark.parametrize(
    "path", ["licences/-rf", "-o", "a" * 256, "\u00e9" * 128, "/".join("a" * 17), "/".join(["a" * 250] * 5)]
)
def test_paths_that_are_no_sane_names_are_refused(bundle: Path, path: str) -> None:
    listed = {"path": path, "role": role_of(path), "coded": None, "size": 0, "sha256": "0" * 64}
    seal(bundle, lambda manifest: manifest["files"].append(listed))
    with pytest.raises(InputError, match=r"files\.10\.path: Value error, a path must have"):
        read_manifest(bundle)


def test_a_role_that_is_not_its_path_s_is_refused(bundle: Path) -> None:
    seal(bundle, lambda manifest: manifest["files"][0].update(role="model"))
    with pytest.raises(InputError, match="its place makes it a file of the role measurements, not model"):
        read_manifest(bundle)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("target", "x; touch /tmp/pwned"),
        ("target", "Onnx"),
        ("target", "../gguf"),
        ("target", "a" * 40),
        ("device", "../../mine.toml"),
        ("device", "\x1b[31m"),
        ("name", "two\nlines"),
        ("name", "a" * 300),
        ("name", ""),
        ("runtime", {"onnx runtime": "1"}),
        ("runtime", {str(n): "1" for n in range(99)}),
        ("runtime", {"onnx": "$(id)"}),
    ],
)
def test_values_that_are_no_names_are_refused(bundle: Path, key: str, value: object) -> None:
    seal(bundle, lambda manifest: manifest.update({key: value}))
    with pytest.raises(InputError, match=f"not a Manifest document: {key}"):
        read_manifest(bundle)


def test_a_target_that_is_not_known_is_the_bundle_s_fault(bundle: Path) -> None:
    edit(bundle / "report.json", lambda report: report.update(target="gguf-next"))
    seal(bundle, lambda manifest: manifest.update(target="gguf-next"))
    assert "for a target that is not known here; got 'gguf-next', expected gguf or onnx or onnx-qdq" in refusal(bundle)


@pytest.mark.parametrize("count", [360_000, 6_000])
def test_a_manifest_of_very_many_files_is_refused_at_once(bundle: Path, count: int) -> None:
    listed = {"path": "", "role": "other", "coded": None, "size": 0, "sha256": "0" * 64}
    document = json.loads((bundle / "manifest.json").read_text("utf-8"))
    document["files"] = [listed | {"path": f"f{n}"} for n in range(count)]
    (bundle / "manifest.json").write_text(json.dumps(document, separators=(",", ":")))
    started = time.monotonic()
    with pytest.raises(InputError, match=r"too large|at most 1000 items"):
        read_manifest(bundle)
    assert time.monotonic() - started < 1


@pytest.mark.parametrize("name", MOST_BYTES)
def test_documents_are_bounded(bundle: Path, name: str) -> None:
    with_plan(bundle)
    seal(bundle, lambda manifest: manifest.update(schema_version=2))
    largest = {
        "manifest.json": 3_000, "plan.json": 9_000, "report.json": 7_000, "measurements.json": 3_000,
        "selftest.json": 400,
    }  # fmt: skip
    assert MOST_BYTES[name] > 100 * largest[name]
    os.truncate(bundle / name, MOST_BYTES[name] + 1)
    if name == "manifest.json":
        with pytest.raises(InputError, match="the document is too large"):
            read_manifest(bundle)
    else:
        seal(bundle)
        assert "the document is too large" in failed(bundle)[name].detail


# Coded files


def bomb(path: Path, size: int) -> None:
    """Write a coded file whose header claims a size."""
    path.write_bytes(_header(Original("model.gguf", size, bytes(32))) + bytes(100))


def coded(gguf: Path) -> Path:
    model = gguf / "model/model.gguf"
    coded = model.with_name("model.gguf.coded")
    code_file(model, coded)
    form = {"size": coded.stat().st_size, "sha256": hashlib.sha256(coded.read_bytes()).hexdigest()}
    whole = (model.stat().st_size, hashlib.sha256(model.read_bytes()).hexdigest())
    model.unlink()
    coded.rename(model)
    seal(gguf, lambda manifest: list_coded(manifest, form, *whole))
    model.rename(coded)
    return coded


def list_coded(manifest: dict[str, Any], form: dict[str, Any], size: int, sha256: str) -> None:
    entry = next(one for one in manifest["files"] if one["path"] == "model/model.gguf")
    entry.update(coded=form, size=size, sha256=sha256)


def test_nothing_is_written_for_a_coded_file_that_is_not_as_listed(gguf: Path, tmp_path: Path) -> None:
    path = coded(gguf)
    assert not failed(gguf)
    size = path.stat().st_size
    bomb(path, 3_400_000_000)
    os.truncate(path, size)
    for sentence in ("not the one that the manifest lists", "more than any model does"):
        with pytest.raises(InputError, match=sentence):
            unpack_bundle(gguf, tmp_path / "out", silent)
        document = json.loads((gguf / "manifest.json").read_text("utf-8"))
        entry = next(one for one in document["files"] if one["coded"])
        entry["coded"]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        (gguf / "manifest.json").write_text(canonical_json(document))
    assert "more than any model does" in failed(gguf)["file model/model.gguf"].detail
    bomb(path, 60_000_000)
    os.truncate(path, size)
    entry["coded"]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (gguf / "manifest.json").write_text(canonical_json(document))
    with pytest.raises(InputError, match=r"another than the manifest lists; got 'model.gguf', 60,000,000 bytes"):
        unpack_bundle(gguf, tmp_path / "out", silent)
    assert [one.name for one in tmp_path.iterdir()] == ["gguf"]


def test_a_coded_file_alone_does_not_fill_the_disk(tmp_path: Path) -> None:
    bomb(tmp_path / "a.coded", 3_400_000_000)
    with pytest.raises(
        InputError, match=r"more than any model does; got 3,400,000,000 bytes, expected at most 67,108,864"
    ):
        restore_file(tmp_path / "a.coded", tmp_path / "a")
    assert [one.name for one in tmp_path.iterdir()] == ["a.coded"]


# What is loaded is what is listed


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The file that remembers what was compared, in a cache of its own, for files that were made just now."""
    monkeypatch.setenv("EDGE_EXPORTER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "SETTLED_NS", -1)
    return cache_folder() / digests.MEMORY


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_changed_model_is_not_run(gguf: Path, memory: Path) -> None:
    weights = gguf / "model/model.gguf"
    flip(weights)
    for use in (lambda: answer(gguf, "a", 2, False, 1), lambda: measure_here(gguf, QUICK, None)):
        with pytest.raises(
            InputError, match=r"model.gguf: the file is not the one that the manifest lists; got SHA-256"
        ):
            use()
    assert ended("run", str(gguf), "-p", "a") == 3
    assert ended("run", str(gguf), "-p", "a", "--no-check") == 0


def test_what_was_compared_is_not_read_again(gguf: Path, memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, hashed = [], digests.sha256_read
    monkeypatch.setattr(digests, "sha256_read", lambda file: read.append(file.name) or hashed(file))
    counts = []
    for change in (
        lambda: None,
        lambda: None,
        lambda: os.utime(gguf / "model/model.gguf"),
        lambda: memory.write_text("{"),
    ):
        change()
        read.clear()
        with opened_bundle(gguf):
            counts.append(len(read))
    assert counts == [2, 0, 1, 2]
    assert memory.stat().st_mode & 0o777 == memory.stat().st_mode & 0o777 & ~0o022
    seal(gguf, lambda manifest: manifest["files"][2].update(sha256="0" * 64))
    with pytest.raises(InputError, match="expected 0000"), opened_bundle(gguf):
        pass


@pytest.mark.parametrize("text", ["", "[", "{}", '["a", 1]', "[" * 100_000, "null", "\xff"])
def test_a_damaged_memory_is_forgotten(gguf: Path, memory: Path, text: str) -> None:
    memory.write_text(text, encoding="latin-1")
    with opened_bundle(gguf):
        assert len(json.loads(memory.read_text())) == 2


def test_the_memory_stays_small(gguf: Path, memory: Path) -> None:
    memory.write_text(json.dumps([f"{n}" * 20 for n in range(5000)]))
    with opened_bundle(gguf):
        assert len(json.loads(memory.read_text())) == digests.MOST_REMEMBERED


# Evidence


def with_device_checks(bundle: Path) -> None:
    """Make a bundle one of schema version 2, one of whose checks of the device failed."""
    measured = json.loads((bundle / "measurements.json").read_text("utf-8"))
    measured["checks"][0]["status"] = "failed"
    (bundle / "measurements.json").write_text(canonical_json(measured), encoding="utf-8")
    rows = [{name: check[name] for name in ("name", "status", "limit", "unit")} for check in measured["checks"]]
    values = [None, None, measured["checks"][2]["value"]]
    told = [row | {"value": value} for row, value in zip(rows, values, strict=True)]
    with_plan(bundle)
    edit(bundle / "report.json", lambda report: report.update(device_checks=told))
    seal(bundle, lambda manifest: manifest.update(schema_version=2))


@pytest.mark.parametrize(
    ("number", "change"),
    [
        (0, {"status": "passed"}),
        (1, {"status": "not run"}),
        (0, {"limit": 1e12}),
        (2, {"value": 1.0}),
        (1, {"name": "device.app_memory"}),
        (1, {"unit": "GB"}),
    ],
)
def test_a_check_of_the_device_is_under_the_content_digest(bundle: Path, number: int, change: dict[str, Any]) -> None:
    with_device_checks(bundle)
    assert not failed(bundle)
    digest = read_manifest(bundle).content_digest
    edit(bundle / "measurements.json", lambda document: document["checks"][number].update(change))
    seal(bundle)
    assert read_manifest(bundle).content_digest == digest
    assert failed(bundle)["measurements.json"].detail.startswith("it does not agree with report.json: device.")


def test_the_evidence_has_a_digest_of_its_own(bundle: Path) -> None:
    with_device_checks(bundle)
    before = read_manifest(bundle)
    (bundle / "report.html").write_text("another page")
    seal(bundle)
    after = read_manifest(bundle)
    assert after.content_digest == before.content_digest
    assert after.evidence_digest != before.evidence_digest
    document = json.loads((bundle / "manifest.json").read_text("utf-8")) | {"evidence_digest": before.evidence_digest}
    (bundle / "manifest.json").write_text(canonical_json(document), encoding="utf-8")
    assert set(failed(bundle)) == {"evidence digest"}


def test_a_manifest_has_an_evidence_digest_by_its_version(bundle: Path) -> None:
    notes = {check.name: check.detail for check in verify_bundle(bundle)}
    assert "measurements.json and report.html are under no digest in schema version 1" in notes["content digest"]
    document = json.loads((bundle / "manifest.json").read_text("utf-8"))
    for change in ({"evidence_digest": "0" * 64}, {"schema_version": 2}, {"evidence_digest": None}):
        (bundle / "manifest.json").write_text(canonical_json(document | change), encoding="utf-8")
        with pytest.raises(InputError, match=r"evidence digest from schema version 2 on|changed after it was written"):
            read_manifest(bundle)


# Self-tests


@pytest.mark.parametrize(
    "change",
    [
        {"tolerance": 1e9},
        {"tolerance": 0.0},
        {"prompt": [1] * 100_000},
        {"prompt": []},
        {"prompt": [-1]},
        {"prompt": [1 << 40]},
        {"positions": [30, 31, 32, 33]},
        {"positions": [-1, 8, 17, 19]},
        {"positions": [8, 8, 17, 19]},
        {"expected": [1]},
        {"logits": [1e300] * 4},
        {"logits": ["NaN"] * 4},
    ],
)
def test_self_tests_that_are_not_ours_are_refused(bundle: Path, change: dict[str, Any]) -> None:
    edit(bundle / "selftest.json", lambda test: test.update(change))
    seal(bundle)
    assert set(failed(bundle)) == {"selftest.json"}
    with pytest.raises(InputError, match=r"selftest.json: (not a SelfTest document|the document is too large)"):
        self_test(bundle, 1)
    with pytest.raises(InputError, match=r"selftest\.json"), subject_of(bundle):
        pass


@pytest.mark.parametrize("target", ["gguf", "onnx"])
def test_tokens_that_the_model_has_not_are_refused(target: str, tmp_path: Path) -> None:
    bundle = unpacked(target, tmp_path)
    edit(bundle / "selftest.json", lambda test: test["prompt"].__setitem__(0, 320))
    seal(bundle)
    with pytest.raises(InputError, match="the model has no such token; got 320, expected 0 to 319"):
        self_test(bundle, 1)
    with pytest.raises(InputError, match="the self-test has a token that the model has not"), subject_of(bundle):
        pass


# Whatever is wrong, one sentence is said, and the exit code is that of a bad bundle


def ended(*arguments: str) -> int:
    """Run a command in this process and return its exit code; anything but an error of ours is raised."""
    try:
        app(list(arguments), standalone_mode=False)
    except ExporterError as error:
        assert str(error).count("\n") == 0
        return error.exit_code
    return 0


def damages(path: Path) -> dict[str, Callable[[], object]]:
    return {
        "missing": lambda: None,
        "empty": path.touch,
        "garbage": lambda: path.write_bytes(bytes(range(256))),
        "text": lambda: path.write_text("[" * 50_000),
        "folder": path.mkdir,
        "pipe": lambda: os.mkfifo(path),
        "link": lambda: path.symlink_to("/etc/passwd"),
        "loop": lambda: path.symlink_to(path),
        "huge": lambda: (path.touch(), os.truncate(path, 1 << 34)),
    }


@pytest.mark.parametrize("damage", damages(Path()))
@pytest.mark.parametrize("sealed", [False, True])
def test_every_damage_is_the_bundle_s_fault(bundle: Path, tmp_path: Path, damage: str, sealed: bool) -> None:
    if sealed and damage in ("huge", "missing", "folder", "pipe", "link", "loop"):
        pytest.skip("cannot be listed")
    spare = shutil.copytree(bundle, tmp_path / "spare")
    for name in [path.relative_to(spare).as_posix() for path in spare.rglob("*") if path.is_file()]:
        shutil.rmtree(bundle)
        shutil.copytree(spare, bundle)
        (bundle / name).unlink()
        damages(bundle / name)[damage]()
        if sealed and name != "manifest.json":
            seal(bundle)
        unread = sealed and name in ("report.html", "model/tokenizer.json", "model/chat_template.jinja")
        assert ended("verify", str(bundle)) in ((0,) if unread else (1, 3)), name
        assert ended("inspect", str(bundle), "--json") == (3 if name in DOCUMENTS else 0), name
        if name in (SETTINGS, GRAPH) or (name == f"{GRAPH}.data" and not sealed):
            assert ended("run", str(bundle), "-p", "a") == 3, name


def test_every_command_ends_alike(bundle: Path, tmp_path: Path) -> None:
    (bundle / "report.json").unlink()
    for arguments in (("inspect",), ("compare", str(bundle)), ("bench",)):
        assert ended(*arguments, str(bundle)) == 3
    (bundle / "manifest.json").unlink()
    for arguments in (("verify",), ("run", "-p", "a"), ("unpack", "-o", str(tmp_path / "out"))):
        assert ended(*arguments, str(bundle)) == 3


def values(document: object, keys: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
    """Return the places of all values of a document."""
    found = [keys] if keys else []
    if isinstance(document, dict):
        return found + [place for key in document for place in values(document[key], (*keys, key))]
    if isinstance(document, list):
        return found + [place for key in range(min(2, len(document))) for place in values(document[key], (*keys, key))]
    return found


DOCUMENTS = ("manifest.json", "report.json", "measurements.json")
WRONG = [None, True, -1, 1.5, 10**30, 10**400, 1e308, "", "\x1b[31m" * 9, [], {}, [[[[]]]], {"a": {}}]


@pytest.mark.parametrize("name", ["manifest.json", "plan.json", "report.json", "measurements.json", "selftest.json"])
def test_every_wrong_value_is_the_bundle_s_fault(bundle: Path, name: str) -> None:
    with_device_checks(bundle)
    original = json.loads((bundle / name).read_text("utf-8"))
    for number, place in enumerate(values(original)):
        document: Any = json.loads(json.dumps(original))
        holder = document
        for key in place[:-1]:
            holder = holder[key]
        holder[place[-1]] = WRONG[number % len(WRONG)]
        (bundle / name).write_text(canonical_json(document), encoding="utf-8")
        assert ended("inspect", str(bundle)) in (0, 3), (name, place)
        if number % 5:
            continue
        try:
            statuses = {check.status for check in verify_bundle(bundle)}
        except InputError:
            continue
        assert "failed" in statuses or document == original, (name, place)
