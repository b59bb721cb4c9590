"""Chat templates of any content, in transformers and in both runtimes: an answer, a refusal, or an end by force."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import pytest

from exporter.bundle.installed import as_chat
from exporter.calibrate.sample import notes, opening_ids
from exporter.child.process import Child
from exporter.foundation.errors import DeadlineError, RequestError, RuntimeCrashError
from exporter.foundation.quantities import Check
from exporter.model.chat import LOAD_S, TEXT_BYTES, Rendered
from exporter.model.sources import open_model
from exporter.model.template import TemplateRenderer
from exporter.model.tokenizer import load_tokenizer
from exporter.prove.text_checks import check_text
from exporter.targets.artifact import Artifact
from exporter.targets.contract import load_target
from exporter.targets.gguf.tokenize import LlamaTokenizer
from exporter.targets.gguf.vocabulary import read_vocabulary, write_vocabulary_file
from exporter.targets.onnx.companions import write_text_files
from exporter.targets.onnx.tokenize import GenaiTokenizer
from exporter.targets.text import open_text
from tests.models import TEMPLATE, VOCAB, tiny_model

CHAT = [{"role": "user", "content": "Hello"}]
LOOPS = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
RECURSION = "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}"
REFUSED = {
    "a syntax error": "{% for m in messages %}{{ m.content }",
    "a range beyond the sandbox": "{% for i in range(10000000000) %}{% endfor %}",
    "a string of all memory": "{% set ns = namespace(s='x' * 1000000) %}"
    "{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "a refusal": "{{ raise_exception('never') }}",
    "what is not defined": "{{ nothing.of.that }}",
    "the interpreter's inside": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "a division by zero": "{{ 1 / 0 }}",
    "another file": "{% include '/etc/hostname' %}",
    "deep brackets": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
}
TAKEN = {
    "the usual": (TEMPLATE, "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"),
    "what is no text": ("{{ 5 }}{{ [1, 2] }}", "5[1, 2]"),
    "10 MB of text": ("y" * 10_000_000 + "{{ messages[0].content }}", "y" * 10_000_000 + "Hello"),
}
SYSTEM_FIRST = (
    "{% if messages[0].role != 'system' %}{{ raise_exception('a system message first') }}{% endif %}" + TEMPLATE
)
PARTS = (
    "{% for m in messages %}<{{ m.role }}>{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}"
    "{% endif %}{% endfor %}{% endfor %}"
)
TIMED = "{{ strftime_now('%d %b %Y %H:%M:%S') }}" + TEMPLATE


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("templates") / "model")


class Renderers:
    """Render by any template: in transformers, or in a runtime whose files are written for it, in a `Child`."""

    def __init__(self, folder: Path, scratch: Path) -> None:
        self._vocabulary = read_vocabulary(load_tokenizer(folder, VOCAB), folder, VOCAB)
        self._scratch = scratch

    def transformers(self, template: str) -> Rendered:
        return TemplateRenderer(template, {}, False).render_chat(CHAT, True)

    def gguf(self, template: str) -> Rendered:
        path = self._scratch / "vocabulary.gguf"
        special = replace(self._vocabulary.special, templates={"default": template})
        write_vocabulary_file(path, replace(self._vocabulary, pre_tokenizer="gpt-2", special=special))
        return LlamaTokenizer(path).render_chat(CHAT, True)

    def onnx(self, template: str) -> Rendered:
        (self._scratch / "chat_template.jinja").write_text(template)
        return GenaiTokenizer(self._scratch).render_chat(CHAT, True)


Start = Callable[[], Child]


@pytest.fixture(scope="module")
def start(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Start:
    scratch, tokenizer = tmp_path_factory.mktemp("scratch"), load_tokenizer(folder, VOCAB)
    write_text_files(tokenizer, 512, scratch)
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    settings = {"model": {"type": "llama", "vocab_size": VOCAB, "context_length": 512} | ids}
    (scratch / "genai_config.json").write_text(json.dumps(settings))

    def started() -> Child:
        child = Child("the renderers", TEXT_BYTES)
        child.make(Renderers, LOAD_S, folder, scratch)
        return child

    return started


@pytest.mark.parametrize("by", ["transformers", "gguf", "onnx"])
def test_templates_are_taken_refused_or_ended_by_force(start: Start, by: str) -> None:
    render = getattr(Renderers, by)
    with start() as child:
        child.ready()
        for name, template in REFUSED.items():
            rendered = child.call(render, 20, template)
            assert rendered.text is None and 0 < len(rendered.reason) <= 200, name
        for name, (template, expected) in TAKEN.items():
            assert child.call(render, 20, template) == Rendered(expected), name
        if by != "onnx":
            assert "recursion" in child.call(render, 20, RECURSION).reason
        with pytest.raises(DeadlineError, match=r"did not answer within 0\.5 s, and was ended"):
            child.call(render, 0.5, LOOPS)


def test_a_runtime_may_die_of_a_template(start: Start) -> None:
    with start() as child, pytest.raises(RuntimeCrashError, match="signal SIGSEGV"):
        child.call(Renderers.onnx, 20, RECURSION)


def checked(folder: Path, templates: dict[str, str], target: str, scratch: Path) -> tuple[Check, Artifact]:
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    path = folder / "tokenizer_config.json"
    listed = [{"name": name, "template": text} for name, text in templates.items()]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": listed}))
    scratch.mkdir()
    with open_model(str(folder)) as model:
        artifact = load_target(target).lower_text(model, scratch)
    assert artifact is not None
    with open_text(artifact) as child:
        return check_text(child, load_tokenizer(folder, VOCAB))[-1], artifact


@pytest.mark.parametrize("target", ["gguf", "onnx"])
def test_templates_in_the_real_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    monkeypatch.setattr("exporter.model.chat.RENDER_S", 1.0)
    folder = tiny_model(tmp_path / "model")

    def of(template: str, name: str) -> tuple[Check, Artifact]:
        return checked(folder, {"default": template, "tool_use": "tools", "../x": "no"}, target, tmp_path / name)

    first, artifact = of(SYSTEM_FIRST, "first")
    assert (first.status, first.detail) == (
        "passed",
        "8 of 8 chats equal; the template refuses 6 of them as they are, and takes them with a system message in front",
    )
    with pytest.raises(RequestError, match=r"refuses the prompt; got a system message first.*; leave out --chat"):
        as_chat(artifact, "Hi")
    parts, artifact = of(PARTS, "parts")
    assert parts.detail.startswith("8 of 8 chats equal; 7 of them with contents as lists of parts"), parts.detail
    assert as_chat(artifact, "Hi") == "<user>Hi"
    timed, _ = of(TIMED, "timed")
    assert (timed.status, timed.detail) == ("passed", "8 of 8 chats equal")
    endless, artifact = of(LOOPS, "endless")
    assert endless.status == "not run" and "did not answer within 1 s, and was ended" in endless.detail
    with pytest.raises(
        RequestError, match=r"template cannot be used; got .* within 1 s, and was ended; leave out --chat"
    ):
        as_chat(artifact, "Hi")


@pytest.mark.parametrize("target", ["gguf", "onnx"])
def test_other_templates_are_carried_by_name_where_there_is_a_place(tmp_path: Path, target: str) -> None:
    folder, made = tiny_model(tmp_path / "model"), tmp_path / "made"
    _, artifact = checked(folder, {"default": TEMPLATE, "tool_use": "t", "../x": "no"}, target, made)
    note = "chat templates whose names cannot be names of files are left out: '../x'"
    assert load_tokenizer(folder, VOCAB).notes == (note,)
    if target == "gguf":
        fields = gguf.GGUFReader(artifact.weights[0]).fields
        assert fields["tokenizer.chat_templates"].contents() == ["tool_use"]
        assert fields["tokenizer.chat_template.tool_use"].contents() == "t"
        assert fields["tokenizer.chat_template"].contents() == TEMPLATE
    else:
        assert (made / "chat_template.jinja").read_text() == TEMPLATE
        assert [path.name for path in (made / "additional_chat_templates").iterdir()] == ["tool_use.jinja"]


def test_a_chat_opens_the_same_every_day_by_any_template(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exporter.model.chat.RENDER_S", 1.0)
    tokenizer = load_tokenizer(folder, VOCAB)

    def opening(template: str) -> tuple[list[int], tuple[str, ...]]:
        made = replace(tokenizer, templates={"default": template})
        return opening_ids(made), notes(made)

    assert opening(TIMED) == (tokenizer.inner_ids("26 Jul 2024 00:00:00<|im_start|>user\n"), ())
    assert opening(SYSTEM_FIRST)[0] == tokenizer.inner_ids(
        "<|im_start|>system\nYou are brief.<|im_end|>\n<|im_start|>user\n"
    )
    for template, reason in (("{{ 1 }", "unexpected '}'"), (LOOPS, "within 1 s")):
        ids, (note,) = opening(template)
        assert (
            ids == []
            and note.startswith("text that the model writes begins without a chat's opening")
            and reason in note
        )
