"""Tokenizers: loading, the texts that a runtime's tokenizer is compared on, and how a GGUF file's names split a text.

A runtime carries its own tokenizer. Whether it is the model's is a matter of fact, settled on the texts and
conversations of this file.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from tokenizers import Regex, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from exporter.errors import InputError, RequestError

Chat = list[dict[str, str]]

PARITY_CORPUS: tuple[str, ...] = (
    # Latin letters with diacritics; the same letters composed and decomposed.
    "The quick brown fox jumps over the lazy dog.",
    "Zażółć gęślą jaźń, über Größe, façade, Ærøskøbing, İstanbul ılık, Đặng Thị Ngọc.",
    "caf\u00e9 na\u00efve \u00c5ngstr\u00f6m",
    "cafe\u0301 nai\u0308ve A\u030angstro\u0308m",
    # Other scripts.
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία· τί ἐστιν ἀλήθεια;",
    "السلام عليكم، كيف حالك اليوم؟ ١٢٣٤٥",
    "שָׁלוֹם עולם, מה נשמע?",
    "नमस्ते दुनिया, क्षत्रिय ज्ञान १२३४",
    "สวัสดีชาวโลก ภาษาไทยไม่มีช่องว่าง ๑๒๓",
    "敏捷的棕色狐狸跳过了懒狗。「你好」，世界！",
    "いろはにほへと ちりぬるを。カタカナ、ｶﾀｶﾅ、漢字。",
    "다람쥐 헌 쳇바퀴에 타고파",
    "\u1103\u1161\u1105\u1161\u11b7 \u110c\u1171",
    "mixed 中文 and English и русский عربي together",
    "\U00020bb7\U00029e3d\U0002a6a5 \U00030000 𠮟る",
    # Emoji: plain, joined, with skin tones, flags, keycaps.
    "😀 😃😄 I ❤️ you ☕️",
    "👩‍👩‍👧‍👦 👩🏽‍💻 🏳️‍🌈 👍🏿👍🏻",
    "🇩🇪🇯🇵 1️⃣2️⃣#️⃣",
    # White space: runs, ends, tabs, line ends.
    " ",
    "  ",
    "       ",
    " leading",
    "   three leading",
    "trailing ",
    "trailing   ",
    "a  b   c    d     e",
    "\t",
    "\ttab\t\ttabs\t \t mixed",
    "\n",
    "\n\n",
    "\n\n\n\n",
    "one\ntwo\n\nthree\n\n\nfour \n five\n ",
    "line\r\nline\r\n\r\nline\rline",
    " \n \n  \n\n   x",
    "x \t\n\t y",
    "\u00a0no\u00a0break\u00a0 space\u00a0",
    "em\u2003en\u2002thin\u2009hair\u200aideographic\u3000end\u2028line\u2029paragraph\u0085next",
    "zero\u200bwidth\u200cnon\u200djoiner\ufeffmark\u2060word",
    "soft\u00adhyphen \u202eright to left\u202c \u061c",
    # Digits of many lengths, alone and inside words.
    "0",
    "12",
    "123",
    "1234",
    "12345",
    "123456789 1234567890 12345678901234567890",
    "3.14159, 1,000,000.00, 1e-5, 0x1F, 10:30, 2026-11-23, v1.2.3, +49 (30) 123-4567",
    "abc123def456 7th 2nd x2y3 H2O",
    "½ ⅓ ² ³ ₂ Ⅳ ⅻ ① ㊿ 〇 𝟙𝟚𝟛",
    # Punctuation and symbols.
    "!?!?...---___***///\\\\\\|||",
    "(((())))[[[]]]{{{}}}<<<>>>",
    '“quoted” ‘single’ «guillemets» "plain" — en–dash… · • ¿qué? ¡sí!',
    "$€£¥₹ % ‰ ° § ¶ © ® ™ ± × ÷ ≠ ≤ ∞ ∑ √ → ← ⇔",
    "a.b,c;d:e!f?g-h_i+j=k*l/m\\n|o&p@q#r~s^t`u",
    "...\n!!!\n\n??? \n",
    "end.\nstart, end.\n\nstart",
    "=======\n-------\n",
    # Contractions in both apostrophes and both cases.
    "I'm you're he's we've they'll I'd don't can't o'clock rock'n'roll",
    "I’m you’re he’s we’ve they’ll I’d don’t",
    "I'M YOU'RE HE'S WE'VE THEY'LL I'D DON'T 'Tis 's'd",
    "'s 't 're x'sx 'lla ''s '' '",
    # Case.
    "camelCase PascalCase SCREAMING_SNAKE snake_case kebab-case HTTPServerError iOS McDonald's",
    "ÉCOLE École éCOLE ПРИВЕТ Привет пРИВЕТ ΑΒΓ Αβγ ß ẞ ǅ",
    # Code, mark-up and addresses.
    "def f(x: int) -> int:\n    return x ** 2  # square\n\n\nclass A:\n\tpass\n",
    'for (int i = 0; i < n; ++i) { printf("%d\\n", a[i]); }',
    '{"key": [1, 2.5, null, true], "nested": {"a": "b\\u00e9"}}',
    "<div class='a b'>&nbsp;text</div>\n<!-- comment -->",
    "https://example.org/path/to?query=1&other=%20value#fragment user@example.org",
    "C:\\Users\\name\\file.txt ~/.config/app.toml ../../x",
    "# Title\n\n- item 1\n- item 2\n\n```python\nprint('x')\n```\n| a | b |\n|---|---|\n",
    "$E = mc^2$ \\frac{a}{b} \\alpha",
    # Combining marks, control characters, long words.
    "Z\u0351\u036b\u0343\u036aa\u034b\u0342l\u0313\u0342g\u0308\u0366o\u0306",
    "bell\u0007 escape\u001b[0m delete\u007f unit\u001f backspace\u0008 form\u000c vertical\u000bfeed",
    "private \ue000 noncharacter \ufffe replacement \ufffd tag \U000e0041",
    "a" * 120,
    "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft",
    "ab" * 60 + "12" * 30 + "!?" * 30,
    "[INST] <<SYS>> <s> </s> <|im_start|> <|endoftext|> <|eot_id|> <unk> <pad> [PAD] <0x0A> ▁ Ġ Ċ",
)  # fmt: skip

PARITY_CHATS: tuple[Chat, ...] = (
    [{"role": "user", "content": "Hello"}],
    [{"role": "system", "content": "You are brief."}, {"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello! How can I help?"},
        {"role": "user", "content": "Tell me a joke."},
    ],
    [
        {"role": "system", "content": "Answer in French.\n"},
        {"role": "user", "content": "  leading spaces"},
        {"role": "assistant", "content": "\n\nleading newlines and trailing \n"},
        {"role": "user", "content": "\ttab\r\nCRLF \u00a0 é e\u0301 👩🏽‍💻"},
        {"role": "assistant", "content": "日本語"},
        {"role": "user", "content": "1234 + 5678 = ?"},
    ],
    [{"role": "user", "content": "<|im_start|>system\n<|im_end|></s>[/INST] ignore {{ this }} {% raw %} <|eot_id|>"}],
    [{"role": "user", "content": "quotes \"double\" 'single' <b>&amp;</b> \\n \\u00e9"}],
    [{"role": "user", "content": ""}],
    [{"role": "user", "content": "ends with an answer"}, {"role": "assistant", "content": "Yes."}],
)

# How Hugging Face's tokenizer.json of the models that gave llama.cpp's names splits a text before merging.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _words(digits: str) -> str:
    return rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"


def _cased(suffix: str, digits: str) -> str:
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    start = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{start}{upper}*{lower}+{suffix}|{start}{upper}+{lower}*{suffix}|{digits}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
    )


PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "llama-bpe": (_words(r"\p{N}{1,3}"),),
    "smaug-bpe": (_words(r"\p{N}{1,3}"),),
    "qwen2": (_words(r"\p{N}"),),
    "gpt-4o": (_cased(rf"{_CONTRACTIONS}?", r"\p{N}{1,3}"),),
    "tekken": (_cased("", r"\p{N}"),),
}
# Names whose models take a whole word that is in the vocabulary before any merge.
WHOLE_WORDS_FIRST = frozenset({"llama-bpe", "tekken"})


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a Hugging Face folder; neither network nor code of the folder is used.

    Raises:
        InputError: the folder holds no tokenizer, a damaged one, or one that asks for remote code.
    """
    _refuse_remote_code(folder)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise InputError(
            "the folder holds no tokenizer",
            where=folder,
            expected="tokenizer.json",
            next_step="save it with AutoTokenizer.save_pretrained",
        )
    try:
        loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises plain Exception for a damaged file
        raise InputError(
            "the tokenizer cannot be loaded",
            where=folder,
            got=" ".join(str(error).split())[:300],
            next_step="fetch the tokenizer files again",
        ) from error
    if not isinstance(loaded, PreTrainedTokenizerBase) or getattr(loaded, "backend_tokenizer", None) is None:
        raise InputError(
            "the tokenizer has no fast form", where=folder, got=type(loaded).__name__, expected="a tokenizer.json"
        )
    return loaded


def _refuse_remote_code(folder: Path) -> None:
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        asks = "auto_map" in settings
    except (ValueError, TypeError) as error:
        raise InputError("the file is not JSON", where=file, got=error, next_step="fetch it again") from error
    if asks:
        raise InputError(
            "the tokenizer asks for remote code, which is never run",
            where=file,
            got="auto_map",
            expected="a tokenizer that transformers knows",
        )


def parity_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the corpus, its characters at random, and texts with the tokenizer's own special and added tokens."""
    special = [token for token in tokenizer.all_special_tokens if token]
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.content.strip()]
    texts = list(PARITY_CORPUS)
    for token in dict.fromkeys(special):
        texts += [token, f"{token}Hello", f"Hello{token}", f" {token} ", f"a {token}\n{token}{token} b", token[:-1]]
    texts += [f"x{token} y{token}z" for token in dict.fromkeys(added)]
    chance, characters = random.Random(0), "".join(PARITY_CORPUS)
    return texts + ["".join(chance.choices(characters, k=30)) for _ in range(64)]


def known_difference(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], str | None]:
    """Return what says why a runtime must give a text other ids than transformers, or None.

    Neither llama.cpp nor onnxruntime-genai normalises Unicode for byte-level BPE: text that the tokenizer's
    normaliser would change (Qwen composes letters and accents) reaches the model as it is.
    """
    backend: Any = tokenizer.backend_tokenizer
    settings = json.loads(backend.to_str())
    normalises = settings["normalizer"] is not None and '"ByteLevel"' in json.dumps(settings["pre_tokenizer"])

    def reason(text: str) -> str | None:
        if not normalises or backend.normalizer.normalize_str(text) == text:
            return None
        return f"the tokenizer normalises such text ({settings['normalizer']['type']}), the runtime does not"

    return reason


def pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer:
    """Return Hugging Face's form of the byte-level pre-tokenizer that llama.cpp calls `name`."""
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PRE_TOKENIZERS[name]]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the ids of a text as transformers gives them to a model: with BOS or EOS where the tokenizer adds them."""
    return list(tokenizer(text)["input_ids"])


def render_chat(tokenizer: PreTrainedTokenizerBase, chat: Chat, prompt: bool) -> str | None:
    """Return a chat as the model's template renders it, or None where the template refuses the chat.

    Args:
        tokenizer: The model's tokenizer.
        chat: Messages with `role` and `content`.
        prompt: Ask for the start of an answer at the end.

    Raises:
        RequestError: the model has no chat template.
    """
    if tokenizer.chat_template is None:
        raise RequestError("the model has no chat template", where=tokenizer.name_or_path)
    try:
        return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt))
    except TemplateError:
        return None
