"""OLMoE (arXiv 2409.02060): norms before the blocks, and queries and keys normed over all heads together.

No dense family of transformers has these blocks, but Qwen3 with a single head: a norm in each head is then the norm
over all. Exact for such bases, refused with the reason for all others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

from composer.export.target import LAYER, StockTarget

__all__ = ["OlmoeTarget"]


@final
class OlmoeTarget(StockTarget):
    """``OlmoeForCausalLM``."""

    title = "OLMoE"
    families = ("qwen3",)
    condition = (
        " with one attention head (it norms what enters attention and FFN, and queries and keys over all heads "
        "together, as no other dense class does)"
    )
    config_class = "OlmoeConfig"
    architecture = "OlmoeForCausalLM"
    trunk = (
        r"model\.(embed_tokens|norm)\.weight|lm_head\.weight",
        rf"{LAYER}\.self_attn\.[qkvo]_proj\.(weight|bias)",
        rf"{LAYER}\.self_attn\.[qk]_norm\.weight",
        rf"{LAYER}\.(input|post_attention)_layernorm\.weight",
    )

    def setting_problems(self, config: Mapping[str, object]) -> list[str]:
        """Qwen3 norms every head by itself, and its heads may be wider than the states; OLMoE neither."""
        heads, width, head = (config.get(name) for name in ("num_attention_heads", "hidden_size", "head_dim"))
        found = []
        if heads != 1:
            found.append(
                f"the base norms queries and keys in each of its {heads} heads, OLMoE over all heads together; use "
                "--to qwen3_moe"
            )
        elif head != width:
            found.append(f"the base's head is {head} wide, OLMoE's as wide as the states ({width})")
        if config.get("use_sliding_window"):
            found.append("the base uses sliding windows in some layers; OLMoE has none")
        return found

    def settings(
        self, *, num_experts: int, top_k: int, normalize: bool, intermediate_size: int, dense: tuple[int, ...]
    ) -> dict[str, Any]:
        """OLMoE has experts in every layer; see `StockTarget.settings`."""
        return {
            "num_experts": num_experts,
            "num_experts_per_tok": top_k,
            "norm_topk_prob": normalize,
        }
