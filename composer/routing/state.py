"""What a causal routing context remembers between decoding steps, kept inside the KV cache.

`RouterStateLayer` is one more layer of a `transformers` cache, so beam search reorders, repeats and resets it
together with the keys and values. It also carries the allowed set under which the cache was filled: a cache
holds traces of every expert that wrote it, so it is refused under any other set.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache

from experts.errors import OptOutError

__all__ = ["RouterState", "RouterStateLayer", "attach_state", "held_state"]


class RouterState:
    """Running sums per scored layer and the allowed set they belong to.

    Args:
        composition: Digest of the loaded composition (which experts, which base, which router).
        allowed: bool ``(batch, num_experts + 1)``.
    """

    def __init__(self, *, composition: str, allowed: torch.Tensor) -> None:
        self.composition = composition
        self.allowed = allowed
        self.sums: dict[int, torch.Tensor] = {}  # layer -> float32 (batch, d)
        self.seen: dict[int, torch.Tensor] = {}  # layer -> float32 (batch,), tokens so far
        self.columns: dict[int, int] = {}  # layer -> positions so far, padding and all; for prompt_mean
        self.prompt_length: int | None = None

    def check(self, *, composition: str, allowed: torch.Tensor) -> None:
        """Raise `OptOutError` unless the cache was filled by this composition under the same allowed sets."""
        if self.composition != composition:
            raise OptOutError(
                f"This cache was filled by another composition ({self.composition[:12]}, this one is "
                f"{composition[:12]}). Start again with an empty cache."
            )
        if self.allowed is not allowed and not torch.equal(self.allowed, allowed):
            raise OptOutError(
                "This cache was filled under another set of allowed experts, so its keys and values hold traces "
                f"of experts that this request may not use (filled under {_describe(self.allowed)}, asked for "
                f"{_describe(allowed)}). Start again with an empty cache."
            )

    def end_prompt_at(self, length: int) -> None:
        """Say how many leading positions, padding and all, are the prompt.

        Raises:
            ValueError: No position is, or positions after the prompt were decided under another length.
        """
        if length == self.prompt_length:
            return
        if length < 1:
            raise ValueError(f"prompt_length must be at least 1, got {length}.")
        done = max(self.columns.values(), default=0)
        before = done if self.prompt_length is None else min(self.prompt_length, done)
        if min(length, done) != before:
            raise ValueError(
                f"This cache holds {done} positions that were routed by a prompt of {before}; they cannot be continued "
                f"as a prompt of {length}. Start again with an empty cache, or compose with `context: running_mean`."
            )
        self.prompt_length = length

    def clear(self) -> None:
        """Forget every position."""
        self.sums.clear()
        self.seen.clear()
        self.columns.clear()
        self.prompt_length = None

    def map(self, index: torch.Tensor) -> None:
        """Replace the batch rows by ``rows[index]`` (int64)."""
        self.allowed = self.allowed[index.to(self.allowed.device)]
        for table in (self.sums, self.seen):
            for layer, value in table.items():
                table[layer] = value.index_select(0, index.to(value.device))


def _describe(allowed: torch.Tensor) -> str:
    """Write the allowed expert ids of each row, the anchor left out."""
    rows = [[i for i, flag in enumerate(row) if flag and i > 0] for row in allowed.tolist()]
    return str(rows if len(rows) <= 4 else [*rows[:4], "..."])


class RouterStateLayer:
    """The router's state dressed as a layer of a `transformers.Cache`.

    It stands behind the attention layers and answers the calls that a cache makes on all of its layers.
    """

    is_initialized = True
    supports_early_init = False
    keys = None
    values = None

    def __init__(self, state: RouterState, *, is_sliding: bool, is_compileable: bool = False) -> None:
        self.state = state
        self.is_sliding = is_sliding
        # masks are cut to the keys that are there unless every layer says that its length is fixed
        self.is_compileable = is_compileable

    @property
    def is_croppable(self) -> bool:
        """Whether positions can be taken back: running sums cannot forget, an empty state can."""
        return not self.state.sums

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> tuple[None, None]:
        """Refuse keys and values: no attention layer has this index."""
        raise IndexError("The router's state is not an attention layer of the cache.")

    def offload(self) -> None:
        """Stay where it is: the state is one vector per row."""

    def prefetch(self) -> None:
        """Stay where it is: the state is one vector per row."""

    def get_max_length(self) -> int:
        """Return -1: the state has no maximal length."""
        return -1

    def get_max_cache_shape(self) -> int:
        """Return -1: the state has no maximal length (the name in older releases)."""
        return -1

    def reset(self) -> None:
        """Forget every position."""
        self.state.clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Take back positions, which a running mean cannot do.

        Raises:
            OptOutError: A causal context has already summed the positions.
        """
        if not self.is_croppable and tokens_to_remove != 0:
            raise OptOutError(
                "A running-mean context cannot take positions back (assisted decoding does). "
                "Compose with `context: token`, or decode without an assistant."
            )

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Follow beam search: row ``i`` becomes row ``beam_idx[i]``."""
        self.state.map(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times."""
        rows = torch.arange(self.state.allowed.shape[0])
        self.state.map(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows at ``indices``."""
        self.state.map(indices)


def held_state(cache: Cache) -> RouterState | None:
    """Return the state that a cache carries; None where no composed model filled it."""
    for layer in reversed(cache.layers):
        if isinstance(layer, RouterStateLayer):
            return layer.state
    return None


def attach_state(cache: Cache, state: RouterState) -> None:
    """Put the state behind the attention layers, once they all exist."""
    if held_state(cache) is None:
        first = cache.layers[0] if cache.layers else None
        # mask functions look for the first layer of a kind: never let that be this one
        sliding, static = (bool(getattr(first, name, False)) for name in ("is_sliding", "is_compileable"))
        cache.layers.append(RouterStateLayer(state, is_sliding=sliding, is_compileable=static))
