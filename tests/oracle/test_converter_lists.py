"""Keys and tensors of GGUF files are those of llama.cpp's own converter, but for the differences listed here."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from exporter.model.sources import open_model
from exporter.targets.contract import load_target
from tests.converter_lists import CASES, converted, entries, make_model
from tests.gguf_files import edited_gguf

CONVERTED = converted()
FAMILIES = tuple({case.family: None for case in CASES.values()})


@dataclass(frozen=True)
class Difference:
    """Keys or tensors that the converter writes otherwise.

    Attributes:
        names: Their names.
        where: Families or cases.
        ours: What this exporter writes; None for nothing.
        reason: Why.
    """

    names: tuple[str, ...]
    where: tuple[str, ...]
    ours: str | None
    reason: str


HEADS = ("attention.key_length", "attention.value_length")
WINDOWED = ("mistral with a window", "qwen2 with windows")
PHI_4 = ("phi3 like Phi-4-mini",)
DIFFERENCES = (
    # Added.
    Difference(("edge_exporter.end_tokens",), FAMILIES, "STRING 1", "llama.cpp has no key for a list of end tokens"),
    Difference(
        ("vocab_size",), ("gemma3_text", "gemma4_text", "olmo2", "olmo3", "phi3", "qwen2", "qwen3", "qwen3_moe"),
        "UINT32 320", "a file states its sizes, whatever the family; llama.cpp counts the tokens instead",
    ),
    Difference(
        ("rope.dimension_count",), ("gemma3_text", "lfm2", "olmo2", "olmo3", "qwen2", "qwen3", "qwen3_moe"),
        "UINT32 16", "a file states its sizes, whatever the family; it is llama.cpp's default",
    ),
    Difference(
        HEADS, ("granite", "granitemoehybrid", "phi3 tied", "phi3 untied"), "UINT32 16",
        "llama.cpp's default is right only where heads are as wide as the residual stream together",
    ),
    Difference(HEADS, PHI_4, "UINT32 64", "as for other models of the family"),
    Difference(
        ("attention.sliding_window_pattern",), ("gemma3_text",), "BOOL [True False]",
        "without it, llama.cpp assumes that every sixth layer has no window",
    ),
    Difference(
        ("attention.sliding_window",), WINDOWED, "UINT32 64",
        "the window is stated for other readers; llama.cpp ignores it in this architecture",
    ),
    Difference(
        ("rope.scaling.attn_factor",), ("llama yarn", "olmo3"), "FLOAT32 1.0",
        "it is written for every yarn, since models may have a factor of their own; 1 changes nothing",
    ),
    # Other values.
    Difference(
        ("token_embd.weight",), ("gemma3_text", "gemma4_text"), "F32 320x64 f082a99951",
        "the converter drops the rows beyond the tokenizer's last token, and the file pads the tokens instead",
    ),
    Difference(
        ("attention.head_count_kv",), ("granitemoehybrid",), "UINT32 2",
        "the converter has a list for models with Mamba layers; llama.cpp takes one number for all layers",
    ),
    Difference(
        ("rope.scaling.finetuned",), ("granitemoehybrid without rotary embeddings",), "BOOL False",
        "the converter switches rotary embeddings on in every model without Mamba layers, where this one has none",
    ),
    Difference(
        ("context_length",), WINDOWED, "UINT32 64",
        "llama.cpp ignores the window in this architecture, so the context ends where it begins to matter",
    ),
    Difference(
        ("context_length",), PHI_4, "UINT32 256", "llama.cpp takes the long factors by the size of the cache"
    ),
    Difference(
        ("attention.sliding_window",), PHI_4, "UINT32 0",
        "llama.cpp ignores it in this architecture, with a warning; the context is no longer than the window",
    ),
    # Left out.
    Difference(
        ("expert_count", "expert_used_count", "expert_shared_feed_forward_length"), ("granitemoehybrid",), None,
        "the model has no experts, and llama.cpp's 'granite' reads no key of them",
    ),
    Difference(
        ("ssm.conv_kernel", "ssm.group_count", "ssm.inner_size", "ssm.state_size", "ssm.time_step_rank"),
        ("granitemoehybrid",), None, "the model has no Mamba layers, and llama.cpp's 'granite' reads no key of them",
    ),
    Difference(
        ("rope.freq_base_swa",), ("olmo3",), None,
        "llama.cpp's 'olmo2' rotates all layers by one base, and a model with two is refused",
    ),
    Difference(
        ("rope.scaling.original_context_length",), ("phi3 tied", "phi3 untied"), None,
        "it matters only to a model with long and short factors",
    ),
    Difference(
        ("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"), ("ministral3",), None,
        "they are llama.cpp's defaults, and a model with others is refused where it matters",
    ),
    # The same factor in two ways.
    Difference(
        ("rope.scaling.yarn_log_multiplier",), ("ministral3",), None,
        "it is in rope.scaling.attn_factor, which holds any factor that a model may have",
    ),
    Difference(
        ("rope.scaling.attn_factor",), ("ministral3",), "FLOAT32 0.7829266",
        "the converter has it in rope.scaling.yarn_log_multiplier",
    ),
)  # fmt: skip


def listed(name: str) -> dict[str, str | None]:
    """Return name -> what this exporter writes, of the differences of a case."""
    rows = [row for row in DIFFERENCES if name in row.where or CASES[name].family in row.where]
    counted = Counter(one for row in rows for one in row.names)
    assert max(counted.values()) == 1, f"{name}: listed twice: {counted.most_common(1)}"
    return {one: row.ours for row in rows for one in row.names}


def differing(ours: dict[str, str], theirs: dict[str, str]) -> dict[str, str | None]:
    """Return name -> what this exporter writes, of all that the converter writes otherwise."""
    return {name: ours.get(name) for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)}


def written(name: str, scratch: Path) -> Path:
    """Return this exporter's file of a case."""
    folder = make_model(CASES[name], scratch / "model")
    (scratch / "artifact").mkdir()
    with open_model(str(folder)) as model:
        return load_target("gguf").write_float(model, scratch / "artifact").weights[0]


def test_every_case_has_a_list_and_every_row_a_case() -> None:
    assert CONVERTED.keys() == CASES.keys()
    assert {one for row in DIFFERENCES for one in row.where} <= {*FAMILIES, *CASES}


@pytest.mark.parametrize("name", CASES)
def test_a_file_is_the_converters_but_for_what_is_listed(tmp_path: Path, name: str) -> None:
    assert differing(entries(written(name, tmp_path)), CONVERTED[name]) == listed(name)


def test_a_wrong_file_is_seen(tmp_path: Path) -> None:
    name = "llama llama3"
    path = written(name, tmp_path)
    queries = np.zeros((64, 64), np.float32)
    wrong: list[tuple[dict[str, object], dict[str, np.ndarray], str]] = [
        ({"llama.rope.freq_base": 1e6}, {}, "rope.freq_base"),
        ({"llama.context_length": None}, {}, "context_length"),
        # The type counts, too: llama.cpp does not read a whole number as a float.
        ({"llama.attention.layer_norm_rms_epsilon": 1}, {}, "attention.layer_norm_rms_epsilon"),
        ({"llama.more": 1}, {}, "more"),
        ({"general.architecture": "deci"}, {}, "architecture"),
        ({}, {"blk.0.attn_q.weight": queries}, "blk.0.attn_q.weight"),
        ({}, {"rope_freqs.weight": np.ones(8, np.float32)}, "rope_freqs.weight"),
    ]
    for number, (keys, tensors, expected) in enumerate(wrong):
        edited = edited_gguf(path, tmp_path / f"{number}.gguf", keys, tensors)
        found = differing(entries(edited), CONVERTED[name]).keys() - listed(name).keys()
        assert expected in found, expected
        assert len(found) == 1 or expected == "architecture"
