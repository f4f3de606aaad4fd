"""The bytes of one weight on its way from a model into a mixture: adapted, disturbed, scaled, widened, converted.

A weight that stays as it is is copied by the kernel; any other is computed a few rows at a time. Knows tensors; knows
nothing of architectures.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from composer.export.tensors import FLOATS, Part, Slice
from experts.safetensors_header import DTYPE_BYTES

if TYPE_CHECKING:
    import torch

    from composer.mergekit_moe.sources import SourceModel, Update

__all__ = ["BLOCK_BYTES", "Weight", "derived_seed", "read_rows"]

BLOCK_BYTES = 4 << 20
"""Bytes of a weight that are in memory at a time, unless one row is larger."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """A weight of a model and what happens to it.

    Attributes:
        stored: As it lies in the file.
        update: What an adapter adds, summed in float32 and rounded once to the stored dtype.
        noise: Standard deviation of normal noise, drawn from ``seed``, in the stored dtype.
        scale: Factor, in the stored dtype.
        seed: Of the noise.
        rows: Rows of the result; more than stored are zeros.
        columns: Columns of the result; more than stored are zeros.
    """

    stored: Slice
    update: Update | None = None
    noise: float | None = None
    scale: float | None = None
    seed: int = 0
    rows: int | None = None
    columns: int | None = None

    @classmethod
    def of(cls, source: SourceModel, name: str) -> Weight:
        """Return a tensor of a model, with what its adapter adds."""
        return cls(stored=source.tensors[name], update=source.update(name))

    def cut(self, first: int, last: int) -> Weight:
        """Return rows of the weight, before anything is done to it."""
        update = self.update and self.update._replace(b=self.update.b.rows(first, last))
        return replace(self, stored=self.stored.rows(first, last), update=update)

    def changed(
        self, *, noise: float | None, scale: float | None, seed: int, rows: int | None, columns: int | None
    ) -> Weight:
        """Return the weight with what is to happen to it."""
        return replace(self, noise=noise, scale=scale, seed=seed, rows=rows, columns=columns)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the result."""
        if len(self.stored.shape) != 2:
            return self.stored.shape
        return (self.rows or self.stored.shape[0], self.columns or self.stored.shape[1])

    def parts(self, dtype: str) -> tuple[Part, ...]:
        """Return where the bytes come from, in a dtype of safetensors' spelling."""
        if self._untouched(dtype):
            body: tuple[Part, ...] = (self.stored,)
        else:
            body = tuple(self._computed(dtype))
        missing = self.shape[0] - self.stored.shape[0]
        if not missing:
            return body
        size = missing * self.shape[1] * DTYPE_BYTES[dtype]
        return (*body, lambda: bytes(size))

    def _untouched(self, dtype: str) -> bool:
        changed = self.update is not None or self.noise is not None or self.scale is not None
        wider = len(self.shape) == 2 and self.shape[1] != self.stored.shape[1]
        return not changed and not wider and (self.stored.dtype == dtype or self.stored.dtype not in FLOATS)

    def _computed(self, dtype: str) -> Iterator[Part]:
        for number, (first, last) in enumerate(_blocks(self.stored)):

            def compute(first: int = first, last: int = last, number: int = number) -> memoryview:
                return self._block(first, last, number, dtype)

            yield compute

    def _block(self, first: int, last: int, number: int, dtype: str) -> memoryview:
        import torch

        block = read_rows(self.stored, first, last, self.update)
        if self.noise is not None:
            generator = torch.Generator().manual_seed(derived_seed(self.seed, f"block {number}"))
            block = block + torch.randn(block.shape, generator=generator, dtype=block.dtype) * self.noise
        if self.scale is not None:
            block = block * self.scale
        block = block.to(getattr(torch, FLOATS[dtype]))
        if block.dim() == 2 and block.shape[1] != self.shape[1]:
            block = torch.nn.functional.pad(block, (0, self.shape[1] - block.shape[1]))
        return block.contiguous().view(-1).view(torch.uint8).numpy().data


def read_rows(stored: Slice, first: int, last: int, update: Update | None = None) -> torch.Tensor:
    """Read rows of a tensor, with what an adapter adds; in the stored dtype."""
    import torch

    part = stored.rows(first, last)
    rows = torch.frombuffer(part.read(), dtype=getattr(torch, FLOATS[part.dtype])).view(part.shape)
    if update is None:
        return rows
    a = read_rows(update.a, 0, update.a.shape[0]).float()
    b = read_rows(update.b, first, last).float()
    return (rows.float() + (b @ a) * update.scaling).to(rows.dtype)


def _blocks(stored: Slice) -> Iterator[tuple[int, int]]:
    rows = stored.shape[0]
    each = max(1, BLOCK_BYTES // max(1, stored.spec.nbytes // rows))
    for first in range(0, rows, each):
        yield first, min(rows, first + each)


def derived_seed(seed: int, what: str) -> int:
    """Return a seed of its own for one thing, so that no order of drawing matters."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{what}".encode()).digest()[:7], "big")
