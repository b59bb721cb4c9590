"""Text that came with a bundle, a model or a profile is shown, and does nothing to the terminal that shows it."""

import json
import re
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

from exporter.bundle.installed import Answer
from exporter.bundle.manifest import Manifest, content_digest
from exporter.cli import main, show
from exporter.foundation.errors import InputError, printable
from exporter.foundation.quantities import Check
from exporter.prove.text_checks import TextPreview
from exporter.report.data import canonical_json
from tests.models import tiny_model

BUNDLE = Path(__file__).parents[1] / "data" / "bundles-0.1.0" / "gguf.tar.xz"
# Sets the title, colours all that follows, turns the line round, ends it for some, and is a link for rich.
HOSTILE = "\x1b]0;x\x07\x9b31m\u202e\u2028\x7f[link=http://x]y[/link]"
# Written out here: Unicode's own lists, not the product's.
OBEYED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Return what runs a command in this process, and gives its exit code and all that it printed."""
    monkeypatch.setattr(main.signal, "signal", lambda number, handler: None)
    monkeypatch.setenv("EDGE_EXPORTER_CACHE", str(tmp_path / "cache"))

    def called(*arguments: object) -> tuple[int, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["edge-exporter", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main.main()
        printed = "".join(capsys.readouterr())
        assert OBEYED.search(printed) is None, (arguments, printed)
        assert isinstance(ended.value.code, int)
        return ended.value.code, printed

    return called


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    with tarfile.open(BUNDLE) as packed:
        packed.extractall(folder, filter="data")
    return folder


def texts(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Give the place of every text, and of every name."""
    if isinstance(value, str):
        yield place
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ()):
        yield from texts(inner, (*place, key))


def changed(document: Any, place: tuple[Any, ...]) -> Any:
    """Return a document with one text hostile."""
    made = json.loads(json.dumps(document))
    inner = made
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] += HOSTILE
    return made


@given(some.text(), some.text(some.sampled_from(HOSTILE + "\n\t\r\\ü\u200d")))
def test_what_is_printable_stays_and_the_rest_is_escaped(plain: str, hostile: str) -> None:
    for text in (plain, hostile):
        shown = printable(text)
        assert OBEYED.search(shown) is None and "\n" not in shown and printable(shown) == shown
        assert shown == text or OBEYED.search(text) or re.search(r"[\n\t\r]", text)
        facts = {text: [text]}
        assert json.loads(printable(json.dumps(facts, ensure_ascii=False, indent=1), kept="\n\t")) == facts
    assert printable("日本語 \u00a0 👩🏽\u200d💻 می\u200cخواهم") == "日本語 \u00a0 👩🏽\u200d💻 می\u200cخواهم"


def spelled(document: dict[str, Any]) -> str:
    """Return a document as the product spells it; a manifest with the digest that it then has."""
    with suppress(ValueError):
        manifest = Manifest.model_validate_json(json.dumps(document))
        document = document | {"content_digest": content_digest(manifest, manifest.files)}
    return canonical_json(document)


def test_no_text_of_a_bundle_reaches_the_terminal_raw(original: Path, tmp_path: Path, run: Run) -> None:
    bundle = Path(shutil.copytree(original, tmp_path / "bundle"))
    for name in ("manifest.json", "report.json", "measurements.json"):
        document = json.loads((bundle / name).read_text())
        taken = document
        for place in texts(document):
            (bundle / name).write_text(spelled(changed(document, place)))
            code, _ = run("inspect", bundle)
            assert code in (0, 3), place
            if code == 0 and place[0] != "files":
                taken = changed(taken, place)
            else:
                assert run("verify", bundle)[0] in (1, 3), place
        # All at once that are taken one by one.
        (bundle / name).write_text(spelled(taken))
    for arguments in (("inspect", bundle), ("compare", bundle, bundle), ("inspect", bundle, "--json")):
        code, printed = run(*arguments)
        # Neither obeyed nor taken for markup.
        assert (code, printable(HOSTILE) in printed) == (0, True), printed[-600:]


def test_no_answer_of_a_model_reaches_the_terminal_raw(
    original: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exporter.bundle.installed.answer", lambda *_: Answer(f"two\n\tlines {HOSTILE}", None))
    code, printed = run("run", original, "-p", "x")
    assert (code, printed) == (0, "two\n\tlines " + printable(HOSTILE) + "\n")
    _, printed = run("run", original, "-p", "x", "--json")
    assert json.loads(printed)["answer"] == f"two\n\tlines {HOSTILE}"


def test_no_name_of_a_tensor_reaches_the_terminal_raw(tmp_path: Path, run: Run) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor(HOSTILE, np.zeros((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    code, printed = run("inspect", tmp_path / "x.gguf")
    assert code == 0 and printable(HOSTILE) in printed


def test_no_text_of_a_model_reaches_the_terminal_raw(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(tmp_path / f"model{HOSTILE}".replace("/", ""))
    # As where a template refuses a chat, and says why.
    preview = TextPreview(checks=(Check(name=HOSTILE, status="passed", detail=HOSTILE),), notes=(HOSTILE,))
    monkeypatch.setattr("exporter.pipeline.preview_text", lambda *_: preview)
    monkeypatch.setattr("exporter.pipeline.stage_seconds", lambda *_, **__: {"encode": 1.0})
    code, printed = run("plan", model, "-d", "raspberry-pi-5", "-t", "gguf")
    assert code == 0 and printed.count(printable(HOSTILE)) >= 3
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(changed(config, ("architectures", 0))))
    code, printed = run("plan", model, "-d", "raspberry-pi-5", "-t", "gguf")
    assert code == 3 and "]0;x" in printed


def test_no_text_of_an_error_reaches_the_terminal_raw(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert str(InputError(HOSTILE, where="a\nb", got=HOSTILE)).isprintable()
    assert run("inspect", f"{HOSTILE}")[0] in (2, 3)
    assert run("inspect", "x", f"--{HOSTILE}")[0] == 2
    assert run("devices", "show", HOSTILE)[0] == 2

    def fails(*_: object) -> None:
        raise ValueError(HOSTILE)

    monkeypatch.setattr(show, "gguf_facts", fails)
    assert run("inspect", "x.gguf")[0] == 70
    monkeypatch.setattr(show, "gguf_facts", lambda path: (tmp_path / HOSTILE.replace("/", "")).read_bytes())
    assert run("inspect", "x.gguf")[0] == 2


def test_no_title_of_a_stage_reaches_the_terminal_raw(capsys: pytest.CaptureFixture[str]) -> None:
    with show.progress(True) as advance:
        advance(HOSTILE, 1, 1)
    printed = capsys.readouterr().err
    assert printable(HOSTILE) in printed and OBEYED.search(printed) is None
