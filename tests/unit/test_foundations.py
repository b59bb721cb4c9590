"""Errors, whole-or-nothing writes, plug-ins and texts: what everything else stands on."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.calibrate.windows import Windows, file_windows, spread_windows
from exporter.compress.method import relative_error
from exporter.foundation.cache import cache_folder, replacing
from exporter.foundation.errors import ExporterError, InputError, MissingDependencyError, RequestError, did_you_mean
from exporter.foundation.registry import load, names
from exporter.model.tokenizer import load_tokenizer
from exporter.prove.self_test import make_self_test, run_self_test
from tests.models import tiny_model


@pytest.mark.skipif(os.name != "posix", reason="modes are those of POSIX")
def test_the_cache_is_private_and_what_is_written_elsewhere_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGE_EXPORTER_CACHE", str(tmp_path / "cache"))
    cache_folder("samples")
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700
    (tmp_path / "plain").touch()
    with replacing(tmp_path / "written") as partial:
        partial.write_text("x", "utf-8")
    assert (tmp_path / "written").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_an_error_is_one_sentence() -> None:
    error = ExporterError("it failed", where="a.bin", got=3, expected="at least 4", next_step="add one")
    assert str(error) == "a.bin: it failed; got 3, expected at least 4; add one."
    assert str(ExporterError("it failed", expected=4)) == "it failed; expected 4."
    assert str(ExporterError("it failed.")) == "it failed."


def test_a_near_name_is_offered_beside_all_that_are_known() -> None:
    known = ["raspberry-pi-5", "pixel-9"]
    assert did_you_mean("raspbery-pi-5", known) == "did you mean 'raspberry-pi-5'? Known: pixel-9, raspberry-pi-5"
    assert "did you mean" not in did_you_mean("zzz", known)
    assert did_you_mean("zzz", "abcde", most=2) == "known: a, b and 3 more"


def test_a_write_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(KeyboardInterrupt), replacing(path) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "before"
    with replacing(path) as partial:
        partial.write_text("after")
        assert path.read_text() == "before"
    assert [found.name for found in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "after"


def test_the_cache_is_where_the_user_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_EXPORTER_CACHE", str(tmp_path / "own"))
    assert cache_folder("a", "b") == tmp_path / "own" / "a" / "b"
    monkeypatch.delenv("EDGE_EXPORTER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "edge-exporter"


def test_plug_ins_are_found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"rtn", "ldlq"} <= set(names("exporter.compress.methods"))
    with pytest.raises(RequestError, match="unknown method 'ldql'; did you mean 'ldlq'"):
        load("exporter.compress.methods.{}", "ldql", ["ldlq", "rtn"], "method")
    with pytest.raises(MissingDependencyError, match="needs the library 'no_such_library'"):
        load("no_such_library.{}", "x", ["x"], "target")


def test_texts_are_cut_into_whole_windows(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_model(tmp_path / "model"))
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbf" + b"hello world, it's France. " * 100)
    windows = file_windows(path, tokenizer, 6, 32)
    ids = tokenizer.inner_ids(path.read_text("utf-8-sig"))
    assert windows.tokens.tolist() == np.array(ids[: 6 * 32]).reshape(6, 32).tolist()
    assert windows.kind == "file"
    assert windows.digest == Windows.of(windows.tokens.astype(np.int32), "file", 0).digest
    assert windows.digest != Windows.of(windows.tokens[::-1], "file", 0).digest
    found = len(ids) // 100
    assert len(file_windows(path, tokenizer, 1000, 100).tokens) == found


@pytest.mark.parametrize("repeats", [40, 4000])
def test_windows_come_from_all_over_a_text(tmp_path: Path, repeats: int) -> None:
    tokenizer = load_tokenizer(tiny_model(tmp_path / "model"))
    path = tmp_path / "text.txt"
    words = ["alpha beta ", "gamma delta ", "epsilon zeta ", "eta theta "]
    path.write_text("".join(word * repeats for word in words))
    windows = spread_windows(path, tokenizer, 4, 16)
    parts = [tokenizer.backend.decode(tokens.tolist()) for tokens in windows.tokens]
    assert [word.split()[0] in part for word, part in zip(words, parts, strict=True)] == [True] * 4
    assert (windows.kind, windows.source_bytes) == ("file", path.stat().st_size)
    everything = file_windows(path, tokenizer, 100_000, 16)
    assert spread_windows(path, tokenizer, 100_000, 16).digest == everything.digest


@pytest.mark.parametrize("windows", [file_windows, spread_windows])
def test_texts_that_cannot_be_used(tmp_path: Path, windows: Callable[[Path, Any, int, int], Windows]) -> None:
    tokenizer = load_tokenizer(tiny_model(tmp_path / "model"))
    short, latin = tmp_path / "short.txt", tmp_path / "latin.txt"
    short.write_text("too short")
    latin.write_bytes("für".encode("latin-1"))
    with pytest.raises(InputError, match=r"the text is too short; got \d tokens, expected at least 128"):
        windows(short, tokenizer, 4, 32)
    with pytest.raises(InputError, match="the text is not UTF-8; got byte 1"):
        windows(latin, tokenizer, 4, 32)
    with pytest.raises(RequestError, match="there is no such text file"):
        windows(tmp_path / "none.txt", tokenizer, 4, 32)


@pytest.mark.parametrize("moment", [None, np.zeros((4, 4), np.float32)])
def test_the_error_of_what_puts_out_nothing_is_unknown(moment: np.ndarray | None) -> None:
    zero, one = np.zeros((3, 4), np.float32), np.ones((3, 4), np.float32)
    assert relative_error(zero if moment is None else one, zero, moment) is None
    assert relative_error(one, zero, None) == 1.0


def test_a_self_test_without_positions_is_not_run() -> None:
    test = make_self_test(lambda tokens: np.zeros((len(tokens), 8), np.float32), 8, 0)
    assert test.positions == ()
    assert run_self_test(test, lambda tokens: np.zeros((len(tokens), 8), np.float32)).status == "not run"
