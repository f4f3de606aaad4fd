"""Reading the header of a safetensors file that a stranger may have written.

Stricter than the library: bounded size and count, no duplicate or odd names, no empty tensors, no holes.
Knows the format (https://github.com/huggingface/safetensors#format); knows nothing of the tensors' use.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from experts.errors import AdmissionError
from experts.files import capped, open_regular
from experts.strict import load_json

__all__ = [
    "DTYPE_BYTES",
    "MAX_BASE_HEADER",
    "MAX_HEADER",
    "Header",
    "StoredTensor",
    "TensorSpec",
    "read_header",
]

MAX_HEADER = 1 << 20
"""Largest header of an expert's file, in bytes."""
MAX_BASE_HEADER = 16 << 20
"""Largest header of a base's file, in bytes."""
MAX_TENSORS = 8192
MAX_DIMENSIONS = 8

DTYPE_BYTES: Mapping[str, int] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}
"""The dtypes that are read, and the bytes of one element."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,254}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """What a tensor looks like: dtype in safetensors' spelling (``"BF16"``) and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return self.numel * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor(TensorSpec):
    """A tensor in a file: ``start`` and ``end`` are byte positions from the beginning of the file."""

    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """A checked header: the tensors by name, in the order of their bytes, and the free-text metadata."""

    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]


def read_header(
    path: Path, *, max_header: int = MAX_HEADER, max_tensors: int = MAX_TENSORS, follow_symlinks: bool = False
) -> Header:
    """Read and check the header of a safetensors file; no tensor byte is read.

    Args:
        path: The file.
        max_header: Largest header accepted, in bytes.
        max_tensors: Largest number of tensors accepted.
        follow_symlinks: Whether ``path`` may be a symbolic link (a downloaded base often is one).

    Raises:
        AdmissionError: Not a regular file, or not a well-formed safetensors file within the bounds; every
            offending tensor is listed.
    """
    with open_regular(path, follow_symlinks=follow_symlinks) as stream:
        return read_header_from(stream, what=f"'{path.name}'", max_header=max_header, max_tensors=max_tensors)


def read_header_from(
    stream: BinaryIO, *, what: str, max_header: int = MAX_HEADER, max_tensors: int = MAX_TENSORS
) -> Header:
    """Do the same on an open file, positioned at its beginning."""
    size = os.fstat(stream.fileno()).st_size
    length, raw = _header_bytes(stream, size=size, what=what, max_header=max_header)
    # counted before parsing: every entry has a dtype (an escaped spelling of the key is counted below)
    if raw.count(b'"dtype"') > max_tensors:
        raise _too_many(what, max_tensors)
    value = load_json(raw, what=f"header of {what}", max_bytes=max_header, max_depth=4, error=AdmissionError)
    if not isinstance(value, dict):
        raise AdmissionError(f"Header of {what} is not a JSON object; write the file with safetensors.")
    metadata = _metadata(value.pop("__metadata__", {}), what=what)
    if len(value) > max_tensors:
        raise _too_many(what, max_tensors)
    problems: list[str] = []
    tensors = {}
    for name, entry in value.items():
        found = _tensor(name, entry, offset=8 + length)
        if isinstance(found, str):
            problems.append(f"tensor {name[:300]!r}: {found}")
        else:
            tensors[name] = found
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)))
    problems = problems or _gaps(ordered, first=8 + length, size=size)
    if problems:
        raise AdmissionError(f"{what} is not a well-formed safetensors file:", problems=capped(problems))
    return Header(tensors=ordered, metadata=metadata)


def _too_many(what: str, max_tensors: int) -> AdmissionError:
    return AdmissionError(f"{what} lists more than {max_tensors:,} tensors; at most that many are allowed.")


def _header_bytes(stream: BinaryIO, *, size: int, what: str, max_header: int) -> tuple[int, bytes]:
    prefix = stream.read(8)
    if len(prefix) < 8:
        raise AdmissionError(f"{what} holds {size} bytes; a safetensors file starts with 8 bytes of length.")
    length = int.from_bytes(prefix, "little")
    if length > max_header:
        raise AdmissionError(
            f"{what} declares a header of {length:,} bytes; at most {max_header:,} are allowed."
        )
    if 8 + length > size:
        raise AdmissionError(f"{what} declares a header of {length:,} bytes but holds {size:,} bytes in all.")
    raw = stream.read(length)
    if len(raw) != length or not raw.startswith(b"{"):
        raise AdmissionError(f"Header of {what} is not a JSON object; write the file with safetensors.")
    return length, raw


def _metadata(value: object, *, what: str) -> dict[str, str]:
    if isinstance(value, dict) and all(isinstance(text, str) for text in value.values()):
        return value
    raise AdmissionError(f"Metadata in the header of {what} is not a mapping of strings to strings.")


def _tensor(name: str, entry: object, *, offset: int) -> StoredTensor | str:
    """Return the tensor, or what is wrong with its header entry."""
    if not _NAME.fullmatch(name) or ".." in name:
        return (
            "not a tensor name; letters, digits, '_', '-' and single dots are allowed, at most 255 characters"
        )
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        return "its entry must have exactly the keys data_offsets, dtype, shape"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        return f"dtype {dtype!r:.40} is not one of {', '.join(DTYPE_BYTES)}"
    if not _naturals(shape) or len(shape) > MAX_DIMENSIONS:
        return f"shape {shape!r:.80} is not a list of at most {MAX_DIMENSIONS} whole numbers"
    if 0 in shape:
        return f"shape {tuple(shape)} has no elements; leave the tensor out"
    if not _naturals(offsets) or len(offsets) != 2:
        return f"data_offsets {offsets!r:.80} are not two whole numbers"
    start, end = offsets
    expected = math.prod(shape) * DTYPE_BYTES[dtype]
    if end - start != expected:
        return f"{end - start:,} bytes for shape {tuple(shape)} of {dtype}, which takes {expected:,} bytes"
    return StoredTensor(dtype=dtype, shape=tuple(shape), start=offset + start, end=offset + end)


def _naturals(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 48 for n in value)


def _gaps(tensors: Mapping[str, StoredTensor], *, first: int, size: int) -> list[str]:
    problems, position = [], first
    for name, tensor in tensors.items():
        if tensor.start != position:
            kind = "overlaps the tensor before it" if tensor.start < position else "leaves a hole before it"
            problems.append(f"tensor {name!r}: {kind} (starts at byte {tensor.start:,}, not {position:,})")
        position = tensor.end
    if not problems and position != size:
        problems.append(f"the tensors end at byte {position:,}, the file at byte {size:,}")
    return problems
