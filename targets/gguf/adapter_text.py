"""How a fine-tune that is kept beside its base treats text: what its file has to say besides that of the base."""

from dataclasses import replace

from exporter.foundation.errors import RequestError
from exporter.model.lora import MERGE_INSTEAD
from exporter.model.model import Model
from exporter.model.tokenizer import load_tokenizer
from exporter.model.tokenizer_notes import DEFAULT
from exporter.targets.gguf.adapter_keys import AdapterText
from exporter.targets.gguf.vocabulary import SpecialTokens, Vocabulary, read_vocabulary


def adapter_text(model: Model) -> AdapterText:
    """Return the text of a fine-tune that is kept beside its base.

    Args:
        model: Both merged, with `Model.base`.

    Raises:
        RequestError: it tokenises otherwise than its base.
    """
    assert model.base is not None
    own, base = _vocabulary(model), _vocabulary(model.base)
    if _without_text(own) != _without_text(base):
        raise RequestError(
            "the adapter's tokenizer is not that of the base, which is the only one in the base's file",
            where=model.name, expected="the same tokens, or no tokenizer beside the adapter", next_step=MERGE_INSTEAD,
        )  # fmt: skip
    return AdapterText(own.special.templates.get(DEFAULT), own.special.ids.get("eos"), own.special.ends)


def _vocabulary(model: Model) -> Vocabulary:
    rows = model.decoder.vocab
    return read_vocabulary(load_tokenizer(model.folder, rows), model.folder, rows)


def _without_text(vocabulary: Vocabulary) -> Vocabulary:
    """Return a vocabulary without the special tokens that change no ids of texts."""
    special = vocabulary.special
    ids = {role: number for role, number in special.ids.items() if role == "bos"}
    return replace(vocabulary, special=SpecialTokens(ids, special.add_bos, special.add_eos, (), {}))
