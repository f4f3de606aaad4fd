"""Key-value caches for several attention experts in one decoder layer.

`transformers` counts a cache's layers by decoder layer. Here expert ``j`` of layer ``l`` uses place ``j * L + l`` of
``L`` layers, so that the first expert stands where the base model's own attention would, and every cache class works
that can be made longer by copies of its empty layers. Knows caches; knows nothing of experts' weights.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache

from composer.routing.state import RouterStateLayer

__all__ = ["OwnCache", "SharedCache", "widened"]


def widened(cache: Cache | None, config: Any, copies: int, *, wanted: bool) -> Cache | None:
    """Return a cache with ``copies`` places for every decoder layer; a cache that is given is changed in place.

    Args:
        cache: Any cache of transformers that is empty or was widened before; None: a dynamic one, if wanted.
        config: The base's text configuration.
        copies: Attention experts per layer.
        wanted: Whether a cache is asked for where none is given.
    """
    if cache is None:
        if not wanted:
            return None
        cache = DynamicCache(config=config)
    depth = config.num_hidden_layers
    there = sum(not isinstance(layer, RouterStateLayer) for layer in cache.layers)
    if there >= copies * depth:
        return cache
    if cache.layer_class_to_replicate is not None:  # it would be filled layer by layer as they are asked for
        cache.layers[there:there] = [cache.layer_class_to_replicate() for _ in range(depth - there)]
        there = depth
    own = cache.layers[:depth]
    cache.layers[there:there] = [copy.deepcopy(layer) for _ in range(copies - 1) for layer in own]
    return cache


class OwnCache:
    """A view of a cache in which an expert finds its own place under its decoder layer's index.

    Args:
        cache: The cache.
        offset: What is added to the layer's index.
    """

    def __init__(self, cache: Cache, offset: int) -> None:
        self._cache = cache
        self._offset = offset

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values ``(batch, heads, positions, head_dim)`` and return all of them."""
        return self._cache.update(  # type: ignore[no-any-return]
            key_states, value_states, layer_idx + self._offset, *args, **kwargs
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


class SharedCache(OwnCache):
    """A view of a cache that takes the keys and values of a layer once, however many experts bring them."""

    def __init__(self, cache: Cache) -> None:
        super().__init__(cache, 0)
        self._kept: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append at the first call; return the same at every call."""
        if self._kept is None:
            self._kept = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return self._kept
