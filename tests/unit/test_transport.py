"""Bundles that ship coded: one manifest for both forms, every damage found, and what is unpacked proved."""

import json
from pathlib import Path

import numpy as np
import pytest

from exporter.bundle.installed import self_test
from exporter.bundle.manifest import content_digest, sha256_of
from exporter.bundle.opening import opened_bundle
from exporter.bundle.reading import read_manifest
from exporter.bundle.transport import code_beside, unpack_bundle
from exporter.bundle.verify import verify_bundle
from exporter.bundle.write import staging_folder, write_bundle
from exporter.coding.container import code_file
from exporter.foundation.errors import InputError, RequestError
from exporter.foundation.progress import silent
from tests.unit.test_bundle import failed, header, rewrite, stage

WEIGHTS = np.random.default_rng(0).normal(0, 3, 50_000).round().astype(np.int8).tobytes()


@pytest.fixture
def coded(tmp_path: Path) -> Path:
    """A bundle with one coded file."""
    output = tmp_path / "coded"
    with staging_folder(output) as staging:
        stage(staging)
        (staging / "model/adapter.gguf").unlink()
        weights = staging / "model/model.gguf"
        weights.write_bytes(WEIGHTS)
        size = code_beside([weights], "small", silent)
        assert size.original_bytes == len(WEIGHTS) > 1.5 * size.coded_bytes
        write_bundle(staging, output, header())
    return output


def test_a_coded_bundle_lists_both_forms_and_holds_one(coded: Path) -> None:
    entries = {entry.path: entry for entry in read_manifest(coded).files}
    entry = entries["model/model.gguf"]
    assert entry.size == len(WEIGHTS)
    assert entry.coded is not None and entry.coded.size == (coded / "model/model.gguf.coded").stat().st_size
    assert [one.path for one in entries.values() if one.coded] == ["model/model.gguf"]
    assert not (coded / "model/model.gguf").exists()


def test_both_forms_verify_under_one_manifest(coded: Path, tmp_path: Path) -> None:
    unpack_bundle(coded, tmp_path / "plain", silent)
    assert (tmp_path / "plain/model/model.gguf").read_bytes() == WEIGHTS
    assert (tmp_path / "plain/manifest.json").read_bytes() == (coded / "manifest.json").read_bytes()
    assert not list((tmp_path / "plain").rglob("*.coded"))
    for form in (coded, tmp_path / "plain"):
        assert not failed(form)
    details = {check.name: check.detail for check in verify_bundle(coded)}
    assert f"{len(WEIGHTS):,} bytes when restored" in details["file model/model.gguf"]


def test_any_flipped_or_missing_byte_is_found(coded: Path, tmp_path: Path) -> None:
    path = coded / "model/model.gguf.coded"
    whole = path.read_bytes()
    for place in (0, 30, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:place] + bytes((whole[place] ^ 1,)) + whole[place + 1 :])
        assert "file model/model.gguf.coded" in failed(coded)
        with pytest.raises(InputError, match=r"not the one that the manifest lists"):
            unpack_bundle(coded, tmp_path / "plain", silent)
    path.write_bytes(whole[:-1])
    assert "file model/model.gguf.coded" in failed(coded)
    assert [one.name for one in tmp_path.iterdir()] == ["coded"]


def forge(bundle: Path, restored: bytes, name: str = "model.gguf") -> None:
    """Put in place a sound coded file of other content, and list it."""
    (bundle / name).write_bytes(restored)
    path = bundle / "model/model.gguf.coded"
    code_file(bundle / name, path)
    (bundle / name).unlink()
    manifest = read_manifest(bundle)
    document = json.loads((bundle / "manifest.json").read_text("utf-8"))
    for entry in document["files"]:
        if entry["coded"]:
            entry["coded"]["size"], entry["coded"]["sha256"] = sha256_of(path)
    rewrite(bundle, {"files": document["files"]})
    rewrite(bundle, {"content_digest": content_digest(manifest, read_manifest(bundle).files)})


def test_what_restores_to_something_else_is_found(coded: Path, tmp_path: Path) -> None:
    forge(coded, WEIGHTS[::-1])
    assert "it restores to SHA-256" in failed(coded)["file model/model.gguf"].detail
    with pytest.raises(InputError, match=r"not what its manifest lists: file model/model.gguf"):
        unpack_bundle(coded, tmp_path / "plain", silent)
    forge(coded, WEIGHTS[:-1])
    assert "the coded file is that of another than the manifest lists" in failed(coded)["file model/model.gguf"].detail
    forge(coded, WEIGHTS, name="other")
    assert "got 'other', 50,000 bytes" in failed(coded)["file model/model.gguf"].detail
    assert not (tmp_path / "plain").exists()


def test_both_forms_at_once_are_found(coded: Path) -> None:
    (coded / "model/model.gguf").write_bytes(WEIGHTS)
    assert "model.gguf.coded" in failed(coded)["no unlisted file"].detail


def test_a_file_cannot_be_listed_where_a_coded_one_stands(coded: Path) -> None:
    document = json.loads((coded / "manifest.json").read_text("utf-8"))
    listed = document["files"]
    rewrite(coded, {"files": [*listed, listed[0] | {"path": "model/model.gguf.coded", "role": "model"}]})
    with pytest.raises(InputError, match="is listed beside"):
        read_manifest(coded)


def test_a_coded_bundle_is_not_used_but_says_how(coded: Path) -> None:
    sentence = "the bundle's model is coded; restore it with edge-exporter unpack"
    with pytest.raises(RequestError, match=sentence), opened_bundle(coded):
        pass
    check = self_test(coded, 1)
    assert (check.status, "edge-exporter unpack" in check.detail) == ("not run", True)


def test_what_cannot_be_unpacked(coded: Path, tmp_path: Path) -> None:
    unpack_bundle(coded, tmp_path / "plain", silent)
    with pytest.raises(RequestError, match="nothing of the bundle is coded; use it as it is"):
        unpack_bundle(tmp_path / "plain", tmp_path / "again", silent)
    with pytest.raises(RequestError, match="already exists"):
        unpack_bundle(coded, tmp_path / "plain", silent)
    (coded / "link").symlink_to(tmp_path)
    with pytest.raises(InputError, match="link: neither a file nor a folder"):
        unpack_bundle(coded, tmp_path / "again", silent)
    (coded / "link").unlink()
    (coded / "selftest.json").unlink()
    with pytest.raises(InputError, match=r"selftest.json: a file of the bundle is missing or truncated"):
        unpack_bundle(coded, tmp_path / "again", silent)
    assert not (tmp_path / "again").exists()
