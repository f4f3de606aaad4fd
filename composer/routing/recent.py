"""The few results worth keeping per allowed set: gates, slices, index tensors.

A server meets the same sets again and again, and an outsider can ask for any number of others, so the oldest are
dropped. Knows keys and values; knows nothing of what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import torch

__all__ = ["Recent"]

Value = TypeVar("Value")


class Recent(Generic[Value]):
    """Keeps the results of the latest keys.

    Safe under threads: two of them may make the same value twice, and get equal ones. Values are made outside of
    inference mode, so that calls that train may use them too.

    Args:
        size: How many results are kept.
    """

    def __init__(self, size: int = 64) -> None:
        self.size = size
        self._values: dict[Hashable, Value] = {}

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """Return the value of a key, made on first use."""
        value = self._values.get(key)
        if value is None:
            with torch.inference_mode(False):
                value = make()
            values = dict(self._values)  # replaced whole: another thread may be reading
            while len(values) >= self.size:
                del values[next(iter(values))]
            values[key] = value
            self._values = values
        return value

    def clear(self) -> None:
        """Forget everything."""
        self._values = {}
