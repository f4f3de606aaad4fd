"""Mixtral (arXiv 2401.04088): Llama's and Mistral's blocks with a mixture of FFNs, renormalised top-k.

Exact for bases of these two families whose linears have no biases.
"""

from __future__ import annotations

from typing import Any, ClassVar, final

from composer.export.target import LAYER, StockTarget

__all__ = ["MixtralTarget"]


@final
class MixtralTarget(StockTarget):
    """``MixtralForCausalLM``."""

    title = "Mixtral"
    families = ("llama", "mistral")
    config_class = "MixtralConfig"
    architecture = "MixtralForCausalLM"
    module = "block_sparse_moe"
    linears: ClassVar = {"gate": "w1", "up": "w3", "down": "w2"}
    trunk = (
        r"model\.(embed_tokens|norm)\.weight|lm_head\.weight",
        rf"{LAYER}\.self_attn\.[qkvo]_proj\.weight",
        rf"{LAYER}\.(input|post_attention)_layernorm\.weight",
    )
    always_normalizes = True

    def settings(
        self, *, num_experts: int, top_k: int, normalize: bool, intermediate_size: int, dense: tuple[int, ...]
    ) -> dict[str, Any]:
        """Mixtral has no switch for renormalisation and no dense layers; see `StockTarget.settings`."""
        return {"num_local_experts": num_experts, "num_experts_per_tok": top_k}
