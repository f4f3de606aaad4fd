"""What all arms of one seed share: the registry, the owners' experts, vectors of documents and queries.

Documents are encoded once for all seeds, queries once for each expert. Knows how experts are trained and composed
through the project's own interfaces; knows nothing of arms.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipelines.experiments.retrieval.data import RetrievalData
from pipelines.experiments.retrieval.settings import RetrieverExperiment
from pipelines.retrieval.collection import Collection
from pipelines.retrieval.encoders import Encoder, open_encoder
from pipelines.retrieval.metrics import measure
from pipelines.retrieval.search import Vectors, search_exactly

if TYPE_CHECKING:
    from pipelines.assets.pairs import Pair
    from pipelines.experiments.world import Tell
    from pipelines.train import DomainJob
    from registry import Registry

__all__ = ["BASE", "Queries", "RetrieverWorld", "Weights", "base_folder"]

BASE = "base"
_DEPTH = 100

Weights = NDArray[np.float64]
"""``(queries, 1 + domains)``: the base's share and each expert's, in the order of the domains; rows sum to 1."""

Queries = Mapping[str, Vectors]
"""Vectors of the queries of every collection, in the collection's order."""


def base_folder(experiment: RetrieverExperiment, *, tell: Tell | None = None) -> Path:
    """Return the base's sentence-transformers folder, fetched where it is not there yet."""
    if experiment.base != "minilm":
        return Path(experiment.base)
    from pipelines.assets import minilm

    return minilm(progress=tell)


class RetrieverWorld:
    """One seed of a comparison of retrievers.

    Args:
        experiment: What is run.
        data: Its domains.
        folder: The working folder of the experiment; the seed's own is below it.
        seed: Which seed.
        tell: Told what is going on.
    """

    def __init__(
        self,
        experiment: RetrieverExperiment,
        data: RetrievalData,
        *,
        folder: Path,
        seed: int,
        tell: Tell | None = None,
    ) -> None:
        self.experiment = experiment
        self.data = data
        self.seed = seed
        self.shared = folder
        self.folder = folder / f"seed-{seed}"
        self.tell: Tell = tell or (lambda _: None)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.domains = tuple(data.owned)

    # ---------------------------------------------------------------- base and registry

    @cached_property
    def base_folder(self) -> Path:
        """The base's sentence-transformers folder."""
        return base_folder(self.experiment, tell=self.tell)

    @cached_property
    def registry(self) -> Registry:
        """The seed's registry."""
        from registry import Registry

        registry = Registry(self.folder / "registry")
        registry.add_base(self.base_folder, name=BASE)
        return registry

    @cached_property
    def base(self) -> Encoder:
        """The base alone."""
        return open_encoder(self.base_folder)

    # ---------------------------------------------------------------- documents

    @cached_property
    def documents(self) -> Mapping[str, Vectors]:
        """Vectors of every collection's documents, by the base; kept for all seeds."""
        return {name: self._documents(collection) for name, collection in self.data.collections.items()}

    def _documents(self, collection: Collection) -> Vectors:
        texts = [document.text for document in collection.documents]
        key = hashlib.sha256(json.dumps([self.base.base, texts]).encode()).hexdigest()[:16]
        path = self.shared / "documents" / f"{collection.name}-{key}.npy"
        if not path.is_file():
            self.tell(f"encoding {len(texts)} documents of {collection.name}")
            path.parent.mkdir(exist_ok=True)
            beside = path.with_suffix(".part.npy")
            np.save(beside, self.base.documents(texts))
            beside.replace(path)
        found: Vectors = np.load(path, allow_pickle=False)
        return found

    # ---------------------------------------------------------------- experts

    def owner(self, domain: str) -> str:
        """Name of the owner of a domain."""
        return f"{domain}-owner"

    @cached_property
    def experts(self) -> Mapping[str, str]:
        """Every owner's expert, trained on first use: reference by domain."""
        return self.train(
            {
                f"{self.owner(name)}/retriever": (name, owned.training)
                for name, owned in self.data.owned.items()
            },
            steps=self.experiment.steps,
        )

    def train(self, wanted: Mapping[str, tuple[str, Sequence[Pair]]], *, steps: int) -> dict[str, str]:
        """Train retrievers and register them; what is registered already is kept.

        Args:
            wanted: Domain and pairs by the expert's name.
            steps: Of the optimiser, for each.

        Returns:
            Reference by domain.

        Raises:
            TrainingError: A job failed.
        """
        from pipelines.experiments.training import train_and_register

        jobs = {
            name: partial(self._domain_job, name, domain, pairs, steps=steps)
            for name, (domain, pairs) in wanted.items()
        }
        train_and_register(
            jobs, registry=self.registry, out_dir=self.folder / "experts", runner="local", tell=self.tell
        )
        return {domain: name for name, (domain, _) in wanted.items()}

    def _domain_job(self, name: str, domain: str, pairs: Sequence[Pair], *, steps: int) -> DomainJob:
        from pipelines.train import DomainJob

        return DomainJob.from_dict(self._job(name, domain, pairs, steps=steps))

    def _job(self, name: str, domain: str, pairs: Sequence[Pair], *, steps: int) -> dict[str, Any]:
        settings = self.experiment
        owner, _, short = name.partition("/")
        # not below the seed's folder: what an owner computed of the documents serves every seed
        folder = self.shared / "owners" / owner / short
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = folder / "pairs.jsonl"
        lines = (json.dumps({"query": pair.query, "document": pair.document}) for pair in pairs)
        file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return {
            "name": name,
            "domain": domain,
            "license": "Apache-2.0",
            "base": BASE,
            "kind": "retriever",
            "data": str(file),
            "layers": settings.layers,
            "rank": settings.rank,
            "steps": steps,
            "batch_size": settings.batch_size,
            "learning_rate": settings.learning_rate,
            "held_out": 0.0,
            "seed": self.seed,
            "workdir": str(folder),
            "retrieval": {"second_moment": "always", "label": 0.0, "min_group": min(10, len(pairs))},
        }

    # ---------------------------------------------------------------- queries

    @cached_property
    def texts(self) -> Mapping[str, Sequence[str]]:
        """Queries by collection, and those that are labelled under ``DOMAIN labelled``."""
        test = {name: list(c.queries.values()) for name, c in self.data.collections.items()}
        labelled = {
            f"{name} labelled": list(o.labelled.queries.values()) for name, o in self.data.owned.items()
        }
        return {**test, **labelled}

    @cached_property
    def base_queries(self) -> Queries:
        """Query vectors of the base."""
        return self._kept("base", self.base)

    def expert_queries(self, domain: str) -> Queries:
        """Query vectors of one owner's expert."""
        return self.queries_of(self.experts[domain])

    def queries_of(self, reference: str) -> Queries:
        """Query vectors of any registered expert alone."""
        name = reference.replace("/", "--")
        if not self._vector_file(name).is_file():
            folder = self.compose(
                f"only-{name}", [reference], {"scorer": "centroid", "selector": "top1", "min_group": 1}
            )
            return self._kept(name, open_encoder(folder))
        return self._kept(name, None)

    def _vector_file(self, name: str) -> Path:
        return self.folder / "queries" / f"{name}.npz"

    def _kept(self, name: str, encoder: Encoder | None) -> Queries:
        path = self._vector_file(name)
        if not path.is_file():
            assert encoder is not None
            self.tell(f"encoding queries by {name}")
            everything = [text for texts in self.texts.values() for text in texts]
            vectors = encoder.queries(everything)
            path.parent.mkdir(exist_ok=True)
            beside = path.with_suffix(".part.npz")
            np.savez(beside, vectors=vectors)
            beside.replace(path)
        with np.load(path, allow_pickle=False) as stored:
            return self._divided(stored["vectors"])

    def _divided(self, vectors: Vectors) -> Queries:
        ends = np.cumsum([len(texts) for texts in self.texts.values()])[:-1]
        return dict(zip(self.texts, np.split(vectors, ends), strict=True))

    def composed_queries(
        self, name: str, router: Mapping[str, Any], *, experts: Mapping[str, str] | None = None
    ) -> tuple[Queries, Mapping[str, Weights]]:
        """Encode all queries by a composition of every owner's expert; return vectors and weights by collection."""
        encoder = self.composed(name, router, experts=experts)
        self.tell(f"encoding queries by {name}")
        everything = [text for texts in self.texts.values() for text in texts]
        vectors, routes = encoder.routed(everything)
        owners = ["base", *(self.owner(domain) for domain in self.domains)]
        weights = np.array([[route.weights.get(owner, 0.0) for owner in owners] for route in routes])
        return self._divided(vectors), self._divided(weights)  # type: ignore[return-value]

    def composed(
        self, name: str, router: Mapping[str, Any], *, experts: Mapping[str, str] | None = None
    ) -> Encoder:
        """Open a composition of every owner's expert; None: of those that were trained."""
        return open_encoder(self.compose(name, list((experts or self.experts).values()), router))

    def compose(self, name: str, experts: Sequence[str], router: Mapping[str, Any]) -> Path:
        """Compose experts under a router; the folder is kept for the next time."""
        from composer import Manifest, build, plan

        out = self.folder / "composed" / name
        if not out.is_dir():
            out.parent.mkdir(parents=True, exist_ok=True)
            manifest = Manifest.from_dict(
                {
                    "name": name.replace("_", "-"),
                    "recipe": "router_retriever",
                    "base": BASE,
                    "experts": list(experts),
                    "router": dict(router),
                }
            )
            build(plan(manifest, self.registry), out, registry=self.registry)
        return out

    # ---------------------------------------------------------------- measuring

    def scores(self, queries: Queries) -> dict[str, dict[str, dict[str, float]]]:
        """Search every test collection; return collection -> metric -> query -> value."""
        return {
            name: self.score(collection, queries[name], self.documents[name])
            for name, collection in self.data.collections.items()
        }

    def score(
        self, collection: Collection, queries: Vectors, documents: Vectors
    ) -> dict[str, dict[str, float]]:
        """Search one collection; return metric -> query -> value."""
        found = search_exactly(
            [documents],
            queries,
            ids=[document.id for document in collection.documents],
            owners=[None] * len(collection.documents),
            k=_DEPTH,
            allow=None,
            dimension=documents.shape[1],
        )
        run = {
            query: {hit.id: hit.score for hit in hits}
            for query, hits in zip(collection.queries, found, strict=True)
        }
        return measure(run, collection.judgements)

    @cached_property
    def label_scores(self) -> Mapping[str, NDArray[np.float64]]:
        """nDCG@10 of every expert on every owner's labelled queries: domain -> ``(queries, domains)``."""
        vectors = [self.expert_queries(domain) for domain in self.domains]
        found = {}
        for name, owned in self.data.owned.items():
            columns = [
                self.score(owned.labelled, queries[f"{name} labelled"], self.documents[name])["ndcg@10"]
                for queries in vectors
            ]
            found[name] = np.array(
                [[column[query] for column in columns] for query in owned.labelled.queries]
            )
        return found
