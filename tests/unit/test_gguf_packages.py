"""Models that come as packages: parts are put together and checked, and their terms are carried."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from exporter.bundle.write import write_licences
from exporter.foundation.errors import InputError, MissingDependencyError
from exporter.model.gguf_packages import DEMOS, Demo
from exporter.model.licences import MAX_BYTES, licence_files
from exporter.model.sources import open_model
from tests.models import tiny_model

WHOLE = b"first part, second part"


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Demo:
    """Return a model in two packages, with its terms in the first."""
    monkeypatch.setenv("EDGE_EXPORTER_CACHE", str(tmp_path / "cache"))
    for name, content in (("demo_part_a", WHOLE[:10]), ("demo_part_b", WHOLE[10:])):
        package = tmp_path / "site" / name
        (package / "data").mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "data/part").write_bytes(content)
    (tmp_path / "site/demo_part_a/data/TERMS.html").write_text("terms")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    parts = (("demo_part_a", "data/part"), ("demo_part_b", "data/part"))
    terms = (("demo_part_a", "data/TERMS.html"),)
    return Demo("model", "a package", "demo", parts, hashlib.sha256(WHOLE).hexdigest(), terms)


def test_parts_are_put_together_once(demo: Demo, tmp_path: Path) -> None:
    file = demo.file()
    assert file.read_bytes() == WHOLE
    assert file.name == "model.gguf"
    made = file.stat().st_ino
    assert demo.file().stat().st_ino == made
    file.write_bytes(b"damaged")
    assert demo.file().read_bytes() == WHOLE
    assert [path.read_text() for path in demo.licence_files()] == ["terms"]


def test_other_parts_are_refused_and_nothing_stays(demo: Demo, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the packages of the model model do not hold its file; got SHA-256"):
        replace(demo, sha256="0" * 64).file()
    assert not list((tmp_path / "cache/packages").glob("0*"))


@pytest.mark.parametrize("name", sorted(DEMOS))
def test_a_package_that_is_not_installed_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = replace(DEMOS[name], parts=(("no_such_package", "model.gguf"),))
    with pytest.raises(MissingDependencyError, match=rf"is not installed; .*edge-exporter\[{name}\]"):
        missing.file()


def test_terms_beside_a_model_are_carried(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model")
    (folder / "LICENSE").write_text("as is")
    (folder / "NOTICE.md").write_text("by")
    (folder / "LICENSE.weights").write_bytes(bytes(MAX_BYTES + 1))
    with open_model(str(folder)) as model:
        assert model.licences == licence_files(folder) == (folder / "LICENSE", folder / "NOTICE.md")
        write_licences(tmp_path, model.licences)
    assert {path.name: path.read_text() for path in (tmp_path / "licences").iterdir()} == {
        "LICENSE": "as is",
        "NOTICE.md": "by",
    }


def test_without_terms_there_is_no_folder(tmp_path: Path) -> None:
    write_licences(tmp_path, ())
    assert not list(tmp_path.iterdir())
