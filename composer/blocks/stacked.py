"""Full FFN experts as stacked 3-D parameters, run by the expert kernels of `transformers`.

The layout is the library's own (``gate_up_proj (E, 2I, d)``, ``down_proj (E, d, I)``), so every registered
implementation (``eager``, ``grouped_mm``, ``batched_mm``, ...) applies.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from composer.routing.types import UNUSED

__all__ = ["StackedFFN"]


class StackedFFN(nn.Module):
    """A stack of FFNs of one shape.

    Args:
        num_experts: Size E of the stack.
        hidden_size: d.
        intermediate_size: I.
        gated: Whether there is a gate beside the up-projection.
        fused: Whether the base model computes gate and up in one product, which decides the last bits of `one`.
        bias: Whether the linears have biases.
        activation: Applied to the gate, or to the up-projection when there is no gate.
        config: Configuration whose ``_experts_implementation`` names the kernel.
        dtype: Of the parameters, which are allocated and not initialised.
        device: Where they are allocated.
    """

    is_transposed = False
    is_concatenated = True
    has_post_expert_norm = False
    _is_expert_parallel = False

    def __init__(
        self,
        *,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        gated: bool,
        fused: bool = False,
        bias: bool,
        activation: Callable[[torch.Tensor], torch.Tensor],
        config: Any,
        dtype: torch.dtype,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.intermediate_size = intermediate_size
        self.has_gate, self.has_bias, self.is_fused = gated, bias, fused
        self.act_fn = activation
        self.config = config
        name = "gate_up_proj" if gated else "up_proj"
        width = intermediate_size * (2 if gated else 1)
        self.input_name = name
        empty = partial(torch.empty, dtype=dtype, device=device)
        self.register_parameter(name, nn.Parameter(empty(num_experts, width, hidden_size)))
        self.down_proj = nn.Parameter(empty(num_experts, hidden_size, intermediate_size))
        if bias:
            self.register_parameter(f"{name}_bias", nn.Parameter(empty(num_experts, width)))
            self.down_proj_bias = nn.Parameter(empty(num_experts, hidden_size))

    def forward(
        self,
        x: torch.Tensor,
        indices: torch.Tensor,
        weights: torch.Tensor,
        *,
        has_unused: bool = False,
    ) -> torch.Tensor:
        """Return ``sum_e w_e FFN_e(x)``.

        Args:
            x: ``(tokens, d)``.
            indices: int64 ``(tokens, k)`` positions in the stack; `UNUSED` only at the end of a row.
            weights: ``(tokens, k)``.
            has_unused: Whether any slot may be empty. Such rows run apart, by their number of experts, so that no
                slot is filled with a product by zero.
        """
        if not has_unused:
            return self._kernel()(self, x, indices, weights)
        out = x.new_zeros(x.shape)
        used = (indices != UNUSED).sum(-1)
        for k in range(1, indices.shape[-1] + 1):
            tokens = torch.where(used == k)[0]
            if tokens.numel():
                y = self._kernel()(self, x[tokens], indices[tokens, :k], weights[tokens, :k])
                out = out.index_copy(0, tokens, y.to(out.dtype))
        return out

    def one(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """Run one FFN of the stack on ``(..., d)`` with the products its own module would make."""
        weight = getattr(self, self.input_name)[index]
        bias = getattr(self, f"{self.input_name}_bias")[index] if self.has_bias else None
        n = self.intermediate_size
        if self.is_fused:
            hidden = self._apply_gate(F.linear(x, weight, bias))
        elif self.has_gate:
            gate_bias, up_bias = (None, None) if bias is None else (bias[:n], bias[n:])
            hidden = self.act_fn(F.linear(x, weight[:n], gate_bias)) * F.linear(x, weight[n:], up_bias)
        else:
            hidden = self.act_fn(F.linear(x, weight, bias))
        down_bias = self.down_proj_bias[index] if self.has_bias else None
        return F.linear(hidden, self.down_proj[index], down_bias)

    def _kernel(self) -> Callable[..., torch.Tensor]:
        implementation = getattr(self.config, "_experts_implementation", None) or "eager"
        return ALL_EXPERTS_FUNCTIONS.get_interface(implementation, StackedFFN._eager)  # type: ignore[no-any-return]

    def _eager(self, x: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Loop over the experts that were chosen, in the order of the stack."""
        out = torch.zeros_like(x)
        for index in torch.unique(indices).tolist():
            tokens, slots = torch.where(indices == index)
            projected = F.linear(
                x[tokens],
                getattr(self, self.input_name)[index],
                getattr(self, f"{self.input_name}_bias")[index] if self.has_bias else None,
            )
            hidden = self._apply_gate(projected) if self.has_gate else self.act_fn(projected)
            y = F.linear(hidden, self.down_proj[index], self.down_proj_bias[index] if self.has_bias else None)
            out = out.index_add(0, tokens, (y * weights[tokens, slots, None]).to(out.dtype))
        return out

    def _apply_gate(self, projected: torch.Tensor) -> torch.Tensor:
        gate, up = projected.chunk(2, dim=-1)
        return self.act_fn(gate) * up
