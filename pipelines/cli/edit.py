"""``coterie add`` and ``remove``: experts join and leave a composed folder that exists.

Knows how to print a change; what it is made of is the composer's business.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, TypeAlias, cast

import typer

from pipelines.cli.options import (
    JsonOption,
    OutFolder,
    RegistryOption,
    complete_expert,
    complete_owner,
    examples,
    open_registry,
)
from pipelines.cli.output import note, print_json, print_line
from pipelines.cli.progress import byte_bar

if TYPE_CHECKING:
    from composer.editing import Change
    from composer.upcycling.growth import NewRows

__all__ = ["ADD_EXAMPLES", "REMOVE_EXAMPLES", "add_to_folder", "remove_from_folder"]

ADD_EXAMPLES = examples(
    "coterie add composed acme/contracts",
    "coterie add composed acme/contracts@2 --dry-run",
    "coterie add tuned acme/contracts --new-rows embedding",
)
REMOVE_EXAMPLES = examples(
    "coterie remove composed acme", "coterie remove composed acme/contracts bob --json"
)

DryRunOption: TypeAlias = Annotated[
    bool, typer.Option("--dry-run", help="Say what would change and write nothing.")
]


def add_to_folder(
    context: typer.Context,
    out: OutFolder,
    references: Annotated[
        list[str],
        typer.Argument(
            metavar="EXPERT",
            help="owner/expert, owner/expert@VERSION or owner/expert@sha256:DIGEST; one or more.",
            autocompletion=complete_expert,
            show_default=False,
        ),
    ],
    copy: Annotated[
        bool, typer.Option("--copy", help="Copy the new experts' files instead of linking them.")
    ] = False,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt", help="A text of the new experts' domain, for a router made of prompts; repeatable."
        ),
    ] = None,
    new_rows: Annotated[
        str | None,
        typer.Option(
            "--new-rows",
            help="Keep tuned weights; new router rows start from: untuned, embedding or statistics.",
        ),
    ] = None,
    dry_run: DryRunOption = False,
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Add experts to a composed folder, or newer versions.

    The folder becomes what a fresh build of its manifest with these experts would be, in one step. The files of
    the experts that stay are not touched.
    """
    from composer.editing import plan_change

    change = plan_change(
        out,
        add=references,
        registry=open_registry(context, registry),
        prompts=prompt or (),
        new_rows=cast("NewRows | None", new_rows),  # checked by the plan
    )
    _apply(change, dry_run=dry_run, copy=copy, as_json=as_json)


def remove_from_folder(
    out: OutFolder,
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="OWNER_OR_EXPERT",
            help="Owners, with all their experts, or experts (owner/expert); one or more.",
            autocompletion=complete_owner,
            show_default=False,
        ),
    ],
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Take experts out of a composed folder.

    The folder becomes what a fresh build of its manifest without them would be, in one step. Needs no registry.
    The registry keeps them; `coterie opt-out` is how an owner leaves for good.
    """
    from composer.editing import plan_change

    _apply(plan_change(out, remove=names), dry_run=dry_run, copy=False, as_json=as_json)


def _apply(change: Change, *, dry_run: bool, copy: bool, as_json: bool) -> None:
    from time import perf_counter

    from composer.editing import apply_change

    for warning in change.warnings:
        note(f"Warning: {warning}")
    started = perf_counter()
    if not dry_run:
        with byte_bar(f"Changing {change.folder}") as report:
            done = 0

            def add(_path: str, size: int) -> None:
                nonlocal done
                done += size
                report(min(done, change.plan.bytes), change.plan.bytes)

            apply_change(change, copy=copy, progress=add)
    seconds = perf_counter() - started
    if as_json:
        print_json({**change.to_dict(), "dry_run": dry_run, "seconds": round(seconds, 3)})
        return
    _print(change, dry_run=dry_run, seconds=seconds)


def _print(change: Change, *, dry_run: bool, seconds: float) -> None:
    for sign, references in (("+", change.added), ("-", change.removed)):
        for reference in references:
            print_line(f"{sign} {reference}")
    for old, new in change.replaced.items():
        print_line(f"~ {old} -> {new}")
    count = len(change.plan.experts)
    after = f"{count} {'expert' if count == 1 else 'experts'} of {', '.join(change.plan.owners)}"
    if dry_run:
        print_line(f"{change.folder} would hold {after}. Nothing was written.")
    else:
        print_line(f"{change.folder} holds {after}, changed in {seconds:.2f} s.")
