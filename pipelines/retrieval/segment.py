"""One part of an index: a matrix in NumPy's format, and the ids and owners of its rows. Never changed once written.

Knows two files and how they are written durably; knows nothing of what is searched for.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from experts.errors import DataError
from experts.files import open_regular, write_atomic
from experts.strict import load_json
from pipelines.retrieval.search import check_lengths

__all__ = ["Listing", "Segment", "SegmentInfo", "damaged", "delete_segment", "open_part"]

_HEADER = 128
"""Bytes before the numbers; NumPy aligns its header to 64, and any shape fits."""

_CHUNK_BYTES = 1 << 24
_MAX_IDS = 1 << 32


class SegmentInfo(BaseModel):
    """What ``index.json`` says of a segment."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str = Field(pattern=r"^segment-[0-9a-f]{16}$")
    """The files are NAME.npy and NAME.json."""
    documents: int = Field(gt=0)
    ids_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Listing(BaseModel):
    """``NAME.json``: what the rows of a segment are."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    ids: list[str]
    owners: list[str | None]
    matrix_sha256: str | None = None
    """Of ``NAME.npy``; None in indexes of earlier versions."""
    faiss_sha256: str | None = None
    """Of ``NAME.faiss``, where faiss keeps the rows."""

    @classmethod
    def read(cls, folder: Path, info: SegmentInfo) -> Listing:
        """Read a segment's listing.

        Raises:
            DataError: It is not what was written, or does not list what ``info`` says.
            FileNotFoundError: It is missing.
        """
        name = f"{info.name}.json"
        with open_part(folder / name) as stream:
            data = stream.read()
        if hashlib.sha256(data).hexdigest() != info.ids_sha256:
            raise damaged(folder, f"{name} is not what was written")
        listed = load_json(data, what=f"{folder / name}", max_bytes=_MAX_IDS, error=DataError)
        try:
            listing = cls.model_validate(listed)
        except ValidationError:
            raise damaged(folder, f"{name} is no list of ids and owners") from None
        if not len(listing.ids) == len(listing.owners) == info.documents:
            raise damaged(
                folder,
                f"{name} lists {len(listing.ids)} ids and {len(listing.owners)} owners of {info.documents} documents",
            )
        return listing


def damaged(folder: Path, problem: str) -> DataError:
    """Return the error for files that are not what was written."""
    return DataError(f"{folder} is damaged: {problem}. Index the documents again.")


def open_part(path: Path) -> BinaryIO:
    """Open a file of a segment, which is never anything but a regular file.

    Raises:
        DataError: Something else stands there.
        FileNotFoundError: Nothing does.
    """
    try:
        return open_regular(path, follow_symlinks=True, error=DataError)
    except DataError:
        if not path.exists():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from None
        raise


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A segment that is open.

    Attributes:
        folder: Of the index.
        info: Name, size and digest.
        ids: Of the rows.
        owners: Of the rows.
        rows: float32 ``(documents, dimension)``, mapped read-only.
        sha256: Of the file of the rows; None where an earlier version wrote it.
    """

    folder: Path
    info: SegmentInfo
    ids: Sequence[str]
    owners: Sequence[str | None]
    rows: NDArray[np.float32]
    sha256: str | None

    @classmethod
    def open(cls, folder: Path, info: SegmentInfo, *, dimension: int) -> Segment:
        """Map a segment, without reading its rows; `verify` reads them.

        Raises:
            DataError: It is damaged.
            FileNotFoundError: A file of it is missing.
        """
        listing = Listing.read(folder, info)
        rows = _map(folder, f"{info.name}.npy", (info.documents, dimension))
        return cls(
            folder=folder,
            info=info,
            ids=listing.ids,
            owners=listing.owners,
            rows=rows,
            sha256=listing.matrix_sha256,
        )

    @classmethod
    def write(
        cls,
        folder: Path,
        ids: Sequence[str],
        owners: Sequence[str | None],
        chunks: Iterator[NDArray[np.float32]],
        *,
        dimension: int,
    ) -> Segment:
        """Write a segment and map it; nothing names it yet.

        Args:
            folder: Of the index.
            ids: Of all rows.
            owners: Of all rows.
            chunks: The rows, in pieces.
            dimension: Their length.

        Raises:
            DataError: An id is no Unicode text, or another process swept the files away; none is left then.
        """
        name = f"segment-{secrets.token_hex(8)}"
        try:
            digest = _write_rows(folder / f"{name}.npy", chunks, (len(ids), dimension))
            data = json.dumps({"ids": list(ids), "owners": list(owners), "matrix_sha256": digest}).encode()
            write_atomic(folder / f"{name}.json", data)
            info = SegmentInfo(name=name, documents=len(ids), ids_sha256=hashlib.sha256(data).hexdigest())
            return cls.open(folder, info, dimension=dimension)
        except FileNotFoundError:
            delete_segment(folder, name)
            raise DataError(
                f"Another process changed {folder} meanwhile. Nothing was written; do it again."
            ) from None
        except BaseException:
            delete_segment(folder, name)
            raise

    @property
    def path(self) -> Path:
        """Of the rows."""
        return self.folder / f"{self.info.name}.npy"

    @property
    def names(self) -> tuple[str, str]:
        """Its files."""
        return f"{self.info.name}.npy", f"{self.info.name}.json"

    def chunks(self) -> Iterator[NDArray[np.float32]]:
        """Yield all rows in pieces that fit into little memory; in the end, say whether they are what was written.

        Whoever writes the pieces elsewhere keeps the result only when this has ended, so that damage never gets a
        digest of its own.

        Raises:
            DataError: They are not, or, where an earlier version wrote no digest, a vector cannot be compared.
        """
        step = max(1, _CHUNK_BYTES // (4 * self.rows.shape[1]))
        digest = hashlib.sha256(_header(self.rows.shape))
        for start in range(0, len(self.ids), step):
            part = self.rows[start : start + step]
            digest.update(part.reshape(-1).data)
            if self.sha256 is None:
                check_lengths(part, self.ids[start : start + step], where=str(self.path))
            yield part
        if self.sha256 not in (None, digest.hexdigest()):
            raise damaged(self.folder, f"{self.path.name} is not what was written")

    def verify(self) -> None:
        """Read all rows, and compare their digest with the one that was noted when they were written.

        Raises:
            DataError: They are not what was written, or no digest was noted.
        """
        if self.sha256 is None:
            raise DataError(
                f"{self.folder} cannot be verified: an earlier version wrote {self.path.name}, and noted no digest of "
                "it. Index the documents again."
            )
        for _ in self.chunks():
            pass

    def without(self, gone: Collection[str]) -> Segment:
        """Write the same without some documents; a segment without rows is not written, and has no ids."""
        kept = np.array([key not in gone for key in self.ids])
        if not kept.any():
            return replace(self, ids=(), owners=(), rows=self.rows[:0])
        ids = [key for key, keep in zip(self.ids, kept, strict=True) if keep]
        owners = [owner for owner, keep in zip(self.owners, kept, strict=True) if keep]

        def chunks() -> Iterator[NDArray[np.float32]]:
            start = 0
            for part in self.chunks():
                yield part[kept[start : start + len(part)]]
                start += len(part)

        return Segment.write(self.folder, ids, owners, chunks(), dimension=self.rows.shape[1])


def delete_segment(folder: Path, name: str) -> None:
    """Delete the files of a segment that nothing names."""
    for end in ("npy", "json"):
        (folder / f"{name}.{end}").unlink(missing_ok=True)


def _write_rows(path: Path, chunks: Iterator[NDArray[np.float32]], shape: tuple[int, int]) -> str:
    """Write a matrix durably as its rows come, and return the digest of the file."""
    header = _header(shape)
    digest = hashlib.sha256(header)
    with path.open("xb") as stream:
        stream.write(header)
        for chunk in chunks:
            numbers = np.ascontiguousarray(chunk, dtype="<f4").reshape(-1).data
            digest.update(numbers)
            stream.write(numbers)
        stream.flush()
        os.fsync(stream.fileno())
    return digest.hexdigest()


def _map(folder: Path, name: str, shape: tuple[int, int]) -> NDArray[np.float32]:
    """Map a matrix that is exactly as `Segment.write` writes it; no reader of NumPy's looks at its first bytes."""
    with open_part(folder / name) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size != _HEADER + 4 * shape[0] * shape[1] or stream.read(_HEADER) != _header(shape):
            raise damaged(
                folder,
                f"{name} is not the matrix of {shape[0]} x {shape[1]} float32 numbers that was written",
            )
        return np.memmap(stream, dtype="<f4", mode="r", offset=_HEADER, shape=shape)


def _header(shape: tuple[int, ...]) -> bytes:
    """NumPy's format, version 1.0: magic, length of the description, the description, padding, a newline."""
    description = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode()
    length = _HEADER - 10
    return b"\x93NUMPY\x01\x00" + length.to_bytes(2, "little") + description.ljust(length - 1) + b"\n"
