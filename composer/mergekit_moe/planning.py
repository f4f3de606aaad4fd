"""The plan of a mixture: which class holds it exactly, what every tensor is made of, and what is left out and why.

Pure but for downloads: it reads headers and biases, and returns a value that can be printed. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from composer.export.tensors import FLOATS
from composer.mergekit_moe.accounting import (
    Account,
    Dropped,
    PlannedSource,
    ffn_tensors,
    trunk_names,
    trunk_parts,
)
from composer.mergekit_moe.comparing import plan_warnings, source_problems
from composer.mergekit_moe.completeness import trunk_problems
from composer.mergekit_moe.families import FAMILIES, Family, Layout, matching
from composer.mergekit_moe.manifest import PROMPTED, MoEExpert, MoEManifest
from composer.mergekit_moe.sources import SourceModel, Sources
from composer.mergekit_moe.tokens import tokenizer_problems
from experts.errors import PlanError
from experts.files import capped
from experts.names import unknown_name
from experts.safetensors_header import DTYPE_BYTES

__all__ = ["MoEPlan", "plan_moe"]

_SHARED_ZEROS = 64
"""Width of a shared expert of zeros, where the class has one and nobody is wanted in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEPlan:
    """What `composer.mergekit_moe.writing.build_moe` will write.

    Attributes:
        manifest: The wish.
        family: The class that holds it.
        base: Gives everything but FFNs.
        experts: In order.
        shared: The expert that every token meets.
        gated: Whether the shared expert's gate comes from prompts or chance; else its answer counts in full.
        layout: How tensors are named.
        dtype: Of all tensors, in safetensors' spelling; None: each keeps its own.
        width: FFN width of every expert; narrower ones are padded with zeros.
        seed: Of whatever is drawn.
        dropped: Every tensor that is read from no source, with the reason.
        warnings: What the builder should know.
    """

    manifest: MoEManifest
    family: Family
    base: SourceModel
    experts: tuple[PlannedSource, ...]
    shared: PlannedSource | None
    gated: bool
    layout: Layout
    dtype: str | None
    width: int
    seed: int
    dropped: tuple[Dropped, ...]
    warnings: tuple[str, ...]

    @property
    def shared_width(self) -> int:
        """Width of the shared expert; 0 where the class has none."""
        if self.shared is not None:
            return self.shared.width if self.family.needs_biases else self.width
        return min(_SHARED_ZEROS, self.width) if self.family.needs_biases else 0

    @property
    def ffn_dtype(self) -> str:
        """The dtype that the FFNs are written in."""
        return self.dtype or self.base.description.dtype

    def counts(self) -> tuple[int, int]:
        """Return the parameters in all, and those that one token meets."""
        description = self.base.description
        row = description.hidden_size * description.num_layers
        shared = row * (3 * self.shared_width + (self.shared_width > 0 and self.family.needs_biases))
        fixed = sum(self.base.tensors[name].spec.numel for name in self.trunk())
        fixed += sum(self.missing_biases().values()) + shared + len(self.experts) * row
        routed = 3 * self.width * row
        return fixed + len(self.experts) * routed, fixed + self.manifest.experts_per_token * routed

    def trunk(self) -> list[str]:
        """Return the base's tensors that are written, by their names in its files."""
        ffn = {n for layer in range(self.base.description.num_layers) for n in ffn_tensors(self.base, layer)}
        dropped = {n for d in self.dropped if d.source == str(self.base.ref) for n in d.tensors}
        return [name for name in trunk_names(self.base, ffn) if name not in dropped]

    def missing_biases(self) -> dict[str, int]:
        """Return the attention biases that the class has and the base has not, with their lengths."""
        if not self.family.needs_biases:
            return {}
        rows: dict[str, int] = {}
        for name in self.trunk():
            for new, cut in trunk_parts(self.base, name).items():
                stem, _, role = new.rpartition(".self_attn.")
                bias = f"{stem}.self_attn.{role.removesuffix('weight')}bias"
                if (
                    role in ("q_proj.weight", "k_proj.weight", "v_proj.weight")
                    and bias not in self.base.tensors
                ):
                    rows[bias] = self.base.tensors[name].shape[0] if cut is None else cut[1] - cut[0]
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for printing and ``--json``."""
        total, active = self.counts()
        return {
            "format": "mergekit-moe",
            "architecture": self.family.target.architecture
            if self.family.automatic
            else "DeepseekForCausalLM",
            "base_model": str(self.base.ref),
            "experts": [
                {"source_model": str(expert.model.ref), "width": expert.width} for expert in self.experts
            ],
            "shared_expert": None if self.shared is None else str(self.shared.model.ref),
            "experts_per_token": self.manifest.experts_per_token,
            "gate_mode": self.manifest.gate_mode,
            "seed": self.seed,
            "layout": self.layout,
            "dtype": self.dtype,
            "parameters_total": total,
            "parameters_active": active,
            "bytes": total * DTYPE_BYTES[self.ffn_dtype],
            "dropped": [
                {"source": d.source, "tensors": len(d.tensors), "example": d.tensors[0], "reason": d.reason}
                for d in self.dropped
            ],
            "warnings": list(self.warnings),
        }


def plan_moe(
    manifest: MoEManifest,
    *,
    near: Path = Path(),
    layout: Layout = "mergekit",
    seed: int = 0,
    pad: bool = True,
) -> MoEPlan:
    """Open every model's headers, choose the class, and account for every tensor.

    Args:
        manifest: What is wanted.
        near: Where relative paths are looked for if the working folder has them not.
        layout: How tensors are named.
        seed: Of random gates and noise.
        pad: Whether narrower experts are widened with zeros, which is exact; else different widths are refused.

    Raises:
        PlanError: Everything that stands in the way, at once.
        AdmissionError: A model is incomplete, pickled or of no known layout.
        ManifestError: There is no such model.
        AssetError: The hub does not give it.
        UnknownNameError: ``architecture`` is none that is known.
    """
    sources = Sources(near=near)
    base = sources(manifest.base_model)
    experts = tuple(PlannedSource(wish=e, model=sources(e.source_model)) for e in manifest.experts)
    wish = manifest.shared
    shared = None if wish is None else PlannedSource(wish=wish, model=sources(wish.source_model))
    problems = source_problems(base, [*experts, *([shared] if shared else [])])
    family = None if problems else _choose(manifest, base, shared, problems)
    account = Account(base, experts, shared)
    if family is not None:
        problems += account.problems(family) + trunk_problems(base, account.trunk, family)
    if manifest.gate_mode in PROMPTED:
        problems += tokenizer_problems(base)
    widths = sorted({expert.width for expert in experts})
    if len(widths) > 1 and not pad:
        problems.append(
            f"the experts' FFNs are {', '.join(map(str, widths))} wide, and padding is turned off"
        )
    if problems or family is None:
        raise PlanError(f"This mixture of {base.ref} cannot be written:", problems=capped(problems))
    gated = _gated(manifest, family, base)
    return MoEPlan(
        manifest=manifest,
        family=family,
        base=base,
        experts=experts,
        shared=shared,
        gated=gated,
        layout=layout,
        dtype=manifest.storage_dtype or _declared(base),
        width=max(widths[-1], 0 if shared is None or family.needs_biases else shared.width),
        seed=seed,
        dropped=tuple(account.dropped),
        warnings=tuple(plan_warnings(family, base, experts, shared, sources, gated=gated)),
    )


def _gated(manifest: MoEManifest, family: Family, base: SourceModel) -> bool:
    """Say whether the shared expert has a gate of its own: from prompts, or drawn with the routed experts' rows.

    Drawn where mergekit would take Qwen's class too: it is asked for, the base is a Qwen2, or there are prompts, which
    say that a gate is wanted. Else mergekit takes DeepSeek's, whose shared expert is not gated.
    """
    shared = manifest.shared
    if shared is None or not family.needs_biases:
        return False
    if manifest.gate_mode in PROMPTED:
        return bool(shared.positive_prompts)
    return bool(manifest.architecture or base.family == "qwen2" or _prompted(shared))


def _prompted(expert: MoEExpert) -> bool:
    return bool(expert.positive_prompts or expert.negative_prompts)


def _declared(base: SourceModel) -> str | None:
    """Return the dtype of the base's configuration, in safetensors' spelling."""
    config = base.description.config
    declared = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    return {torch: ours for ours, torch in FLOATS.items()}.get(declared)


def _choose(
    manifest: MoEManifest, base: SourceModel, shared: PlannedSource | None, problems: list[str]
) -> Family | None:
    """Return the first class that holds these models; else say of each why not."""
    if manifest.architecture is None:
        candidates: Sequence[Family] = [family for family in FAMILIES if family.automatic]
    else:
        candidates = matching(manifest.architecture)
        if not candidates:
            raise unknown_name("architecture", manifest.architecture, [family.name for family in FAMILIES])
    reasons = []
    for family in candidates:
        found = _misfit(manifest, family, base, shared)
        if not found:
            return family
        reasons += [f"{family.name}: {reason}" for reason in found]
    known = {name for family in FAMILIES for name in family.families}
    if base.family not in known:
        problems.append(
            f"model_type '{base.family}': no mixture class of transformers has its blocks; `coterie build --composed` "
            "writes a coterie model instead"
        )
    problems += reasons
    return None


def _misfit(
    manifest: MoEManifest, family: Family, base: SourceModel, shared: PlannedSource | None
) -> list[str]:
    if base.family not in family.families:
        return [f"takes models of type {', '.join(family.families)}, not {base.family}"]
    if shared is not None and not family.shared:
        return ["has no shared expert; write `architecture: qwen`, or list it among the experts"]
    if shared is not None and not family.needs_biases and _prompted(shared.wish):
        return ["its shared expert is not gated; leave its prompts out, or write `architecture: qwen`"]
    return family.setting_problems(base.description.config)
