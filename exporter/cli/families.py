"""`edge-exporter families`: the families of models, and what was verified of each."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from exporter.cli.arguments import JsonOption
from exporter.foundation.errors import RequestError, did_you_mean

if TYPE_CHECKING:
    from exporter.targets.parity import BuiltBy, FamilyRow

app = typer.Typer()


@app.command(epilog="Example: edge-exporter families --json")
def families(
    target: Annotated[str | None, typer.Option("--target", help="Only what this target builds.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List the families of models: which targets build them, and how exactly."""
    from exporter.cli import show
    from exporter.targets.artifact import target_names
    from exporter.targets.parity import family_rows, parity

    names = list(target_names())
    if target is not None and target not in names:
        raise RequestError(f"unknown target {target!r}", next_step=did_you_mean(target, names))
    asked = names if target is None else [target]
    rows = [row for row in family_rows(asked) if any(one.lacks is None for one in row.targets)]
    about = parity().model_dump(mode="json", exclude={"targets", "schema_version"})
    facts = {"families": [asdict(row) for row in rows], "kl_mean": about}
    show.document(facts, as_json, lambda: _list(rows, asked))


def _list(rows: "list[FamilyRow]", targets: list[str]) -> None:
    from rich.table import Table

    from exporter.cli import show
    from exporter.targets.parity import parity

    table = Table("models", "model_type", *targets, "usable context", box=None)
    for row in rows:
        table.add_row(*map(show.plain, (row.title, ", ".join(row.model_types), *map(_cell, row.targets), row.contexts)))
    show.console.print(table)
    about = parity()
    for meaning in (
        "model_type: as in config.json; of a model with an encoder of images, the decoder is built",
        "a number: the target builds the family; mean KL divergence, in nats a token, of a float32 artifact from "
        f"transformers ({about.basis}, {about.on}, {about.date}; measure again: {about.command})",
        "builds: the target builds it and rounds activations, so that it has no float32 artifact to measure",
        "no: the target refuses it; --json says why",
        "usable context: the longest text that an artifact computes as the model does; full is max_position_embeddings",
    ):
        show.line(meaning)


def _cell(built: "BuiltBy") -> str:
    if built.lacks is not None:
        return "no"
    return "builds" if built.kl is None else f"{built.kl:.0e}"
