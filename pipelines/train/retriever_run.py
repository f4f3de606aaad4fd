"""One retriever in the making: documents embedded once, the query side trained, measures, what is published.

Knows the job, the base and the pairs; knows nothing of processes or reports.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn import functional as F

from experts.errors import ManifestError
from experts.files import write_atomic
from experts.retrieval_artifacts import RetrievalArtifacts
from experts.routing_artifacts import RoutingArtifacts, RoutingInfo
from pipelines.retrieval.metrics import ndcg, rank
from pipelines.train.anchor import ResolvedBase
from pipelines.train.job import DomainJob
from pipelines.train.loop import LoopResult, LoopSettings, alike, plan_batches
from pipelines.train.pairs import DomainSplit, read_domain, split_domain
from pipelines.train.query_encoder import QueryStates, RetrievalBase, mean_state
from pipelines.train.retrieval_sums import check_query_noise, query_artifacts
from pipelines.train.retriever_forms import make_form
from pipelines.train.retriever_loop import PairTable, RankingLoss, train_queries
from pipelines.train.trainers.retriever import RetrieverTrainer

__all__ = ["RetrieverRun"]

_DEPTH = 10
_RANKED = 50


class RetrieverRun:
    """Training state of one retriever; the methods are called in the order in which they stand.

    Args:
        job: What to train, of kind ``retriever``.
        base: The embedding model.
    """

    def __init__(self, job: DomainJob, *, base: ResolvedBase) -> None:
        assert job.retrieval is not None
        self.job = job
        self.settings = job.retrieval
        self.base = base
        self.layers = job.layer_numbers(base.description.num_layers)
        self.domain = read_domain(job.data, pairs=self.settings.pairs)
        test = job.held_out
        assert isinstance(test, float)
        self.split: DomainSplit = split_domain(self.domain, test=test, label=self.settings.label)
        self.model = RetrievalBase(base.folder, description=base.description, first=self.layers[0])
        self.form = make_form(job, base)
        self.spec = self.model.spec
        self._order = [*self.split.train, *self.split.label, *self.split.test]
        self._row = {query: row for row, query in enumerate(self._order)}
        self._states = QueryStates(base.description.hidden_size)
        self._embeddings: list[Tensor] = []
        self._mean_states: list[Tensor] = []
        self._mean_tokens: list[Tensor] = []
        self._documents = torch.empty(0)
        self._trained: Sequence[torch.nn.Module] = ()
        check_query_noise(job, self.spec)

    @property
    def documents(self) -> int:
        """Documents of the domain."""
        return len(self.domain.documents)

    def embed_documents(self) -> None:
        """Embed every document with the frozen base, once; kept in the owner's folder for the next job on them."""
        key = json.dumps([self.base.ref.model_dump(mode="json"), self.domain.documents])
        path = self.job.directory / f"documents-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
        if path.is_file():
            self._documents = self._comparable(load_file(path)["documents"])
            return
        size = self.settings.encode_batch
        documents = self.model.embed_documents(self.domain.documents, batch_size=size)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, save({"documents": documents}))
        path.chmod(0o600)
        self._documents = self._comparable(documents)

    def _comparable(self, vectors: Tensor) -> Tensor:
        """Vectors whose products are the base's similarities."""
        return F.normalize(vectors, dim=1) if self.spec.similarity == "cosine" else vectors

    @torch.no_grad()
    def prepare_states(self) -> Iterator[int]:
        """Run every query through the lower layers once, and through the base's upper ones; yields queries done."""
        size = self.settings.encode_batch
        by_length = sorted(
            range(len(self._order)), key=lambda row: len(self.domain.queries[self._order[row]])
        )
        kept: dict[int, tuple[Tensor, Tensor]] = {}
        embeddings: dict[int, Tensor] = {}
        means: dict[int, Tensor] = {}
        tokens: dict[int, Tensor] = {}
        for start in range(0, len(by_length), size):
            rows = by_length[start : start + size]
            features = self.model.tokenize([self.domain.queries[self._order[row]] for row in rows])
            mask, states = features["attention_mask"], self.model.lower(features)
            pooled = self.model.pool(self.model.upper(states, mask), mask)
            mean = mean_state(states, mask)
            if self.settings.static_statistics:
                tokens |= dict(zip(rows, self.model.mean_tokens(features), strict=True))
            for position, row in enumerate(rows):
                kept[row] = (states[position : position + 1], mask[position : position + 1])
                embeddings[row], means[row] = pooled[position], mean[position]
            yield min(start + size, len(by_length))
        for row in range(len(self._order)):
            self._states.extend(*kept.pop(row))
            self._embeddings.append(embeddings[row])
            self._mean_states.append(means[row])
        self._mean_tokens = [tokens[row] for row in sorted(tokens)]

    def base_ndcg(self) -> float | None:
        """nDCG@10 of the base on the held-out queries, against all the domain's documents; None without any."""
        return self._ndcg(lambda rows: torch.stack([self._embeddings[row] for row in rows]))

    def attach(self) -> None:
        """Put what is trained into the encoder."""
        self._trained = self.form.attach(self.model)

    def train(self, *, checkpoint: Path, on_step: Callable[[int, float, float], None]) -> LoopResult:
        """Train; see `pipelines.train.retriever_loop.train_queries`."""
        job, settings = self.job, self.settings
        pairs = self._pairs()
        documents = self._documents[torch.tensor(self.split.negatives)]
        plan = plan_batches(
            steps=job.steps,
            batch_size=job.batch_size,
            own=len(pairs.queries),
            public=0,
            public_fraction=0.0,
            seed=job.seed,
        )
        if settings.negatives == "domain":  # who else is in the batch plays no part then
            lengths = np.array([self._states.length(query) for query in pairs.queries])
            plan = alike(plan, lengths, seed=job.seed)
        with tempfile.TemporaryDirectory(dir=job.directory, prefix=".trainer-") as scratch:
            return train_queries(
                self.model,
                self._states,
                self._trained,
                loss_of=lambda model: RankingLoss(
                    model,
                    documents,
                    pairs,
                    temperature=settings.temperature,
                    cosine=self.spec.similarity == "cosine",
                    whole=settings.negatives == "domain",
                ),
                pairs=pairs,
                plan=plan,
                settings=self.loop_settings,
                seed=job.seed,
                checkpoint=checkpoint,
                scratch=Path(scratch),
                on_step=on_step,
            )

    @property
    def loop_settings(self) -> LoopSettings:
        """The numbers of the loop, as in the job."""
        job = self.job
        return LoopSettings(
            steps=job.steps,
            learning_rate=job.learning_rate or RetrieverTrainer.default_learning_rate,
            weight_decay=job.weight_decay,
            warmup=job.warmup,
            grad_clip=job.grad_clip,
            checkpoint_every=job.checkpoint_every,
            schedule=job.schedule,
        )

    def _pairs(self) -> PairTable:
        """The training pairs, in numbers of stored states and of the documents that training may see."""
        place = {document: row for row, document in enumerate(self.split.negatives)}
        answers = {
            self._row[query]: [place[document] for document in documents]
            for query, documents in self.split.train.items()
        }
        asked = [(query, document) for query, documents in answers.items() for document in documents]
        hard = None
        if self.settings.negatives == "batch" and self.settings.hard_negatives:
            hard = self._hard_negatives(answers)
        return PairTable(
            queries=np.array([query for query, _ in asked], dtype=np.int64),
            documents=np.array([document for _, document in asked], dtype=np.int64),
            answers=answers,
            hard=hard,
        )

    def _hard_negatives(
        self, answers: Mapping[int, list[int]]
    ) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
        """For each training query the documents that the base ranks highest among those that do not answer it."""
        count = self.settings.hard_negatives
        documents = self._documents[torch.tensor(self.split.negatives)]
        if len(documents) <= count + max(map(len, answers.values())):
            raise ManifestError(
                f"retrieval.hard_negatives is {count}, and the domain has only {len(documents)} training documents."
            )
        scores = self._comparable(torch.stack([self._embeddings[row] for row in answers])) @ documents.T
        for position, rows in enumerate(answers.values()):
            scores[position, rows] = -torch.inf
        return scores.topk(count, dim=1).indices.numpy()

    @torch.no_grad()
    def held_out_ndcg(self) -> float | None:
        """nDCG@10 of the expert as it is now; None without held-out queries."""
        for module in self._trained:
            module.eval()
        return self._ndcg(self._embed)

    def _embed(self, rows: list[int]) -> Tensor:
        states, mask = self._states.batch(rows)
        return self.model.pool(self.model.upper(states, mask), mask)

    def _ndcg(self, embed: Callable[[list[int]], Tensor]) -> float | None:
        if not self.split.test:
            return None
        queries, size = list(self.split.test), self.settings.encode_batch
        scores: list[float] = []
        for start in range(0, len(queries), size):
            part = queries[start : start + size]
            found = self._comparable(embed([self._row[query] for query in part])) @ self._documents.T
            best = found.topk(min(_RANKED, self.documents), dim=1)
            for query, values, numbers in zip(part, best.values, best.indices, strict=True):
                ranking = rank(
                    {f"{n:09d}": v for n, v in zip(numbers.tolist(), values.tolist(), strict=True)}, _DEPTH
                )
                judged = {f"{n:09d}": grade for n, grade in self.domain.judgements[query].items()}
                scores.append(ndcg(ranking, judged, k=_DEPTH))
        return float(np.mean(scores))

    def write(self, folder: Path) -> RoutingInfo | None:
        """Write the expert and its routing artefacts into an empty folder."""
        self.form.write(folder)
        artifacts = self.artifacts()
        if artifacts is None:
            return None
        info = RoutingInfo(retrieval=artifacts.info)
        RoutingArtifacts(info=info, tensors=artifacts.tensors()).save(folder)
        return info

    def artifacts(self) -> RetrievalArtifacts | None:
        """What is published of the queries of training and labels; see `pipelines.train.retrieval_sums`."""
        own = len(self.split.train) + len(self.split.label)
        features = {"embedding": self._embeddings}
        features |= {"state": self._mean_states} if self.settings.state_statistics else {}
        features |= {"static": self._mean_tokens} if self.settings.static_statistics else {}
        return query_artifacts(
            self.job,
            self.settings,
            self.spec,
            {place: torch.stack(rows[:own]).double().numpy() for place, rows in features.items()},
            layer=self.layers[0],
        )
