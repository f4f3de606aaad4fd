"""Arguments and options that several commands share, and what the shell may complete for them.

Knows how to find the registry that the user means; opens it only when a command asks.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

if TYPE_CHECKING:
    from registry import Registry

__all__ = [
    "PACKAGE_FOLDER",
    "ExpertArgument",
    "JsonOption",
    "OptOutOption",
    "OutFolder",
    "OwnerArgument",
    "RegistryOption",
    "complete_base",
    "complete_expert",
    "complete_owner",
    "examples",
    "open_registry",
]


def examples(*lines: str) -> str:
    """Build the closing block of a help page from one command line a line."""
    return "\n".join(["\b", "Examples:", *(f"  {line}" for line in lines)])


def open_registry(context: typer.Context, given: Path | None) -> Registry:
    """Open the registry named after the command, before it, in ``COTERIE_REGISTRY``, or the user's own."""
    from registry import Registry

    return Registry(given or context.find_root().params.get("registry"))


def complete_expert(ctx: typer.Context, incomplete: str) -> list[str]:
    """Suggest the experts of the registry."""
    return _suggest(ctx, incomplete, lambda store: {record.name for record in store.experts()})


def complete_owner(ctx: typer.Context, incomplete: str) -> list[str]:
    """Suggest the owners of the registry."""
    return _suggest(ctx, incomplete, lambda store: store.owners())


def complete_base(ctx: typer.Context, incomplete: str) -> list[str]:
    """Suggest the bases of the registry."""
    return _suggest(ctx, incomplete, lambda store: {record.name for record in store.bases()})


def _suggest(context: typer.Context, incomplete: str, known: Callable[[Registry], set[str]]) -> list[str]:
    """Names from the index for the shell; anything that goes wrong only means no suggestion."""
    try:
        names = known(open_registry(context, context.params.get("registry")))
    except Exception:  # inside the shell's prompt: a traceback there helps nobody
        return []
    return sorted(name for name in names if name.startswith(incomplete))


RegistryOption: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--registry",
        metavar="PATH",
        file_okay=False,
        # not envvar=: the variable would then win over the option in front of the command
        help="The registry to use; by default $COTERIE_REGISTRY, else the one in your user data folder.",
        show_default=False,
    ),
]
JsonOption: TypeAlias = Annotated[
    bool, typer.Option("--json", help="Print JSON for programs instead of a table.")
]
ExpertArgument: TypeAlias = Annotated[
    str,
    typer.Argument(
        metavar="EXPERT",
        help="owner/expert, owner/expert@VERSION or owner/expert@sha256:DIGEST.",
        autocompletion=complete_expert,
        show_default=False,
    ),
]
OwnerArgument: TypeAlias = Annotated[
    str,
    typer.Argument(
        metavar="OWNER", help="The owner's name.", autocompletion=complete_owner, show_default=False
    ),
]
OptOutOption: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--opt-out",
        metavar="OWNER",
        help="Leave this owner out; may be given several times.",
        autocompletion=complete_owner,
        show_default=False,
    ),
]
PACKAGE_FOLDER = typer.Option(
    "--out",
    metavar="DIR",
    help="The folder to write, ready for 'coterie register'.",
    file_okay=False,
    show_default=False,
)
"""Where a command writes an expert's package."""
OutFolder: TypeAlias = Annotated[
    Path,
    typer.Argument(
        metavar="OUT",
        help="A folder written by 'coterie build'.",
        show_default=False,
    ),
]
