"""An owner tries other owners' experts on the label queries and publishes how well they do, beside what is published.

Knows a job, a registry and one table of scores; what a score is, and that test queries are never looked at, is
`pipelines.train.retrieval_scores`' business.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from experts.errors import ManifestError, PlanError
from experts.retrieval_info import ScoresInfo
from experts.routing_artifacts import RoutingArtifacts
from pipelines.retrieval.encoders import Encoder, open_encoder
from pipelines.train.anchor import resolve_base
from pipelines.train.pairs import read_domain, split_domain
from pipelines.train.republish import republish
from pipelines.train.retrieval_scores import LabelMetric, ScoreTable

if TYPE_CHECKING:
    from experts.retrieval_artifacts import Scores
    from experts.retrieval_info import Split
    from pipelines.train.job import DomainJob
    from registry import ExpertRecord, Registry

__all__ = ["Scored", "score_experts"]

_TABLE = "scores.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """What came of scoring.

    Attributes:
        folder: The next version of the owner's expert, to be registered.
        measured: Pairs of a query and an expert that were measured; what the owner's table held already is not.
    """

    folder: Path
    measured: int


def score_experts(
    job: DomainJob,
    *,
    registry: Registry,
    experts: Sequence[str],
    out: Path,
    side: Split = "heldout",
    metric: LabelMetric = "margin",
) -> Scored:
    """Measure experts on the owner's queries, and pack the owner's expert anew with the result.

    Args:
        job: That the owner's expert was trained by; its data, its sides and its minimum group count.
        registry: Has the owner's expert and the others.
        experts: References of all that are to be compared, the owner's own among them.
        out: The folder to create.
        side: Which queries, never the held-out ones of the test.
        metric: What is compared; a manifest asks for it as ``label_metric``.

    Raises:
        DataError: There are no such queries, or fewer than the minimum group.
        ManifestError: The job trains no retriever, or its expert publishes nothing or noisy sums.
        PlanError: An expert cannot answer alone: it publishes nothing about its queries, for instance.
        UnknownNameError: The registry does not know an expert.
    """
    if job.retrieval is None or not isinstance(job.held_out, float):
        raise ManifestError(f"{job.name} is no retriever's job; there are no queries to score experts on.")
    own = registry.expert(job.name)
    records = [registry.expert(reference) for reference in dict.fromkeys([*experts, job.name])]
    domain = read_domain(job.data, pairs=job.retrieval.pairs)
    split = split_domain(domain, test=job.held_out, label=job.retrieval.label)
    path = job.directory / _TABLE
    table = ScoreTable(domain, split, side=side, metric=metric, path=path)
    with resolve_base(own.base_name, registry=registry) as base:
        stock = open_encoder(base.folder)
        documents = stock.documents(table.documents)
        measured = table.add_base(stock.queries, documents)
        for record in records:
            if record.ref not in table:
                with tempfile.TemporaryDirectory(dir=job.directory, prefix=".scored-") as scratch:
                    encoder = _alone(record, Path(scratch) / "composed", registry=registry)
                    measured += table.add({record.ref: encoder.queries}, documents)
        scores = table.published([record.ref for record in records], min_group=job.retrieval.min_group)
        files, card = registry.files(own), registry.card(own)
        if card.routing is None or card.routing.retrieval is None or card.routing.retrieval.noise is not None:
            raise ManifestError(
                f"{own.ref} publishes no exact sums over queries, so scores cannot stand beside them."
            )
        published = RoutingArtifacts.load(files[card.routing.file], card.routing).retrieval
        assert published is not None, "the card says so"
        info = published.info.model_copy(update={"scores": _info(scores, side=side, metric=metric)})
        artifacts = replace(published, info=info, scores=scores)
        version = registry.next_version(job.name)
        return Scored(
            folder=republish(files, card, artifacts, out, base=base, version=version), measured=measured
        )


def _info(scores: Scores, *, side: Split, metric: LabelMetric) -> ScoresInfo:
    return ScoresInfo(
        split=side,
        metric=metric,
        queries=int(scores.counts.sum()),
        rows=len(scores.counts),
        experts=scores.experts,
    )


def _alone(record: ExpertRecord, out: Path, *, registry: Registry) -> Encoder:
    """Compose one expert, so that every query is its own."""
    from composer import Manifest, build, plan

    manifest = Manifest.from_dict(
        {
            "name": "alone",
            "recipe": "router_retriever",
            "base": record.base_name,
            "experts": [record.ref],
            "router": {"scorer": "centroid", "selector": "top1", "min_group": 1},
        }
    )
    try:
        build(plan(manifest, registry), out, registry=registry)
    except PlanError as error:
        raise PlanError(f"{record.ref} cannot be tried:", problems=error.problems) from None
    return open_encoder(out)
