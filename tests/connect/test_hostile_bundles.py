"""Bundles that mean harm: on a device their files are data, whatever they and their target are called."""

import ast
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest

from exporter.bench import measurement
from exporter.bench.bundle_under_test import BundleUnderTest, subject_of
from exporter.bench.engine import Probe, Settings
from exporter.bench.measurement import BenchOutcome, Remote, measure_here, measure_on
from exporter.bundle.manifest import sha256_of
from exporter.device.connect.connection import address_of
from exporter.device.connect.remote_folder import Upload
from exporter.device.connect.shell import Line, line
from exporter.foundation.errors import RequestError
from tests.commands import ROOT
from tests.connect.adb_server import SERIAL, AdbServer, llama_bench
from tests.connect.sshd import Sshd

QUICK = Settings(prompt=8, generate=4, depth=0, context=64, repeats=2, sustain_s=0, threads=1)
# Modules that Python or the measuring program imports, where older versions looked for them and elsewhere.
MODULES = ("json.py", "numpy.py", "onnxruntime/__init__.py", "llama_cpp.py", "sitecustomize.py", "usercustomize.py")
FOLDERS = ("", "model/", "program/")
# What shells and programs read as something else than a name.
NAMES = (
    "-rf", "--help", "model/--", "model/-m", "model/it's \"here\"", "model/a b  c", "model/$(touch {mark})",
    "model/`touch {mark}`", "model/; touch {mark} #", "model/line\ntouch {mark}\n#", "model/back\\slash", "model/*",
    "model/'; touch {mark}; '", "~/model", "pid", "kept",
)  # fmt: skip


@dataclass(frozen=True)
class Hostile(BundleUnderTest):
    """A bundle with more files of its model, or with others: no manifest that is read lists such.

    Attributes:
        proper: The bundle with its own files; None for others in their place.
        more: Name -> file.
    """

    proper: BundleUnderTest | None
    more: dict[str, Path]

    @property
    def model_files(self) -> list[str]:
        return [*(self.proper.model_files if self.proper else []), *self.more]

    def uploads(self) -> list[Upload]:
        more = [Upload(path, name, *sha256_of(path)) for name, path in self.more.items()]
        return [*(self.proper.uploads() if self.proper else []), *more]


Make = Callable[..., BundleUnderTest]


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """The file that exists once something of a bundle has run."""
    return tmp_path / "PWNED"


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Makes the bundle that is measured from now on."""
    with ExitStack() as stack:

        def make(
            bundle: Path, texts: dict[str, str] | None = None, target: str = "", model: str = ""
        ) -> BundleUnderTest:
            subject, more = (
                stack.enter_context(subject_of(bundle)),
                {model: bundle / "model/model.gguf"} if model else {},
            )
            for number, (name, text) in enumerate((texts or {}).items()):
                more[name] = tmp_path / f"file-{number}"
                more[name].write_text(text)
            hostile = Hostile(**vars(subject), proper=None if model else subject, more=more)
            hostile = replace(hostile, artifact=replace(subject.artifact, target=target or subject.artifact.target))
            monkeypatch.setattr(measurement, "subject_of", lambda *_, **__: nullcontext(hostile))
            return hostile

        yield make


def measured_over_ssh(sshd: Sshd, keep: bool = False) -> BenchOutcome:
    remote = Remote(address_of(sshd.address), python=sys.executable, keep=keep)
    return measure_on(Path("unread"), remote, QUICK, None, lambda *_: None)


def test_a_line_of_shell_quotes_all_that_is_not_a_line() -> None:
    assert line("a %s b %s 100%%", "; c", ["d", "-e f", "$(g)"]) == "a '; c' b d '-e f' '$(g)' 100%"
    inner = line("cd %s", "it's")
    assert line("%s && exit", inner) == """cd 'it'"'"'s' && exit"""
    # What is put together by other means is text, and quoted again.
    assert line("%s", f"{inner}") == line("%s", str(inner)) == line("%s", inner + "") != inner
    assert isinstance(inner, Line)


def test_text_for_a_shell_is_never_put_together_elsewhere() -> None:
    made = 0
    for path in [path for folder in ("exporter", "targets") for path in sorted((ROOT / folder).rglob("*.py"))]:
        source = path.read_text()
        if path.name == "shell.py":
            continue
        assert not re.search(r"shlex|shell=True|os\.system", source), path
        for node in ast.walk(ast.parse(source)) if "connect.shell import" in source else ():
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in {"Line", "line"}:
                made += 1
                assert isinstance(node.args[0], ast.Constant), f"{path}:{node.lineno}: the text is no literal"
    assert made > 20


def test_a_target_with_a_command_in_it(sshd: Sshd, bundle: Path, mark: Path, made: Make) -> None:
    made(bundle, target=f"gguf; touch {mark}")
    with pytest.raises(RequestError, match=r"unknown target 'gguf; touch "):
        measured_over_ssh(sshd)
    assert not mark.exists()


@pytest.mark.parametrize("target", ["gguf", "onnx"])
def test_files_named_like_modules(sshd: Sshd, world: Path, mark: Path, made: Make, target: str) -> None:
    text = f"open({str(mark)!r}, 'w')\nraise SystemExit('a file of the bundle ran')\n"
    subject = made(world / target, {f"{folder}{module}": text for folder in FOLDERS for module in MODULES})
    outcome = measured_over_ssh(sshd)
    assert {check.name: check.status for check in outcome.checks}["selftest"] == "passed"
    assert outcome.sent_bytes > sum(upload.size for upload in subject.uploads())
    assert not mark.exists()


def test_names_that_shells_read_otherwise(sshd: Sshd, bundle: Path, mark: Path, made: Make) -> None:
    subject = made(bundle, dict.fromkeys((name.format(mark=mark) for name in NAMES), "text"))
    outcome = measured_over_ssh(sshd, keep=True)
    (kept,) = sshd.far.rglob("edge-exporter/bench-*")
    there = {str(path.relative_to(kept / "bundle")) for path in (kept / "bundle").rglob("*") if path.is_file()}
    assert there == set(subject.model_files)
    assert sorted(path.name for path in kept.iterdir()) == ["bundle", "kept", "program"]
    assert outcome.sent_bytes > sum(upload.size for upload in subject.uploads())
    assert not mark.exists()
    shutil.rmtree(kept.parent)


def test_a_model_on_a_phone_whose_name_is_a_command(phone: AdbServer, bundle: Path, tmp_path: Path, made: Make) -> None:
    made(bundle, model="model/-m 'x' $(touch PWNED).gguf")
    remote = Remote(address_of(f"adb://{SERIAL}"), binary=llama_bench(tmp_path / "-llama bench; touch PWNED"))
    outcome = measure_on(bundle, remote, QUICK, None, lambda *_: None)
    assert outcome.measured.runtime.startswith("llama.cpp")
    assert not list(phone.files.rglob("PWNED"))


def test_on_this_machine_nothing_of_the_surroundings_runs(
    bundle: Path, tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    around = tmp_path / "around"
    for module in MODULES:
        (around / module).parent.mkdir(parents=True, exist_ok=True)
        (around / module).write_text(f"open({str(mark)!r}, 'w')\n")
    monkeypatch.chdir(around)
    monkeypatch.setenv("PYTHONPATH", str(around))
    monkeypatch.setenv("EDGE_EXPORTER_CACHE", str(tmp_path / "cache"))
    outcome = measure_here(bundle, QUICK, None)
    assert {check.name: check.status for check in outcome.checks}["selftest"] == "passed"
    assert not mark.exists() and not list((tmp_path / "cache/bench").iterdir())


def test_a_python_is_named_by_one_word(bundle: Path) -> None:
    with subject_of(bundle) as subject:
        probe = partial(Probe, subject)
    for python, said in {"~/my env/python": """"$HOME"/'my env/python'""", "a; b": "'a; b'", "$(c)": "'$(c)'"}.items():
        assert probe(python)._python == said
