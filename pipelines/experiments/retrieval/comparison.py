"""The comparison of retrievers as a kind of experiment, and its rows: rankings, routing, significance.

Knows which modules do what; knows nothing of how an arm is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, final

from pipelines.experiments.kind import ExperimentKind
from pipelines.experiments.results import Row
from pipelines.experiments.retrieval.arms import ARMS
from pipelines.experiments.retrieval.settings import RetrieverExperiment

if TYPE_CHECKING:
    from pipelines.experiments.retrieval.arms import Measured, Scores
    from pipelines.experiments.retrieval.data import RetrievalData
    from pipelines.experiments.retrieval.world import RetrieverWorld
    from pipelines.experiments.world import Tell

__all__ = ["RetrieverComparison"]


@final
class RetrieverComparison(ExperimentKind):
    """Arms of arXiv 2409.02685 and ours, on test collections."""

    settings = RetrieverExperiment
    arms = ARMS
    metric = "ndcg@10"

    def texts(self, experiment: RetrieverExperiment, *, tell: Tell | None) -> RetrievalData:
        """Fetch the pairs and read the collections."""
        from pipelines.experiments.retrieval.data import read_data

        return read_data(experiment, tell=tell)

    def world(
        self,
        experiment: RetrieverExperiment,
        texts: RetrievalData,
        *,
        folder: Path,
        seed: int,
        tell: Tell | None,
    ) -> RetrieverWorld:
        """Make the world of a seed."""
        from pipelines.experiments.retrieval.world import RetrieverWorld

        return RetrieverWorld(experiment, texts, folder=folder, seed=seed, tell=tell)

    def run(self, world: RetrieverWorld, arm: str) -> Iterator[Row]:
        """Measure one arm; some give several results."""
        base = world.scores(world.base_queries)
        for name, measured in ARMS.load(arm)(world).items():
            yield from _rankings(world, name, measured)
            yield from _routing(world, name, measured)
            yield from _significance(world, name, measured, base)

    def owned(self, experiment: RetrieverExperiment) -> Sequence[str]:
        """The owners' domains."""
        return experiment.domains

    def write(self, experiment: RetrieverExperiment, rows: Sequence[Row], *, out: Path) -> list[Path]:
        """Write table, picture and JSON."""
        import json

        from pipelines.experiments.retrieval.costs import query_passes
        from pipelines.experiments.retrieval.report import write_results
        from pipelines.experiments.retrieval.world import base_folder

        config = json.loads((base_folder(experiment) / "config.json").read_text(encoding="utf-8"))
        passes = query_passes(experiment, num_layers=config["num_hidden_layers"])
        return write_results(experiment, rows, out=out, passes=passes)


def _row(world: RetrieverWorld, arm: str, domain: str, metric: str, value: float) -> Row:
    return Row(arm=arm, seed=world.seed, domain=domain, split="test", metric=metric, value=value)


def _rankings(world: RetrieverWorld, arm: str, measured: Measured) -> Iterator[Row]:
    for domain, metrics in measured.scores.items():
        for metric, values in metrics.items():
            yield _row(world, arm, domain, metric, fmean(values.values()))


def _routing(world: RetrieverWorld, arm: str, measured: Measured) -> Iterator[Row]:
    """Mean weight of everybody on every collection, and of the domain's own owner."""
    names = ("base", *(world.owner(domain) for domain in world.domains))
    for domain in world.data.collections:
        if domain not in measured.weights:
            continue
        for name, share in zip(names, measured.weights[domain].mean(axis=0).tolist(), strict=True):
            yield _row(world, arm, domain, f"routed_to:{name}", share)
        if domain in world.domains:
            hits = measured.weights[domain].argmax(axis=1) == 1 + world.domains.index(domain)
            yield _row(world, arm, domain, "routed_to_owner", float(hits.mean()))


def _significance(world: RetrieverWorld, arm: str, measured: Measured, base: Scores) -> Iterator[Row]:
    """Two-sided p-value against the base over all queries of the owners' domains, and over the unseen ones."""
    from pipelines.retrieval.significance import compare

    if arm == "base":
        return
    for group, names in (("owned", world.domains), ("unseen", tuple(world.data.unseen))):
        covered = [name for name in names if name in measured.scores]
        if not covered or len(covered) < len(names):
            continue
        ours, theirs = (_by_query(scores, covered) for scores in (measured.scores, base))
        found = compare(ours, theirs)
        yield _row(world, arm, group, "p_vs_base", found.p_value)


def _by_query(scores: Scores, collections: Sequence[str]) -> dict[str, float]:
    return {
        f"{name}/{query}": value for name in collections for query, value in scores[name]["ndcg@10"].items()
    }
