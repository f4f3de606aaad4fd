"""Where the bytes of a tensor to be written come from: a stretch of a file, or a computation on a few of them.

Knows bytes, dtypes and files; holds no tensor until it is asked for one, and then only that one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from experts.safetensors_header import DTYPE_BYTES, StoredTensor, TensorSpec

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

__all__ = [
    "FLOATS",
    "Entry",
    "Part",
    "Slice",
    "Source",
    "computed",
    "convert",
    "float_bytes",
    "floats",
    "low_rank",
    "read_tensor",
    "rounded",
]

FLOATS = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""The dtypes that are converted into one another, in safetensors' and in torch's spelling."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """A tensor, or a run of its first dimension, as it lies in a file.

    Attributes:
        path: The file.
        dtype: In safetensors' spelling.
        shape: Of the slice.
        start: Byte position in the file.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int

    @classmethod
    def of(cls, path: Path, tensor: StoredTensor) -> Slice:
        """Return the whole of a stored tensor."""
        return cls(path=path, dtype=tensor.dtype, shape=tensor.shape, start=tensor.start)

    @property
    def spec(self) -> TensorSpec:
        """Dtype and shape."""
        return TensorSpec(dtype=self.dtype, shape=self.shape)

    def rows(self, first: int, last: int) -> Slice:
        """Return rows ``first`` to ``last`` (excluded) of the first dimension."""
        row = self.spec.nbytes // self.shape[0]
        shape = (last - first, *self.shape[1:])
        return Slice(path=self.path, dtype=self.dtype, shape=shape, start=self.start + first * row)

    def item(self, index: int) -> Slice:
        """Return one element of the first dimension, without that dimension."""
        row = self.rows(index, index + 1)
        return Slice(path=row.path, dtype=row.dtype, shape=self.shape[1:], start=row.start)

    def read(self) -> bytearray:
        """Return the bytes."""
        data = bytearray(self.spec.nbytes)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.start)
            view, done = memoryview(data), 0
            while done < len(data):
                count = file.readinto(view[done:])
                if not count:
                    raise OSError(f"{self.path} became shorter while it was read")
                done += count
        return data


Part = Slice | Callable[[], "bytes | bytearray | memoryview"]
"""Bytes in a file, copied without being looked at, or a function that computes them."""

Source = Part | tuple[Part, ...]
"""Where a tensor's bytes come from: one part, or several one after the other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One tensor to be written: its name, dtype and shape, and where its bytes come from."""

    name: str
    spec: TensorSpec
    source: Source


def convert(name: str, found: Slice, dtype: str) -> Entry:
    """Return the entry that writes a stored tensor in another floating dtype, untouched where it has it already."""
    if found.dtype == dtype or found.dtype not in FLOATS:
        return Entry(name=name, spec=found.spec, source=found)
    spec = TensorSpec(dtype=dtype, shape=found.shape)
    return Entry(name=name, spec=spec, source=lambda: _bytes(read_tensor(found), dtype))


def computed(name: str, shape: tuple[int, ...], value: Callable[[], torch.Tensor], dtype: str) -> Entry:
    """Return the entry that writes a tensor of ``shape`` that is computed when its turn comes, rounded to ``dtype``."""
    spec = TensorSpec(dtype=dtype, shape=shape)
    return Entry(name=name, spec=spec, source=lambda: _bytes(value(), dtype))


def low_rank(name: str, weight: Slice, *, a: Slice, b: Slice, scaling: float, dtype: str) -> Entry:
    """Return the entry that writes ``W + s B A``, summed in float32 and rounded once.

    Args:
        name: Of the new tensor.
        weight: The anchor's W, ``(out, in)``.
        a: ``(r, in)``.
        b: ``(out, r)``.
        scaling: s.
        dtype: What W, A and B are rounded to before, as loading rounds them, and the sum after.
    """

    def compute() -> memoryview:
        w, left, right = (_rounded(read_tensor(part), dtype) for part in (weight, b, a))
        return _bytes(w.add_(left @ right, alpha=scaling), dtype)

    return Entry(name=name, spec=TensorSpec(dtype=dtype, shape=weight.shape), source=compute)


def read_tensor(found: Slice) -> torch.Tensor:
    """Read one tensor into memory."""
    import torch

    dtype = getattr(torch, FLOATS[found.dtype])
    return torch.frombuffer(found.read(), dtype=dtype).view(found.shape)


def rounded(found: Slice, dtype: str) -> torch.Tensor:
    """Read one tensor as a model of another dtype (in safetensors' spelling) holds it."""
    import torch

    return read_tensor(found).to(getattr(torch, FLOATS[dtype]))


def _rounded(tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    import torch

    return tensor.to(getattr(torch, FLOATS[dtype])).float()


def _bytes(tensor: torch.Tensor, dtype: str) -> memoryview:
    import torch

    rounded = tensor.to(getattr(torch, FLOATS[dtype])).contiguous()
    return rounded.view(-1).view(torch.uint8).numpy().data


def float_bytes(values: NDArray[np.float32], dtype: str) -> bytes:
    """Return float32 values as bytes of another floating dtype, rounded to nearest even as torch rounds."""
    import numpy as np

    if dtype == "BF16":
        bits = np.ascontiguousarray(values, dtype="<f4").view("<u4")
        rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
        return bytes(rounded.astype("<u2").data)
    return bytes(np.ascontiguousarray(values, dtype=f"<f{DTYPE_BYTES[dtype]}").data)


def floats(found: Slice) -> NDArray[np.float32]:
    """Read a stored floating tensor as float32; exact for every dtype but F64."""
    import numpy as np

    data = found.read()
    if found.dtype == "BF16":
        values = (np.frombuffer(data, dtype="<u2").astype("<u4") << 16).view("<f4")
    else:
        values = np.frombuffer(data, dtype=f"<f{DTYPE_BYTES[found.dtype]}").astype("<f4")
    return values.reshape(found.shape)
