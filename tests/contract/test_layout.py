"""The house keeps its shape: imports go one way, the wheel holds the product alone, files name no machine."""

import ast
import graphlib
import itertools
import re
import shutil
import socket
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from email import message_from_bytes
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import exporter

ROOT = Path(exporter.__file__).resolve().parent.parent
PRODUCT = {"exporter": "exporter", "targets": "exporter/targets", "devices": "exporter/devices"}
REPOSITORY = [*PRODUCT, "docs", "tests", ".ci"]
MADE = {"__pycache__", ".DS_Store"}

# A component imports from its own row and from the rows above it.
ORDER = [
    {"foundation", "child", "formats"},
    {"model", "device", "devices", "predict", "coding"},
    {"emulate"},
    {"calibrate", "compress"},
    {"targets"},
    {"planning", "steps", "recipes"},
    {"prove"},
    {"report"},
    {"bundle"},
    {"stages"},
    {"pipeline"},
    {"bench"},
    {"cli"},
    {"__main__"},
]
ROW = {component: row for row, components in enumerate(ORDER) for component in components}


def files(folder: str) -> Iterator[Path]:
    for path in sorted((ROOT / folder).rglob("*")):
        if path.is_file() and not MADE & set(path.parts):
            yield path


def in_wheel(path: Path) -> str:
    folder, *rest = path.relative_to(ROOT).parts
    return "/".join([PRODUCT[folder], *rest])


def product_modules() -> dict[str, str]:
    """Return dotted name -> source of every module of the product."""
    paths = [path for folder in PRODUCT for path in files(folder) if path.suffix == ".py"]
    return {
        in_wheel(path).removesuffix(".py").removesuffix("/__init__").replace("/", "."): path.read_text("utf-8")
        for path in paths
    }


def imported(source: str) -> set[str]:
    """Return the dotted names a module imports, at any depth; `from a import b` counts as `a.b`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names}
    return names


def component(name: str) -> str | None:
    """Return the part of the product a dotted name belongs to; None for the package itself."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] != "__version__" else None


def breaches(modules: dict[str, str]) -> list[str]:
    """Return every import that goes against the order, or that works in a checkout only."""
    found = []
    for module, source in modules.items():
        here = component(module)
        for name in sorted(imported(source)):
            package = name.split(".")[0]
            if package in {"", "targets", "devices", "tests"}:
                found.append(f"{module} imports {name}: not a name in the wheel")
            elif package == "exporter" and here and (there := component(name)) and ROW[there] > ROW[here]:
                found.append(f"{module} imports {name}: upwards")
    return found


def cycle(modules: dict[str, str]) -> list[str]:
    """Return the modules of an import cycle, or nothing. The package itself imports its public API lazily."""
    graph = {
        module: {name if name in modules else name.rpartition(".")[0] for name in imported(source)} - {module}
        for module, source in modules.items()
        if module != "exporter"
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def test_every_component_has_its_place_in_the_order() -> None:
    components = {component(module) for module in product_modules()} - {None}
    assert components <= set(ROW), "give the new component a row in ORDER"


def test_imports_go_one_way() -> None:
    assert breaches(product_modules()) == []


def test_imports_make_no_cycle() -> None:
    assert cycle(product_modules()) == []


@pytest.mark.parametrize(
    ("module", "source", "breach"),
    [
        ("exporter.formats.format", "from exporter.cli.main import main", "upwards"),
        ("exporter.targets.gguf", "def lower():\n    import exporter.bundle", "upwards"),
        ("exporter.model", "from exporter import pipeline", "upwards"),
        ("exporter.cli.main", "from targets.gguf import TARGET", "not a name in the wheel"),
        ("exporter.cli.main", "import devices", "not a name in the wheel"),
        ("exporter.cli.main", "from . import build", "not a name in the wheel"),
    ],
)
def test_the_rule_catches(module: str, source: str, breach: str) -> None:
    assert [line for line in breaches({module: source}) if line.endswith(breach)]


def unpickling(source: str) -> list[str]:
    """Return every import and call by which a module could run what it reads."""
    modules = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "multiprocessing"}
    found = [name for name in imported(source) if name.split(".")[0] in modules or name.endswith("ProcessPoolExecutor")]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and (call := ast.unparse(node.func)) in ("np.load", "numpy.load", "torch.load"):
            safe = {"np.load": "allow_pickle=False", "torch.load": "weights_only=True"}.get(call)
            if safe not in [ast.unparse(keyword) for keyword in node.keywords]:
                found.append(ast.unparse(node))
    return found


def test_no_module_reads_pickles() -> None:
    assert {module: found for module, source in product_modules().items() if (found := unpickling(source))} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "def f():\n    from multiprocessing import Pool", "import torch\ntorch.load('x')",
        "from concurrent.futures import ProcessPoolExecutor", "np.load(x)", "np.load(x, allow_pickle=True)",
    ],
)  # fmt: skip
def test_the_rule_against_pickles_catches(source: str) -> None:
    assert unpickling(source)
    assert not unpickling("import json\nnp.load(x, allow_pickle=False)")


def test_the_rule_lets_pass() -> None:
    source = "import numpy\nfrom exporter import __version__\nfrom exporter.targets.gguf import formats"
    assert breaches({"exporter.cli.main": source}) == []


def test_the_rule_catches_a_cycle() -> None:
    modules = {
        "exporter.planning.job": "from exporter.model import sources",
        "exporter.model": "import exporter.planning.job",
    }
    assert set(cycle(modules)) == set(modules)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy that holds only what is versioned, so that leftovers cannot enter it."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for folder in PRODUCT:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns(*MADE))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(copy)]
    built = subprocess.run(command, check=False, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = out.glob("*.whl")
    return path


def test_wheel_holds_exactly_the_product(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    info = f"edge_exporter-{exporter.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"exporter", info}
    product = {in_wheel(path) for folder in PRODUCT for path in files(folder)}
    assert {name for name in names if not name.startswith(info)} == product


def test_wheel_says_what_it_is(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (info,) = {name.split("/")[0] for name in archive.namelist()} - {"exporter"}
    metadata = message_from_bytes(archive.read(f"{info}/METADATA"))
    assert (metadata["Name"], metadata["Version"]) == ("edge-exporter", exporter.__version__)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "edge-exporter = exporter.cli.main:main" in archive.read(f"{info}/entry_points.txt").decode()


def test_wheel_works_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    program = (
        "import exporter, exporter.targets, exporter.devices\n"
        "from exporter.foundation.registry import names\n"
        "print(*names('exporter.devices', '.toml'))\n"
        "print(*exporter.__path__, exporter.targets.__file__, exporter.devices.__file__, sep='\\n')"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": str(tmp_path / "site")},
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    listed, *paths = answer.stdout.splitlines()
    assert listed.split() == sorted(path.stem for path in files("devices") if path.suffix == ".toml")
    assert len(paths) == 3
    assert all(Path(path).is_relative_to(tmp_path) for path in paths)


# A class of one letter keeps each pattern from matching itself.
FORBIDDEN = {
    "a path of one machine": re.compile(r"(?<![\w/.:~-])/(?:[w]ork|[r]oot|[h]ome|[U]sers|[o]pt)/[\w.]"),
    "a host of packages": re.compile(r"[p]ypi\.org|[p]ythonhosted\.org|[d]ownload\.pytorch\.org|[a]naconda\.org"),
    "a choice of registry": re.compile(r"--(?:extra-)?[i]ndex-url|--[f]ind-links"),
}
FORBIDDEN_IN_PRODUCT = {"a fixed temporary folder": re.compile(r"(?<![\w/.:~-])/[t]mp\b")}


def forbidden(text: str, product: bool) -> list[str]:
    rules = FORBIDDEN | (FORBIDDEN_IN_PRODUCT if product else {})
    return [f"{what}: {hit.group()}" for what, rule in rules.items() for hit in rule.finditer(text)]


def test_files_name_no_machine() -> None:
    paths = [path for folder in REPOSITORY for path in files(folder)]
    paths += [ROOT / name for name in ("README.md", "Makefile", "pyproject.toml", ".gitignore")]
    found = {}
    for path in paths:
        text = path.read_bytes().decode("utf-8", errors="ignore")
        if hits := forbidden(text, product=path.relative_to(ROOT).parts[0] in PRODUCT):
            found[str(path.relative_to(ROOT))] = hits
    assert found == {}


@pytest.mark.parametrize(
    "text",
    ["see /w|ork/main/x", "'/r|oot/.cache'", "--i|ndex-url x", "https://p|ypi.org/simple", 'Path("/t|mp")'],
)
def test_the_scan_catches(text: str) -> None:
    assert forbidden(text.replace("|", ""), product=True)


def test_the_scan_lets_pass() -> None:
    assert forbidden("model/root/x, ~/work/x, https://host/home/x, a/tmp, /bin/sh", product=True) == []


def test_every_direct_dependency_is_pinned() -> None:
    lines = (ROOT / ".ci/constraints.txt").read_text("utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert [pin for pin in pins if [part.operator for part in pin.specifier] != ["=="]] == []
    pinned = {pin.name: str(pin.specifier).removeprefix("==") for pin in pins}
    assert pinned["torch"] == "2.13.0"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    for line in itertools.chain(project["dependencies"], *project["optional-dependencies"].values()):
        wanted = Requirement(line)
        assert wanted.name in pinned
        assert pinned[wanted.name] in wanted.specifier, line


def test_tests_have_no_network(no_network: list[str]) -> None:
    with pytest.raises(PermissionError, match="tests have no network"):
        socket.create_connection(("192.0.2.1", 80), timeout=1)
    assert no_network
    no_network.clear()


def test_tests_have_the_loopback() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        pass
