"""Predicted speeds against published ones of chips that the prediction has not seen; runs in seconds.

Prints the median error by class, the worst class first, and draws predicted against published: predict.svg.
"""

import numpy as np

from tests.benchmarks.rows import PICTURES
from tests.benchmarks.scatter import scatter
from tests.benchmarks.scores import (
    OTHERS_FOR_DECODE,
    OTHERS_FOR_PREFILL,
    Scored,
    by_class,
    class_medians,
    coverage,
    from_facts,
    from_one_point,
    of_device,
    of_kernels,
    quantile,
    trial,
)

PICTURE = PICTURES / "predict.svg"


def test_predicted_speeds_are_near_published_ones() -> None:
    decode, prefill = trial("decode"), trial("prefill")
    facts, point = from_facts(decode), from_one_point(decode, of_device, OTHERS_FOR_DECODE)
    prompts, kernels = from_facts(prefill), from_one_point(prefill, of_kernels, OTHERS_FOR_PREFILL)
    print()
    _print("decode, from facts alone", facts)
    plain = class_medians(decode)
    middle, tail = np.quantile(plain, (0.5, 0.9))
    print(f"decode, by the median of other chips of the class: median {middle:.1%}, 90th percentile {tail:.1%}")
    _print("decode, one measured point of device and backend", point)
    _print("prefill, from facts alone", prompts)
    _print("prefill, one measured point of the same kernels", kernels)
    drawn = scatter([("Decode, from facts alone", "decode", facts), ("Prefill, from facts alone", "prefill", prompts)])
    PICTURE.write_text(drawn, encoding="utf-8")
    assert quantile(facts, 0.5) < middle and quantile(facts, 0.9) < tail
    assert quantile(facts, 0.5) <= 0.10 and quantile(facts, 0.9) <= 0.36
    assert quantile(point, 0.5) <= 0.065 and quantile(point, 0.9) <= 0.24
    assert quantile(kernels, 0.5) <= 0.20
    assert 0.75 <= coverage(facts) <= 0.90
    assert 0.75 <= coverage(point) <= 0.90
    assert 0.75 <= coverage(kernels) <= 0.90


def _print(title: str, scored: list[Scored]) -> None:
    rows = len({one.row.number for one in scored})
    figures = f"median {quantile(scored, 0.5):.1%}, 90th percentile {quantile(scored, 0.9):.1%}"
    print(f"{title}: {figures}, {coverage(scored):.0%} within the interval of 80 % ({rows} rows)")
    classes = by_class(scored)
    print(f"  worst class: {next(iter(classes))}; medians by class:")
    for name, own in classes.items():
        print(f"  {name:<20} {quantile(own, 0.5):>6.1%}  ({len({one.row.number for one in own})} rows)")
