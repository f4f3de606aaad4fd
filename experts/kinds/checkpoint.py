"""A checkpoint in one file or in shards, as what is packed: one safetensors file with exactly the tensors wanted.

Streams bytes, so memory does not grow with them; knows headers and digests, and nothing of what tensors mean.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from experts.base import BaseDescription
from experts.errors import AdmissionError
from experts.files import CHUNK, capped, open_regular
from experts.fingerprint import INDEX, WEIGHTS, checkpoint_files
from experts.kinds.kind import DTYPES
from experts.safetensors_header import StoredTensor, TensorSpec
from experts.schema import compare_schema

__all__ = ["Checkpoint", "has_checkpoint", "weight_files"]


def has_checkpoint(folder: Path) -> bool:
    """Say whether there is a checkpoint in one file or in shards, whatever is in it."""
    return (folder / "config.json").exists() and any((folder / name).exists() for name in (WEIGHTS, INDEX))


def weight_files(folder: Path) -> tuple[str, ...]:
    """Return the names of the shards, after that of their index if there is one."""
    shards = sorted(path.name for path in checkpoint_files(folder))
    return (*([INDEX] if (folder / INDEX).exists() else []), *shards)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    path: Path
    tensor: StoredTensor


class Checkpoint:
    """Where the tensors of a checkpoint lie, and their digests once they were read.

    Args:
        places: Tensor name to its file and its place in it.
    """

    def __init__(self, places: Mapping[str, _Place]) -> None:
        self.places = places
        self._lines: list[bytes] = []

    @classmethod
    def read(cls, folder: Path) -> Checkpoint:
        """Read the headers of a checkpoint in one file or in shards.

        Raises:
            AdmissionError: There is none, or it is malformed.
        """
        return cls(
            {
                name: _Place(path=path, tensor=tensor)
                for path, tensors in checkpoint_files(folder).items()
                for name, tensor in tensors.items()
            }
        )

    def check(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        base: BaseDescription,
        folder: Path,
        *,
        dtype: str | None = None,
    ) -> None:
        """Compare with the one set of tensors that is allowed; copies of tied tensors and buffers may be there too.

        Args:
            shapes: Of every tensor by name.
            base: The anchor.
            folder: For the message.
            dtype: Of all tensors; None: whichever most of them have.

        Raises:
            AdmissionError: Lists every offender.
        """
        allowed = DTYPES if dtype is None else (dtype,)
        dtype = dtype or self._common_dtype()
        expected = {name: TensorSpec(dtype=dtype, shape=shape) for name, shape in shapes.items()}
        found: dict[str, TensorSpec] = {
            name: place.tensor
            for name, place in self.places.items()
            if name in shapes or not self._needless(name, base)
        }
        problems = compare_schema(found, expected)
        if problems:
            raise AdmissionError(
                f"The checkpoint in '{folder}' does not hold exactly the base's tensors, all of one dtype out of "
                f"{', '.join(allowed)}:",
                problems=capped(problems),
            )

    def _common_dtype(self) -> str:
        counts = Counter(place.tensor.dtype for place in self.places.values() if place.tensor.dtype in DTYPES)
        return counts.most_common(1)[0][0] if counts else DTYPES[0]

    def _needless(self, name: str, base: BaseDescription) -> bool:
        """Say whether a tensor says nothing: a buffer that is computed, or the copy of a tied embedding."""
        if name.endswith(".rotary_emb.inv_freq") or name in base.tensors:
            return True
        if name != "lm_head.weight" or not base.config.get("tie_word_embeddings"):
            return False
        twin = next((n for n in self.places if n.endswith("embed_tokens.weight")), None)
        return twin is not None and self._digest(name) == self._digest(twin)

    def _digest(self, name: str) -> str:
        digest = hashlib.sha256()
        for piece in _pieces(self.places[name]):
            digest.update(piece)
        return digest.hexdigest()

    def stream(self, names: list[str]) -> Iterator[bytes]:
        """Yield the bytes of one safetensors file with these tensors, noting their digests on the way."""
        self._lines.clear()
        yield _header([(name, self.places[name].tensor) for name in names])
        for name in names:
            tensor, digest = self.places[name].tensor, hashlib.sha256()
            for piece in _pieces(self.places[name]):
                digest.update(piece)
                yield piece
            line = json.dumps([name, tensor.dtype, list(tensor.shape), digest.hexdigest()])
            self._lines.append(line.encode() + b"\n")

    def fingerprint(self) -> str:
        """Return what `experts.fingerprint.fingerprint_tensors` says of the tensors that were streamed."""
        return hashlib.sha256(b"".join(sorted(self._lines))).hexdigest()


def _header(tensors: list[tuple[str, StoredTensor]]) -> bytes:
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, tensor in tensors:
        offsets = [position, position + tensor.nbytes]
        table[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        position += tensor.nbytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format asks for aligned tensors
    return len(text).to_bytes(8, "little") + text


def _pieces(place: _Place) -> Iterator[bytes]:
    with open_regular(place.path, follow_symlinks=True) as stream:
        yield from _read(stream, place.tensor)


def _read(stream: BinaryIO, tensor: StoredTensor) -> Iterator[bytes]:
    for start in range(tensor.start, tensor.end, CHUNK):
        size = min(CHUNK, tensor.end - start)
        piece = os.pread(stream.fileno(), size, start)
        if len(piece) != size:
            raise AdmissionError("The file became shorter while it was read; try again.")
        yield piece
