"""A target owns what is its own: no other module of code names a runtime, its file format or its files."""

import ast
import re
from collections.abc import Iterator

from tests.contract.test_layout import product_modules

NAMES = re.compile(r"gguf|ggml|llama[._ -]?cpp|onnx|\bort\b", re.IGNORECASE)
# Their own: targets, the reader of GGUF sources, and what the families declare.
OWNERS = re.compile(
    r"exporter\.targets(\.|$)|exporter\.model\.(gguf_\w+|llama_vocabulary|sources)$|exporter\.model\.families(\.|$)"
)
ALLOWED: dict[str, dict[str, str]] = {}


def named(source: str) -> Iterator[str]:
    """Yield the identifiers, imports and texts of a module's code that name a runtime; docstrings are no code."""
    tree = ast.parse(source)
    documented = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body and isinstance(node.body[0], ast.Expr)
    }  # fmt: skip
    for node in ast.walk(tree):
        for text in texts_of(node):
            if id(node) not in documented and NAMES.search(text):
                yield text


def texts_of(node: ast.AST) -> Iterator[str]:
    """Yield the names and the text of one node of a syntax tree."""
    if isinstance(node, ast.Constant):
        yield from [node.value] if isinstance(node.value, str) else []
        yield from [node.value.decode("latin-1")] if isinstance(node.value, bytes) else []
        return
    for _, value in ast.iter_fields(node):
        yield from (one for one in (value if isinstance(value, list) else [value]) if isinstance(one, str))


if __name__ == "__main__":
    for module, source in sorted(product_modules().items()):
        if not OWNERS.match(module):
            for text in named(source):
                print(module, "|", text[:150])
