"""Which of a base's tensors every expert has of its own, and which are the trunk that all of them share.

Knows names and shapes; knows no values and no torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from experts.base import BaseDescription
from experts.errors import PlanError
from experts.kinds.kind import DTYPES

__all__ = ["ATTENTION_NAMES", "KEYS_AND_VALUES", "Partition", "attention_module", "partition"]

ATTENTION_NAMES = ("self_attn", "attention", "attn")
"""What decoder families call a layer's attention."""
KEYS_AND_VALUES = ("k_proj", "v_proj", "k_norm", "v_norm")
"""Children of an attention module that make keys and values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """The tensors of a base by who has them. Buffers that are not floating belong to nobody.

    Attributes:
        ffn: Feed-forward tensors of every layer: a copy per expert.
        attention: Attention tensors that are copied per expert; empty where attention is of the trunk.
        trunk: The rest, in the base's order.
        sizes: Number of entries of every tensor; 0 for one that is a copy of another, tied to it.
        num_layers: Decoder layers.
        hidden_size: Width d.
    """

    ffn: tuple[str, ...]
    attention: tuple[str, ...]
    trunk: tuple[str, ...]
    sizes: dict[str, int]
    num_layers: int
    hidden_size: int

    def count(self, names: Iterable[str]) -> int:
        """Return the number of parameters in some tensors."""
        return sum(self.sizes[name] for name in names)

    def parameters(self, *, ffn: int, attention: int, rows: int) -> int:
        """Return how many parameters there are, or a token meets.

        Args:
            ffn: Copies of the FFN.
            attention: Copies of what attention experts have of their own.
            rows: Router rows of a layer, of all of its routers.
        """
        experts = ffn * self.count(self.ffn) + attention * self.count(self.attention)
        return self.count(self.trunk) + experts + rows * self.hidden_size * self.num_layers


def partition(base: BaseDescription, attention: Literal["own", "shared"] | None = None) -> Partition:
    """Part a base's tensors.

    Args:
        base: The anchor's tensors.
        attention: ``own``: all of attention is the experts'; ``shared``: all but what makes keys and values (queries,
            output and the norm of queries); None: attention is of the trunk.

    Raises:
        PlanError: Attention is not where any known family has it, or keeps keys, values and queries in one matrix
            that would have to be shared in part.
    """
    floating = [name for name, spec in base.tensors.items() if spec.dtype in DTYPES]
    ffn = {
        f"{linear.name}.{what}"
        for layer in range(base.num_layers)
        for linear in base.ffn_linears(layer).values()
        for what in ("weight", "bias")
    }
    own = set() if attention is None else _attention(base, floating, shared=attention == "shared")
    copy = base.tied_head
    return Partition(
        ffn=tuple(name for name in floating if name in ffn),
        attention=tuple(name for name in floating if name in own),
        trunk=tuple(name for name in floating if name not in ffn and name not in own),
        sizes={name: 0 if name == copy else base.tensors[name].numel for name in floating},
        num_layers=base.num_layers,
        hidden_size=base.hidden_size,
    )


def attention_module(base: BaseDescription) -> str:
    """Return what the base calls a layer's attention, for instance ``self_attn``.

    Raises:
        PlanError: It has none under a known name.
    """
    for name in ATTENTION_NAMES:
        if any(tensor.startswith(f"{base.layers_prefix}.0.{name}.") for tensor in base.tensors):
            return name
    raise PlanError(
        f"the base has no attention under any of the names {', '.join(ATTENTION_NAMES)} in {base.layers_prefix}.0, so "
        "it cannot have attention experts; compose with recipe `btx`"
    )


def _attention(base: BaseDescription, floating: list[str], *, shared: bool) -> set[str]:
    module = attention_module(base)
    prefixes = tuple(f"{base.layers_prefix}.{layer}.{module}." for layer in range(base.num_layers))
    inside = {name: _child(name, prefixes) for name in floating if name.startswith(prefixes)}
    if not shared:
        return set(inside)
    if not {"k_proj", "v_proj"} <= set(inside.values()):
        raise PlanError(
            f"upcycle.attention.kv: the base's attention has no k_proj and v_proj of their own (it has "
            f"{', '.join(sorted(set(inside.values())))}), so they cannot be shared; write `kv: own`"
        )
    return {name for name, child in inside.items() if child not in KEYS_AND_VALUES}


def _child(name: str, prefixes: tuple[str, ...]) -> str:
    """Return the child of the attention module that a tensor belongs to."""
    prefix = next(prefix for prefix in prefixes if name.startswith(prefix))
    return name[len(prefix) :].partition(".")[0]
