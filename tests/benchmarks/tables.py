"""The tables of README and docs that are made of kept figures, written between their markers.

    .venv/bin/python -m tests.benchmarks.tables

A table stands between `<!-- begin: NAME -->` and `<!-- end: NAME -->`. The benchmarks keep their figures in
quality.json and recipes.json; published_bench.csv holds the published speeds that predictions are compared with.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from statistics import median

from exporter.targets.artifact import target_names
from exporter.targets.parity import family_rows
from tests.benchmarks import scores
from tests.benchmarks.rows import BENCHMARKS, PARAMETERS, Published, Row
from tests.benchmarks.scores import (
    OTHERS_FOR_DECODE,
    OTHERS_FOR_PREFILL,
    coverage,
    from_facts,
    from_one_point,
    of_device,
    of_kernels,
    quantile,
    trial,
)

ROOT = BENCHMARKS.parents[1]
QUALITY = Published(BENCHMARKS / "quality.json")
RECIPES = Published(BENCHMARKS / "recipes.json")
FAMILIES = Published(BENCHMARKS / "families.json")
UNTUNED, BUDGETS, WIDE, QWEN3 = (
    "seed 1, source code", "seed 0, source code", "seed 0 in width 768, prose", "Qwen3 trained from seed 0, prose",
)  # fmt: skip
BUILDER = "onnxruntime-genai's builder, {}"
NAMED_RECIPES = ("caldera", "double", "rate", "low-rank-rate", "prune-rate", "prune-closed-form", "prunenet")
EIGHT_BITS = {"gguf": "Q8_0", "onnx": "int8"}
OTHER_SIZES = ("rate 2", "rate 2.5", "rate 3.5", "rate 4.83", "double 3", "double 4.83", "Q4_0, ldlq, coded")
# The seeds and families of test_families.py, by target.
SEEDS = (0, 1, 2)
TRAINED = {
    "gguf": ("gemma3_text", "granite", "llama", "olmo2", "phi3", "qwen3"),
    "onnx": ("gemma3_text", "qwen3"),
}
MARKED = re.compile(r"(<!-- begin: (?P<name>[\w-]+) -->\n).*?(<!-- end: (?P=name) -->)", re.DOTALL)


def summary() -> str:
    """Return README's table: ours and the stock tools at equal bytes."""
    asked = [("gguf", name, f"llama.cpp, {name}") for name in ("Q5_K_M", "Q4_K_M", "Q3_K_M", "IQ4_XS")]
    asked += [("onnx", row.name, BUILDER.format(row.name)) for row in _builder_rivals()]
    head = [
        "stock tool",
        *(f"{what}, {whose}" for what in ("bytes", "KL", "same token") for whose in ("stock", "ours")),
    ]
    rows = []
    for target, name, title in asked:
        stock, ours = _duel(UNTUNED, name, target)
        rows.append([
            title, _bytes(stock), _bytes(ours), _kl(stock), f"**{_kl(ours)}**", f"{stock.top1:.1%}", f"{ours.top1:.1%}",
        ])  # fmt: skip
    return table(head, rows, numbers_from=1)


def quality_gguf() -> str:
    """Return ours, llama.cpp's mixes and hand-made ones at the mixes' sizes."""
    hand_made = [row for row in QUALITY.latest(UNTUNED) if (row.kind, row.target) == ("hand-made", "gguf")]
    rows = []
    for stock in _of_kind(UNTUNED, "stock", "gguf"):
        _, ours = _duel(UNTUNED, stock.name, "gguf")
        best = min((row for row in hand_made if row.file_bytes <= stock.file_bytes), key=lambda row: row.kl_mean)
        rows.append([*_against(stock.name, ours, stock), _kl(best)])
    for name in ("Q4_K_M", "IQ4_XS"):
        stock, ours = _duel(UNTUNED, name, "gguf", ", embedding in Q8_0")
        rows.append([*_against(f"{name}, embedding and head in Q8_0 in both", ours, stock), ""])
    return table([*_against_head("llama.cpp's"), "best hand-made mix"], rows, numbers_from=1)


def quality_onnx() -> str:
    """Return ours and onnxruntime-genai's builder at its sizes."""
    rows = [
        _against(row.name, _duel(UNTUNED, row.name, "onnx")[1], row, own_bytes=True) for row in _builder_rivals()
    ]  # fmt: skip
    return table(_against_head("onnxruntime-genai's builder", own_bytes=True), rows, numbers_from=1)


def quality_onnx_second() -> str:
    """Return what can be made of the builder's files."""
    rows = [[row.name, _bytes(row), _kl(row)] for row in _of_kind(UNTUNED, "hand-made", "onnx")]
    return table(["made of the builder's files", "bytes", "mean KL"], rows, numbers_from=1)


def quality_width_768() -> str:
    """Return ours and llama.cpp's mixes on the reference model embedded in width 768."""
    stocks = _of_kind(WIDE, "stock", "gguf")
    rows = [_against(stock.name, _duel(WIDE, stock.name, "gguf")[1], stock) for stock in stocks]
    return table(_against_head("llama.cpp's"), rows, numbers_from=1)


def quality_qwen3() -> str:
    """Return ours and llama.cpp's codes of the same type on a small trained Qwen3."""
    ours = {row.name: row for row in _of_kind(QWEN3, "ours", "gguf")}
    rows = [
        [stock.name, _bytes(ours[stock.name]), *(f"{row.kl_mean:.5f}" for row in (ours[stock.name], stock)),
         _ratio(ours[stock.name], stock)]
        for stock in _of_kind(QWEN3, "stock", "gguf")
    ]  # fmt: skip
    return table(["type", "bytes", "ours: mean KL", "llama.cpp's", "ratio"], rows, numbers_from=1)


def quality_families() -> str:
    """Return ours and round to nearest of equal bytes, on models of families trained from several seeds."""
    rows = []
    for target, model_types in TRAINED.items():
        for model_type in model_types:
            pairs = family_pairs(model_type, target)
            if not pairs:
                continue
            ratios = [ours.kl_mean / nearest.kl_mean for nearest, ours in pairs]
            losses = (median(row.kl_mean for row in kind) for kind in zip(*pairs, strict=True))
            rows.append([
                f"`{model_type}`", f"`{target}`, {pairs[0][0].name}", str(len(pairs)), _bytes(pairs[0][0]),
                *(f"{kl:.2g}" for kl in losses), f"{median(ratios):.2f}", f"{min(ratios):.2f} to {max(ratios):.2f}",
            ])  # fmt: skip
    head = ["`model_type`", "target, type", "seeds", "bytes", "round to nearest", "ours", "ratio", "lowest to highest"]
    return table(head, rows, numbers_from=2)


def family_pairs(model_type: str, target: str) -> list[list[Row]]:
    """Return round to nearest and ours on the models of a family, a pair for each seed that was measured."""
    found = (FAMILIES.latest(seeded(model_type, target, seed)) for seed in SEEDS)
    return [pair for pair in found if pair]


def seeded(model_type: str, target: str, seed: int) -> str:
    """Return the conditions of a model of a family that is trained from a seed."""
    return f"{model_type}, {target}, seed {seed}"


def predicted_kl() -> str:
    """Return predicted over measured KL of budgets at effort `fast`."""
    rows = []
    for target, title in (("gguf", "GGUF"), ("onnx", "ONNX")):
        ours = sorted(_of_kind(BUDGETS, "ours", target), key=lambda row: row.file_bytes)
        ratios = [_predicted(row) / row.kl_mean for row in ours]
        sizes = f"{_bytes(ours[0])} to {_bytes(ours[-1])}"
        rows.append([title, str(len(ours)), sizes, f"{min(ratios):.2f} to {max(ratios):.2f}"])
    return table(["target", "budgets", "bytes", "predicted / measured"], rows, numbers_from=1)


def recipes() -> str:
    """Return every named recipe with its defaults, in both targets, and the types of 8 bits."""
    head = ["recipe"]
    for target in ("GGUF", "ONNX"):
        head += [f"{target}: bytes, bits", "mean KL, same next token", "runtime rounding"]
    rows = [[f"`{name}`", *_recipe_cells(name, "gguf"), *_recipe_cells(name, "onnx")] for name in NAMED_RECIPES]
    eight_bits = [cell for target, name in EIGHT_BITS.items() for cell in _recipe_cells(name, target)]
    return table(head, [*rows, ["`--type Q8_0`, `int8`", *eight_bits]], numbers_from=1)


def recipes_other_sizes() -> str:
    """Return recipes at other sizes than their own, in GGUF."""
    found = [_recipe_row(name, "gguf") for name in OTHER_SIZES]
    rows = [[row.name, _bytes(row), _bits(row), _kl(row), f"{row.top1:.1%}"] for row in found]
    return table(["step and bits", "bytes as shipped", "bits", "mean KL", "same next token"], rows, numbers_from=1)


def prediction() -> str:
    """Return the errors of predicted speeds, each chip predicted from the other chips alone."""
    decode, prefill = trial("decode"), trial("prefill")
    tried = (
        ("decode", "profile only", from_facts(decode)),
        ("decode", "one run on the same backend", from_one_point(decode, of_device, OTHERS_FOR_DECODE)),
        ("prefill", "profile only", from_facts(prefill)),
        ("prefill", "one run with the same kernels", from_one_point(prefill, of_kernels, OTHERS_FOR_PREFILL)),
    )
    rows = [
        [speed, known, *(_percent(quantile(scored, share)) for share in (0.5, 0.9)), f"{coverage(scored):.0%}"]
        for speed, known, scored in tried
    ]
    head = ["speed", "known of the device", "median error", "90th percentile", "within the 80 % interval"]
    return table(head, rows, numbers_from=2)


def families() -> str:
    """Return the families, the targets that build them, and how close their float32 artifacts are to the model."""
    names = list(target_names())
    rows = []
    for row in family_rows(names):
        cells = [
            f"{one.kl:.0e}" if one.kl is not None else "builds" if one.lacks is None else "no" for one in row.targets
        ]
        rows.append([row.title, ", ".join(f"`{one}`" for one in row.model_types), *cells, row.contexts])
    return table(["models", "`model_type`", *(f"`{name}`" for name in names), "usable context"], rows, numbers_from=6)


TABLES: dict[str, Callable[[], str]] = {
    "summary": summary,
    "quality-gguf": quality_gguf,
    "quality-onnx": quality_onnx,
    "quality-onnx-second": quality_onnx_second,
    "quality-width-768": quality_width_768,
    "quality-qwen3": quality_qwen3,
    "quality-families": quality_families,
    "predicted-kl": predicted_kl,
    "recipes": recipes,
    "recipes-other-sizes": recipes_other_sizes,
    "prediction": prediction,
    "prediction-groups": scores.table,
    "families": families,
}


@cache
def rendered(name: str) -> str:
    """Return a table by its name."""
    if name not in TABLES:
        raise ValueError(f"there is no table {name!r}; known: {', '.join(TABLES)}")
    return TABLES[name]()


def with_tables(text: str) -> str:
    """Return a page with every marked table as the data has it."""
    return MARKED.sub(lambda found: f"{found[1]}\n{rendered(found['name'])}\n\n{found[3]}", text)


def pages() -> Iterator[Path]:
    """Yield README and the pages of docs."""
    yield ROOT / "README.md"
    yield from sorted((ROOT / "docs").rglob("*.md"))


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers_from: int) -> str:
    """Return a Markdown table whose columns from `numbers_from` on are aligned to the right."""
    rule = ["---" if column < numbers_from else "---:" for column in range(len(head))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))


def _of_kind(conditions: str, kind: str, target: str) -> list[Row]:
    return [row for row in QUALITY.latest(conditions) if (row.kind, row.target) == (kind, target)]


def _duel(conditions: str, name: str, target: str, asked: str = "") -> tuple[Row, Row]:
    """Return the stock tool's row of that name, and ours at its size."""
    (stock,) = (row for row in _of_kind(conditions, "stock", target) if row.name == name)
    (ours,) = (row for row in _of_kind(conditions, "ours", target) if row.name == f"at {name}{asked}")
    return stock, ours


def _builder_rivals() -> list[Row]:
    """Return the builder's rows that ours was measured against."""
    names = {row.name.removeprefix("at ") for row in _of_kind(UNTUNED, "ours", "onnx")}
    return [row for row in _of_kind(UNTUNED, "stock", "onnx") if row.name in names]


def _against_head(tool: str, own_bytes: bool = False) -> list[str]:
    ours = ["our bytes"] if own_bytes else []
    kl = "mean KL, same next token"
    return [f"at the size of {tool}", "bytes", *ours, f"ours: {kl}", "predicted KL", f"stock: {kl}", "ratio"]


def _against(title: str, ours: Row, stock: Row, own_bytes: bool = False) -> list[str]:
    sizes = [_bytes(stock), _bytes(ours)] if own_bytes else [_bytes(stock)]
    return [title, *sizes, _kl_top1(ours), f"{_predicted(ours):.4f}", _kl_top1(stock), _ratio(ours, stock)]


def _recipe_row(name: str, target: str) -> Row:
    (row,) = RECIPES.latest(f"{name}, {target}")
    return row


def _recipe_cells(name: str, target: str) -> list[str]:
    row = _recipe_row(name, target)
    assert row.rounding is not None, f"{name}: rounding is measured of every recipe"
    return [f"{_bytes(row)}, {_bits(row)}", _kl_top1(row), f"{row.rounding:.4f}"]


def _predicted(row: Row) -> float:
    assert row.predicted is not None, f"{row.name}: the KL of ours is predicted"
    return row.predicted


def _bytes(row: Row) -> str:
    return f"{row.file_bytes:,}"


def _bits(row: Row) -> str:
    return f"{row.file_bytes * 8 / PARAMETERS:.2f}"


def _kl(row: Row) -> str:
    return f"{row.kl_mean:.4f}"


def _kl_top1(row: Row) -> str:
    return f"{row.kl_mean:.4f}, {row.top1:.1%}"


def _ratio(ours: Row, stock: Row) -> str:
    return f"{ours.kl_mean / stock.kl_mean:.2f}"


def _percent(share: float) -> str:
    return f"{share:.1%}" if share < 1 else f"{share:.0%}"


def main() -> None:
    """Write every table into its pages."""
    for path in pages():
        before = path.read_text("utf-8")
        after = with_tables(before)
        if after != before:
            path.write_text(after, "utf-8")
            print(f"{path.relative_to(ROOT)}: tables written")


if __name__ == "__main__":
    main()
