"""The index kept by faiss (extra ``faiss``), behind the same methods as the default.

Knows faiss's flat inner-product index and its file; ids and owners stand beside it. Faiss chooses candidates by its
products in float32, and what ranks them is the product of `pipelines.retrieval.search`, so both backends find the same.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experts.errors import CoterieError, DataError
from experts.files import fsync_folder, write_atomic
from pipelines.retrieval.index import (
    FILE,
    IndexInfo,
    Mask,
    alone,
    check_added,
    check_ids,
    check_unchanged,
    checked_rows,
    sweep,
)
from pipelines.retrieval.search import (
    Hit,
    Vectors,
    best_hits,
    check_lengths,
    check_queries,
    error_bound,
    exact_products,
    longest,
)
from pipelines.retrieval.segment import Listing, SegmentInfo, damaged, open_part

__all__ = ["FaissIndex"]

_MORE = 16
"""Candidates beyond those asked for, so that few questions are put twice."""

_PIECE = 1 << 14
"""Rows copied out at once."""


def _faiss() -> Any:
    try:
        import faiss
    except ModuleNotFoundError:
        raise CoterieError(
            "This index needs faiss, which is not installed: pip install 'coterie[faiss]'."
        ) from None
    return faiss


def _unpacked(packed: bytes) -> Any:
    """Read a flat index; None if it is something else."""
    faiss = _faiss()
    try:
        index = faiss.deserialize_index(np.frombuffer(packed, dtype=np.uint8))
    except RuntimeError:
        return None
    return index if isinstance(index, faiss.IndexFlatIP) else None


class FaissIndex:
    """Exact search by faiss's ``IndexFlatIP``, held in memory whole.

    Documents that are not allowed are skipped by a selector before any product. Hits and scores are those of
    `DocumentIndex`, bit for bit: faiss is asked for more than ``k``, until it says that no other document can be among
    the first ``k``, whatever it rounded.
    """

    def __init__(self, folder: Path, info: IndexInfo) -> None:
        faiss = _faiss()
        self.folder = folder
        self.info = info
        self.ids: list[str] = []
        self.owners: list[str | None] = []
        self._index = faiss.IndexFlatIP(info.dimension)
        self._longest = 0.0
        if info.segments:
            self._read(info.segments[0])

    def _read(self, part: SegmentInfo) -> None:
        listing = Listing.read(self.folder, part)
        check_ids(self.folder, listing.ids)
        self.ids, self.owners = listing.ids, listing.owners
        name = f"{part.name}.faiss"
        with open_part(self.folder / name) as stream:
            packed = stream.read()
        if hashlib.sha256(packed).hexdigest() != listing.faiss_sha256:
            raise damaged(self.folder, f"{name} is not what was written")
        self._index = _unpacked(packed)
        shape = (len(self.ids), self.info.dimension)
        if self._index is None or (self._index.ntotal, self._index.d) != shape:
            raise damaged(self.folder, f"{name} is no flat index of {shape[0]} x {shape[1]} numbers")
        for start in range(0, shape[0], _PIECE):
            rows = self._index.reconstruct_n(start, min(_PIECE, shape[0] - start))
            check_lengths(rows, self.ids[start : start + _PIECE], where=f"{self.folder / name}")
            self._longest = max(self._longest, longest(rows))

    def __len__(self) -> int:
        return len(self.ids)

    def add(
        self,
        ids: Sequence[str],
        vectors: Vectors | Iterable[Vectors],
        owners: Sequence[str | None] | None = None,
    ) -> None:
        """Add documents; see `DocumentIndex.add`."""
        owners = [None] * len(ids) if owners is None else owners
        check_added(set(self.ids), ids, owners)
        try:
            for rows in checked_rows(vectors, documents=len(ids), dimension=self.info.dimension):
                self._index.add(rows)
                self._longest = max(
                    self._longest, longest(rows)
                )  # also of what will be taken back or removed
        except BaseException:
            rest = np.arange(len(self.ids), self._index.ntotal, dtype=np.int64)
            self._index.remove_ids(_faiss().IDSelectorBatch(rest))
            raise
        self.ids += ids
        self.owners += owners

    def remove(self, ids: Collection[str]) -> None:
        """Remove documents; see `DocumentIndex.remove`."""
        gone = set(ids)
        unknown = sorted(gone.difference(self.ids))
        if unknown:
            raise DataError(
                f"The index holds no document '{unknown[0]}' ({len(unknown)} of {len(gone)} are unknown)."
            )
        rows = np.array([row for row, key in enumerate(self.ids) if key in gone], dtype=np.int64)
        self._index.remove_ids(_faiss().IDSelectorBatch(rows))  # the others keep their order
        kept = [row for row, key in enumerate(self.ids) if key not in gone]
        self.ids, self.owners = [self.ids[row] for row in kept], [self.owners[row] for row in kept]

    def search(self, queries: Vectors, *, k: int = 10, allow: Mask | None = None) -> list[list[Hit]]:
        """Find the documents of the largest inner products; see `DocumentIndex.search`."""
        faiss = _faiss()
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        check_queries(queries, rows=len(self.ids), k=k, allow=allow, dimension=self.info.dimension)
        room = len(self.ids) if allow is None else int(np.count_nonzero(allow))
        options: dict[str, Any] = {}
        if allow is not None:
            selector = faiss.IDSelectorBatch(np.flatnonzero(allow).astype(np.int64))
            options["params"] = faiss.SearchParameters(sel=selector)
        hits: list[list[Hit]] = [[] for _ in queries]
        left, wanted = np.arange(len(queries)), min(k + _MORE, room)
        while wanted and len(left):
            scores, rows = self._index.search(queries[left], wanted, **options)
            again = []
            for query, close, found in zip(left, scores, rows, strict=True):
                exact = queries[query].astype(np.float64)
                # one that faiss leaves out scored no better than the last, so it cannot pass the k-th
                if wanted < room and close[-1] >= close[k - 1] - error_bound(exact, self._longest):
                    again.append(query)
                    continue
                products = exact_products(self._index.reconstruct_batch(found), exact)
                hits[query] = best_hits(products, found, self.ids, self.owners, k=k)
            left, wanted = np.array(again, dtype=np.intp), min(4 * wanted, room)
        return hits

    def verify(self) -> None:
        """Do nothing: the file was compared with its digest when it was read."""

    def save(self) -> None:
        """Write a new file beside the old one, then name it in ``index.json``; see `DocumentIndex.save`."""
        with alone(self.folder):
            check_unchanged(self.folder, self.info)
            parts = (self._write(),) if self.ids else ()
            fsync_folder(self.folder)
            self.info = self.info.model_copy(update={"segments": parts})
            write_atomic(self.folder / FILE, self.info.model_dump_json(indent=1).encode() + b"\n")
            sweep(self.folder, {f"{part.name}.{end}" for part in parts for end in ("faiss", "json")})

    def _write(self) -> SegmentInfo:
        name = f"segment-{secrets.token_hex(8)}"
        packed = _faiss().serialize_index(self._index).tobytes()
        write_atomic(self.folder / f"{name}.faiss", packed)
        digest = hashlib.sha256(packed).hexdigest()
        data = json.dumps({"ids": self.ids, "owners": self.owners, "faiss_sha256": digest}).encode()
        write_atomic(self.folder / f"{name}.json", data)
        return SegmentInfo(name=name, documents=len(self.ids), ids_sha256=hashlib.sha256(data).hexdigest())
