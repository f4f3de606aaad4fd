"""Looking at every value of a tensor in a file without torch: is it finite, how large is it.

Reads the file in chunks through one descriptor (a mapped file that shrinks would kill the process) and finds
NaN and infinity by the exponent bits. Knows floating-point formats; knows nothing of what is a sound value.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from experts.errors import AdmissionError
from experts.files import CHUNK
from experts.safetensors_header import StoredTensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["TensorValues", "scan_tensor"]

_EXPONENTS = {"F32": ("<u4", 0x7F800000), "BF16": ("<u2", 0x7F80), "F16": ("<u2", 0x7C00)}
"""Unsigned type of the same width and the mask of the exponent; all ones there means NaN or infinity."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorValues:
    """What was seen in a tensor."""

    numel: int
    not_finite: int
    """Number of NaNs and infinities."""
    largest: float
    """Largest magnitude, where all are finite."""
    norm: float
    """Frobenius norm, where all are finite."""

    @property
    def rms(self) -> float:
        """Root mean square."""
        return self.norm / math.sqrt(self.numel)


def scan_tensor(descriptor: int, tensor: StoredTensor) -> TensorValues:
    """Read one tensor of dtype F32, BF16 or F16 and sum it up.

    Args:
        descriptor: Of the open file.
        tensor: Where the tensor lies in it.

    Raises:
        AdmissionError: The file became shorter while it was read.
    """
    import numpy as np

    unsigned, mask = _EXPONENTS[tensor.dtype]
    not_finite, largest, squares = 0, 0.0, 0.0
    for start in range(tensor.start, tensor.end, CHUNK):
        size = min(CHUNK, tensor.end - start)
        data = os.pread(descriptor, size, start)
        if len(data) != size:
            raise AdmissionError("The file became shorter while it was read; try again.")
        bits = np.frombuffer(data, dtype=unsigned)
        not_finite += int(np.count_nonzero((bits & mask) == mask))
        if not not_finite:
            values = _as_float32(bits, tensor.dtype)
            largest = max(largest, float(np.abs(values).max()))
            squares += float(np.square(values, dtype=np.float64).sum())
    return TensorValues(numel=tensor.numel, not_finite=not_finite, largest=largest, norm=math.sqrt(squares))


def _as_float32(bits: NDArray[np.unsignedinteger], dtype: str) -> NDArray[np.float32]:
    import numpy as np

    if dtype == "BF16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return bits.view(np.float16 if dtype == "F16" else np.float32).astype(np.float32, copy=False)
