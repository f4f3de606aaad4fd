"""The mixture classes that mergekit-moe writes, and one more: which models they take, and their tensors' names.

Knows names and settings; knows nothing of where weights come from.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, final

from composer.export.flex_olmo import FlexOlmoTarget
from composer.export.mixtral import MixtralTarget
from composer.export.qwen3_moe import Qwen3MoeTarget
from composer.export.target import LAYER, StockTarget

__all__ = ["FAMILIES", "Family", "Layout", "Qwen2MoeTarget"]

Layout = Literal["mergekit", "classic"]
"""``mergekit``: the names mergekit writes, for Mixtral and Qwen3-MoE those that transformers 5 has in memory;
``classic``: one tensor an expert and matrix, which every version of transformers and other programs read."""

ROLES = ("gate", "up", "down")
_LINEARS = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


@final
class Qwen2MoeTarget(StockTarget):
    """``Qwen2MoeForCausalLM``: routed experts and a shared one behind a sigmoid gate (arXiv 2407.10671)."""

    title = "Qwen2-MoE"
    families = ("llama", "mistral", "qwen2", "phi3")
    config_class = "Qwen2MoeConfig"
    architecture = "Qwen2MoeForCausalLM"
    trunk = (
        r"model\.(embed_tokens|norm)\.weight|lm_head\.weight",
        rf"{LAYER}\.self_attn\.[qkvo]_proj\.weight",
        rf"{LAYER}\.self_attn\.[qkv]_proj\.bias",
        rf"{LAYER}\.(input|post_attention)_layernorm\.weight",
    )

    def settings(
        self, *, num_experts: int, top_k: int, normalize: bool, intermediate_size: int, dense: tuple[int, ...]
    ) -> dict[str, Any]:
        """Experts in every layer; see `StockTarget.settings`."""
        return {
            "num_experts": num_experts,
            "num_experts_per_tok": top_k,
            "norm_topk_prob": normalize,
            "moe_intermediate_size": intermediate_size,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }


class Family:
    """One mixture class as mergekit-moe calls it.

    Attributes:
        name: How ``architecture`` names it, at least in its beginning and in any case.
        target: The class of transformers and its settings.
        shared: Whether it has a shared expert: never, or always (of zeros where none is wanted).
        automatic: Whether it is chosen without being asked for.
        fused: Whether mergekit writes all experts of a layer in one tensor.
        needs_biases: Whether attention biases that a base has not are written as zeros.
        biases: Projections of attention, by their letters, that have biases where ``attention_bias`` is set.
        norms: Norms of a layer.
        head_norms: Norms of queries and keys: one for every head alike, one over all heads, or none.
    """

    name: ClassVar[str]
    target: StockTarget
    shared: ClassVar[bool] = False
    automatic: ClassVar[bool] = True
    fused: ClassVar[bool] = True
    needs_biases: ClassVar[bool] = False
    biases: ClassVar[str] = ""
    norms: ClassVar[tuple[str, ...]] = ("input_layernorm", "post_attention_layernorm")
    head_norms: ClassVar[Literal["each", "all"] | None] = None

    @property
    def families(self) -> tuple[str, ...]:
        """``model_type`` of the models that it takes."""
        return self.target.families

    def setting_problems(self, config: Mapping[str, object]) -> list[str]:
        """Say which settings of the base the class cannot express."""
        problems = self.target.setting_problems(config)
        if config.get("model_type") == "phi3":
            problems += _phi3_problems(config)
        return problems

    def misfits(self, names: Iterable[str]) -> list[str]:
        """Return the trunk's tensors that the class has no place for."""
        return self.target.misfits(names)

    def gate_name(self, layer: int) -> str:
        """Return the name of a layer's router weight in mergekit's layout."""
        return f"model.layers.{layer}.mlp.gate.weight"

    def expert_name(self, layer: int, expert: int, role: str) -> str:
        """Return the name of one expert's matrix."""
        return f"model.layers.{layer}.mlp.experts.{expert}.{_LINEARS[role]}.weight"

    def fused_name(self, layer: int, what: Literal["gate_up", "down"]) -> str:
        """Return the name of all experts' matrices of a layer."""
        return f"model.layers.{layer}.mlp.experts.{what}_proj"

    def shared_name(self, layer: int, role: str) -> str:
        """Return the name of the shared expert's matrix."""
        return f"model.layers.{layer}.mlp.shared_expert.{_LINEARS[role]}.weight"

    def settings(
        self, base: Any, *, num_experts: int, top_k: int, width: int, shared_width: int
    ) -> dict[str, Any]:
        """Return what the class has and a dense model has not.

        Args:
            base: The base's configuration, as transformers reads it.
            num_experts: Experts of every layer.
            top_k: Experts per token.
            width: FFN width of every expert.
            shared_width: That of the shared expert.
        """
        return self.target.settings(
            num_experts=num_experts, top_k=top_k, normalize=True, intermediate_size=width, dense=()
        )


def _phi3_problems(config: Mapping[str, object]) -> list[str]:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope = rope if isinstance(rope, dict) else {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    problems = []
    if kind != "default":
        problems.append(f"the rotary embedding is of type {kind!r}, which only Phi-3's own class computes")
    if partial not in (None, 1, 1.0):
        problems.append(f"a share of {partial} of each head is rotated; the class rotates all of it")
    return problems


@final
class Mixtral(Family):
    """Llama, Mistral and Phi-3: one block, renormalised top-k, no biases."""

    name = "Mixtral"
    target = MixtralTarget()

    @property
    def families(self) -> tuple[str, ...]:
        """Phi-3's block is Mistral's with fused linears, which are cut apart."""
        return (*self.target.families, "phi3")

    def settings(
        self, base: Any, *, num_experts: int, top_k: int, width: int, shared_width: int
    ) -> dict[str, Any]:
        """Mixtral's experts have the width that a dense base calls its own."""
        own = super().settings(
            base, num_experts=num_experts, top_k=top_k, width=width, shared_width=shared_width
        )
        return {**own, "intermediate_size": width}


@final
class Qwen2Moe(Family):
    """Llama, Mistral and Qwen2, with a shared expert."""

    name = "Qwen MoE"
    target = Qwen2MoeTarget()
    shared = True
    fused = False
    needs_biases = True
    biases = "qkv"

    def settings(
        self, base: Any, *, num_experts: int, top_k: int, width: int, shared_width: int
    ) -> dict[str, Any]:
        """The shared expert has a width of its own; a window over all layers is spelled as Qwen2 spells it."""
        own = super().settings(
            base, num_experts=num_experts, top_k=top_k, width=width, shared_width=shared_width
        )
        own |= {"shared_expert_intermediate_size": shared_width}
        window = getattr(base, "sliding_window", None)
        if window is not None and not hasattr(base, "use_sliding_window"):
            layers = ["sliding_attention"] * base.num_hidden_layers
            own |= {"use_sliding_window": True, "sliding_window": window, "layer_types": layers}
        return own

    def shared_gate_name(self, layer: int) -> str:
        """Return the name of the row that gates the shared expert."""
        return f"model.layers.{layer}.mlp.shared_expert_gate.weight"


@final
class Qwen3Moe(Family):
    """Qwen3."""

    name = "Qwen3 MoE"
    target = Qwen3MoeTarget()
    biases = "qkvo"
    head_norms = "each"


@final
class FlexOlmo(Family):
    """OLMo-2, which mergekit refuses."""

    name = "FlexOlmo"
    target = FlexOlmoTarget()
    fused = False
    biases = "qkvo"
    norms = ("post_attention_layernorm", "post_feedforward_layernorm")
    head_norms = "all"


@final
class DeepSeek(Family):
    """DeepSeek-MoE as mergekit writes it: its class is remote code, none of transformers' own."""

    name = "DeepSeek MoE"
    target = MixtralTarget()
    automatic = False
    fused = False
    shared = True

    def shared_name(self, layer: int, role: str) -> str:
        """DeepSeek's shared expert is not gated and has a name of its own."""
        return f"model.layers.{layer}.mlp.shared_experts.{_LINEARS[role]}.weight"


FAMILIES: tuple[Family, ...] = (Mixtral(), DeepSeek(), Qwen2Moe(), Qwen3Moe(), FlexOlmo())
"""In the order in which the first that fits is taken."""


def matching(architecture: str) -> Sequence[Family]:
    """Return the families whose name begins so, in any case."""
    asked = re.sub(r"\s+", " ", architecture.strip().lower())
    return [family for family in FAMILIES if family.name.lower().startswith(asked)]
