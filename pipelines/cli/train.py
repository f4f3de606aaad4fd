"""``coterie train``: owners' training jobs on the command line.

Knows job files, the live table and how jobs ended; training and Ray are the business of ``pipelines.train``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from experts.errors import ManifestError
from pipelines.cli.board import job_board
from pipelines.cli.catalog import layer_ranges
from pipelines.cli.errors import resumable, writing_to
from pipelines.cli.options import JsonOption, RegistryOption, examples, open_registry
from pipelines.cli.output import human_count, print_json, print_table

if TYPE_CHECKING:
    from pipelines.train import DomainJob
    from pipelines.train.hub import JobOutcome
    from pipelines.train.planning import JobPlan

__all__ = ["train"]

EXAMPLES = examples(
    "coterie train job.yaml",
    "coterie train jobs/*.yaml --out trained",
    "coterie train jobs/*.yaml --dry-run",
    "coterie train job.yaml --local --threads 2",
)


def train(
    context: typer.Context,
    jobs: Annotated[
        list[Path],
        typer.Argument(
            metavar="JOB...", help="Job files (YAML), of one or several owners.", show_default=False
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="FOLDER", help="Receives OWNER/EXPERT for each job.")
    ] = Path("trained"),
    local: Annotated[
        bool, typer.Option("--local", help="Train in this process, one job after the other, without Ray.")
    ] = False,
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads",
            min=1,
            metavar="N",
            help="Threads of each owner; by default all cores, shared out.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be trained, and on which device; train nothing.")
    ] = False,
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train owners' experts where their text is.

    Each owner gets a process and a Ray of its own, side by side; what comes back is an expert's folder and a
    few numbers. A job that was stopped resumes from its last checkpoint when it is started again.
    """
    from pipelines.train.hub import raise_failures, train_jobs
    from pipelines.train.planning import plan_jobs

    loaded = _load(jobs)
    if dry_run:
        plans = plan_jobs(loaded, out_dir=out, registry=open_registry(context, registry))
        print_json([plan.to_dict() for plan in plans]) if as_json else _print_plans(plans)
        return
    with (
        writing_to(out),
        resumable("finished experts and the last checkpoints are kept; the same command goes on from there."),
        job_board([job.name for job in loaded]) as report,
    ):
        outcomes = train_jobs(
            loaded,
            out_dir=out,
            registry=open_registry(context, registry),
            runner="local" if local else "ray",
            progress=report,
            threads=threads,
        )
    if as_json:
        print_json([_row(outcome) for outcome in outcomes])
    else:
        _print(outcomes)
    raise_failures(outcomes)


def _load(paths: Sequence[Path]) -> list[DomainJob]:
    """Read every job file; all mistakes of all files are reported together."""
    from pipelines.train import DomainJob

    loaded, mistakes = [], []
    for path in paths:
        try:
            loaded.append(DomainJob.from_file(path))
        except ManifestError as error:
            mistakes.append(error)
    if len(mistakes) == 1:
        raise mistakes[0]
    if mistakes:
        raise ManifestError(
            f"{len(mistakes)} job files have mistakes:", problems=[str(error) for error in mistakes]
        )
    return loaded


def _print_plans(plans: Sequence[JobPlan]) -> None:
    print_table(
        [
            (
                plan.name,
                plan.kind,
                plan.base,
                layer_ranges(plan.layers),
                plan.steps,
                None if plan.tokens is None else human_count(plan.tokens),
                "done already" if plan.finished else f"{plan.device}, {plan.dtype}",
                plan.folder,
            )
            for plan in plans
        ],
        columns=("EXPERT", "KIND", "BASE", "LAYERS", "STEPS", "TOKENS", "DEVICE", "FOLDER"),
        empty="No job.",
        right=("STEPS", "TOKENS"),
    )


def _row(outcome: JobOutcome) -> dict[str, Any]:
    return {
        "name": outcome.name,
        "folder": str(outcome.folder) if outcome.folder else None,
        "error": outcome.error,
        "message": outcome.message,
        "log": str(outcome.log),
        "scalars": dict(outcome.final.scalars),
        "device": outcome.device,
    }


def _print(outcomes: Sequence[JobOutcome]) -> None:
    retrievers = [outcome for outcome in outcomes if "queries" in outcome.final.scalars]
    others = [outcome for outcome in outcomes if outcome not in retrievers]
    if others or not retrievers:
        _print_language(others)
    if retrievers:
        _print_retrievers(retrievers)


def _print_retrievers(outcomes: Sequence[JobOutcome]) -> None:
    measures = ("base_held_out_ndcg10", "held_out_ndcg10")
    print_table(
        [
            (
                outcome.name,
                human_count(int(outcome.final.scalars["queries"])),
                *(f"{scalars[key]:.3f}" if key in scalars else None for key in measures),
                outcome.folder or f"failed: {outcome.error}",
            )
            for outcome in outcomes
            for scalars in [outcome.final.scalars]
        ],
        columns=("RETRIEVER", "QUERIES", "BASE NDCG@10", "NDCG@10", "FOLDER"),
        empty="No job.",
        right=("QUERIES", "BASE NDCG@10", "NDCG@10"),
    )


def _print_language(outcomes: Sequence[JobOutcome]) -> None:
    rows = []
    for outcome in outcomes:
        scalars = outcome.final.scalars
        rows.append(
            (
                outcome.name,
                human_count(int(scalars["tokens"])) if "tokens" in scalars else None,
                f"{scalars['tokens_per_second']:,.0f}" if "tokens_per_second" in scalars else None,
                f"{scalars['anchor_held_out_nll']:.3f}" if "anchor_held_out_nll" in scalars else None,
                f"{scalars['held_out_nll']:.3f}" if "held_out_nll" in scalars else None,
                outcome.folder or f"failed: {outcome.error}",
            )
        )
    print_table(
        rows,
        columns=("EXPERT", "TOKENS", "TOKENS/S", "ANCHOR NLL", "EXPERT NLL", "FOLDER"),
        empty="No job.",
        right=("TOKENS", "TOKENS/S", "ANCHOR NLL", "EXPERT NLL"),
    )
