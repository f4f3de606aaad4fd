"""``coterie audit``: the registry's log of changes on the command line.

Knows how to show the log and report its check; the chain itself is the registry's business.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from pipelines.cli.options import JsonOption, RegistryOption, examples, open_registry
from pipelines.cli.output import print_json, print_line, print_table

__all__ = ["group"]

group = typer.Typer(
    help="Show and check the log of every change.",
    no_args_is_help=True,
    rich_markup_mode=None,
    epilog=examples("coterie audit list --last 20", "coterie audit verify"),
)


@group.command("list", epilog=examples("coterie audit list", "coterie audit list --last 20 --json"))
def list_entries(
    context: typer.Context,
    last: Annotated[
        int | None,
        typer.Option("--last", min=1, metavar="N", help="Only the newest N entries.", show_default=False),
    ] = None,
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """List what was changed, when, oldest first."""
    entries = list(open_registry(context, registry).audit())
    entries = entries[-last:] if last else entries
    if as_json:
        print_json([{**dataclasses.asdict(entry), "detail": dict(entry.detail)} for entry in entries])
        return
    print_table(
        [(entry.sequence, entry.at, entry.action, entry.subject, entry.digest[:12]) for entry in entries],
        columns=("SEQUENCE", "AT", "ACTION", "SUBJECT", "DIGEST"),
        empty="Nothing has been changed yet.",
        right=("SEQUENCE",),
    )


@group.command("verify", epilog=examples("coterie audit verify", "coterie audit verify --json"))
def verify(context: typer.Context, registry: RegistryOption = None, as_json: JsonOption = False) -> None:
    """Check that no entry was altered, reordered or cut out.

    Keep the printed digest elsewhere: with it even a log that was rewritten as a whole can be told.
    """
    head = open_registry(context, registry).verify_audit()
    if as_json:
        print_json({"entries": head.entries, "digest": head.digest})
        return
    print_line(f"The audit log is intact: {head.entries} entries, the last with digest {head.digest}.")
