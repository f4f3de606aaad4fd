"""FlexOlmo (arXiv 2507.07024): OLMo-2's blocks with a mixture of FFNs, as transformers has it: without the bias.

Exact for OLMo-2 bases. The only target that can also be imported, since only its experts are owners' by design.
"""

from __future__ import annotations

from typing import Any, final

from composer.export.target import LAYER, StockTarget

__all__ = ["FlexOlmoTarget"]


@final
class FlexOlmoTarget(StockTarget):
    """``FlexOlmoForCausalLM``."""

    title = "FlexOlmo"
    families = ("olmo2",)
    config_class = "FlexOlmoConfig"
    architecture = "FlexOlmoForCausalLM"
    trunk = (
        r"model\.(embed_tokens|norm)\.weight|lm_head\.weight",
        rf"{LAYER}\.self_attn\.[qkvo]_proj\.(weight|bias)",
        rf"{LAYER}\.self_attn\.[qk]_norm\.weight",
        rf"{LAYER}\.post_(attention|feedforward)_layernorm\.weight",
    )

    def settings(
        self, *, num_experts: int, top_k: int, normalize: bool, intermediate_size: int, dense: tuple[int, ...]
    ) -> dict[str, Any]:
        """FlexOlmo has experts in every layer; see `StockTarget.settings`."""
        return {
            "num_experts": num_experts,
            "num_experts_per_tok": top_k,
            "norm_topk_prob": normalize,
        }

    def dense_config(self, stock: Any) -> Any:
        """Return the configuration of the OLMo-2 model that expert 0 and the trunk are.

        Args:
            stock: A FlexOlmo configuration, as transformers reads it.
        """
        import dataclasses

        from transformers import Olmo2Config

        shared = {field.name for field in dataclasses.fields(Olmo2Config)} - {"architectures"}
        given = {name: value for name, value in stock.to_dict().items() if name in shared}
        return Olmo2Config(**given, architectures=["Olmo2ForCausalLM"])
