"""The plan of a mixture: which class holds it exactly, what every tensor is made of, and what is left out and why.

Pure but for downloads: it reads headers and biases, and returns a value that can be printed. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from composer.export.tensors import FLOATS, Slice, floats
from composer.mergekit_moe.families import FAMILIES, Family, Layout, matching
from composer.mergekit_moe.manifest import PROMPTED, MoEExpert, MoEManifest
from composer.mergekit_moe.sources import SourceModel, Sources
from experts.errors import PlanError
from experts.files import capped
from experts.names import unknown_name
from experts.safetensors_header import DTYPE_BYTES
from experts.same_architecture import decisive

__all__ = ["Dropped", "MoEPlan", "PlannedSource", "plan_moe"]

_SHARED_ZEROS = 64
"""Width of a shared expert of zeros, where the class has one and nobody is wanted in it."""
_FREE = frozenset(
    {
        "architectures",
        "intermediate_size",
        "max_position_embeddings",
        "max_window_layers",
        "tie_word_embeddings",
    }
)
"""Settings in which an expert may differ from the base: they do not reach its FFNs."""
_DECISIVE = ("hidden_act", "hidden_activation", "hidden_size", "model_type", "num_hidden_layers")
"""Settings of an expert that must be the base's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropped:
    """Tensors of a source that do not reach the output."""

    source: str
    tensors: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedSource:
    """One expert and the model that it is from."""

    wish: MoEExpert
    model: SourceModel

    @property
    def width(self) -> int:
        """FFN width, which is one in all layers."""
        return self.model.description.intermediate_size


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
        base = self.base.description
        ffn = [name for layer in range(base.num_layers) for name in ffn_tensors(self.base, layer)]
        trunk = sum(spec.numel for spec in base.tensors.values()) - sum(base.tensors[n].numel for n in ffn)
        row = base.hidden_size * base.num_layers
        shared = row * (3 * self.shared_width + bool(self.shared_width))
        routed, rows = 3 * self.width * row, len(self.experts) * row
        fixed = trunk + shared + rows
        return fixed + len(self.experts) * routed, fixed + self.manifest.experts_per_token * routed

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


def ffn_tensors(source: SourceModel, layer: int) -> list[str]:
    """Return the names of a layer's FFN weights and biases in the file."""
    names = []
    for linear in source.description.ffn_linears(layer).values():
        names += [f"{linear.name}.weight", *([f"{linear.name}.bias"] if linear.bias else [])]
    return names


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
    problems = _source_problems(base, [*experts, *([shared] if shared else [])])
    family = None if problems else _choose(manifest, base, shared, problems)
    account = _Account(base, experts, shared)
    if family is not None:
        problems += account.problems(family)
    widths = sorted({expert.width for expert in experts})
    if len(widths) > 1 and not pad:
        problems.append(
            f"the experts' FFNs are {', '.join(map(str, widths))} wide, and padding is turned off"
        )
    if problems or family is None:
        raise PlanError(f"This mixture of {base.ref} cannot be written:", problems=capped(problems))
    return MoEPlan(
        manifest=manifest,
        family=family,
        base=base,
        experts=experts,
        shared=shared,
        gated=_gated(manifest, family),
        layout=layout,
        dtype=manifest.storage_dtype or _declared(base),
        width=max(widths[-1], 0 if shared is None or family.needs_biases else shared.width),
        seed=seed,
        dropped=tuple(account.dropped),
        warnings=tuple(_warnings(manifest, family, base, experts, shared, sources)),
    )


def _gated(manifest: MoEManifest, family: Family) -> bool:
    """Say whether the shared expert has a gate of its own: from prompts, or drawn where the class is asked for."""
    if manifest.shared is None or not family.needs_biases:
        return False
    if manifest.gate_mode in PROMPTED or not manifest.architecture:
        return bool(manifest.shared.positive_prompts)
    return True


def _declared(base: SourceModel) -> str | None:
    """Return the dtype of the base's configuration, in safetensors' spelling."""
    config = base.description.config
    declared = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    return {torch: ours for ours, torch in FLOATS.items()}.get(declared)


# ---------------------------------------------------------------- may these models be experts of one?


def _source_problems(base: SourceModel, others: Sequence[PlannedSource]) -> list[str]:
    wanted = decisive(base.description.config)
    problems = []
    if base.description.layout.style == "dense":
        problems.append(
            f"{base.ref}: its FFN has no gate matrix (model_type '{base.family}'), and every mixture class of "
            "transformers has; compose it with coterie's own recipes instead"
        )
    for other in others:
        found = decisive(other.model.description.config)
        for key in _DECISIVE:
            if found.get(key) != wanted.get(key):
                problems.append(
                    f"{other.model.ref}: {key} is {found.get(key)!r}, the base has {wanted.get(key)!r}; experts "
                    "must be fine-tuned from one architecture"
                )
        problems += _width_problems(other.model)
    return list(dict.fromkeys(problems))


def _width_problems(model: SourceModel) -> list[str]:
    description = model.description
    down = [
        description.tensors[
            f"{description.layout.name_of('down', prefix=description.layers_prefix, layer=n)}.weight"
        ]
        for n in range(description.num_layers)
    ]
    widths = sorted({spec.shape[1] for spec in down})
    if len(widths) == 1:
        return []
    return [f"{model.ref}: its layers' FFNs are {', '.join(map(str, widths))} wide; a mixture has one width"]


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
            f"model_type '{base.family}': no mixture class of transformers has its blocks. Register the models "
            "(coterie register takes whole models) and compose them with recipe 'btx' as a coterie model"
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
    if shared is not None and not family.needs_biases and shared.wish.positive_prompts:
        return ["its shared expert is not gated; leave its prompts out, or write `architecture: qwen`"]
    return family.setting_problems(base.description.config)


# ---------------------------------------------------------------- where does every tensor go?


class _Account:
    """Accounts for every tensor of every source: used, or dropped for a reason, or in the way."""

    def __init__(
        self, base: SourceModel, experts: Sequence[PlannedSource], shared: PlannedSource | None
    ) -> None:
        self.base = base
        self.models = list({id(e.model): e.model for e in [*experts, *([shared] if shared else [])]}.values())
        self.dropped: list[Dropped] = []

    def problems(self, family: Family) -> list[str]:
        """Fill ``dropped``; return what can neither be used nor dropped."""
        problems = self._trunk(family)
        for model in self.models:
            problems += self._expert(model)
        return problems

    def _trunk(self, family: Family) -> list[str]:
        base = self.base
        ffn = {n for layer in range(base.description.num_layers) for n in ffn_tensors(base, layer)}
        if base not in self.models:
            self._drop(base, sorted(ffn), "FFNs of the base, in whose place experts stand")
        names = trunk_names(base, ffn)
        buffers = [name for name in names if name.endswith((".inv_freq", ".attention.bias", ".masked_bias"))]
        self._drop(base, buffers, "a buffer that is computed anew")
        misfits = [name for name in names if name not in buffers and family.misfits(trunk_parts(base, name))]
        zeros = [name for name in misfits if name.endswith(".bias") and _is_zero(base.tensors[name])]
        self._drop(base, zeros, f"a bias of zeros, for which {family.name} has no place")
        problems = [
            f"{base.ref}: {name} has no place in {family.name}{_cure(family, name)}"
            for name in misfits
            if name not in zeros
        ]
        return problems + self._adapter(base, ffn)

    def _adapter(self, base: SourceModel, ffn: set[str]) -> list[str]:
        if base.adapter is not None:
            unread = [f"{name}.weight" for name in base.adapter.spec.modules if f"{name}.weight" in ffn]
            if base not in self.models:
                self._drop(
                    base, unread, "the adapter's updates of the base's FFNs, in whose place experts stand"
                )
        return []

    def _expert(self, model: SourceModel) -> list[str]:
        ffn = [n for layer in range(model.description.num_layers) for n in ffn_tensors(model, layer)]
        biases = [name for name in ffn if name.endswith(".bias")]
        zeros = [name for name in biases if _is_zero(model.tensors[name])]
        self._drop(model, zeros, "an FFN bias of zeros, for which no mixture class has a place")
        if model is not self.base:
            rest = sorted(set(model.tensors) - set(ffn))
            self._drop(model, rest, "not an FFN: attention, norms and embeddings are the base model's")
        if model.adapter is not None and model is not self.base:
            stray = [f"{name}.weight" for name in model.adapter.spec.modules if f"{name}.weight" not in ffn]
            self._drop(model, stray, "the adapter's updates beside the FFNs, which are the base model's here")
        return [
            f"{model.ref}: {name} is not zero, and the experts of no mixture class have biases; compose the models "
            "with coterie's own recipes instead"
            for name in biases
            if name not in zeros
        ]

    def _drop(self, source: SourceModel, names: Sequence[str], reason: str) -> None:
        if names:
            self.dropped.append(Dropped(source=str(source.ref), tensors=tuple(names), reason=reason))


def _cure(family: Family, name: str) -> str:
    if ".self_attn." in name and name.endswith(".bias"):
        if name.endswith("o_proj.bias"):
            return ": no mixture class has a bias behind attention, and dropping it would change every answer"
        return "; `architecture: qwen` keeps biases of q, k and v" if not family.needs_biases else ""
    return ", and dropping it would change every answer"


def _is_zero(found: Slice) -> bool:
    return found.dtype in FLOATS and not floats(found).any()


def trunk_names(base: SourceModel, ffn: set[str]) -> list[str]:
    """Return the base's tensors beside its FFNs, in the order of the file."""
    return [name for name in base.tensors if name not in ffn]


def trunk_parts(base: SourceModel, name: str) -> dict[str, tuple[int, int] | None]:
    """Return what a trunk's tensor is called in the output: its new names, each with its rows where it is cut."""
    if not name.endswith(".self_attn.qkv_proj.weight"):
        return {name: None}
    config: Mapping[str, Any] = base.description.config
    heads = int(config["num_attention_heads"])
    width = int(config.get("head_dim") or base.description.hidden_size // heads)
    query, key = heads * width, int(config.get("num_key_value_heads") or heads) * width
    stem = name.removesuffix("qkv_proj.weight")
    edges = [0, query, query + key, query + 2 * key]
    assert edges[-1] == base.tensors[name].shape[0], name
    return {f"{stem}{role}_proj.weight": (edges[n], edges[n + 1]) for n, role in enumerate("qkv")}


# ---------------------------------------------------------------- what the builder should know


def _warnings(
    manifest: MoEManifest,
    family: Family,
    base: SourceModel,
    experts: Sequence[PlannedSource],
    shared: PlannedSource | None,
    sources: Sources,
) -> list[str]:
    found = []
    if not family.automatic:
        found.append(
            "transformers has no class for DeepSeek-MoE of this form: the checkpoint loads only with its authors' "
            "remote code, which coterie never runs. Leave `architecture` out for a class that loads."
        )
    if len(experts) > 1 and len({expert.model.ref for expert in experts}) == 1:
        still = (
            ""
            if any(e.wish.noise_scale for e in experts)
            else ", which answers as the one model until trained"
        )
        found.append(f"all experts are {experts[0].model.ref}: a sparse upcycling{still}.")
    if len({expert.width for expert in experts}) > 1:
        narrow = sorted({e.width for e in experts})
        found.append(
            f"FFN widths {', '.join(map(str, narrow))}: narrower experts are padded with zeros (exact)."
        )
    for model in sources:
        found += _differences(model, base)
    return found


def _differences(model: SourceModel, base: SourceModel) -> list[str]:
    if model is base:
        return []
    found = []
    if model.vocabulary and base.vocabulary and model.vocabulary != base.vocabulary:
        found.append(
            f"{model.ref} has {model.vocabulary} tokens, the base {base.vocabulary}: the mixture has the base's "
            "tokenizer and embeddings."
        )
    elif model.tokenizer and base.tokenizer and model.tokenizer != base.tokenizer:
        found.append(f"{model.ref} has another tokenizer than the base; the mixture has the base's.")
    own, wanted = decisive(model.description.config), decisive(base.description.config)
    keys = {*own, *wanted} - _FREE - {*_DECISIVE, "vocab_size"}
    differing = sorted(key for key in keys if own.get(key) != wanted.get(key))
    if differing:
        found.append(
            f"{model.ref} differs from the base in {', '.join(differing)}; the mixture has the base's."
        )
    return found
