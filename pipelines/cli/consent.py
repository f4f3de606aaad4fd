"""``coterie opt-out``: the consent ledger on the command line.

Knows how to record and show who has withdrawn; what a withdrawal does is the registry's and the composer's
business.
"""

from __future__ import annotations

from typing import Annotated

import typer

from pipelines.cli.options import JsonOption, OwnerArgument, RegistryOption, examples, open_registry
from pipelines.cli.output import print_json, print_line, print_table

__all__ = ["group"]

group = typer.Typer(
    help="Record, show and lift the opt-out of owners.",
    no_args_is_help=True,
    rich_markup_mode=None,
    epilog=examples(
        'coterie opt-out add acme --reason "contract ended"',
        "coterie opt-out list",
        "coterie opt-out remove acme",
    ),
)

ByOption = Annotated[
    str | None,
    typer.Option(
        "--by", metavar="WHO", help="Who records this; by default your user name.", show_default=False
    ),
]


@group.command("add", epilog=examples('coterie opt-out add acme --reason "contract ended"'))
def add(
    context: typer.Context,
    owner: OwnerArgument,
    reason: Annotated[str, typer.Option("--reason", help="Why, in a few words.", show_default=False)],
    by: ByOption = None,
    unknown_owner: Annotated[
        bool,
        typer.Option(
            "--unknown-owner",
            help="Take a name without an expert here: an owner of text that was tuned on, or of documents.",
        ),
    ] = False,
    registry: RegistryOption = None,
) -> None:
    """Leave an owner out of every composition from now on.

    No new manifest may name the owner's experts, and builds leave them out. Folders built earlier leave
    the owner out when they are loaded beside this registry.
    """
    open_registry(context, registry).opt_out(owner, reason=reason, by=by, allow_unknown=unknown_owner)
    print_line(f"Owner '{owner}' has opted out.")


@group.command("list", epilog=examples("coterie opt-out list", "coterie opt-out list --history --json"))
def list_opt_outs(
    context: typer.Context,
    history: Annotated[
        bool, typer.Option("--history", help="Show every opt-out and opt-in there ever was.")
    ] = False,
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the owners who are out: since when, by whom, why."""
    store = open_registry(context, registry)
    entries = store.opt_out_history() if history else store.opt_outs()
    fields = (("sequence",) if history else ()) + ("owner",) + (("action",) if history else ())
    fields = (*fields, "when", "who", "reason")
    rows = [{field: getattr(entry, field) for field in fields} for entry in entries]
    if as_json:
        print_json(rows)
        return
    print_table(
        [list(row.values()) for row in rows],
        columns=[field.upper() for field in fields],
        empty="Nobody has ever opted out." if history else "Nobody has opted out.",
        right=("SEQUENCE",),
    )


@group.command(
    "remove",
    epilog=examples("coterie opt-out remove acme", 'coterie opt-out remove acme --reason "agreed anew"'),
)
def remove(
    context: typer.Context,
    owner: OwnerArgument,
    reason: Annotated[
        str, typer.Option("--reason", help="Why, in a few words.")
    ] = "the owner takes part again",
    by: ByOption = None,
    registry: RegistryOption = None,
) -> None:
    """Lift an owner's opt-out; the ledger keeps both entries."""
    open_registry(context, registry).opt_in(owner, reason=reason, by=by)
    print_line(f"Owner '{owner}' takes part again.")
