"""Bundles: staged, listed, renamed in one step, read back as hostile, checked byte for byte."""

import errno
import json
import os
import shutil
import tarfile
from pathlib import Path

import pytest

from exporter.bundle.manifest import FileEntry, Manifest, ManifestHeader, Provenance, files_below, role_of
from exporter.bundle.reading import MOST_BYTES, _bytes, read_manifest
from exporter.bundle.verify import _check_file, verify_bundle
from exporter.bundle.write import staging_folder, write_bundle, write_tar
from exporter.foundation.errors import ExporterError, InputError, RequestError
from exporter.foundation.quantities import Check, from_json
from exporter.report.data import Report, to_json

DATA = Path(__file__).parents[1] / "data"
DOCUMENTS = ("plan.json", "report.json", "measurements.json")
SELF_TEST = b'{"expected": [], "logits": [], "positions": [], "prompt": [1], "tolerance": 2.0}'
FILES = {
    "model/model.gguf": b"graph",
    "model/adapter.gguf": bytes(range(256)) * 8,
    "model/tokenizer.json": b"{}",
    "model/genai_config.json": b"{}",
    "licences/MODEL": b"Apache-2.0",
    "report.html": b"<!doctype html>",
    "selftest.json": SELF_TEST,
}


def header() -> ManifestHeader:
    report = from_json(Report, (DATA / "report.json").read_bytes(), "report.json")
    provenance = Provenance(
        exporter="0.1.0", versions={"gguf": "0.17.1"}, model_digest="ab", instruction_set="avx2", threads=2
    )
    return ManifestHeader(
        name="demo",
        target=report.target,
        device=report.device,
        runtime={"llama.cpp": "b6000"},
        recipe=report.recipe,
        provenance=provenance,
    )


def stage(folder: Path) -> None:
    for path, data in FILES.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(data)
    for name in DOCUMENTS:
        shutil.copyfile(DATA / name, folder / name)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    output = tmp_path / "demo"
    with staging_folder(output) as folder:
        stage(folder)
        write_bundle(folder, output, header())
    return output


def failed(bundle: Path) -> dict[str, Check]:
    return {check.name: check for check in verify_bundle(bundle) if check.status == "failed"}


def rewrite(bundle: Path, change: dict[str, object]) -> None:
    """Write a manifest with other values, spelled as this tool spells it."""
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8")) | change
    text = json.dumps(manifest, sort_keys=True, indent=1, ensure_ascii=False) + "\n"
    (bundle / "manifest.json").write_text(text, encoding="utf-8")


def test_a_written_bundle_verifies(bundle: Path) -> None:
    checks = verify_bundle(bundle)
    assert {check.status for check in checks} == {"passed"}
    assert [check.name for check in checks][:2] == ["file licences/MODEL", "file measurements.json"]
    assert len(checks) == len(FILES) + 3 + 9


def test_the_manifest_lists_every_other_file(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    paths = [entry.path for entry in manifest.files]
    assert paths == sorted([*FILES, *DOCUMENTS])
    assert {entry.path: entry.role for entry in manifest.files}["model/tokenizer.json"] == "tokenizer"
    assert to_json(manifest) == (bundle / "manifest.json").read_text(encoding="utf-8")


def test_nothing_but_the_bundle_is_left(bundle: Path) -> None:
    assert [path.name for path in bundle.parent.iterdir()] == ["demo"]
    umask = os.umask(0)
    os.umask(umask)
    assert bundle.stat().st_mode & 0o777 == 0o777 & ~umask


@pytest.mark.parametrize(
    ("path", "role"),
    [
        ("model/model.gguf", "model"),
        ("model/Modelfile", "config"),
        ("model/tokenizer_config.json", "tokenizer"),
        ("licences/a/LICENSE", "licence"),
        ("plan.json", "plan"),
        ("report.json", "report"),
        ("report.html", "report"),
        ("measurements.json", "measurements"),
        ("selftest.json", "selftest"),
        ("sbom.cdx.json", "other"),
    ],
)
def test_roles_follow_from_places(path: str, role: str) -> None:
    assert role_of(path) == role


def test_progress_ends_at_the_total(bundle: Path) -> None:
    seen: list[tuple[int, int]] = []
    verify_bundle(bundle, lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] == sum(entry.size for entry in read_manifest(bundle).files)
    assert seen == sorted(seen)


# The content digest


def test_the_digest_ignores_what_differs_from_run_to_run(bundle: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    with staging_folder(again) as folder:
        stage(folder)
        (folder / "measurements.json").write_text("other", encoding="utf-8")
        (folder / "report.html").write_text("other", encoding="utf-8")
        second = write_bundle(folder, again, header())
    assert second.content_digest == read_manifest(bundle).content_digest
    assert second.files != read_manifest(bundle).files


@pytest.mark.parametrize("path", ["model/adapter.gguf", "report.json", "selftest.json", "licences/MODEL"])
def test_the_digest_covers_the_content(bundle: Path, tmp_path: Path, path: str) -> None:
    with staging_folder(tmp_path / "again") as folder:
        stage(folder)
        (folder / path).write_bytes(b"other")
        second = write_bundle(folder, tmp_path / "again", header())
    assert second.content_digest != read_manifest(bundle).content_digest


def test_the_digest_covers_the_header() -> None:
    facts = header()
    digests = {
        Manifest.of(changed, ()).content_digest
        for changed in (
            facts,
            facts.model_copy(update={"device": "other"}),
            facts.model_copy(update={"runtime": {}}),
            facts.model_copy(update={"provenance": facts.provenance.model_copy(update={"threads": 3})}),
        )
    }
    assert len(digests) == 4


def test_the_digest_does_not_depend_on_the_order_of_files() -> None:
    entries = [FileEntry.of(path, 0, "0" * 64) for path in "abc"]
    assert Manifest.of(header(), entries) == Manifest.of(header(), reversed(entries))


# Damage


def test_a_truncated_file_is_named_with_its_bytes(bundle: Path) -> None:
    (bundle / "model/adapter.gguf").write_bytes(bytes(100))
    check = failed(bundle)["file model/adapter.gguf"]
    assert check.detail == "the file is cut short or was changed: got 100 bytes, expected 2,048 bytes"
    assert (check.value, check.limit, check.unit) == (100, 2048, "bytes")


def test_a_changed_byte_is_found(bundle: Path) -> None:
    (bundle / "model/model.gguf").write_bytes(b"grapH")
    assert list(failed(bundle)) == ["file model/model.gguf"]
    assert "the bytes were changed: got SHA-256" in failed(bundle)["file model/model.gguf"].detail


def test_a_missing_file_is_found(bundle: Path) -> None:
    (bundle / "model/adapter.gguf").unlink()
    assert failed(bundle)["file model/adapter.gguf"].detail == "the file is missing: expected 2,048 bytes"


def test_unlisted_files_are_found(bundle: Path) -> None:
    for number in range(7):
        (bundle / "model" / f"extra{number}.bin").write_bytes(b"")
    detail = failed(bundle)["no unlisted file"].detail
    assert "does not list: model/extra0.bin, model/extra1.bin" in detail
    assert detail.endswith("and 2 more")


def test_links_are_found_and_not_followed(bundle: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(FILES["model/model.gguf"])
    (bundle / "model/model.gguf").unlink()
    (bundle / "model/model.gguf").symlink_to(outside)
    (bundle / "more").symlink_to(tmp_path)
    assert set(failed(bundle)) == {"no links", "file model/model.gguf"}
    assert failed(bundle)["no links"].detail == "neither files nor folders: model/model.gguf, more"


def test_a_pipe_is_found_and_not_opened(bundle: Path) -> None:
    (bundle / "model/model.gguf").unlink()
    os.mkfifo(bundle / "model/model.gguf")
    assert set(failed(bundle)) == {"no links", "file model/model.gguf"}


def test_a_manifest_edited_in_its_own_spelling_fails_the_digest(bundle: Path) -> None:
    rewrite(bundle, {"name": "other"})
    assert failed(bundle)["content digest"].detail.startswith("the manifest was changed: got ")


def test_a_report_on_another_device_is_found(bundle: Path) -> None:
    rewrite(bundle, {"device": "other"})
    assert "reports on another device" in failed(bundle)["report.json"].detail


def test_a_plan_of_other_decisions_is_found(bundle: Path) -> None:
    plan = (bundle / "plan.json").read_text("utf-8")
    for old, new in (('"Q8_0"', '"Q4_0"'), ('"evaluation_kl": ', '"evaluation_kl": 1'), ('"seed": 0', '"seed": 1')):
        assert old in plan
        (bundle / "plan.json").write_text(plan.replace(old, new, 1), "utf-8")
        assert "is not the plan of what report.json reports on" in failed(bundle)["plan.json"].detail


@pytest.mark.parametrize("name", ["plan.json", "report.json", "measurements.json"])
def test_documents_must_be_of_their_schema(bundle: Path, name: str) -> None:
    (bundle / name).write_text('{"schema_version": 1}', encoding="utf-8")
    assert "document: " in failed(bundle)[name].detail
    (bundle / name).unlink()
    assert "no such file" in failed(bundle)[name].detail


def test_a_folder_too_deep_to_list_is_refused(bundle: Path) -> None:
    handle = os.open(bundle, os.O_RDONLY)
    for _ in range(20):
        os.mkdir("d" * 250, dir_fd=handle)
        inner = os.open("d" * 250, os.O_RDONLY, dir_fd=handle)
        os.close(handle)
        handle = inner
    os.close(handle)
    with pytest.raises(InputError, match=r"demo: cannot be read; got .*; check its permissions and the disk"):
        verify_bundle(bundle)


# The memory of a process is a regular file whose first bytes cannot be read, whoever asks.
UNREADABLE = Path("/proc/self/mem")


@pytest.mark.skipif(not UNREADABLE.is_file(), reason="needs a file that cannot be read")
def test_a_file_the_disk_does_not_give_is_found() -> None:
    listed = FileEntry.of(UNREADABLE.name, 0, "0" * 64)
    check = _check_file(UNREADABLE.parent, listed, True, lambda _: None)
    assert (check.status, check.detail) == ("failed", "cannot be read: Input/output error")
    with pytest.raises(InputError, match=r"mem: cannot be read; got Input/output error; check its permissions"):
        _bytes(UNREADABLE, 1)


# Manifests that cannot be read


def entry(path: str, **changes: object) -> dict[str, object]:
    return {"path": path, "role": "other", "sha256": "0" * 64, "size": 0} | changes


@pytest.mark.parametrize(
    "path",
    [
        "/a",
        "../a",
        "a/../b",
        "a//b",
        "./a",
        "",
        "a/",
        "a\\b",
        "C:a",
        "a\x00b",
        "a\nb",
        "a./b",
        "a /b",
        "..",
        "a\u202eb",
    ],
)
def test_a_path_outside_or_unportable_is_refused(bundle: Path, path: str) -> None:
    rewrite(bundle, {"files": [entry(path)]})
    with pytest.raises(InputError, match=r"files\.0\.path: Value error, a path must be"):
        read_manifest(bundle)


@pytest.mark.parametrize("pair", [("a", "a"), ("a/B", "A/b"), ("\u00e9", "e\u0301"), ("stra\u00dfe", "STRASSE")])
def test_two_names_for_one_file_are_refused(bundle: Path, pair: tuple[str, str]) -> None:
    rewrite(bundle, {"files": [entry(path) for path in pair]})
    with pytest.raises(InputError, match="some systems hold one file for both"):
        read_manifest(bundle)


def test_a_manifest_that_lists_itself_is_refused(bundle: Path) -> None:
    rewrite(bundle, {"files": [entry("Manifest.json")]})
    with pytest.raises(InputError, match=r"'Manifest.json' is listed beside 'manifest.json'"):
        read_manifest(bundle)


@pytest.mark.parametrize("changes", [{"size": -1}, {"size": "1"}, {"sha256": "0"}, {"role": "root"}, {"extra": 1}])
def test_an_entry_of_another_form_is_refused(bundle: Path, changes: dict[str, object]) -> None:
    rewrite(bundle, {"files": [entry("a", **changes)]})
    with pytest.raises(InputError, match=r"manifest.json: not a Manifest document: files\.0\."):
        read_manifest(bundle)


def test_another_spelling_of_the_manifest_is_refused(bundle: Path) -> None:
    text = (bundle / "manifest.json").read_text(encoding="utf-8")
    (bundle / "manifest.json").write_text(text.replace('"name"', '"name": "x", "name"', 1), encoding="utf-8")
    with pytest.raises(InputError, match="the manifest was changed after it was written; get the bundle again"):
        read_manifest(bundle)


def test_a_missing_or_linked_manifest_is_refused(bundle: Path) -> None:
    (bundle / "manifest.json").rename(bundle.parent / "manifest.json")
    with pytest.raises(InputError, match=r"manifest.json: no such file; check that the path is a complete bundle"):
        verify_bundle(bundle)
    (bundle / "manifest.json").symlink_to(bundle.parent / "manifest.json")
    with pytest.raises(InputError, match="no such file"):
        verify_bundle(bundle)


def test_a_huge_manifest_is_refused_unread(bundle: Path) -> None:
    os.truncate(bundle / "manifest.json", MOST_BYTES["manifest.json"] + 1)
    with pytest.raises(InputError, match=r"too large; got 1,048,577 bytes, expected at most 1,048,576 bytes"):
        read_manifest(bundle)


# Writing


def test_an_output_that_exists_is_refused(bundle: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(RequestError, match=r"demo: already exists; choose another -o or delete it"),
        staging_folder(bundle),
    ):
        pass
    (tmp_path / "staged").mkdir()
    with pytest.raises(RequestError, match="already exists"):
        write_bundle(tmp_path / "staged", bundle, header())


def test_a_dangling_link_counts_as_existing(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(RequestError, match="already exists"), staging_folder(tmp_path / "out"):
        pass


def test_a_missing_parent_is_refused(tmp_path: Path) -> None:
    match = r"is to hold the bundle does not exist; create it or choose another -o"
    with pytest.raises(RequestError, match=match), staging_folder(tmp_path / "no" / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_too_little_space_is_refused(tmp_path: Path) -> None:
    need = r"not enough free disk space; got [\d,]+ bytes, expected at least 1,000,000,000,000,000,000 bytes"
    with pytest.raises(RequestError, match=need), staging_folder(tmp_path / "out", need_bytes=10**18):
        pass


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit, ValueError])
def test_an_interrupted_job_leaves_nothing(tmp_path: Path, interruption: type[BaseException]) -> None:
    with pytest.raises(interruption), staging_folder(tmp_path / "out") as folder:
        stage(folder)
        assert folder.parent == tmp_path
        assert folder.name.startswith(".out.partial-")
        raise interruption
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    match = rf"{tmp_path}: the disk is full; got .* free on the disk at \S+; free some space, or choose another place\."
    with pytest.raises(RequestError, match=match), staging_folder(tmp_path / "out"):
        Path("/dev/full").write_bytes(b"x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.EACCES, "no permission to write"),
        (errno.EPERM, "no permission to write"),
        (errno.EROFS, "the file system is read-only"),
        (errno.EDQUOT, "the disk quota is used up"),
    ],
)
def test_refusals_of_the_file_system_are_one_sentence(tmp_path: Path, code: int, message: str) -> None:
    with pytest.raises(RequestError, match=message), staging_folder(tmp_path / "out") as folder:
        raise OSError(code, "refused", str(folder / "model"))


def test_a_name_too_long_is_one_sentence(tmp_path: Path) -> None:
    match = "too long for the file system; choose a shorter -o"
    with pytest.raises(RequestError, match=match), staging_folder(tmp_path / ("a" * 250)):
        pass


def test_an_output_made_by_another_job_meanwhile_is_kept(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(RequestError, match="out: already exists"), staging_folder(output) as folder:
        output.mkdir()
        (output / "theirs").touch()
        folder.rename(output)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "theirs"]


def test_errors_elsewhere_are_not_the_output_s(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    with pytest.raises(PermissionError), staging_folder(tmp_path / "here" / "out"):
        raise PermissionError(errno.EACCES, "denied", str(tmp_path / "input"))


def test_a_staged_link_is_our_fault(tmp_path: Path) -> None:
    match = r"model: neither a file nor a folder; give a folder of plain files"
    with pytest.raises(ExporterError, match=match) as info, staging_folder(tmp_path / "out") as folder:
        (folder / "model").symlink_to(tmp_path)
        write_bundle(folder, tmp_path / "out", header())
    assert info.value.exit_code == 70
    assert list(tmp_path.iterdir()) == []


def test_files_below_are_sorted_with_slashes(bundle: Path) -> None:
    regular, strange = files_below(bundle)
    assert regular == sorted([*FILES, *DOCUMENTS, "manifest.json"])
    assert strange == []


# Tar


def test_the_tar_is_the_same_for_the_same_bundle(bundle: Path, tmp_path: Path) -> None:
    write_tar(bundle, tmp_path / "1.tar")
    for path in bundle.rglob("*"):
        os.utime(path, (0, 12345))
        path.chmod(0o700)
    write_tar(bundle, tmp_path / "2.tar")
    assert (tmp_path / "1.tar").read_bytes() == (tmp_path / "2.tar").read_bytes()


def test_the_tar_unpacks_to_a_bundle_that_verifies(bundle: Path, tmp_path: Path) -> None:
    write_tar(bundle, tmp_path / "demo.tar")
    with tarfile.open(tmp_path / "demo.tar") as archive:
        members = archive.getmembers()
        archive.extractall(tmp_path / "away", filter="data")
    assert [member.name for member in members] == sorted(member.name for member in members)
    assert {(member.mtime, member.uid, member.mode, member.uname) for member in members} == {(0, 0, 0o644, "")}
    assert failed(tmp_path / "away" / "demo") == {}


def test_a_tar_is_not_written_over_or_into_things(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="lies inside the bundle it is to hold; choose a place beside it"):
        write_tar(bundle, bundle / "model" / "demo.tar")
    (tmp_path / "demo.tar").write_bytes(b"mine")
    with pytest.raises(RequestError, match="already exists"):
        write_tar(bundle, tmp_path / "demo.tar")
    assert (tmp_path / "demo.tar").read_bytes() == b"mine"
    assert failed(bundle) == {}


def test_a_tar_of_a_bundle_with_links_leaves_nothing(bundle: Path, tmp_path: Path) -> None:
    (bundle / "link").symlink_to(tmp_path)
    with pytest.raises(ExporterError, match="neither a file nor a folder"):
        write_tar(bundle, tmp_path / "demo.tar")
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]
