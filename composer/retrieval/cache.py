"""Keeps embeddings of queries that come again: a hit needs the same text, allowed experts and composition.

Knows texts and digests; what is not there, the model encodes.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from composer.optout import OptOut, owners_per_row

if TYPE_CHECKING:
    from composer.retrieval.sentence import Retriever

__all__ = ["QueryCache"]

Vectors = NDArray[np.float32]


class QueryCache:
    """Embeddings of the latest queries, of any number of models; safe under threads.

    Args:
        size: How many embeddings are kept.
    """

    def __init__(self, size: int = 10_000) -> None:
        self.size = size
        self.hits = 0
        self._kept: OrderedDict[tuple[str, str, str], Vectors] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def encode_query(self, model: Retriever, texts: Sequence[str], *, opt_out: OptOut = ()) -> Vectors:
        """Encode queries, those that are kept excepted.

        Args:
            model: The model.
            texts: The queries.
            opt_out: Owners who must not answer: one collection for all queries, or one for each.

        Returns:
            float32 ``(queries, d)``.

        Raises:
            OptOutError: See `composer.retrieval.sentence.Retriever.encode`.
            UnknownNameError: See there.
        """
        known = model.membership.known_owners
        sets = owners_per_row(opt_out, batch=len(texts), known=known)
        keys = [
            (text, _allowed_digest(model, owners), f"{model.membership.digest} {model.dtype}")
            for text, owners in zip(texts, sets, strict=True)
        ]
        found = self._look_up(keys)
        missing = {key: i for i, key in enumerate(keys) if key not in found}
        if missing:
            rows = list(missing.values())
            new = model.encode_query([texts[i] for i in rows], opt_out=[sets[i] for i in rows])
            found |= dict(zip(missing, np.asarray(new, dtype=np.float32), strict=True))
            self._keep({key: found[key] for key in missing})
        width = model.get_embedding_dimension()
        return np.stack([found[key] for key in keys]) if keys else np.zeros((0, width), dtype=np.float32)

    def _look_up(self, keys: Sequence[tuple[str, str, str]]) -> dict[tuple[str, str, str], Vectors]:
        with self._lock:
            found = {key: self._kept[key] for key in keys if key in self._kept}
            for key in found:
                self._kept.move_to_end(key)
            self.hits += sum(key in found for key in keys)
        return found

    def _keep(self, new: dict[tuple[str, str, str], Vectors]) -> None:
        with self._lock:
            self._kept |= new
            while len(self._kept) > self.size:
                self._kept.popitem(last=False)


def _allowed_digest(model: Retriever, left_out: frozenset[str]) -> str:
    """Name the experts that may answer: opting an owner out who is not there changes nothing."""
    pairs = zip(model.membership.experts, model.membership.whose, strict=True)
    allowed = [expert for expert, owners in pairs if left_out.isdisjoint(owners)]
    return hashlib.sha256("\n".join(allowed).encode()).hexdigest()
