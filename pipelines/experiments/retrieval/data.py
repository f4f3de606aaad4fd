"""What a comparison of retrievers searches in: a collection for every domain, owned or nobody's.

Knows pairs, folders and sizes; knows nothing of models.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.assets.pairs import PAIRS, DomainPairs, Pair, domain_pairs
from pipelines.retrieval.collection import Collection, Document, read_collection

if TYPE_CHECKING:
    from pipelines.experiments.retrieval.settings import RetrieverExperiment
    from pipelines.experiments.world import Tell

__all__ = ["COLLECTIONS_VARIABLE", "Owned", "RetrievalData", "owned_domain", "read_data"]

COLLECTIONS_VARIABLE = "COTERIE_COLLECTIONS"
"""Environment variable that names the folder of test collections."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Owned:
    """A domain that somebody owns.

    Attributes:
        training: Pairs that its owner trains on.
        labelled: The first of them, whose documents are in the collection: every expert is tried on these.
        collection: Test queries, none of whose documents any owner trains on, among other documents.
    """

    training: Sequence[Pair]
    labelled: Collection
    collection: Collection


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrievalData:
    """All domains of a comparison.

    Attributes:
        owned: By domain.
        unseen: Collections of nobody's, by name.
    """

    owned: Mapping[str, Owned]
    unseen: Mapping[str, Collection]

    @property
    def collections(self) -> dict[str, Collection]:
        """Every test collection by domain."""
        return {**{name: owned.collection for name, owned in self.owned.items()}, **self.unseen}


def read_data(experiment: RetrieverExperiment, *, tell: Tell | None = None) -> RetrievalData:
    """Fetch pairs and read collections; those that are not there are left out, which is told.

    Raises:
        AssetError: Pairs cannot be had.
        DataError: A collection is damaged.
    """
    say = tell or (lambda _: None)
    owned = {
        name: owned_domain(domain_pairs(name, progress=tell), experiment=experiment)
        for name in experiment.domains
    }
    unseen = {}
    for name in experiment.unseen:
        if name in PAIRS:
            unseen[name] = _unseen(domain_pairs(name, progress=tell), experiment)
            continue
        folder = _folder(experiment)
        if folder is None or not (folder / name).is_dir():
            where = folder or f"${COLLECTIONS_VARIABLE}, which is not set"
            say(f"{name} is left out: there is no folder of that name in {where}")
            continue
        unseen[name] = read_collection(folder / name)
    return RetrievalData(owned=owned, unseen=unseen)


def _folder(experiment: RetrieverExperiment) -> Path | None:
    named = os.environ.get(COLLECTIONS_VARIABLE)
    return experiment.collections or (Path(named) if named else None)


def owned_domain(pairs: DomainPairs, *, experiment: RetrieverExperiment) -> Owned:
    """Divide a domain's pairs: test queries from the held-out ones, and training ones as distractors.

    Args:
        pairs: Of the domain.
        experiment: Says how many of what.
    """
    test = pairs.held_out[: experiment.queries]
    labelled = pairs.training[: experiment.labelled]
    documents = [
        *test,
        *labelled,
        *pairs.held_out[experiment.queries :],
        *pairs.training[experiment.labelled :],
    ]
    documents = documents[: max(experiment.documents, len(test) + len(labelled))]
    return Owned(
        training=pairs.training[: experiment.pairs],
        labelled=_collection(pairs.name, labelled, documents),
        collection=_collection(pairs.name, test, documents),
    )


def _unseen(pairs: DomainPairs, experiment: RetrieverExperiment) -> Collection:
    everything = [*pairs.held_out, *pairs.training]
    return _collection(pairs.name, everything[: experiment.queries], everything[: experiment.documents])


def _collection(name: str, queries: Sequence[Pair], documents: Sequence[Pair]) -> Collection:
    return Collection(
        name=name,
        documents=tuple(Document(id=pair.id, text=pair.document) for pair in documents),
        queries={pair.id: pair.query for pair in queries},
        judgements={pair.id: {pair.id: 1} for pair in queries},
    )
