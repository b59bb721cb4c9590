"""Everything an artifact is asked before it is packed."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from exporter.calibrate.text import Tokens
from exporter.compress.compressed import CompressedModel, weights_digest
from exporter.measures import Check
from exporter.model.model import Model
from exporter.model.tokenizer import (
    PARITY_CHATS,
    Chat,
    known_difference,
    load_tokenizer,
    parity_texts,
    render_chat,
    token_ids,
)
from exporter.targets.child import Child
from exporter.targets.runtime import Timing
from exporter.targets.target import Artifact, Target
from exporter.validate.accuracy import Distance, Reference, dequantised, distances
from exporter.validate.parity import check_chat_template, check_tokenizer
from exporter.validate.selftest import SelfTest, make_self_test
from exporter.weights.format import Float32
from exporter.weights.group import WeightGroup

# Above this the difference between the artifact and its own weights is no rounding of activations any more.
MOST_ROUNDING_KL = 0.1
DECODE_TOKENS = 32
REPEATS = 3


@dataclass(frozen=True)
class Proof:
    """What was found out about an artifact.

    Attributes:
        accuracy: Against the original model.
        rounding: Of the artifact against the float model with the artifact's own weights.
        timing: Speed and memory in a process of its own.
        checks: Of lowering, formats, tokenizer and chat template.
        self_test: What the artifact must answer again.
    """

    accuracy: Distance
    rounding: Distance
    timing: Timing
    checks: tuple[Check, ...]
    self_test: SelfTest


def prove(
    target: Target, artifact: Artifact, compressed: CompressedModel, tokens: Tokens, context: int, threads: int
) -> Proof:
    """Compare an artifact with its original through the real runtime, and time it.

    Args:
        target: What made the artifact.
        artifact: The artifact.
        compressed: The plan's outcome that the artifact must hold.
        tokens: Evaluation windows, int64 [windows, length].
        context: Tokens of context to time and to measure memory at.
        threads: Threads of the runtime.
    """
    model = compressed.model
    read = target.read_back(artifact, model)
    checks = [check_weights(read, compressed), check_stored_types(target, artifact, compressed)]
    original = Reference.of(model, tokens)
    own = Reference.of(dequantised(model, read), tokens)
    with target.open(artifact, tokens.shape[1], threads) as child:
        accuracy, rounding = distances([original, own], partial(child.call, "logits"))
        self_test = make_self_test(partial(child.call, "logits"), model.architecture.vocab, 0)
        checks += check_parity(child, model, target.title)
    checks.append(check_rounding(rounding))
    with target.open(artifact, context, threads) as child:
        prompt = tokens.reshape(-1)[: context - DECODE_TOKENS - 1].tolist()
        timing = child.call("measure", prompt, DECODE_TOKENS, REPEATS)
    return Proof(accuracy, rounding, timing, tuple(checks), self_test)


def check_weights(read: Callable[[WeightGroup], Float32], compressed: CompressedModel) -> Check:
    """Decode every matrix as the runtime does, from the artifact's bytes, and compare with the planned weights."""
    groups = compressed.model.groups()
    wrong = [g.name for g in groups if weights_digest(read(g)) != compressed.outcomes[g.name].planned_sha256]
    detail = f"{len(groups) - len(wrong)} of {len(groups)} matrices decode to exactly the planned weights"
    return _check("lowering.weights", not wrong, detail + (f"; the first that does not: {wrong[0]}" if wrong else ""))


def check_stored_types(target: Target, artifact: Artifact, compressed: CompressedModel) -> Check:
    """Compare the formats in the file with those decided on."""
    stored = target.stored_types(artifact, compressed.model)
    wrong = [name for name, decision in compressed.decisions.items() if stored[name] != decision.format.name]
    detail = f"{len(stored) - len(wrong)} of {len(stored)} matrices are stored in the format decided on"
    return _check("lowering.formats", not wrong, detail + (f"; the first that is not: {wrong[0]}" if wrong else ""))


def check_rounding(rounding: Distance) -> Check:
    """Hold the runtime's own rounding below what a packing error would cost."""
    detail = "KL of the artifact against a float model with the artifact's own weights"
    passed = rounding.kl_mean <= MOST_ROUNDING_KL
    check = _check("lowering.runtime_rounding", passed, detail)
    return check.model_copy(update={"value": rounding.kl_mean, "limit": MOST_ROUNDING_KL, "unit": "nats"})


def check_parity(child: Child, model: Model, runtime: str) -> list[Check]:
    """Compare the runtime's tokenizer and chat template with transformers'."""
    tokenizer = load_tokenizer(model.folder)
    runtime = runtime.lower().replace(" ", "-")
    found = [
        check_tokenizer(
            parity_texts(tokenizer),
            partial(token_ids, tokenizer),
            partial(child.call, "tokenize"),
            runtime,
            known_difference(tokenizer),
        )
    ]
    if tokenizer.chat_template is not None:

        def rendered(chat: Chat) -> str | None:
            return render_chat(tokenizer, chat, True)

        def by_runtime(chat: Chat) -> str | None:
            text: str | None = child.call("render_chat", chat, True)
            return text

        found.append(check_chat_template(PARITY_CHATS, rendered, by_runtime, runtime))
    return found


def _check(name: str, passed: bool, detail: str) -> Check:
    return Check(name=name, status="passed" if passed else "failed", detail=detail)
