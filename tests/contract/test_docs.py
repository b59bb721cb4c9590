"""README and docs say what is so: every command is parsed, every link followed, every table is that of the data."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.main import get_command

import exporter
from exporter.cli.main import app
from tests.benchmarks.tables import MARKED, TABLES, pages, rendered, with_tables

ROOT = Path(exporter.__file__).resolve().parent.parent
MOST_README_LINES = 200
PAGES = {str(path.relative_to(ROOT)): path.read_text("utf-8") for path in pages()}
FENCED = re.compile(r"^```(?P<language>\w*)\n(?P<body>.*?)^```$", re.DOTALL | re.MULTILINE)
SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.+)$", re.MULTILINE)
# A span such as `exporter/compress/NAME.py` shows where a file goes, not one that is there.
IN_REPOSITORY = re.compile(r"(?:exporter|targets|devices|tests|docs|\.ci)(?:/[\w.-]+)+")
COMMAND = re.compile(r"^(?:\$ )?((?:edge-exporter|make|pip|python|\.venv/bin/\w+) .*)$", re.MULTILINE)
# Programs of others, whose options are not checked.
OTHERS = {"apt-get", "llama-cli", "lm_eval", "ollama"}
# Words that only this project ever used, and phrases that tell how figures came about.
PRIVATE = re.compile(
    r"\b(?:foretell\w*|foretold|evened|evening|loud\w*|heard|mend\w*|met elsewhere|lately|by turns|as ever"
    r"|of its own accord|held to its word|puts? down|slow day|older server|another hour|servers? of another kind"
    r"|on a server)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Command:
    """A command line and the page that it is on."""

    page: str
    line: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.line, comments=True)


def commands() -> Iterator[Command]:
    """Yield the lines of sh blocks, what looks like a command in other blocks, and commands within the text."""
    for page, text in PAGES.items():
        for block in FENCED.finditer(text):
            body = block["body"].replace("\\\n", " ")
            lines = body.splitlines() if block["language"] == "sh" else COMMAND.findall(body)
            yield from (Command(page, line.removeprefix("$ ")) for line in lines if line.strip())
        for span in SPAN.findall(FENCED.sub("", text)):
            if COMMAND.fullmatch(span):
                yield Command(page, span)


@cache
def command_line() -> Any:
    return get_command(app)


def parse(words: list[str]) -> None:
    """Parse the words after `edge-exporter` without running anything.

    Raises:
        typer.TyperException: no such command or option, or a value that does not convert.
    """
    command, context = command_line(), None
    name: str | None = "edge-exporter"
    while True:
        context = command.make_context(name, list(words), parent=context)
        if not hasattr(command, "resolve_command"):
            return
        words = [*context._protected_args, *context.args]
        name, command, words = command.resolve_command(context, words)


@cache
def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))


def check(words: list[str]) -> None:
    """Raise where a command cannot work as it is written."""
    program, *rest = words
    program = program.removeprefix(".venv/bin/")
    if program == "edge-exporter":
        parse(rest)
    elif program == "make":
        targets = [word for word in rest if "=" not in word]
        assert targets and set(targets) <= make_targets(), f"no such target: {targets}"
    elif program == "python":
        assert rest[0] == "-m", "python is shown with modules alone"
        _check_module(rest[1], rest[2:])
    elif program == "pip":
        assert rest[0] == "install"
        _check_paths(rest)
    else:
        assert program in OTHERS, f"unknown program {program!r}"


def _check_module(module: str, rest: list[str]) -> None:
    if module != "pytest":
        assert ROOT.joinpath(*module.split(".")).with_suffix(".py").is_file(), f"no such module: {module}"
        return
    _check_paths(rest)
    (path,) = [word for word in rest if word.startswith("tests/")] or [None]
    if path is not None and "-k" in rest:
        text = (ROOT / path).read_text("utf-8")
        for word in set(rest[rest.index("-k") + 1].split()) - {"and", "or", "not"}:
            assert word in text, f"-k {word} selects nothing in {path}"


def _check_paths(words: list[str]) -> None:
    missing = [word for word in words if IN_REPOSITORY.fullmatch(word) and not (ROOT / word).exists()]
    assert not missing, f"no such files: {missing}"


@pytest.mark.parametrize("page", PAGES)
def test_every_command_can_be_parsed(page: str) -> None:
    for command in commands():
        if command.page == page:
            try:
                check(command.words)
            except (AssertionError, typer.TyperException) as error:
                pytest.fail(f"{page}: {command.line}: {error}")


def test_commands_are_found() -> None:
    found = {(command.page, command.words[1]) for command in commands() if command.words[0] == "edge-exporter"}
    shown = {word for _, word in found}
    assert {
        "plan",
        "build",
        "run",
        "verify",
        "inspect",
        "compare",
        "unpack",
        "bench",
        "devices",
        "predict",
        "emulate",
        "families",
    } == shown
    assert {("README.md", word) for word in ("plan", "build", "run", "verify")} <= found
    assert {("make", "demo"), ("make", "test")} <= {tuple(one.words) for one in commands() if one.page == "README.md"}


@pytest.mark.parametrize(
    "line",
    [
        "edge-exporter built demo",
        "edge-exporter build demo --device pixel-9",
        "edge-exporter build demo --device pixel-9 -o x --no-such-option",
        "edge-exporter devices list --klass phone",
        "edge-exporter run x -p y --tokens many",
        "make breakfast",
        "python -m tests.benchmarks.nothing",
        "python -m pytest tests/benchmarks/test_nothing.py",
        "python -m pytest tests/benchmarks/test_quality.py -k no_such_word",
        "rm -rf out",
    ],
)
def test_the_check_catches(line: str) -> None:
    with pytest.raises((AssertionError, typer.TyperException)):
        check(shlex.split(line))


def options(command: Any) -> Iterator[str]:
    for parameter in command.params:
        yield from parameter.opts
    for other in getattr(command, "commands", {}).values():
        yield from options(other)


def test_options_in_the_text_exist() -> None:
    known = set(options(command_line())) | {"--help"}
    found = {
        (page, word)
        for page, text in PAGES.items()
        for span in SPAN.findall(FENCED.sub("", text))
        for word in re.findall(r"^--[a-z-]+", span)
    }
    assert len(found) > 20
    assert {(page, word) for page, word in found if word not in known} == set()


def test_files_in_the_text_exist() -> None:
    named = {
        (page, path)
        for page, text in PAGES.items()
        for span in SPAN.findall(FENCED.sub("", text))
        for path in IN_REPOSITORY.findall(span)
        if "NAME" not in path
    }
    assert len(named) > 20
    assert {(page, path) for page, path in named if not (ROOT / path).exists()} == set()


def slug(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def broken(page: str, text: str) -> list[str]:
    """Return the relative links of a page that lead nowhere."""
    found = []
    for link in LINK.findall(FENCED.sub("", text)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        to = (ROOT / page).parent / path if path else ROOT / page
        headings = HEADING.findall(FENCED.sub("", to.read_text("utf-8"))) if anchor and to.is_file() else []
        if not to.exists() or (anchor and anchor not in map(slug, headings)):
            found.append(link)
    return found


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    assert broken(page, PAGES[page]) == []


def test_broken_links_are_caught() -> None:
    text = "[a](docs/nothing.md) [b](docs/README.md#nothing) [c](#limits) [d](docs/README.md) [e](https://host/x)"
    assert broken("README.md", text) == ["docs/nothing.md", "docs/README.md#nothing"]


def test_every_page_is_reached() -> None:
    linked = {
        ((ROOT / page).parent / link.partition("#")[0]).resolve()
        for page, text in PAGES.items()
        for link in LINK.findall(text)
    }
    assert [page for page in PAGES if page != "README.md" and ROOT / page not in linked] == []


def test_readme_is_short() -> None:
    assert len(PAGES["README.md"].splitlines()) <= MOST_README_LINES


@pytest.mark.parametrize("page", PAGES)
def test_pages_are_in_plain_english(page: str) -> None:
    assert PRIVATE.findall(PAGES[page]) == []


def test_private_words_are_caught() -> None:
    assert PRIVATE.findall("It is foretold, Evened and loudest; not an event, a recommendation or allowed.") == [
        "foretold",
        "Evened",
        "loudest",
    ]


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if MARKED.search(text)])
def test_tables_are_those_of_the_data(page: str) -> None:
    assert PAGES[page] == with_tables(PAGES[page]), "run: python -m tests.benchmarks.tables"


def test_every_table_stands_once_and_every_marker_is_of_one() -> None:
    text = "\n".join(PAGES.values())
    assert sorted(found["name"] for found in MARKED.finditer(text)) == sorted(TABLES)
    assert len(re.findall(r"<!-- (?:begin|end):", text)) == 2 * len(TABLES)


def test_a_changed_figure_is_caught() -> None:
    text = f"<!-- begin: summary -->\n\n{rendered('summary')}\n\n<!-- end: summary -->"
    assert with_tables(text) == text
    assert with_tables(text.replace("0.0", "0.1", 1)) == text
