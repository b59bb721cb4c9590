"""Texts that onnxruntime-genai is known to tokenise in another way than the tokenizer.json that it reads.

Measured with onnxruntime-genai 0.18.0 on the tokenizers of Gemma 3, Llama 3, Qwen 3 and gpt-oss.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from exporter.model.sentencepiece_file import SPACE
from exporter.model.tokenizer_files import TOKENIZER, components, ids_of_vocabulary

# It merges pieces in runs of at most this many, which it ends at spaces where it can.
RUN = 100
OF_EVERY_TEXT = {r"\x00": "onnxruntime-genai reads a text up to a zero character"}
# Part of a splitting pattern -> the texts to which it is applied wrongly -> why.
OF_PATTERNS: dict[str, dict[str, str]] = {
    r"\s": {r"\x{85}": "onnxruntime-genai does not take U+0085 for white space"},
    r"\s*[\r\n]+": {
        r"[\r\n][^\S\r\n]+[\r\n]+[^\S\r\n]": "onnxruntime-genai splits before an empty line with spaces "
        "if an indented line follows"
    },
    r"[\r\n/]*": {r"[\r\n]/": "onnxruntime-genai splits before a slash at the beginning of a line"},
    r"\p{M}]+": {
        r"(?:\A|[\p{N}\r\n])\p{M}[^\p{L}\p{M}]": "onnxruntime-genai does not split between a combining mark of no "
        "letter and a symbol"
    },
}


def known_differences(folder: Path) -> dict[str, str]:
    """Return pattern -> reason of such texts.

    Args:
        folder: Holds tokenizer.json.
    """
    definition = json.loads((folder / TOKENIZER).read_text(encoding="utf-8"))
    if definition["model"].get("byte_fallback"):
        return OF_EVERY_TEXT | _of_pieces(definition)
    patterns = "".join(_patterns(definition))
    of_patterns = {text: why for part, found in OF_PATTERNS.items() if part in patterns for text, why in found.items()}
    return OF_EVERY_TEXT | of_patterns


def _of_pieces(definition: Mapping[str, Any]) -> dict[str, str]:
    longest = max((len(text) for text in ids_of_vocabulary(definition) if not text.strip(SPACE)), default=0)
    return {
        rf"[^ \r\n{SPACE}]{{{RUN + 1},}}": f"onnxruntime-genai cuts more than {RUN} characters without a space",
        "<0x[0-9A-F]{2}>": "onnxruntime-genai takes the name of a byte's token for the token",
        f"[ {SPACE}]{{{longest + 1},}}": f"onnxruntime-genai divides a run of more than {longest} spaces differently",
    }


def _patterns(definition: Mapping[str, Any]) -> Iterator[str]:
    for part in components(definition.get("pre_tokenizer")):
        yield (part.get("pattern") or {}).get("Regex", "")
