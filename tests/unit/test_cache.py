"""The cache: what is damaged is made anew, what is made is made once, what is ours is private, what is left goes."""

import errno
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from exporter.foundation import cache
from exporter.foundation import cache_entries as entries
from exporter.foundation.cache import cache_folder, disk_of, locked, naming_disk, replacing, scratch_folder, telling
from exporter.foundation.cache_entries import (
    ARRAY,
    JSON,
    VECTORS,
    DamagedEntryError,
    Form,
    filling,
    kept,
    kept_folder,
    load,
    save,
)
from exporter.foundation.errors import InputError, RequestError, RuntimeCrashError
from exporter.model.folder import save_folder
from exporter.model.model import SourceFiles
from exporter.model.sources import open_model
from tests.damage import DAMAGES, left_over
from tests.models import tiny_model

ROOT = Path(__file__).parents[2]
NUMBERS = np.arange(35, dtype=np.float32).reshape(5, 7)
FORMS = [(ARRAY, NUMBERS), (VECTORS, {"a": NUMBERS, "b": np.array(3)}), (JSON, {"a": [1, "b", None]})]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGE_EXPORTER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def equal(one: Any, other: Any) -> bool:
    np.testing.assert_equal(one, other)
    return True


@pytest.mark.parametrize(("form", "value"), FORMS)
def test_what_was_kept_is_not_made_again(form: Form[Any], value: Any) -> None:
    made: list[int] = []
    for _ in range(3):
        assert equal(kept(cache_folder("samples") / "x", form, lambda: made.append(1) or value), value)
    assert made == [1]
    assert equal(load(cache_folder("samples") / "x", form), value)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(("form", "value"), FORMS)
def test_what_is_damaged_is_made_again(form: Form[Any], value: Any, damage: Callable[[bytes], bytes]) -> None:
    path = cache_folder("samples") / "x"
    save(path, form, value)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    with pytest.raises(DamagedEntryError, match="x: the cache was damaged"):
        load(path, form)
    assert equal(kept(path, form, lambda: value), value)
    assert path.read_bytes() == whole


def test_every_bit_counts() -> None:
    path = cache_folder("samples") / "x"
    save(path, ARRAY, NUMBERS)
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        assert not entries.is_whole(path)
    for foreign in (whole + b"\0", whole[:-1], b"\x93NUMPY", whole[: -entries.SEAL_BYTES]):
        path.write_bytes(foreign)
        assert not entries.is_whole(path)


def test_an_entry_under_another_name_is_another_s() -> None:
    save(cache_folder("samples") / "x", ARRAY, NUMBERS)
    for path in (cache_folder("samples") / "y", cache_folder("references") / "x"):
        path.write_bytes((cache_folder("samples") / "x").read_bytes())
        assert not entries.is_whole(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda place: (place / "one").write_bytes(b"twO"),
        lambda place: (place / "one").unlink(),
        lambda place: (place / "more").touch(),
        lambda place: (place / "in" / "link").unlink(),
        lambda place: (place / ".files").unlink(),
        lambda place: (place / ".files").write_bytes(b""),
    ],
)
def test_a_folder_that_is_not_as_it_was_made_is_made_again(change: Callable[[Path], object]) -> None:
    made = []

    def make(folder: Path) -> None:
        made.append(1)
        (folder / "one").write_bytes(b"two")
        (folder / "in").mkdir()
        (folder / "in" / "link").symlink_to("../one")

    place = cache_folder("gguf") / "x"
    for _ in range(2):
        kept_folder(place, make)
    assert made == [1]
    change(place)
    kept_folder(place, make)
    assert made == [1, 1]
    assert (place / "in" / "link").read_bytes() == b"two"
    assert sorted(path.name for path in place.iterdir()) == [".files", "in", "one"]


def test_files_and_folders_are_their_owner_s_alone_whatever_the_umask(folder: Path) -> None:
    before = os.umask(0)
    try:
        (cache_folder() / "samples").mkdir(0o777)
        kept(cache_folder("samples") / "x", ARRAY, lambda: NUMBERS)
        kept_folder(cache_folder("arm64", "1") / "root", lambda root: (root / "program").touch(0o777))
        with filling(cache_folder("statistics", "1")) as files, scratch_folder(cache_folder("samples")) as scratch:
            files.save("x", ARRAY, NUMBERS)
            modes = {path: path.stat().st_mode & 0o777 for path in (folder / "cache").rglob("*")}
    finally:
        os.umask(before)
    assert scratch in modes
    private = {path: 0o700 if path.is_dir() or path.name == "program" else 0o600 for path in modes if path.exists()}
    assert {path: modes[path] for path in private} == private
    assert (folder / "cache").stat().st_mode & 0o777 == 0o700


def test_a_cache_that_others_can_write_to_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "cache").mkdir()
    (folder / "cache").chmod(0o770)
    with pytest.raises(RequestError, match=r"others can write to the cache folder; got mode 770; .*chmod go-w"):
        cache_folder("samples")
    (folder / "cache").chmod(0o755)
    cache_folder("samples")
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(RequestError, match="the cache folder belongs to another user"):
        cache_folder("samples")


def test_two_that_want_the_same_make_it_once_and_the_second_says_that_it_waits() -> None:
    made, found, began, goes_on = [], [], threading.Event(), threading.Event()

    def make() -> np.ndarray:
        made.append(1)
        began.set()
        assert goes_on.wait(20)
        return NUMBERS

    def want() -> None:
        with telling(goes_on.set):
            found.append(kept(cache_folder("samples") / "x", ARRAY, make))

    threads = [threading.Thread(target=want) for _ in range(2)]
    threads[0].start()
    assert began.wait(20)
    threads[1].start()
    for thread in threads:
        thread.join(20)
    assert made == [1]
    assert len(found) == 2
    assert not left_over(cache_folder())


def test_no_two_can_wait_for_each_other() -> None:
    with locked(cache_folder("samples") / "x"), locked(cache_folder("vocabularies") / "y"):
        pass
    early = locked(cache_folder("samples") / "x")
    with locked(cache_folder("vocabularies") / "y"), pytest.raises(AssertionError, match="may wait for ever"), early:
        pass


HOLDER = """
import sys
from contextlib import ExitStack
from pathlib import Path
from exporter.foundation.cache import cache_folder, locked, replacing, scratch_folder
with ExitStack() as opened:
    staging = opened.enter_context(scratch_folder(Path(sys.argv[1]), "bundle", 0o777))
    (staging / "model").mkdir()
    (staging / "model" / "weights").touch()
    opened.enter_context(scratch_folder())
    opened.enter_context(replacing(Path(sys.argv[1], "profile.toml")))
    entry = cache_folder("samples") / Path(sys.argv[1]).name
    opened.enter_context(replacing(entry, 0o600))
    opened.enter_context(locked(entry))
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    folder.mkdir()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder.parent)}
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], env=environment, text=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_what_a_killed_process_left_is_removed_by_the_next_and_what_a_living_one_has_is_not(folder: Path) -> None:
    with holder(folder / "one") as killed, holder(folder / "other"):
        both = left_over(folder)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        assert left_over(folder) == both
        with scratch_folder():
            pass
        living = left_over(folder)
    assert len(both) == 18
    assert len(living) == 9
    assert not any(str(folder / "one") in path for path in living)
    (cache_folder() / "held" / "deadbeef").write_bytes(os.fsencode(folder / "other"))
    with replacing(folder / "file"):
        pass
    assert left_over(folder) == []
    assert {path.name for path in folder.iterdir()} == {"cache", "one", "other", "file"}


def test_without_a_cache_folder_what_needs_none_still_works(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "file").touch()
    monkeypatch.setenv("EDGE_EXPORTER_CACHE", str(folder / "file" / "cache"))
    with scratch_folder() as scratch, replacing(folder / "written") as partial:
        partial.write_text("x")
    assert not scratch.exists()
    assert {path.name for path in folder.iterdir()} == {"file", "written"}


@contextmanager
def largest_file(count: int) -> Iterator[None]:
    """Let no file of this process grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


LARGE = np.zeros(1 << 16, np.float32)


def saved(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, LARGE)


@pytest.mark.parametrize(
    "write",
    [
        LARGE.tofile,
        saved,
        lambda path: path.write_bytes(LARGE.tobytes()),
        lambda path: save_file({"a": LARGE}, path),
    ],
)
def test_a_file_that_may_not_grow_names_the_disk(folder: Path, write: Callable[[Path], object]) -> None:
    with largest_file(1 << 15), pytest.raises(RequestError) as refused, replacing(folder / "file") as partial:
        write(partial)
    assert str(refused.value).startswith(f"{folder}: ")
    assert "bytes free on the disk at /" in str(refused.value)
    assert left_over(folder) == []


def test_a_disk_that_is_full_is_named(folder: Path) -> None:
    small = folder / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small], check=False).returncode:
        pytest.skip("no right to mount")
    try:
        full = pytest.raises(RequestError, match=rf"{small}: the disk is full; got .* free on the disk at {small}; fr")
        with full, replacing(small / "file") as partial:
            partial.write_bytes(LARGE.tobytes())
        with pytest.raises(RequestError, match=rf"on the disk at {small}"), scratch_folder(small) as scratch:
            LARGE.tofile(scratch / "file")
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", small], check=True)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk quota is used up"),
        (OSError(errno.EFBIG, "File too large"), "a file is larger than the disk or a limit"),
        (RuntimeError("writing failed: No space left on device (os error 28)"), "the disk is full"),
        (RuntimeCrashError("OSError: [Errno 28] No space left on device"), "the disk is full"),
    ],
)
def test_whatever_a_library_says_of_a_full_disk(folder: Path, error: Exception, sentence: str) -> None:
    with pytest.raises(RequestError, match=f"{sentence}.*on the disk at /.*in TMPDIR"), naming_disk(folder):
        raise error
    elsewhere = OSError(errno.ENOSPC, "No space left on device", "/elsewhere/file")
    with pytest.raises(OSError, match="elsewhere"), naming_disk(folder):
        raise elsewhere
    with pytest.raises(ValueError, match="another"), naming_disk(folder):
        raise ValueError("another")


def test_the_next_step_names_what_chooses_the_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr("tempfile.tempdir", str(folder / "temporary"))
    for place, named in (("cache/samples", "EDGE_EXPORTER_CACHE"), ("temporary", "TMPDIR"), ("out", "another place")):
        with pytest.raises(RequestError, match=named), naming_disk(folder / place):
            raise full
    assert "bytes free on the disk at /" in disk_of(folder / "not" / "there")


@pytest.mark.parametrize(
    "name",
    [
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
        "chat_template.json", "additional_chat_templates/tool.jinja", "tokenizer.model", "tokenizer.model.v3",
        "merges.txt", "vocab.json", "vocab.txt", "added_tokens.json", "special_tokens_map.json", "model.safetensors",
    ],
)  # fmt: skip
def test_every_file_that_a_bundle_depends_on_counts_and_is_watched(folder: Path, name: str) -> None:
    source = tiny_model(folder / "model", layers=1)
    path = source / name
    path.parent.mkdir(exist_ok=True)
    if not path.exists():
        path.write_text("{}" if path.suffix == ".json" else "text")
    with open_model(str(source)) as model:
        before = model.digest
        model.require_unchanged()
        content = path.read_bytes()
        # As many bytes as before.
        path.write_bytes(content[:-1] + b" ")
        with pytest.raises(InputError, match=f"{name}: the source changed while it was read"):
            model.require_unchanged()
        vars(model).pop("digest")
        assert model.digest != before


def test_a_file_that_is_added_or_taken_away_is_noticed(folder: Path) -> None:
    source = tiny_model(folder / "model", layers=1)
    with open_model(str(source)) as model:
        before = model.digest
        (source / "README.md").write_text("not read")
        model.require_unchanged()
        (source / "chat_template.jinja.old").touch()
        model.require_unchanged()
        (source / "added_tokens.json").write_text("{}")
        with pytest.raises(InputError, match=r"added_tokens.json: the source changed"):
            save_folder(model, folder / "saved")
        (source / "added_tokens.json").unlink()
        model.require_unchanged()
        (source / "config.json").unlink()
        with pytest.raises(InputError, match=r"config.json: the source changed"):
            model.require_unchanged()
        assert model.digest == before
    assert left_over(folder) == []
    assert not (folder / "saved").exists()


def test_a_file_that_goes_while_it_is_looked_at_is_noticed(folder: Path) -> None:
    path = folder / "file"
    path.touch()
    source = SourceFiles(lambda: [path])
    path.unlink()
    with pytest.raises(InputError, match="the source changed"):
        source.require_unchanged()


def test_a_saved_folder_has_all_that_the_tokenizer_reads(folder: Path) -> None:
    source = tiny_model(folder / "model", layers=1)
    (source / "additional_chat_templates").mkdir()
    names = ("merges.txt", "LICENSE.txt", "additional_chat_templates/tool.jinja")
    for name in names:
        (source / name).write_text(name)
    with open_model(str(source)) as model:
        save_folder(model, folder / "saved")
    assert all((folder / "saved" / name).read_text() == name for name in names)
    assert (folder / "saved").stat().st_mode == (folder / "model").stat().st_mode


def test_the_folder_of_notes_is_named_where_the_others_look(folder: Path) -> None:
    with scratch_folder() as scratch:
        (note,) = (folder / "cache" / cache.HELD).iterdir()
        assert note.read_bytes() == os.fsencode(scratch)
        assert note.stat().st_mode & 0o777 == 0o600
