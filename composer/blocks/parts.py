"""The anchor's FFN taken apart: its linears by role and what happens between them.

Knows three layouts (gated, fused gated, plain); which module attribute plays which role comes from
`experts.ffn_layout`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from experts.errors import PlanError
from experts.ffn_layout import FFNLayout

__all__ = ["FFNParts"]

_ACTIVATIONS = ("act_fn", "act", "activation_fn", "activation", "activation_function")


class FFNParts:
    """Views of a decoder layer's own FFN module, which stays the owner of its weights.

    Args:
        module: The base model's ``mlp``.
        layout: Says which attribute plays which role.

    Attributes:
        inputs: ``"gate"`` and ``"up"``, ``"gate_up"``, or ``"up"`` alone -> linear from d to the FFN's width.
        down: Linear from the FFN's width back to d.
    """

    def __init__(self, module: nn.Module, layout: FFNLayout) -> None:
        linears = {role: module.get_submodule(name) for role, name in layout.linears.items()}
        self.down: nn.Linear = linears.pop("down")  # type: ignore[assignment]
        self.inputs: Mapping[str, nn.Linear] = linears  # type: ignore[assignment]
        self.activation: Callable[[torch.Tensor], torch.Tensor] = _activation(module)

    @property
    def gated(self) -> bool:
        """Whether the FFN multiplies an activated gate with an up-projection."""
        return "up" not in self.inputs or "gate" in self.inputs

    def project(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Apply the input linears to ``(tokens, d)``."""
        return {role: linear(x) for role, linear in self.inputs.items()}

    def hidden(self, projected: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Combine the input projections into the hidden activation ``(tokens, width)``."""
        if "gate" in projected:
            return self.activation(projected["gate"]) * projected["up"]
        if "gate_up" in projected:
            gate, up = projected["gate_up"].chunk(2, dim=-1)
            return self.activation(gate) * up
        return self.activation(projected["up"])


def _activation(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    for name in _ACTIVATIONS:
        candidate = getattr(module, name, None)
        if callable(candidate):
            return candidate  # type: ignore[no-any-return]
    raise PlanError(
        f"{type(module).__name__} has no activation under any of the names {', '.join(_ACTIVATIONS)}, so its "
        "experts cannot be composed. Report the model family."
    )
