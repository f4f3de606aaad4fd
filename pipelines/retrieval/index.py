"""An exact index of document vectors on disk: memory-mapped matrices, searched chunk by chunk.

Knows vectors, ids and owners; knows nothing of models or texts. What `DocumentIndex.save` has returned from survives
a kill; before that the folder is what it was.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from composer.optout import owner_names
from experts.errors import DataError
from experts.files import fsync_folder, write_atomic
from experts.strict import load_json, validate
from pipelines.retrieval.search import Hit, Vectors, comparable, search_exactly
from pipelines.retrieval.segment import Segment, SegmentInfo, damaged, delete_segment

__all__ = [
    "DocumentIndex",
    "Index",
    "IndexInfo",
    "Mask",
    "alone",
    "check_added",
    "check_ids",
    "check_new",
    "check_there",
    "check_unchanged",
    "checked_rows",
    "create_index",
    "open_index",
    "owner_mask",
    "sweep",
]

Mask = NDArray[np.bool_]
"""One truth value a document, in the order of ``ids``: whether it may be found."""

FILE = "index.json"
_SEGMENTS = "segment-"
_MOST_SEGMENTS = 32
_MAX_INDEX = 1 << 24


class IndexInfo(BaseModel):
    """``index.json``: what an index is made of."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format_version: Literal[1] = 1
    backend: Literal["exact", "faiss"] = "exact"
    base: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Digest of the encoder that made the vectors, see `pipelines.retrieval.encoders`."""
    dimension: int = Field(gt=0, le=1 << 16)
    segments: tuple[SegmentInfo, ...] = ()
    """In the order in which documents were added."""

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        double = [name for name, count in Counter(part.name for part in self.segments).items() if count > 1]
        if double:
            raise ValueError(f"{double[0]} is named twice; index the documents again")
        if self.backend == "faiss" and len(self.segments) > 1:
            raise ValueError(
                f"faiss keeps one segment, and {len(self.segments)} are named; index the documents again"
            )
        return self


class Index(Protocol):
    """What every kind of index can do. Changes are durable when ``save`` has returned."""

    info: IndexInfo

    @property
    def ids(self) -> Sequence[str]:
        """Of the documents, in the order in which they were added."""

    @property
    def owners(self) -> Sequence[str | None]:
        """Whose each is; None: nobody's."""

    def add(
        self,
        ids: Sequence[str],
        vectors: Vectors | Iterable[Vectors],
        owners: Sequence[str | None] | None = None,
    ) -> None:
        """Add documents that are not there yet."""

    def remove(self, ids: Collection[str]) -> None:
        """Remove documents, and their bytes at the next ``save``."""

    def search(self, queries: Vectors, *, k: int = 10, allow: Mask | None = None) -> list[list[Hit]]:
        """Find the ``k`` documents of the largest inner product for every query."""

    def verify(self) -> None:
        """See that the vectors are those that were written."""

    def save(self) -> None:
        """Make the changes so far durable."""


def create_index(folder: Path, *, base: str, dimension: int, backend: str = "exact") -> Index:
    """Make an empty index in a folder that does not exist yet; it appears with the first ``save``.

    Args:
        folder: The index.
        base: Digest of the encoder, 64 hexadecimal digits.
        dimension: Length of the vectors.
        backend: ``exact``, or ``faiss``, which needs the extra of that name.

    Raises:
        DataError: Something stands at ``folder`` already.
    """
    check_new(folder)
    info = validate(
        IndexInfo,
        {"base": base, "dimension": dimension, "backend": backend},
        what="the index",
        error=DataError,
    )
    index = _backend(backend)(folder, info)
    folder.mkdir(parents=True, exist_ok=True)  # after what may fail, so that nothing is left behind
    return index


def check_new(folder: Path) -> None:
    """Refuse a place where something stands; what a killed process left of an index does not count.

    Raises:
        DataError: Something stands there.
    """
    if folder.exists() and not (folder.is_dir() and all(map(_is_segment, folder.iterdir()))):
        raise DataError(
            f"{folder} exists already. Choose another folder, or add to it with 'coterie index add'."
        )


def _is_segment(path: Path) -> bool:
    return path.name.startswith((_SEGMENTS, f".{_SEGMENTS}"))


def open_index(folder: Path, *, base: str | None = None, verify: bool = False) -> Index:
    """Open an index.

    The vectors of the exact backend are mapped and not read, so that a search starts at once; whatever is not what
    was written is found with ``verify``, and before vectors are written anew (`remove`, and `save` after many
    additions).

    Args:
        folder: Written by ``save``.
        base: Digest of the encoder that will be used with it; None: not checked.
        verify: Read all vectors, and compare them with the digest that was noted when they were written.

    Raises:
        DataError: There is no index, it is damaged, or another base made it.
    """
    if not (folder / FILE).is_file():
        raise DataError(f"{folder} is not an index: it holds no {FILE}. Make one with 'coterie index'.")
    for _ in range(8):  # between reading the list and opening its files, a writer may have replaced both
        info = validate(
            IndexInfo,
            load_json(folder / FILE, what=f"{folder / FILE}", max_bytes=_MAX_INDEX, error=DataError),
            what=f"{folder / FILE}",
            error=DataError,
        )
        if base is not None and info.base != base:
            raise DataError(
                f"{folder} was built by another base ({info.base[:12]}) than this model's ({base[:12]}), or by "
                "the same one with another pooling, normalisation, prompt or max length; their vectors cannot be "
                "compared. Use the model's own base, or index the documents again."
            )
        try:
            index = _backend(info.backend)(folder, info)
        except FileNotFoundError as error:
            missing = error
            continue
        if verify:
            index.verify()
        return index
    raise damaged(folder, f"{Path(missing.filename or '').name} is missing")


def _backend(name: str) -> Callable[[Path, IndexInfo], Index]:
    if name == "faiss":
        from pipelines.retrieval.faiss_index import FaissIndex

        return FaissIndex
    return DocumentIndex


def check_added(known: Collection[str], ids: Sequence[str], owners: Sequence[str | None]) -> None:
    """Refuse documents that cannot be added.

    Raises:
        DataError: An id is there already, or not every document has an owner or None.
    """
    if len(owners) != len(ids):
        raise DataError(f"{len(ids)} ids and {len(owners)} owners were given; each document has one of each.")
    double = next((key for key in ids if key in known), None)
    if double is not None:
        raise DataError(f"The document '{double}' is in the index already. Remove it first; ids are unique.")
    if len(set(ids)) != len(ids):
        raise DataError(
            f"{len(ids)} ids were given, and {len(ids) - len(set(ids))} of them twice. Ids are unique."
        )


def check_ids(folder: Path, ids: Sequence[str]) -> None:
    """Refuse files that say of two rows that they are the same document.

    Raises:
        DataError: An id is listed twice.
    """
    if len(set(ids)) != len(ids):
        key = next(key for key, count in Counter(ids).items() if count > 1)
        raise damaged(folder, f"it lists the document '{key}' twice")


def checked_rows(
    vectors: Vectors | Iterable[Vectors], *, documents: int, dimension: int
) -> Iterator[Vectors]:
    """Yield float32 matrices, checked; in the end they have ``documents`` rows.

    Raises:
        DataError: A shape does not fit, or a number is not finite or out of all proportion.
    """
    rows = 0
    for part in [vectors] if isinstance(vectors, np.ndarray) else vectors:
        rows += len(part)
        if part.ndim != 2 or part.shape[1] != dimension or rows > documents:
            raise DataError(
                f"Vectors of shape {part.shape} were given; {documents} vectors of {dimension} numbers are needed."
            )
        if not np.isfinite(part).all():
            raise DataError("A vector holds numbers that are not finite. Check the encoder.")
        if not comparable(part):
            raise DataError("A vector holds numbers that are too large to compare. Check the encoder.")
        yield np.ascontiguousarray(part, dtype="<f4")
    if rows != documents:
        raise DataError(f"{rows} vectors were given for {documents} documents.")


def owner_mask(owners: Sequence[str | None], opt_out: Collection[str]) -> Mask | None:
    """Return which documents may be found when owners are left out; None: all.

    Args:
        owners: Of the documents.
        opt_out: Owners whose documents must not be found.

    Raises:
        OptOutError: ``opt_out`` is no collection of names.
    """
    left_out = owner_names(opt_out)
    return np.array([owner not in left_out for owner in owners], dtype=np.bool_) if left_out else None


class DocumentIndex:
    """The default: exact inner products over memory-mapped float32 matrices, one for every addition.

    Rankings are by the inner product in float64, summed in one fixed order for every document, and by id where it is
    equal. So they depend on the documents alone: leaving some out gives what an index without them gives, bit for bit.
    Resident memory is that of the ids; the matrices are mapped, once, whatever the number of experts.

    Args:
        folder: Of the index; use `create_index` and `open_index`.
        info: What it is made of.
    """

    def __init__(self, folder: Path, info: IndexInfo) -> None:
        self.folder = folder
        self.info = info
        self._segments = [Segment.open(folder, part, dimension=info.dimension) for part in info.segments]
        self._refresh()
        check_ids(folder, self.ids)

    def _refresh(self) -> None:
        self.ids: list[str] = [key for segment in self._segments for key in segment.ids]
        self.owners: list[str | None] = [owner for segment in self._segments for owner in segment.owners]
        self._known = set(self.ids)

    def __len__(self) -> int:
        return len(self.ids)

    def add(
        self,
        ids: Sequence[str],
        vectors: Vectors | Iterable[Vectors],
        owners: Sequence[str | None] | None = None,
    ) -> None:
        """Add documents, all of them or, after an error, none.

        Args:
            ids: Of the documents; none may be in the index.
            vectors: float32 ``(documents, dimension)``, or such matrices one after the other, which are written as
                they come.
            owners: Whose each is; None: nobody's.

        Raises:
            DataError: Shapes do not fit, a number is not finite, or an id is there already.
        """
        owners = [None] * len(ids) if owners is None else owners
        check_added(self._known, ids, owners)
        dimension = self.info.dimension
        rows = checked_rows(vectors, documents=len(ids), dimension=dimension)
        if ids:
            self._segments.append(Segment.write(self.folder, ids, owners, rows, dimension=dimension))
        self.ids += ids
        self.owners += owners
        self._known.update(ids)

    def remove(self, ids: Collection[str]) -> None:
        """Remove documents.

        Raises:
            DataError: An id is not in the index, or vectors that would stay are damaged; nothing is removed then.
        """
        gone = set(ids)
        unknown = sorted(gone - self._known)
        if unknown:
            raise DataError(
                f"The index holds no document '{unknown[0]}' ({len(unknown)} of {len(gone)} are unknown)."
            )
        left: list[Segment] = []
        try:
            for segment in self._segments:
                left.append(segment.without(gone) if gone.intersection(segment.ids) else segment)
        except BaseException:
            for segment in left:
                if segment.info not in [known.info for known in self._segments]:
                    delete_segment(self.folder, segment.info.name)
            raise
        self._segments = [segment for segment in left if segment.ids]
        self._refresh()

    def search(self, queries: Vectors, *, k: int = 10, allow: Mask | None = None) -> list[list[Hit]]:
        """Find the documents of the largest inner products; those not allowed are not read.

        Args:
            queries: float32 ``(queries, dimension)``.
            k: How many for each.
            allow: Which documents may be found; None: all.

        Returns:
            For every query at most ``k`` hits, best first, equal scores by ascending id.

        Raises:
            DataError: Shapes do not fit, or a number is not finite.
        """
        return search_exactly(
            [segment.rows for segment in self._segments],
            queries,
            ids=self.ids,
            owners=self.owners,
            k=k,
            allow=allow,
            dimension=self.info.dimension,
            names=[str(segment.path) for segment in self._segments],
        )

    def verify(self) -> None:
        """Read all vectors, and see that they are those that were written: some seconds for a gigabyte.

        Raises:
            DataError: Some are not, or an earlier version wrote them and noted no digest.
        """
        for segment in self._segments:
            segment.verify()

    def save(self) -> None:
        """Write ``index.json`` in one step; delete what it no longer names.

        Raises:
            DataError: Another process changed the index meanwhile, or vectors that would be written anew are damaged;
                nothing is written then.
        """
        with alone(self.folder):
            check_unchanged(self.folder, self.info)
            check_there(self.folder, [name for segment in self._segments for name in segment.names])
            if len(self._segments) > _MOST_SEGMENTS:
                self._merge()
            fsync_folder(self.folder)
            info = self.info.model_copy(
                update={"segments": tuple(segment.info for segment in self._segments)}
            )
            write_atomic(self.folder / FILE, info.model_dump_json(indent=1).encode() + b"\n")
            self.info = info
            sweep(self.folder, {name for segment in self._segments for name in segment.names})

    def _merge(self) -> None:
        """Make one matrix of all, row by row, so that additions of single documents do not pile up."""
        rows: Iterator[Vectors] = (chunk for segment in self._segments for chunk in segment.chunks())
        try:
            whole = Segment.write(self.folder, self.ids, self.owners, rows, dimension=self.info.dimension)
        except DataError:
            sweep(
                self.folder, {f"{part.name}.{end}" for part in self.info.segments for end in ("npy", "json")}
            )
            raise
        self._segments = [whole]


def check_unchanged(folder: Path, info: IndexInfo) -> None:
    """Refuse to write over what another process wrote since this one read ``info``.

    Raises:
        DataError: Another process changed the index.
    """
    path = folder / FILE
    try:
        same = not path.exists() or json.loads(path.read_bytes()) == info.model_dump(mode="json")
    except ValueError:  # no JSON
        same = False
    if not same:
        raise DataError(f"Another process changed {folder} meanwhile. Nothing was written; do it again.")


def check_there(folder: Path, names: Iterable[str]) -> None:
    """Refuse to name files that another process has swept away, though what it wrote is as before.

    Raises:
        DataError: A file is missing.
    """
    if not all((folder / name).exists() for name in names):
        raise DataError(f"Another process changed {folder} meanwhile. Nothing was written; do it again.")


def sweep(folder: Path, kept: Collection[str]) -> None:
    """Delete segments that the index no longer names, and those that a killed process left."""
    for path in folder.iterdir():
        if _is_segment(path) and path.name not in kept:
            path.unlink(missing_ok=True)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Let one process at a time write; the system lets go of the lock when the process ends, however it ends."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
