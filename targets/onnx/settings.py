"""The accepted keys of genai_config.json and tokenizer_config.json, for both writing and reading.

onnxruntime-genai obeys these files: a key can make it load a library or write a file. No other keys are accepted.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from exporter.foundation.quantities import Document
from exporter.foundation.registry import names
from exporter.targets.onnx.rounding import DISABLE_KLEIDIAI

CONFIGURATION, TOKENIZER_SETTINGS = "genai_config.json", "tokenizer_config.json"
MODEL_FILE, DATA_FILE = "model.onnx", "model.onnx.data"
TOKEN_NAME = r"^[a-z0-9_]{0,64}_token$"

Size = Annotated[int, Field(ge=1, le=1 << 24)]
Few = Annotated[int, Field(ge=1, le=4096)]
TokenId = Annotated[int, Field(ge=0, le=1 << 24)]
TokenIds = Annotated[tuple[TokenId, ...], Field(max_length=256)]
Share = Annotated[float, Field(ge=0, le=1e6)]
ABSENT = Field(exclude_if=lambda value: value is None)


class SessionOptions(Document):
    """Options of the decoder's session."""

    log_id: Literal["onnxruntime-genai"]
    provider_options: Annotated[tuple[str, ...], Field(max_length=0)]
    without_kleidiai: Annotated[Literal["1"] | None, Field(alias=DISABLE_KLEIDIAI), ABSENT] = None


class Inputs(Document):
    """Names of the graph's inputs."""

    input_ids: Literal["input_ids"]
    attention_mask: Literal["attention_mask"]
    position_ids: Annotated[Literal["position_ids"] | None, ABSENT] = None
    past_key_names: Literal["past_key_values.%d.key"]
    past_value_names: Literal["past_key_values.%d.value"]
    past_conv_names: Annotated[Literal["past.%d.conv"] | None, ABSENT] = None


class Outputs(Document):
    """Names of the graph's outputs."""

    logits: Literal["logits"]
    present_key_names: Literal["present.%d.key"]
    present_value_names: Literal["present.%d.value"]
    present_conv_names: Annotated[Literal["present.%d.conv"] | None, ABSENT] = None


class Decoder(Document):
    """The graph and its shape; the last two entries are those of decoders with short convolutions."""

    session_options: SessionOptions
    filename: Literal["model.onnx"]
    head_size: Few
    hidden_size: Size
    inputs: Inputs
    outputs: Outputs
    num_attention_heads: Few
    num_hidden_layers: Few
    num_key_value_heads: Few
    layer_types: Annotated[tuple[Literal["full_attention", "conv"], ...] | None, ABSENT] = None
    conv_cache_size: Annotated[Few | None, ABSENT] = None

    @property
    def attention_layers(self) -> int:
        """Number of layers with keys and values."""
        return self.num_hidden_layers if self.layer_types is None else self.layer_types.count("full_attention")

    @model_validator(mode="after")
    def _names_each_layer(self) -> Self:
        if self.layer_types is not None and len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(f"layer_types must name each of the {self.num_hidden_layers} layers")
        own = (self.layer_types, self.conv_cache_size, self.inputs.past_conv_names, self.outputs.present_conv_names)
        if len({one is None for one in own}) > 1:
            raise ValueError("the entries of convolutions must be given together")
        return self


def _of_a_family(name: str) -> str:
    """Return the name of a family's file, which is its `model_type`."""
    known = [family.replace("-", "_") for family in names("exporter.model.families")]
    if name not in known:
        raise ValueError(f"a family of decoders is expected: {', '.join(known)}")
    return name


class GenaiModel(Document):
    """The model: its decoder and its special tokens."""

    context_length: Size
    decoder: Decoder
    eos_token_id: TokenId | TokenIds
    pad_token_id: TokenId
    type: Annotated[str, AfterValidator(_of_a_family)]
    vocab_size: Size
    bos_token_id: Annotated[TokenId | None, ABSENT] = None

    @model_validator(mode="after")
    def _has_its_tokens(self) -> Self:
        ends = self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)
        if max((*ends, self.pad_token_id, self.bos_token_id or 0)) >= self.vocab_size:
            raise ValueError(f"the ids of special tokens must be below the vocabulary's {self.vocab_size:,}")
        return self


class Search(Document):
    """How tokens are chosen; this tool itself decodes greedily."""

    diversity_penalty: Share
    do_sample: bool
    early_stopping: bool
    length_penalty: Share
    max_length: Size
    min_length: Literal[0]
    no_repeat_ngram_size: Literal[0]
    num_beams: Literal[1]
    num_return_sequences: Literal[1]
    past_present_share_buffer: bool
    repetition_penalty: Share
    temperature: Share
    top_k: Annotated[int, Field(ge=0, le=1 << 24)]
    top_p: Share
    chunk_size: Annotated[int, Field(ge=1, le=1 << 16)]


class GenaiConfig(Document):
    """genai_config.json."""

    model: GenaiModel
    search: Search

    def with_session_options(self, options: Mapping[str, str]) -> "GenaiConfig":
        """Return a copy with exactly these entries of the session's configuration."""
        decoder = self.model.decoder
        kept = {"log_id": decoder.session_options.log_id, "provider_options": decoder.session_options.provider_options}
        session = SessionOptions.model_validate(kept | dict(options))
        changed = decoder.model_copy(update={"session_options": session})
        return self.model_copy(update={"model": self.model.model_copy(update={"decoder": changed})})

    def to_text(self) -> str:
        """Return the file's content."""
        return json.dumps(self.model_dump(mode="json", by_alias=True), indent=4)


class TokenizerConfig(Document):
    """tokenizer_config.json, as written by this version and by version 0.1.0."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[Annotated[str, Field(pattern=TOKEN_NAME)], str]

    clean_up_tokenization_spaces: Annotated[bool | None, ABSENT] = None
    model_max_length: Size
    tokenizer_class: Literal["PreTrainedTokenizerFast", "TokenizersBackend"]
    backend: Annotated[Literal["tokenizers"] | None, ABSENT] = None
    is_local: Annotated[bool | None, ABSENT] = None
    local_files_only: Annotated[bool | None, ABSENT] = None

    def to_text(self) -> str:
        """Return the file's content."""
        return json.dumps(self.model_dump(mode="json"), indent=2, sort_keys=True, ensure_ascii=False)
