"""One part of an index: a matrix in NumPy's format, and the ids and owners of its rows. Never changed once written.

Knows two files and how they are written durably; knows nothing of what is searched for.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from experts.errors import DataError
from experts.files import write_atomic
from experts.strict import load_json

__all__ = ["Segment", "SegmentInfo"]

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A segment that is open.

    Attributes:
        folder: Of the index.
        info: Name, size and digest.
        ids: Of the rows.
        owners: Of the rows.
        rows: float32 ``(documents, dimension)``, mapped read-only.
    """

    folder: Path
    info: SegmentInfo
    ids: Sequence[str]
    owners: Sequence[str | None]
    rows: NDArray[np.float32]

    @classmethod
    def open(cls, folder: Path, info: SegmentInfo, *, dimension: int) -> Segment:
        """Map a segment.

        Raises:
            DataError: It is damaged.
            FileNotFoundError: A file of it is missing.
        """
        data = (folder / f"{info.name}.json").read_bytes()
        if hashlib.sha256(data).hexdigest() != info.ids_sha256:
            raise DataError(f"{folder} is damaged: {info.name}.json is not what was written.")
        listed = load_json(data, what=f"{info.name}.json", max_bytes=_MAX_IDS, error=DataError)
        assert isinstance(listed, dict)
        try:
            rows = np.load(folder / f"{info.name}.npy", mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            raise DataError(f"{folder} is damaged: {info.name}.npy: {error}.") from None
        if rows.shape != (info.documents, dimension) or rows.dtype != np.dtype("<f4"):
            raise DataError(
                f"{folder} is damaged: {info.name}.npy holds {rows.dtype} of shape {rows.shape}, and float32 of shape "
                f"({info.documents}, {dimension}) was written."
            )
        return cls(folder=folder, info=info, ids=listed["ids"], owners=listed["owners"], rows=rows)

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
        matrix = folder / f"{name}.npy"
        try:
            with matrix.open("xb") as stream:
                _write_header(stream, (len(ids), dimension))
                for chunk in chunks:
                    stream.write(np.ascontiguousarray(chunk, dtype="<f4").data)
                stream.flush()
                os.fsync(stream.fileno())
            data = json.dumps({"ids": list(ids), "owners": list(owners)}).encode()
            write_atomic(folder / f"{name}.json", data)
            info = SegmentInfo(name=name, documents=len(ids), ids_sha256=hashlib.sha256(data).hexdigest())
            return cls.open(folder, info, dimension=dimension)
        except FileNotFoundError:
            _delete(folder, name)
            raise DataError(
                f"Another process changed {folder} meanwhile. Nothing was written; do it again."
            ) from None
        except BaseException:
            _delete(folder, name)
            raise

    @property
    def names(self) -> tuple[str, str]:
        """Its files."""
        return f"{self.info.name}.npy", f"{self.info.name}.json"

    def chunks(self) -> Iterator[NDArray[np.float32]]:
        """The rows in pieces that fit into little memory."""
        step = max(1, _CHUNK_BYTES // (4 * self.rows.shape[1]))
        for start in range(0, len(self.ids), step):
            yield self.rows[start : start + step]

    def without(self, gone: Collection[str]) -> Segment:
        """Write the same without some documents; a segment without rows is not written, and has no ids."""
        kept = [row for row, key in enumerate(self.ids) if key not in gone]
        ids, owners = [self.ids[row] for row in kept], [self.owners[row] for row in kept]
        dimension = self.rows.shape[1]
        if not kept:
            return Segment(folder=self.folder, info=self.info, ids=(), owners=(), rows=self.rows[:0])
        step = max(1, _CHUNK_BYTES // (4 * dimension))
        chunks = (self.rows[kept[start : start + step]] for start in range(0, len(kept), step))
        return Segment.write(self.folder, ids, owners, chunks, dimension=dimension)


def _delete(folder: Path, name: str) -> None:
    for end in ("npy", "json"):
        (folder / f"{name}.{end}").unlink(missing_ok=True)


def _write_header(stream: BinaryIO, shape: tuple[int, int]) -> None:
    """NumPy's format, version 1.0: magic, length of the description, the description, padding, a newline."""
    description = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode()
    length = _HEADER - 10
    stream.write(b"\x93NUMPY\x01\x00" + length.to_bytes(2, "little") + description.ljust(length - 1) + b"\n")
