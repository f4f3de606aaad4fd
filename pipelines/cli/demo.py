"""``coterie demo``: the whole job on a real model and real text, on the command line.

Knows where the results go and which registry is meant; the demonstration itself is ``pipelines.demo``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipelines.cli.errors import resumable, writing_to
from pipelines.cli.loading import quiet_transformers
from pipelines.cli.options import JsonOption, RegistryOption, examples, open_registry
from pipelines.cli.output import print_json

__all__ = ["demo"]

EXAMPLES = examples("coterie demo --out demo-out", "coterie demo --out demo-out --quick")


def demo(
    context: typer.Context,
    out: Annotated[
        Path, typer.Option("--out", metavar="FOLDER", help="Receives everything that is made.")
    ] = Path("demo-out"),
    quick: Annotated[bool, typer.Option("--quick", help="Train less: a look in about two minutes.")] = False,
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run the whole job on a real model and real text.

    Three owners train experts on text that stays apart, the experts are composed, every combination is
    measured, and each owner is left out. The results are in FOLDER/report.md and report.json. Unless a registry
    is named on the command line, the demo uses one of its own, FOLDER/registry.
    """
    from rich.console import Console

    from pipelines.demo import run_demo

    named = registry or context.find_root().params.get("registry")
    advice = f"what was made so far is in {out}; the next run starts anew."
    with writing_to(out), resumable(advice), quiet_transformers():
        report = run_demo(
            out,
            registry=open_registry(context, named) if named else None,
            quick=quick,
            console=Console(stderr=as_json),
        )
    if as_json:
        print_json(report.to_dict())
