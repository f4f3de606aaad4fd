"""Qwen3-MoE (arXiv 2505.09388): Qwen3's blocks with a mixture of FFNs; some layers may keep a plain one.

Exact for Qwen3 bases without sliding windows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

from composer.export.target import LAYER, StockTarget

__all__ = ["Qwen3MoeTarget"]


@final
class Qwen3MoeTarget(StockTarget):
    """``Qwen3MoeForCausalLM``."""

    title = "Qwen3-MoE"
    families = ("qwen3",)
    config_class = "Qwen3MoeConfig"
    architecture = "Qwen3MoeForCausalLM"
    trunk = (
        r"model\.(embed_tokens|norm)\.weight|lm_head\.weight",
        rf"{LAYER}\.self_attn\.[qkvo]_proj\.(weight|bias)",
        rf"{LAYER}\.self_attn\.[qk]_norm\.weight",
        rf"{LAYER}\.(input|post_attention)_layernorm\.weight",
    )
    dense_layers = True

    def setting_problems(self, config: Mapping[str, object]) -> list[str]:
        """Qwen3 keeps full attention in some layers, Qwen3-MoE has one window for all."""
        if config.get("use_sliding_window"):
            return ["the base uses sliding windows in some layers; Qwen3-MoE has one window for all of them"]
        return []

    def settings(
        self, *, num_experts: int, top_k: int, normalize: bool, intermediate_size: int, dense: tuple[int, ...]
    ) -> dict[str, Any]:
        """Qwen3-MoE lists its dense layers; see `StockTarget.settings`."""
        return {
            "num_experts": num_experts,
            "num_experts_per_tok": top_k,
            "norm_topk_prob": normalize,
            "moe_intermediate_size": intermediate_size,
            "decoder_sparse_step": 1,
            "mlp_only_layers": list(dense),
        }
