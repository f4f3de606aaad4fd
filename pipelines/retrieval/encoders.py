"""Opens an embedding model, composed or stock, and turns queries and documents into vectors that an index can hold.

Knows folders, digests and the encode calls of sentence-transformers; knows nothing of what is searched.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from composer.optout import check_owners, owner_names
from experts.errors import DataError
from experts.names import unknown_name
from pipelines.retrieval.collection import is_unicode
from pipelines.retrieval.search import Vectors

if TYPE_CHECKING:
    from composer.membership import Membership
    from registry import Registry

__all__ = ["Encoder", "Route", "base_digest", "open_encoder"]

_LOCK = "composition.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """Who answered a query.

    Attributes:
        expert: The expert of the largest weight; None: the base.
        owner: Whose it is; None: nobody's.
        weights: Weight by owner, ``base`` for the base; those that are 0 are left out.
    """

    expert: str | None
    owner: str | None
    weights: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoder:
    """An embedding model that is open.

    Attributes:
        model: Of sentence-transformers.
        base: Digest of what makes its document vectors, see `base_digest`.
        dimension: Length of a vector.
        owners: Whose experts are in it, sorted; empty for a stock model.
        unit: Whether vectors have to be divided by their length, because texts are compared by their angle.
        known: Whom a request may leave out, sorted: owners of experts and of those that experts were made from, whoever
            was left out at load included; empty for a stock model.
        whose: By expert that is in it, everybody whose leaving takes it along.
        composition: Digest of the composition that was loaded, those left out at load taken away; None: a stock model.
    """

    model: Any
    base: str
    dimension: int
    owners: tuple[str, ...]
    unit: bool
    known: tuple[str, ...] = ()
    whose: Mapping[str, frozenset[str]] = field(default_factory=dict)
    composition: str | None = None

    @property
    def involved(self) -> tuple[str, ...]:
        """Everybody without whom fewer experts may answer, sorted."""
        return tuple(sorted(frozenset[str]().union(*self.whose.values())))

    def documents(self, texts: Sequence[str], *, batch_size: int = 32) -> Vectors:
        """Encode documents, by the base alone; float32 ``(texts, dimension)``."""
        return self._vectors(self.model.encode_document(list(texts), **self._options(batch_size)))

    def queries(
        self, texts: Sequence[str], *, opt_out: Collection[str] = (), batch_size: int = 32
    ) -> Vectors:
        """Encode queries, routed among the owners who are not left out; float32 ``(texts, dimension)``.

        Raises:
            DataError: A query is empty.
            OptOutError: ``opt_out`` is no collection of names.
            UnknownNameError: ``opt_out`` names somebody who is not among `known`.
        """
        check_queries(texts)
        return self._vectors(
            self.model.encode_query(list(texts), **self._options(batch_size), **self._left_out(opt_out))
        )

    def routed(self, texts: Sequence[str], *, opt_out: Collection[str] = ()) -> tuple[Vectors, list[Route]]:
        """Encode queries and say who answers each; for a stock model always the base.

        Raises:
            DataError: A query is empty.
            OptOutError: ``opt_out`` is no collection of names.
            UnknownNameError: ``opt_out`` names somebody who is not among `known`.
        """
        if not self.owners:
            routes = [Route(expert=None, owner=None, weights={"base": 1.0}) for _ in texts]
            return self.queries(texts, opt_out=opt_out), routes
        check_queries(texts)
        options = self._options(32) | {"output_value": None, "convert_to_numpy": False}
        found = self.model.encode_query(list(texts), **options, **self._left_out(opt_out))
        vectors = [item["sentence_embedding"].cpu().float().numpy() for item in found]
        names = ["base", *self.model.membership.owners]
        routes = [
            Route(
                expert=item["expert"],
                owner=item["owner"],
                weights=_summed(names, item["route_weights"].tolist()),
            )
            for item in found
        ]
        whole = self._vectors(np.stack(vectors))
        return whole / np.linalg.norm(whole, axis=1, keepdims=True) if self.unit else whole, routes

    def revision(self, *, opt_out: Collection[str] = ()) -> str:
        """Digest of everything that decides query vectors when owners are left out: base, router, experts, allowed."""
        left_out = owner_names(opt_out)
        allowed = sorted(name for name, owners in self.whose.items() if left_out.isdisjoint(owners))
        return hashlib.sha256(json.dumps([self.base, self.composition or "", allowed]).encode()).hexdigest()

    def tokens(self, text: str) -> int:
        """Count the tokens of a text, those beyond the longest input included."""
        return len(self.model.tokenizer(text, truncation=False, verbose=False)["input_ids"])

    @property
    def longest(self) -> int:
        """Tokens after which a text is cut off."""
        return int(self.model.max_seq_length)

    def _options(self, batch_size: int) -> dict[str, Any]:
        return {
            "batch_size": batch_size,
            "convert_to_numpy": True,
            "show_progress_bar": False,
            "normalize_embeddings": self.unit,
        }

    def _left_out(self, opt_out: Collection[str]) -> dict[str, Any]:
        names = check_owners(opt_out, self.known)
        return {"opt_out": sorted(names)} if names else {}

    def _vectors(self, found: Any) -> Vectors:
        return np.ascontiguousarray(found, dtype=np.float32).reshape(-1, self.dimension)


def _summed(names: Sequence[str], weights: Sequence[float]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for name, weight in zip(names, weights, strict=True):
        if weight:
            sums[name] = sums.get(name, 0.0) + weight
    return sums


def check_queries(texts: Sequence[str]) -> None:
    """Refuse empty queries, and those that are no text.

    Raises:
        DataError: A query is empty or nothing but white space, or has half of a surrogate pair.
    """
    which = "The query is" if len(texts) == 1 else "A query is"
    if any(not text.strip() for text in texts):
        raise DataError(f"{which} empty. Write what to look for.")
    if not all(map(is_unicode, texts)):
        raise DataError(f"{which} not Unicode text: it has half of a surrogate pair. Write it as UTF-8.")


def base_digest(fingerprint: str, tokenizer_fingerprint: str, embedding: Mapping[str, object]) -> str:
    """Digest of everything that decides document vectors: tensors, tokenizer, pooling, length, prompts, similarity."""
    parts = [fingerprint, tokenizer_fingerprint, dict(embedding)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def open_encoder(
    folder: Path,
    *,
    opt_out: Collection[str] = (),
    registry: Registry | None = None,
    device: str = "cpu",
) -> Encoder:
    """Open a composed retriever or a stock sentence-transformers folder.

    Args:
        folder: Written by ``coterie build`` with recipe ``router_retriever``, or a folder of sentence-transformers.
        opt_out: Owners whose files are not opened.
        registry: Whose consent ledger is read too.
        device: Where the model runs.

    Raises:
        DataError: The folder holds no embedding model.
        AdmissionError: It is an embedding model that is not understood.
        OptOutError: ``opt_out`` is no collection of names.
        UnknownNameError: ``opt_out`` names an owner who is not in it.
    """
    names = owner_names(opt_out)
    if (folder / _LOCK).is_file():
        return _composed(folder, opt_out=names, registry=registry, device=device)
    if not (folder / "modules.json").is_file():
        raise DataError(
            f"{folder} is no embedding model: it holds neither {_LOCK} (of 'coterie build') nor modules.json (of "
            "sentence-transformers)."
        )
    if names:
        raise unknown_name("owner", min(names), ())
    from sentence_transformers import SentenceTransformer

    from experts.base import BaseDescription

    base = BaseDescription.from_folder(folder)
    model = SentenceTransformer(str(folder), device=device, local_files_only=True)
    return _encoder(model, folder, fingerprint=base.fingerprint, embedding=base.embedding)


def _composed(folder: Path, *, opt_out: Collection[str], registry: Registry | None, device: str) -> Encoder:
    import composer
    from composer.members import BASE_FOLDER
    from experts.base import BaseDescription

    model: Any = composer.load(folder, opt_out=opt_out, registry=registry, device=device)
    if not hasattr(model, "encode_query"):
        raise DataError(f"{folder} holds a language model. Retrieval needs one of recipe router_retriever.")
    members: Membership = model.membership
    base = BaseDescription.from_folder(folder / BASE_FOLDER)
    return _encoder(
        model,
        folder / BASE_FOLDER,
        fingerprint=base.fingerprint,
        embedding=base.embedding,
        members=members,
    )


def _encoder(
    model: Any,
    folder: Path,
    *,
    fingerprint: str,
    embedding: Any,
    members: Membership | None = None,
) -> Encoder:
    from experts.fingerprint import tokenizer_fingerprint

    if embedding is None:
        raise DataError(f"{folder} holds a language model. Retrieval needs an embedding model.")
    stock = Encoder(
        model=model.eval(),
        base=base_digest(fingerprint, tokenizer_fingerprint(folder), embedding.model_dump(mode="json")),
        dimension=embedding.dimension,
        owners=(),
        unit=embedding.similarity == "cosine" and not embedding.normalize,
    )
    if members is None:
        return stock
    return replace(
        stock,
        owners=tuple(sorted(set(members.owners))),
        known=tuple(sorted(members.known_owners)),
        whose=dict(zip(members.experts, members.whose, strict=True)),
        composition=members.digest,
    )
