"""LoRA adapters kept beside their base: both together in llama.cpp are the merged model, and the base is its own."""

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from exporter import pipeline
from exporter.bundle.installed import as_chat, self_test
from exporter.bundle.opening import opened_bundle
from exporter.bundle.verify import verify_bundle
from exporter.foundation.errors import RequestError
from exporter.model.gguf_names import interleaved_rows
from exporter.model.sources import open_model
from exporter.planning.job import Job
from exporter.planning.plan import read_plan
from exporter.prove.accuracy import divergence
from exporter.targets.artifact import Artifact
from exporter.targets.contract import load_target
from exporter.targets.gguf.adapter_keys import read_adapter_text
from exporter.targets.opened import OpenedArtifact
from tests.adapters import LINEARS, PREFIX, merged, tiny_adapter
from tests.commands import cli, printed
from tests.folders import TOKENS, transformers_logits
from tests.models import VOCAB, tiny_model

TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}!{{ eos_token }}{% endfor %}"
# Nats; a float32 adapter beside a float32 base is 1e-12 away from the merged model in most families.
MOST_KL = 1e-6
FAMILIES = (("gemma3_text", True), ("lfm2", True), ("llama", False), ("olmo2", False), ("qwen2", True))
WORDS = "the capital of France is Paris, numbers 12 345 and hello world. " * 400
Change = Callable[[dict[str, np.ndarray]], None]


def written(adapter: Path, folder: Path) -> Artifact:
    """Return base and adapter in float32."""
    folder.mkdir()
    with open_model(str(adapter), adapter="keep") as model:
        assert model.base is not None
        return load_target("gguf").write_float(model.base, folder)


def changed(artifact: Artifact, change: Change) -> None:
    """Change the factors in an adapter's file in place: name -> float32, rows in the file's order."""
    tensors = gguf.GGUFReader(artifact.folder / "adapter.gguf", "r+").tensors
    change({tensor.name: tensor.data for tensor in tensors})
    for tensor in tensors:
        tensor.data.flush()


def kl(artifact: Artifact, expected: np.ndarray) -> float:
    with OpenedArtifact(artifact, 128, 1, exact=True) as child:
        return float(divergence(expected, child.logits(TOKENS, 0)).mean())


@pytest.mark.parametrize(("family", "tied"), FAMILIES)
def test_base_and_adapter_are_the_merged_model(tmp_path: Path, family: str, tied: bool) -> None:
    base = tiny_model(tmp_path / "base", family, tied=tied, layers=3)
    adapter = tiny_adapter(tmp_path / "adapter", base, modules=LINEARS if tied else (*LINEARS, "lm_head"))
    expected = transformers_logits(merged(tmp_path / "merged", base, adapter))
    artifact = written(adapter, tmp_path / "artifact")
    assert kl(artifact, expected) < MOST_KL
    assert kl(Artifact("gguf", artifact.folder, artifact.weights[:1]), expected) > 1e-3


def test_ranks_alphas_and_the_scaling_of_their_own(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", "llama", layers=2)
    deep = {f"model.layers.{layer}.mlp.down_proj": 7 for layer in range(2)}
    adapter = tiny_adapter(
        tmp_path / "adapter", base, ranks=deep, use_rslora=True, rank_pattern={"down_proj": 7},
        alpha_pattern={"q_proj": 5},
    )  # fmt: skip
    alphas = {f"model.layers.{layer}.self_attn.q_proj": 5.0 for layer in range(2)}
    artifact = written(adapter, tmp_path / "artifact")
    assert kl(artifact, transformers_logits(merged(tmp_path / "merged", base, adapter, alphas))) < MOST_KL
    assert kl(artifact, transformers_logits(merged(tmp_path / "wrong", base, adapter))) > 1e-5


def one_value(held: dict[str, np.ndarray]) -> None:
    held["blk.1.ffn_down.weight.lora_b"][3, 1] += 1


def row_order(held: dict[str, np.ndarray]) -> None:
    left = held["blk.0.attn_q.weight.lora_b"]
    left[:] = left[interleaved_rows(len(left), 4)]


@pytest.mark.parametrize("change", [one_value, row_order])
def test_a_wrong_value_is_seen(tmp_path: Path, change: Change) -> None:
    base = tiny_model(tmp_path / "base", "llama", layers=2)
    adapter = tiny_adapter(tmp_path / "adapter", base)
    expected = transformers_logits(merged(tmp_path / "merged", base, adapter))
    artifact = written(adapter, tmp_path / "artifact")
    assert kl(artifact, expected) < MOST_KL
    changed(artifact, change)
    assert kl(artifact, expected) > 10 * MOST_KL


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two adapters on it of which the first is a chat's, the base of another shape, and a text."""
    folder = tmp_path_factory.mktemp("kept")
    base = tiny_model(folder / "base", "llama", layers=2)
    tiny_adapter(folder / "two", base, modules=("q_proj", "v_proj"), use_rslora=True)
    adapter = tiny_adapter(folder / "one", base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template, tokenizer.eos_token = TEMPLATE, "<|im_start|>"
    tokenizer.save_pretrained(adapter)
    (folder / "text.txt").write_text(WORDS)
    return folder


def job(world: Path, name: str, **changes: object) -> Job:
    text = world / "text.txt"
    usual = {"calibration": text, "evaluation": text, "context": 128, "window": 64, "effort": "fast", "target": "gguf"}
    limits = {"max_file_bytes", "recipe"} & changes.keys()
    usual |= {"device": "raspberry-pi-5", "adapter": "merge" if name == "base" else "keep"}
    return Job(str(world / name), **usual | ({} if limits else {"type": "Q4_0"}) | changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def bundles(world: Path) -> dict[str, pipeline.Bundle]:
    """Name -> bundle, of the base and of each adapter kept beside it."""
    names = ("base", "one", "two")
    return {name: pipeline.build(job(world, name, output=world / f"bundle-{name}")) for name in names}


def test_the_base_is_the_same_file_beside_every_adapter(bundles: dict[str, pipeline.Bundle]) -> None:
    files = {name: (bundle.path / "model" / "model.gguf").read_bytes() for name, bundle in bundles.items()}
    assert files["one"] == files["two"] == files["base"]
    adapters = [(bundles[name].path / "model" / "adapter.gguf").read_bytes() for name in ("one", "two")]
    assert adapters[0] != adapters[1]


def test_the_proof_is_of_both_against_the_merged_model(bundles: dict[str, pipeline.Bundle]) -> None:
    for name, matrices in (("one", 14), ("two", 4)):
        bundle = bundles[name]
        report = bundle.report
        assert report.passed, report.checks
        assert report.model.origin == f"LoRA adapter {name}, kept beside Hugging Face folder base"
        assert any("of both together against the merged model" in note for note in report.model.warnings)
        assert sum(row.format == "Q4_0+r4-F32" for row in report.tensors) == matrices
        assert all(row.reason.count("an adapter's factors") <= 1 for row in report.tensors)
        sizes = [path.stat().st_size for path in (bundle.path / "model").glob("*.gguf")]
        assert report.size.file_bytes.value == sum(sizes)
        # Of the codes alone: the adapter would move it by more.
        assert report.accuracy.kl_mean.value < 2 * bundles["base"].report.accuracy.kl_mean.value
        assert {check.status for check in verify_bundle(bundle.path)} == {"passed"}
        assert self_test(bundle.path, 1).status == "passed"


def test_a_fine_tune_keeps_its_template_and_its_ends(bundles: dict[str, pipeline.Bundle]) -> None:
    bundle = bundles["one"]
    text = read_adapter_text(bundle.path / "model" / "adapter.gguf")
    assert text is not None
    assert (text.template, text.ends[0]) == (TEMPLATE, text.eos)
    assert (bundle.path / "model" / "chat_template.jinja").read_text() == TEMPLATE
    with opened_bundle(bundle.path) as artifact:
        assert as_chat(artifact, "hi") == "<|im_start|>hi!<|im_start|>"
    assert any("by itself takes the base's chat template" in note for note in bundle.report.model.warnings)
    with opened_bundle(bundles["two"].path) as artifact, opened_bundle(bundles["base"].path) as base:
        assert as_chat(artifact, "hi") == as_chat(base, "hi") != "<|im_start|>hi!<|im_start|>"


def test_a_plan_repeats_it(world: Path, bundles: dict[str, pipeline.Bundle]) -> None:
    first = bundles["two"]
    text = world / "text.txt"
    again = Job(str(world / "two"), calibration=text, evaluation=text, output=world / "again")
    repeated = pipeline.build(again.repeating(read_plan(first.path / "plan.json")))
    assert repeated.manifest.content_digest == first.manifest.content_digest


def test_plan_says_what_the_adapter_takes_and_budgets_count_it(world: Path) -> None:
    outline = pipeline.plan(job(world, "one"))
    assert outline.adapter_bytes is not None
    assert pipeline.plan(job(world, "base")).adapter_bytes is None
    most = 220_000
    made = pipeline.build(job(world, "one", max_file_bytes=most, output=world / "small"))
    size = (made.path / "model" / "adapter.gguf").stat().st_size
    assert size <= outline.adapter_bytes.value < size + 2_000
    assert made.report.size.file_bytes.value <= most
    alone = pipeline.plan(job(world, "base", max_file_bytes=most))
    with_adapter = pipeline.plan(job(world, "one", max_file_bytes=most))
    assert sum(one.bytes for one in alone.decisions) > sum(one.bytes for one in with_adapter.decisions) - size


def whole_tensors(folder: Path) -> Path:
    base = tiny_model(folder / "base", "qwen3", layers=1, tied=False)
    copies = {"model.norm.weight": torch.rand(64)}
    return tiny_adapter(folder / "adapter", base, copies=copies, modules_to_save=["norm"])


def another_vocabulary(folder: Path) -> Path:
    base = tiny_model(folder / "base", "qwen3", layers=1, tied=False)
    copies = {f"{name}.weight": torch.zeros(VOCAB + 8, 64) for name in ("model.embed_tokens", "lm_head")}
    return tiny_adapter(folder / "adapter", base, copies=copies, modules_to_save=["embed_tokens", "lm_head"])


def table_of_embeddings(folder: Path) -> Path:
    base = tiny_model(folder / "base", "llama", layers=1, tied=False)
    adapter = tiny_adapter(folder / "adapter", base, modules=("embed_tokens",))
    held, stem = load_file(adapter / "adapter_model.safetensors"), f"{PREFIX}model.embed_tokens.lora_"
    a, b = held[f"{stem}A.weight"], held[f"{stem}B.weight"]
    turned = {f"{stem}embedding_A": b.T.contiguous(), f"{stem}embedding_B": a.T.contiguous()}
    save_file(turned, adapter / "adapter_model.safetensors")
    return adapter


def of_family(family: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        base = tiny_model(folder / "base", family, layers=1, tied=family != "qwen3_moe")
        return tiny_adapter(folder / "adapter", base)

    return make


def other_tokens(folder: Path) -> Path:
    adapter = of_family("llama")(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    tokenizer.save_pretrained(adapter)
    definition = json.loads((adapter / "tokenizer.json").read_text())
    definition["model"]["merges"] = definition["model"]["merges"][:-1]
    (adapter / "tokenizer.json").write_text(json.dumps(definition))
    return adapter


FACTORS = 'schema_version = 1\ntitle = "factors"\n[[step]]\nmethod = "caldera"\nrank = 32\n'
REFUSALS = {
    "another vocabulary": (another_vocabulary, {}, "the adapter replaces whole tensors of the base"),
    "caldera": (of_family("llama"), {"recipe": FACTORS}, "low-rank factors and an adapter cannot both be kept"),
    "experts": (of_family("qwen3_moe"), {}, "the target gguf cannot keep factors of an adapter beside this matrix"),
    "fused matrices": (of_family("phi3"), {}, "factors of a tensor that is not one matrix here"),
    "onnx": (of_family("llama"), {"target": "onnx"}, "the target onnx cannot keep factors of an adapter beside"),
    "other tokens": (other_tokens, {}, "the adapter's tokenizer is not that of the base"),
    "pruning": (of_family("llama"), {"recipe": "prunenet"}, "the step prunenet changes the base"),
    "table": (table_of_embeddings, {}, "embed_tokens.*: the target gguf cannot keep factors"),
    "whole tensors": (whole_tensors, {}, r"whole tensors of the base, .*; got model\.norm\.weight, expected factors"),
}


@pytest.mark.parametrize("name", sorted(REFUSALS))
def test_what_cannot_be_kept_is_refused(tmp_path: Path, name: str) -> None:
    make, options, message = REFUSALS[name]
    if options.get("recipe") == FACTORS:
        options = {"recipe": str(tmp_path / "factors.toml")}
        (tmp_path / "factors.toml").write_text(FACTORS)
    usual = {"device": "raspberry-pi-5", "target": "gguf", "context": 64, "adapter": "keep"}
    with pytest.raises(RequestError, match=message) as caught:
        pipeline.plan(Job(str(make(tmp_path)), **usual | options))  # type: ignore[arg-type]
    assert str(caught.value).endswith("--adapter merge.")
    assert len(str(caught.value).splitlines()) == 1


def test_a_model_that_is_no_adapter(world: Path) -> None:
    with pytest.raises(RequestError, match=r"an adapter is to be kept, but the model is no adapter; .* leave out --ad"):
        pipeline.plan(job(world, "base", adapter="keep"))


def test_the_command_line(world: Path, bundles: dict[str, pipeline.Bundle]) -> None:
    asked = ("--device", "raspberry-pi-5", "--target", "gguf", "--type", "Q4_0", "--context", "128")
    planned = json.loads(printed(world, "plan", "one", "--adapter", "keep", *asked, "--json"))
    size = bundles["one"].path.joinpath("model", "adapter.gguf").stat().st_size
    assert planned["adapter_bytes"]["value"] >= size
    assert "adapter bytes" in printed(world, "plan", "one", "--base", "base", "--adapter", "keep", *asked)
    assert "kept beside" in printed(world, "inspect", "bundle-one", "--json")
    assert printed(world, "run", "bundle-one", "--chat", "-p", "hello")
    refused = cli(world, "plan", "one", "--adapter", "keep", "--plan", "bundle-one/plan.json")
    assert refused.returncode == 2
    assert "the plan decides this already; got --adapter" in refused.stderr
