"""genai_config.json of the pipeline: stages, windows, and the options of Qualcomm's execution provider."""

import json
from collections.abc import Collection
from typing import Any

from exporter.targets.onnx_qdq.npu.stages import (
    CONTEXT,
    EMBEDDINGS,
    HEAD,
    HIDDEN_IN,
    HIDDEN_OUT,
    IDS,
    ITERATOR,
    LAYER_STAGES,
    LOGITS,
    PAST_LENGTH,
    TOTAL_LENGTH,
    WINDOW,
    graph_file,
)

LOG_ID = "onnxruntime-genai"
PROVIDER = "qnn"
STEMS = ("past_key_values", "present")
NO_PROVIDER = {"log_id": LOG_ID, "provider_options": []}


def compiled_file(stage: str) -> str:
    """Return the name of a stage's graph of context binaries."""
    return f"{stage}_ctx.onnx"


def provider_options(soc_number: int) -> dict[str, str]:
    """Return the options of Qualcomm's execution provider; `htp` is the neural processor."""
    return {
        "backend_type": "htp",
        "soc_model": str(soc_number),
        "htp_performance_mode": "burst",
        "htp_graph_finalization_optimization_mode": "3",
    }


def pipeline_settings(model: dict[str, Any], length: int, padding: int, soc_number: int) -> dict[str, Any]:
    """Return the settings of the pipeline.

    Args:
        model: genai_config.json of the artifact itself.
        length: Tokens that keys and values have room for; it becomes the context length.
        padding: The padding token.
        soc_number: The SoC's number.
    """
    decoder = model["model"]["decoder"]
    layers = range(decoder["num_hidden_layers"])
    past, present = ([f"{stem}.{layer}.{part}" for layer in layers for part in ("key", "value")] for stem in STEMS)
    on_processor = {"log_id": LOG_ID, "provider_options": [{PROVIDER: provider_options(soc_number)}]}
    lengths = {"past_sequence_length": PAST_LENGTH, "total_sequence_length": TOTAL_LENGTH}
    inputs = {name: value for name, value in decoder["inputs"].items() if name != "attention_mask"} | lengths

    def layers_stage(stage: str) -> dict[str, Any]:
        return {
            "filename": graph_file(stage),
            "inputs": [HIDDEN_IN, PAST_LENGTH, TOTAL_LENGTH, *past],
            "outputs": [HIDDEN_OUT, *present],
            "run_on_prompt": stage == CONTEXT,
            "run_on_token_gen": stage == ITERATOR,
            "session_options": on_processor,
        }

    def cpu_stage(stage: str, given: str, made: str) -> dict[str, Any]:
        return {"filename": graph_file(stage), "inputs": [given], "outputs": [made], "session_options": NO_PROVIDER}

    pipeline = {
        EMBEDDINGS: cpu_stage(EMBEDDINGS, IDS, HIDDEN_IN),
        **{stage: layers_stage(stage) for stage in LAYER_STAGES},
        HEAD: cpu_stage(HEAD, HIDDEN_OUT, LOGITS) | {"is_lm_head": True},
    }
    kept = {name: value for name, value in decoder.items() if name != "filename"}
    windows = {
        "window_size": WINDOW,
        "pad_value": padding,
        "alignment": "left",
        "slide_inputs": True,
        "slide_key_value_cache": False,
    }
    own = {
        "session_options": NO_PROVIDER,
        "inputs": inputs,
        "sliding_window": windows,
        "pipeline": [{name: stage} for name, stage in pipeline.items()],
    }
    facts = {
        "type": "decoder-pipeline",
        "decoder": kept | own,
        "pad_token_id": padding,
        "context_length": length,
    }
    # A prompt is read in windows, not in chunks.
    search = {name: value for name, value in model["search"].items() if name != "chunk_size"}
    return {"model": model["model"] | facts, "search": search | {"max_length": length}}


def with_compiled(settings: dict[str, Any], stages: Collection[str]) -> dict[str, Any]:
    """Return settings in which some stages are those with compiled binaries."""
    decoder = settings["model"]["decoder"]
    pipeline = [
        {name: stage | ({"filename": compiled_file(name)} if name in stages else {})}
        for entry in decoder["pipeline"]
        for name, stage in entry.items()
    ]
    return settings | {"model": settings["model"] | {"decoder": decoder | {"pipeline": pipeline}}}


def to_text(settings: dict[str, Any]) -> str:
    """Return the file's content."""
    return json.dumps(settings, indent=4) + "\n"
