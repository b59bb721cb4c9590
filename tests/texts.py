"""Texts from a seed on which tokenizers are compared: scripts, pieces, spaces, digits, code, emoji, special tokens."""

import random
from collections.abc import Callable

from exporter.model.corpus import PARITY_CORPUS
from exporter.model.tokenizer import ModelTokenizer

# First and last code point of blocks of Unicode: letters, marks, symbols, emoji, private use and controls.
BLOCKS = (
    (0x20, 0x7E), (0xA0, 0x24F), (0x300, 0x36F), (0x370, 0x3FF), (0x400, 0x52F), (0x530, 0x5FF), (0x600, 0x6FF),
    (0x900, 0x9FF), (0xB80, 0xBFF), (0xE00, 0xE7F), (0xF00, 0xFFF), (0x10A0, 0x11FF), (0x1200, 0x137F),
    (0x1780, 0x17FF), (0x1E00, 0x1FFF), (0x2000, 0x218F), (0x2190, 0x27FF), (0x3000, 0x30FF), (0x4E00, 0x9FFF),
    (0xAC00, 0xD7A3), (0xE000, 0xE0FF), (0xFB00, 0xFDFF), (0xFE00, 0xFFEF), (0x10400, 0x1044F), (0x1D400, 0x1D7FF),
    (0x1F1E6, 0x1F1FF), (0x1F300, 0x1FAFF), (0x20000, 0x2A6DF), (0x00, 0x1F), (0x7F, 0x9F),
)  # fmt: skip
SPACES = ("\n\n", "\t\t", "\r\n", "\u00a0", "\u3000", "a", "B1", ".", " \n    \n   x")
EMOJI = ("\u200d", "\ufe0f", "\U0001f3fd", "\u2764", " ", "\U0001f1e9\U0001f1ea")
CASED = (
    "ПРИВЕТ",
    "привет",
    "École",
    "ÉCOLE",
    "IÓN",
    "αβγ",
    "नमस्ते",
    "สวัสดี",
    "ß",
    "Abc",
    "deF",
    "'s",
    "'LL",
    "’s",
    "\n",
    "/",
)
LIKE_SPECIAL = ("</s>", "<s>", "<|im_end|>", "[INST]", "<|end", " ", "  ", "\n")
DIGITS = ("0123456789", "0123456789 .,x", "٠١٢٣٤٥ ", "१२३४ ")


def generated_texts(tokenizer: ModelTokenizer, code: str, count: int, seed: int) -> list[str]:
    """Return texts of ten kinds in turn.

    Args:
        tokenizer: Its pieces and added tokens occur in the texts.
        code: Source code, from which parts are taken.
        count: How many texts.
        seed: Of the texts.
    """
    chance = random.Random(seed)
    pieces, words = tokenizer.ordinary_ids(), " ".join(PARITY_CORPUS).split(" ")
    added = [token.content for token in tokenizer.added().values()] or list(LIKE_SPECIAL)

    def one_of(*choices: Callable[[], str]) -> str:
        return "".join(chance.choice(choices)() for _ in range(chance.randint(1, 9)))

    def block(most: int) -> str:
        first, last = chance.choice(BLOCKS)
        return "".join(chr(chance.randint(first, last)) for _ in range(chance.randint(1, most)))

    def part() -> str:
        start = chance.randrange(len(code))
        return code[start : start + chance.randint(1, 200)]

    def pick(*lists: list[str] | tuple[str, ...]) -> str:
        return chance.choice(chance.choice(lists))

    kinds: tuple[Callable[[], str], ...] = (
        lambda: one_of(lambda: block(12), lambda: " "),
        lambda: block(40),
        lambda: tokenizer.backend.decode(chance.choices(pieces, k=chance.randint(1, 12)), skip_special_tokens=False),
        lambda: one_of(lambda: pick(SPACES), lambda: " " * chance.randint(1, 40), lambda: "\n" * chance.randint(1, 9)),
        lambda: "".join(chance.choices(chance.choice(DIGITS), k=chance.randint(1, 30))),
        lambda: pick(("", " ", "  ", "\n")).join(chance.choices(words, k=chance.randint(1, 8))),
        part,
        lambda: pick(words, ("▁", "-", "\n", "é", "中", "😀")) * chance.randint(2, 60),
        lambda: one_of(lambda: pick(EMOJI), lambda: chr(chance.randint(0x1F300, 0x1FAFF))),
        lambda: one_of(lambda: pick(added, LIKE_SPECIAL, words), lambda: pick(CASED)),
    )
    return [kinds[number % len(kinds)]() for number in range(count)]
