"""Writes a mixture: tensors one after the other from the models' files, configuration, tokenizer, the manifest itself.

Holds a few rows of one weight at a time; the folder appears whole or not at all. Knows what the plan says.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from composer.building import TOKENIZER_FILES, link_file, new_folder
from composer.export.shards import SHARD_BYTES, write_shards
from composer.export.tensors import FLOATS, Entry, Part
from composer.mergekit_moe.accounting import PlannedSource, trunk_parts
from composer.mergekit_moe.families import ROLES, Qwen2Moe
from composer.mergekit_moe.matrices import Weight, derived_seed
from composer.mergekit_moe.planning import MoEPlan
from experts.safetensors_header import TensorSpec

if TYPE_CHECKING:
    import torch

    from composer.mergekit_moe.gates import Gates

__all__ = ["MANIFEST_NAME", "build_moe"]

MANIFEST_NAME = "mergekit_moe_config.yml"
"""How mergekit calls its copy of the manifest."""

Progress = Callable[[str, int], None]
_DEEPSEEK = "deepseek-ai/deepseek-moe-16b-base--"


def build_moe(
    plan: MoEPlan,
    out: Path | str,
    *,
    source: str = "",
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> tuple[str, ...]:
    """Write the checkpoint.

    Args:
        plan: What to write.
        out: The folder; it must not exist.
        source: The manifest's text, which is put beside the result.
        shard_bytes: Tensor bytes of a file.
        progress: Told of every tensor.

    Returns:
        What the gates gave reason to warn of.

    Raises:
        BuildError: ``out`` exists or cannot be written. Nothing is left behind.
        AdmissionError: The base's tokenizer cannot be read.
        DataError: It makes no usable tokens of a prompt.
    """
    from composer.mergekit_moe.gates import make_gates

    with new_folder(Path(out)) as staging:
        gates = make_gates(plan)
        write_shards(
            staging, list(_Layout(plan, gates).entries()), shard_bytes=shard_bytes, progress=progress
        )
        _write_config(plan, staging)
        for name in TOKENIZER_FILES:
            if (plan.base.folder / name).is_file():
                link_file(plan.base.folder / name, staging / name, copy=True)
        if source:
            (staging / MANIFEST_NAME).write_text(source, encoding="utf-8")
    return gates.warnings


class _Layout:
    """Every tensor of the output, in the order in which it is written."""

    def __init__(self, plan: MoEPlan, gates: Gates) -> None:
        self.plan = plan
        self.gates = gates
        self.base = plan.base
        self.layers = self.base.description.num_layers
        self.fused = plan.family.fused and plan.layout == "mergekit"

    def entries(self) -> Iterator[Entry]:
        """Yield the trunk, then layer by layer experts and gates."""
        yield from self._trunk()
        for layer in range(self.layers):
            yield from self._fused(layer) if self.fused else self._apart(layer)
            yield from self._shared(layer)
            yield self._gate(layer)

    def _trunk(self) -> Iterator[Entry]:
        for name in self.plan.trunk():
            for new, rows in trunk_parts(self.base, name).items():
                yield self._whole(new, self._cut(name, rows))
        for name, length in self.plan.missing_biases().items():
            yield self._zeros(name, (length,))

    def _cut(self, name: str, rows: tuple[int, int] | None) -> Weight:
        weight = Weight.of(self.base, name)
        return weight if rows is None else weight.cut(*rows)

    def _whole(self, name: str, weight: Weight) -> Entry:
        dtype = self.plan.dtype or weight.stored.dtype
        if weight.stored.dtype not in FLOATS:
            dtype = weight.stored.dtype
        return Entry(name=name, spec=TensorSpec(dtype=dtype, shape=weight.shape), source=weight.parts(dtype))

    def _zeros(self, name: str, shape: tuple[int, ...]) -> Entry:
        spec = TensorSpec(dtype=self.plan.ffn_dtype, shape=shape)
        return Entry(name=name, spec=spec, source=lambda: bytes(spec.nbytes))

    # experts

    def _matrix(
        self, expert: PlannedSource, number: int, layer: int, role: str, *, width: int, scale: float = 1.0
    ) -> Weight:
        """Return one matrix of an expert: ``(width, d)`` for gate and up, ``(d, width)`` for down."""
        model, description = expert.model, expert.model.description
        linears = description.ffn_linears(layer)
        if description.layout.style == "fused" and role != "down":
            weight = Weight.of(model, f"{linears['gate_up'].name}.weight")
            half = weight.stored.shape[0] // 2
            weight = weight.cut(0, half) if role == "gate" else weight.cut(half, 2 * half)
        else:
            weight = Weight.of(model, f"{linears[role].name}.weight")
        residual = expert.wish.residual_scale if role == "down" else None
        factor = None if residual is None and (role != "down" or scale == 1.0) else scale * _or_one(residual)
        return weight.changed(
            noise=expert.wish.noise_scale,
            scale=factor,
            seed=derived_seed(self.plan.seed, f"noise {number} {layer} {role}"),
            rows=None if role == "down" else width,
            columns=width if role == "down" else None,
        )

    def _routed(self, layer: int, role: str) -> Iterator[Weight]:
        for number, expert in enumerate(self.plan.experts):
            yield self._matrix(expert, number, layer, role, width=self.plan.width)

    def _fused(self, layer: int) -> Iterator[Entry]:
        family, dtype, width = self.plan.family, self.plan.ffn_dtype, self.plan.width
        hidden, count = self.base.description.hidden_size, len(self.plan.experts)
        pairs = zip(self._routed(layer, "gate"), self._routed(layer, "up"), strict=True)
        stacked: tuple[Part, ...] = tuple(p for pair in pairs for weight in pair for p in weight.parts(dtype))
        spec = TensorSpec(dtype=dtype, shape=(count, 2 * width, hidden))
        yield Entry(name=family.fused_name(layer, "gate_up"), spec=spec, source=stacked)
        down = tuple(part for weight in self._routed(layer, "down") for part in weight.parts(dtype))
        spec = TensorSpec(dtype=dtype, shape=(count, hidden, width))
        yield Entry(name=family.fused_name(layer, "down"), spec=spec, source=down)

    def _apart(self, layer: int) -> Iterator[Entry]:
        classic = self.plan.layout == "classic" and self.plan.family.automatic
        naming = self.plan.family.target if classic else self.plan.family
        for role in ROLES:
            for number, weight in enumerate(self._routed(layer, role)):
                yield self._ffn(naming.expert_name(layer, number, role), weight)

    def _ffn(self, name: str, weight: Weight) -> Entry:
        dtype = self.plan.ffn_dtype
        return Entry(name=name, spec=TensorSpec(dtype=dtype, shape=weight.shape), source=weight.parts(dtype))

    def _shared(self, layer: int) -> Iterator[Entry]:
        """Write the shared expert; one without a gate counts in full.

        The gate is a sigmoid: a row of zeros lets half of the answer pass, so the down projection is doubled, which
        no rounding touches. Where nobody is wanted, the expert is of zeros.
        """
        family, width = self.plan.family, self.plan.shared_width
        if not width:
            return
        hidden = self.base.description.hidden_size
        sigmoid = isinstance(family, Qwen2Moe)
        for role in ROLES:
            name = family.shared_name(layer, role)
            if self.plan.shared is None:
                yield self._zeros(name, (hidden, width) if role == "down" else (width, hidden))
                continue
            scale = 2.0 if sigmoid and not self.plan.gated else 1.0
            yield self._ffn(name, self._matrix(self.plan.shared, -1, layer, role, width=width, scale=scale))
        if isinstance(family, Qwen2Moe):
            name = family.shared_gate_name(layer)
            if self.plan.gated:
                yield self._row(name, self.gates.shared(layer))
            else:
                yield self._zeros(name, (1, hidden))

    def _gate(self, layer: int) -> Entry:
        classic = self.plan.layout == "classic" and self.plan.family.automatic
        naming = self.plan.family.target if classic else self.plan.family
        return self._row(naming.gate_name(layer), self.gates.routed(layer))

    def _row(self, name: str, rows: torch.Tensor) -> Entry:
        import torch

        dtype = self.plan.ffn_dtype
        data = rows.to(getattr(torch, FLOATS[dtype])).contiguous()
        spec = TensorSpec(dtype=dtype, shape=tuple(data.shape))
        return Entry(name=name, spec=spec, source=lambda: data.view(-1).view(torch.uint8).numpy().data)


def _or_one(value: float | None) -> float:
    return 1.0 if value is None else value


# ---------------------------------------------------------------- configuration


def _write_config(plan: MoEPlan, staging: Path) -> None:
    from transformers import AutoConfig

    base = AutoConfig.from_pretrained(plan.base.folder, local_files_only=True)
    if not plan.family.automatic:
        text = json.dumps(_deepseek_config(plan, base.to_dict()), indent=2) + "\n"
        (staging / "config.json").write_text(text, encoding="utf-8")
        return
    settings = plan.family.settings(
        base,
        num_experts=len(plan.experts),
        top_k=plan.manifest.experts_per_token,
        width=plan.width,
        shared_width=plan.shared_width,
    )
    config: Any = plan.family.target.config(base, dtype=FLOATS[plan.ffn_dtype], settings=settings)
    config.save_pretrained(staging)


def _deepseek_config(plan: MoEPlan, defaults: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that DeepSeek-MoE's remote code reads, on top of the base's own.

    Defaults that the base's ``config.json`` leaves out are the base family's, not those of the remote code.
    """
    return {
        **defaults,
        **plan.base.description.config,
        "architectures": ["DeepseekForCausalLM"],
        "model_type": "deepseek",
        "auto_map": {
            "AutoConfig": f"{_DEEPSEEK}configuration_deepseek.DeepseekConfig",
            "AutoModel": f"{_DEEPSEEK}modeling_deepseek.DeepseekModel",
            "AutoModelForCausalLM": f"{_DEEPSEEK}modeling_deepseek.DeepseekForCausalLM",
        },
        "n_routed_experts": len(plan.experts),
        "n_shared_experts": 1 if plan.shared else None,
        "num_experts_per_tok": plan.manifest.experts_per_token,
        "first_k_dense_replace": 0,
        "moe_layer_freq": 1,
        "scoring_func": "softmax",
        "norm_topk_prob": True,
        "moe_intermediate_size": plan.width,
        "torch_dtype": FLOATS[plan.ffn_dtype],
    }
