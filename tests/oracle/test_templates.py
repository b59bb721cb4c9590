"""Chat templates are programs of anybody's: whatever one does, `plan` ends with a check that says so."""

import shutil
from pathlib import Path

import pytest

from exporter.job import Job
from exporter.measures import Check
from exporter.model import chat
from exporter.pipeline import plan
from tests.models import TEMPLATE, tiny_model

LOOP = "".join(f"{{% for {name} in range(99999) %}}" for name in "abc") + "{% endfor %}" * 3
SYSTEM_FIRST = (
    "{% if messages[0]['role'] != 'system' %}{{ raise_exception('a system message must come first') }}{% endif %}"
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("templates") / "model")


def check(whole: Path, folder: Path, template: str, target: str = "gguf") -> Check:
    model = Path(shutil.copytree(whole, folder / "model"))
    (model / "chat_template.jinja").write_text(template)
    planned, _ = plan(Job(str(model), "raspberry-pi-5", target, context=128))
    (found,) = (one for one in planned.text_checks if one.name.startswith("parity.chat_template"))
    return found


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('never') }}", "refuses all 8 chats"),
        ("{{ messages.__class__.__mro__ }}", "refuses all 8 chats"),
        ("{{ 'x' * 99999999999 }}", ""),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", ""),
        (LOOP, ""),
    ],
)
def test_a_template_that_gives_no_chat_is_not_run(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str, reason: str
) -> None:
    monkeypatch.setattr(chat, "RENDER_S", 3.0)
    found = check(whole, tmp_path, template)
    assert found.status == "not run"
    assert reason in found.detail


@pytest.mark.parametrize("target", ["gguf", "onnx"])
def test_a_template_that_wants_a_system_message_is_given_one(whole: Path, tmp_path: Path, target: str) -> None:
    found = check(whole, tmp_path, SYSTEM_FIRST + TEMPLATE, target)
    assert found.status == "passed"
    assert "the template refuses 6 of them as they are" in found.detail
