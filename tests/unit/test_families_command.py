"""`edge-exporter families`: what it lists, and that every family's figures were measured."""

import json

import pytest
from click.testing import Result
from typer.testing import CliRunner

from exporter.cli.main import app
from exporter.model.family import families
from exporter.targets.artifact import target_names
from exporter.targets.contract import load_target
from exporter.targets.parity import family_rows, parity

# Nothing in this target's artifacts is computed in floating point.
WITHOUT_FIGURES = ("onnx-qdq",)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["families", *arguments])


@pytest.mark.parametrize("target", [name for name in target_names() if name not in WITHOUT_FIGURES])
def test_every_family_that_a_target_builds_was_measured(target: str) -> None:
    built = {one.model_type for one in families().values() if load_target(target).lacks(one) is None}
    figures = parity().targets[target].kl_mean
    assert figures.keys() == built, "run the command that parity.toml names"
    assert max(figures.values()) < 1e-6


def test_it_lists_each_family_with_each_target() -> None:
    said = run("--json")
    assert said.exit_code == 0
    rows = json.loads(said.output)["families"]
    assert [row["model_type"] for row in rows] == sorted(family.model_type for family in families().values())
    olmo = next(row for row in rows if row["model_type"] == "olmo2")
    assert [(one["target"], one["lacks"] is None) for one in olmo["targets"]] == [
        (name, name == "gguf") for name in target_names()
    ]
    assert "Mistral 7B" in run().output


def test_with_a_target_it_lists_what_that_builds() -> None:
    said = json.loads(run("--target", "onnx", "--json").output)
    assert "olmo2" not in {row["model_type"] for row in said["families"]}
    assert {one["target"] for row in said["families"] for one in row["targets"]} == {"onnx"}


def test_usable_contexts_are_those_of_the_descriptions() -> None:
    contexts = {row.model_type: row.context for row in family_rows([])}
    assert contexts["llama"] == contexts["gemma3_text"] == "full"
    assert contexts["mistral"] == "full, or the attention window if the model has one"
    assert "longrope" in contexts["phi3"]


def test_limits_of_targets_are_named_once() -> None:
    (ministral,) = (row for row in family_rows(list(target_names())) if row.model_type == "ministral3")
    assert ministral.contexts == (
        "full, or the attention window if the model has one; "
        "onnx, onnx-qdq: at most the original context of its rotary embeddings"
    )


def test_a_model_with_an_encoder_is_found_by_its_model_type() -> None:
    rows = {row.model_type: row.model_types for row in family_rows([])}
    assert rows["gemma4_text"] == ("gemma4_text", "gemma4")
    assert rows["llama"] == ("llama",)


def test_an_unknown_target_is_refused() -> None:
    said = run("--target", "gguff")
    assert said.exit_code != 0
    assert "unknown target 'gguff'" in str(said.exception)
