"""``coterie tune``: trains routers, the trunk or everything of a composition on a mix of texts.

Knows how a job and its progress are shown; training is the business of ``pipelines.tune``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.cli.errors import resumable, writing_to
from pipelines.cli.loading import DeviceOption, quiet_transformers
from pipelines.cli.options import JsonOption, RegistryOption, examples, open_registry
from pipelines.cli.output import human_count, note, print_fields, print_json, print_line
from pipelines.cli.progress import count_bar

__all__ = ["EXAMPLES", "tune"]

EXAMPLES = examples(
    "coterie tune manifest.yaml tuned --job tune.yaml",
    "coterie tune composed tuned --job tune.yaml --dry-run",
    "accelerate launch -m pipelines.cli tune composed tuned --job tune.yaml",
)


def tune(
    context: typer.Context,
    composition: Annotated[
        Path,
        typer.Argument(
            metavar="COMPOSITION",
            help="A manifest (YAML), or a folder written by 'coterie build'.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="The folder to write; must not exist.", show_default=False)
    ],
    job: Annotated[
        Path,
        typer.Option(
            "--job",
            metavar="FILE",
            help="The tuning job (YAML): what is trained, on whose text, for how long.",
            show_default=False,
        ),
    ],
    device: DeviceOption = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done and stop.")] = False,
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train a composition further on several owners' texts.

    The trained weights stand in files of their own beside what they started from. They hold everybody whose text or
    expert went in, so they count only while nobody is left out: otherwise the composition from before answers.
    """
    from pipelines.tune import TuneJob, plan_tuning
    from pipelines.tune import tune as run

    wanted = TuneJob.from_file(job)
    store = open_registry(context, registry)
    plan = plan_tuning(composition, wanted, registry=store)
    for warning in plan.warnings:
        note(f"Warning: {warning}")
    if dry_run:
        print_json(plan.to_dict()) if as_json else _print_plan(plan.to_dict())
        return
    if plan.optout_class_before == "exact":
        note(
            f"Note: the trained weights will hold {', '.join(plan.owners)}; leaving one of them out falls back to the "
            "weights from before."
        )
    advice = f"the last checkpoint is kept in {wanted.workdir}; the same command goes on from there."
    with (
        writing_to(out),
        resumable(advice),
        quiet_transformers(),
        count_bar("Tuning", unit="tokens") as progress,
    ):
        result = run(plan, wanted, out, registry=store, device=device, progress=progress)
    if os.environ.get("RANK", "0") != "0":  # one of several processes speaks for all
        return
    if as_json:
        print_json({**plan.to_dict(), **result.to_dict()})
        return
    print_line(
        f"Tuned {result.folder}: {human_count(result.parameters)} parameters on {human_count(result.tokens)} tokens, "
        f"{result.tokens_per_second:,.0f} tokens/s, loss {result.loss:.3f}."
    )


def _print_plan(plan: dict[str, Any]) -> None:
    print_fields(
        {
            "composition": plan["name"],
            "train": plan["train"],
            "tokens": human_count(plan["tokens"]),
            "steps": plan["steps"],
            "text of": ", ".join(plan["text_owners"]) or "nobody (public)",
            "trained weights hold": ", ".join(plan["owners"]),
            "opt-out class": f"{plan['optout_class']} (before: {plan['optout_class_before']})",
        }
    )
