"""A target owns what is its own: no other module of code names a runtime, its file format or its files.

Comments and docstrings may name them, as the source of a figure. What else may is listed with its reason.
"""

import ast
import re
from collections.abc import Iterator, Mapping

import pytest

from tests.contract.test_layout import product_modules

NAMES = re.compile(r"gguf|ggml|llama[._ -]?cpp|onnx", re.IGNORECASE)
# Their own: targets, the reader of GGUF sources with what opens one, and what the families declare.
OWNERS = re.compile(
    r"exporter\.targets(\.|$)|exporter\.model\.(gguf_\w+|llama_vocabulary|sources|family)$|exporter\.model\.families\."
)
# Module -> why it may, and the names or the beginnings of the texts with which it does.
ALLOWED: dict[str, tuple[str, tuple[str, ...]]] = {
    "exporter.cli.job_options": (
        "help on the names that a user may type",
        ("A folder, a hub id, a .gguf file", "gguf, onnx, onnx-qdq, or auto"),
    ),
    "exporter.cli.bench": ("help on what is timed", ("Time the products of each GGUF type",)),
    "exporter.cli.predict": ("help on the names that a user may type", ("Runtime, such as llama.cpp",)),
    "exporter.cli.main": (
        "`inspect` takes a file of the kind that a source may be; the library of its reader is told to be quiet",
        (".gguf", "gguf", "gguf_facts", "BUNDLE_OR_GGUF", "Folder of a bundle, or a GGUF file."),
    ),
    "exporter.cli.show": (
        "`inspect` shows the tensors of such a file, through the reader of sources",
        ("gguf_facts", "exporter.model.gguf_reader", "open_gguf"),
    ),
    "exporter.model.checkpoint": ("says that a folder holds a file which is a source by itself", ("*.gguf",)),
    "exporter.model.recognised": (
        "recognises what is given as a source, and says what to give instead",
        ("*.gguf", "holds a GGUF file", "*.onnx", "onnx/*.onnx", "holds an ONNX model"),
    ),
    "exporter.foundation.cache": ("the folder of the cache where the reader of sources unpacks", ("gguf",)),
    "exporter.compress.checks": ("an error's reason", ("factors beside matrices of the layers; llama.cpp dies",)),
    "exporter.compress.compression": ("an error's advice", ("choose a type that holds float32",)),
    "exporter.bench.engine": (
        "how to get the program llama-bench, which is measured with as it is, and a build for old processors",
        ("for file in ", "name a static build of it", "install or name a build for this processor"),
    ),
}  # fmt: skip


def named(source: str) -> list[str]:
    """Return the identifiers, imports and texts of a module's code that name a runtime."""
    return [text for text in texts_of_code(source) if NAMES.search(text)]


def texts_of_code(source: str) -> list[str]:
    """Return the identifiers, imports and texts of a module's code; docstrings are no code."""
    tree = ast.parse(source)
    documentation = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }  # fmt: skip
    nodes = (node for node in ast.walk(tree) if id(node) not in documentation)
    return [text for node in nodes for text in texts_of(node)]


def texts_of(node: ast.AST) -> Iterator[str]:
    """Yield the names and the text of one node of a syntax tree."""
    values = [node.value] if isinstance(node, ast.Constant) else [value for _, value in ast.iter_fields(node)]
    for value in values:
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, str | bytes):
                yield one if isinstance(one, str) else one.decode("latin-1")


def breaches(modules: Mapping[str, str]) -> list[str]:
    """Return every name of a runtime outside its target that is not allowed, and every permission that is not used."""
    found = []
    for module, source in modules.items():
        if OWNERS.match(module):
            continue
        _, allowed = ALLOWED.get(module, ("", ()))
        texts = named(source)
        used = {one: [text for text in texts if is_one(text, one)] for one in allowed}
        found += [f"{module}: {text}" for text in texts if not any(text in some for some in used.values())]
        found += [f"{module} no longer says {one!r}" for one, some in used.items() if not some]
    return found


def is_one(text: str, allowed: str) -> bool:
    """Return whether a text is an allowed name, or begins as an allowed sentence does."""
    return text.startswith(allowed) if " " in allowed else text == allowed


def test_only_targets_name_what_is_theirs() -> None:
    modules = product_modules()
    assert breaches(modules) == []
    assert set(ALLOWED) <= set(modules)


@pytest.mark.parametrize(
    "source",
    [
        "import onnx", "from onnxruntime import InferenceSession", "def f():\n    import llama_cpp",
        "from exporter.targets.gguf import target", "def ggml_format(): ...", "def f(gguf): ...", "f(gguf=1)",
        "class OnnxThing: ...", "x.gguf = 1", "x = y.to_gguf()", "if target == 'onnx-qdq': ...", "FILE = 'model.onnx'",
        "magic = b'GGUF'", "print(f'{x} llama.cpp')", "load_target('gguf')", "TABLE = {'llama-cpp-python': 1}",
        "global gguf", "match x:\n    case 'gguf': ...", "try: ...\nexcept E as onnx: ...", "import numpy as gguf",
    ],
)  # fmt: skip
def test_the_rule_catches(source: str) -> None:
    assert breaches({"exporter.planning.job": source})


def test_the_rule_lets_pass() -> None:
    source = (
        '"""Of llama.cpp."""\n# ggml has 32.\nx = 1\ndef f():\n    """Return what onnx does."""\n    return "llama"\n'
    )
    assert breaches({"exporter.planning.job": source}) == []
    owners = ("targets.gguf.target", "targets.facts", "model.gguf_reader", "model.sources", "model.families.llama")
    assert breaches({f"exporter.{name}": "import gguf" for name in owners}) == []


def test_a_permission_that_is_not_used_is_found() -> None:
    assert breaches({"exporter.foundation.cache": "x = 1"}) == ["exporter.foundation.cache no longer says 'gguf'"]
    assert breaches({"exporter.foundation.cache": "FOLDERS = ('gguf',)\nimport onnx"}) == [
        "exporter.foundation.cache: onnx"
    ]


# Names of tensors in checkpoints, and the names of a graph's own nodes and initialisers that look like them.
TENSORS = re.compile(r"model\.layers\.|self_attn|_layernorm|model\.norm|lm_head\.|embed_tokens|_proj\b")
GRAPH = re.compile(r"/.*|attn/\w+|model\.embed_tokens(\.weight|\.codes|\.scales)?")


def tensors_named(modules: Mapping[str, str]) -> list[str]:
    """Return every name of a checkpoint's tensor in a module outside the model."""
    return [
        f"{module}: {text}"
        for module, source in modules.items()
        if not module.startswith("exporter.model.")
        for text in texts_of_code(source)
        if TENSORS.search(text) and not (module.startswith("exporter.targets.onnx") and GRAPH.fullmatch(text))
    ]


def test_only_the_model_names_tensors_of_a_checkpoint() -> None:
    assert tensors_named(product_modules()) == []


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "self_attn.q_proj", "lm_head.weight"])
def test_the_rule_on_tensors_catches(name: str) -> None:
    for module in ("exporter.compress.prune", "exporter.targets.onnx.graph", "exporter.targets.gguf.target"):
        assert tensors_named({module: f"x = {name!r}"})
        assert tensors_named({module: f"x = f'{{y}}{name}'"})
    assert tensors_named({"exporter.model.families.llama": f"x = {name!r}"}) == []
