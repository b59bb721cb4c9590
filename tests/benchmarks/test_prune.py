"""Pruned feed-forward channels on the reference model: PruneNet and the closed form against random and norms.

    .venv/bin/python -m pytest tests/benchmarks/test_prune.py --timeout=0 -s

Every row is the pruned model in float32, run by transformers' own modules, against the original on prose that was not
calibrated on. The runtimes show the same: see tests/oracle/test_widths.py.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import torch

from exporter.calibrate.statistics import Statistics, collect
from exporter.calibrate.windows import Windows, file_windows, spread_windows
from exporter.compress import prune, prunenet
from exporter.compress.effort import effort
from exporter.model.model import Model
from exporter.model.sources import open_model
from exporter.model.tokenizer import load_tokenizer
from exporter.model.widths import Channels
from exporter.prove.accuracy import Distance, Reference, distance
from tests.benchmarks.measured import WINDOW
from tests.llama_names import LINEARS, layer_tensor
from tests.reference import plain_texts, reference_model

RATIOS = (0.20, 0.25, 0.30)
EVALUATION_WINDOWS = 16
SEEDS = 5
# What does follow the reward.
FOLLOWING = prunenet.PruneNetOptions(baseline=True, exact_probability=True, same_noise=True, clip=1.0)
LEARNED_AT = 0.25
MOST_LEARNING_S = 120
# Most KL of the closed form over PruneNet's.
LIMIT = 0.6


@dataclass(frozen=True)
class Measured:
    """The model, the texts, and what is measured with them."""

    model: Model
    calibration: Windows
    evaluation: Windows

    @cached_property
    def original(self) -> Reference:
        return Reference.of_original(self.model, self.evaluation.tokens)

    @cached_property
    def perplexity(self) -> float:
        """Of the original, on the tokens that all rows are measured on."""
        half = WINDOW // 2
        losses = [
            torch.nn.functional.cross_entropy(
                self.original.logits(number, slice(half, WINDOW - 1)), torch.from_numpy(tokens[half + 1 :])
            )
            for number, tokens in enumerate(self.evaluation.tokens)
        ]
        return float(torch.stack(losses).mean().exp())

    def row(self, name: str, pruned: prune.Pruned) -> Distance:
        """Measure a pruned model and print its row."""
        found = self.distance(pruned.model)
        predicted = "" if pruned.predicted_kl is None else f"predicted {pruned.predicted_kl:.3f}"
        print(
            f"  {pruned.ratio:6.1%}  KL {found.kl_mean:.4f}  same first {found.top1_agreement:.1%}  perplexity "
            f"{self.perplexity * found.perplexity_ratio:.2f}  {name}  {predicted}",
            flush=True,
        )
        return found

    def distance(self, model: Model) -> Distance:
        changed = Reference.of(model, self.evaluation.tokens)
        numbers = {tuple(tokens): number for number, tokens in enumerate(self.evaluation.tokens.tolist())}
        return distance(
            self.original,
            lambda tokens, first: changed.logits(numbers[tuple(tokens)], slice(first, len(tokens))).numpy(),
        )

    def by_score(self, ratio: float, score: Callable[[int], np.ndarray]) -> prune.Pruned:
        """Keep the channels with the greatest scores."""
        widths = prune.planned_widths(self.model.decoder, ratio, 32)
        kept: list[Channels] = [np.sort(np.argsort(-score(layer))[:width]) for layer, width in enumerate(widths)]
        return prune.Pruned.of(self.model, kept, {})

    def norms(self, layer: int, roles: tuple[str, ...]) -> np.ndarray:
        """Return the product of the norms of what each channel has in some matrices."""
        found = np.ones(self.model.decoder.intermediate[layer])
        for role in roles:
            weight = self.model.read(layer_tensor(layer, f"{LINEARS[role][0]}.weight"))
            found *= np.linalg.norm(weight, axis=0 if role == "down" else 1)
        return found


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Measured]:
    scratch: Path = tmp_path_factory.mktemp("prune")
    calibration, evaluation = plain_texts(scratch)
    with open_model(str(reference_model(scratch / "model"))) as model:
        tokenizer = load_tokenizer(model.folder)
        windows = effort("balanced").calibration_windows
        yield Measured(
            model,
            spread_windows(calibration, tokenizer, windows, WINDOW),
            file_windows(evaluation, tokenizer, EVALUATION_WINDOWS, WINDOW),
        )


def best_of_random(
    measured: Measured, statistics: Statistics, ratio: float, chance: np.random.Generator
) -> prune.Pruned:
    """Choose among random masks as among those that a policy draws."""
    kept = []
    for layer, width in enumerate(prune.planned_widths(measured.model.decoder, ratio, 32)):
        whole = measured.model.decoder.intermediate[layer]
        masks = [np.sort(chance.choice(whole, width, replace=False)) for _ in range(prunenet.DRAWS)]
        kept.append(masks[int(np.argmin(prune.losses(measured.model, statistics, layer, masks)))])
    return prune.Pruned.of(measured.model, kept, {})


@pytest.fixture(scope="module")
def statistics(measured: Measured) -> Statistics:
    return collect(measured.model, measured.calibration, 0, lambda done, total: None)


@pytest.mark.parametrize("ratio", RATIOS)
def test_prunenet_and_the_closed_form(measured: Measured, statistics: Statistics, ratio: float) -> None:
    def pruned(policy: prunenet.Policy, text: Statistics | None = None) -> prune.Pruned:
        return prunenet.prune(measured.model, policy, ratio, 32, text)

    def learned(options: prunenet.PruneNetOptions) -> tuple[prunenet.Policy, float]:
        started = time.perf_counter()
        policy = prunenet.learned(measured.model, options)
        return policy, time.perf_counter() - started

    print(
        f"\noriginal: perplexity {measured.perplexity:.2f}; {measured.evaluation.tokens.shape[0]} windows of {WINDOW}"
    )
    chances = [np.random.default_rng(seed) for seed in range(SEEDS)]
    randoms = [
        measured.row(f"random, seed {seed}", measured.by_score(ratio, lambda layer: chance.random(1536)))  # noqa: B023
        for seed, chance in enumerate(chances)
    ]
    random = mean("random", randoms)
    norms = [
        measured.row(
            f"norms of {', '.join(roles)}",
            measured.by_score(ratio, lambda layer: measured.norms(layer, roles)),  # noqa: B023
        ).kl_mean
        for roles in (("gate",), ("gate", "up", "down"))
    ]
    policies = [learned(prunenet.PruneNetOptions(ratio, seed=seed)) for seed in range(SEEDS)]
    networks = [
        measured.row(f"PruneNet, seed {seed}, learned in {took:.0f} s", pruned(policy, statistics))
        for seed, (policy, took) in enumerate(policies)
    ]
    network = mean("PruneNet", networks)
    measured.row(f"best of {prunenet.DRAWS} at random", best_of_random(measured, statistics, ratio, chances[0]))
    transferred, _ = learned(prunenet.PruneNetOptions(LEARNED_AT))
    measured.row(f"PruneNet, learned at {LEARNED_AT:.0%}", pruned(transferred, statistics))
    mean(
        "PruneNet without text",
        [
            measured.row(f"PruneNet without text, seed {seed}", pruned(policy))
            for seed, (policy, _) in enumerate(policies)
        ],
    )
    others = {"as published": prunenet.PUBLISHED, "that follows the reward": FOLLOWING}
    for name, options in others.items():
        measured.row(f"PruneNet {name}, without text", pruned(learned(replace(options, ratio=ratio))[0]))
    closed = {}
    for even in (True, False):
        started = time.perf_counter()
        found = prune.prune(measured.model, statistics, prune.ClosedFormOptions(ratio, even=even))
        name = f"closed form, {'even' if even else 'uneven'}, {time.perf_counter() - started:.0f} s"
        closed[even] = measured.row(name, found).kl_mean
    assert network < random
    assert network < min(norms)
    assert max(closed.values()) <= LIMIT * network
    assert max(took for _, took in policies) < MOST_LEARNING_S


def mean(name: str, rows: Sequence[Distance]) -> float:
    """Return the mean KL of some rows and print it."""
    found = float(np.mean([one.kl_mean for one in rows]))
    print(f"          KL {found:.4f}  mean of {name}", flush=True)
    return found
