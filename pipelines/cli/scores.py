"""``coterie expert score``: how well experts serve one owner's queries, published so that routers can be labelled.

Knows options and how to say what was written; queries are measured in ``pipelines.train.score_experts``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pipelines.cli.errors import resumable, writing_to
from pipelines.cli.loading import quiet_transformers
from pipelines.cli.options import (
    PACKAGE_FOLDER,
    JsonOption,
    RegistryOption,
    complete_expert,
    open_registry,
)
from pipelines.cli.output import human_count, print_fields, print_json
from pipelines.cli.progress import spinner

if TYPE_CHECKING:
    from pipelines.train.job import DomainJob
    from registry import Registry

__all__ = ["score"]


def score(
    context: typer.Context,
    file: Annotated[
        Path,
        typer.Argument(
            metavar="JOB", help="The job that the owner's retriever was trained by.", show_default=False
        ),
    ],
    out: Annotated[Path, PACKAGE_FOLDER],
    expert: Annotated[
        list[str] | None,
        typer.Option(
            "--expert",
            metavar="EXPERT",
            help="An expert to try, the owner's own beside it; may be given several times. By default all retrievers "
            "on the same base whose owners have not opted out.",
            autocompletion=complete_expert,
            show_default=False,
        ),
    ] = None,
    split: Annotated[
        Literal["heldout", "train"],
        typer.Option(
            "--split", help="Which queries: those kept for labels, or those trained on. Never the test's."
        ),
    ] = "heldout",
    metric: Annotated[
        Literal["margin", "ndcg@10", "mrr@10"],
        typer.Option(
            "--metric",
            help="What is compared: the best right document's score less the best wrong one's, or a metric.",
        ),
    ] = "margin",
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Try experts on an owner's queries; publish how well they do.

    The scorers 'pilot_mean' and 'pilot_max', the paper's among them, label every owner's queries with the experts that
    serve them best, and need this of every owner. Queries are told apart in bundles of the job's min_group at least.
    What was measured stays in the job's workdir: when another expert joins, only that one is tried.
    """
    store = open_registry(context, registry)
    from pipelines.train.job import DomainJob

    job = DomainJob.from_file(file)
    experts = expert or _everybody(job, store)

    from pipelines.train.score_experts import score_experts

    advice = f"experts that were tried are kept in {job.directory}; the same command goes on from there."
    with resumable(advice), quiet_transformers(), spinner("Scoring"), writing_to(out):
        done = score_experts(job, registry=store, experts=experts, out=out, side=split, metric=metric)

    from experts.package import read_package

    card = read_package(done.folder)
    published = card.routing.retrieval.scores if card.routing and card.routing.retrieval else None
    assert published is not None, "it was written"
    if as_json:
        print_json(
            {
                "name": card.name,
                "version": card.version,
                "digest": card.digest,
                "out": str(done.folder),
                "measured": done.measured,
                "scores": published.model_dump(mode="json"),
            }
        )
        return
    print_fields(
        {
            "tried": ", ".join(published.experts),
            "on": f"{human_count(published.queries)} queries, published as {human_count(published.rows)} rows",
            "measured": f"{human_count(done.measured)} pairs of a query and an expert; the rest was known",
            "written": f"{done.folder}: {card.name}@{card.version}, to be registered",
        }
    )


def _everybody(job: DomainJob, store: Registry) -> list[str]:
    base = store.expert(job.name).base_name
    return [record.name for record in store.experts(kind="retriever", base=base) if not record.opted_out]
