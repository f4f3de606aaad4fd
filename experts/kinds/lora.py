"""Kind ``lora``: a PEFT LoRA adapter folder, so that PEFT alone loads it too.

Derives from the configuration and the base which linears are adapted, with PEFT's own matching rules
(``peft.tuners.tuners_utils.check_target_module_exists``, ``peft.utils.other.get_pattern_key``), and hence the
one set of tensors the file may hold. Knows nothing of torch or of how adapters are applied.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, final

from experts.base import BaseDescription
from experts.card import BaseRef
from experts.errors import AdmissionError
from experts.files import capped
from experts.kinds.kind import ExpertKind, ResolvedConfig
from experts.kinds.lora_config import KNOWN_KEYS, LoraConfig, parse_lora_config
from experts.kinds.lora_match import TargetMatcher, pattern_values, target_reason

__all__ = ["AdapterKind", "LoraKind", "LoraModule", "LoraSpec", "lora_spec", "lora_tensor_names"]

MAX_UPDATE_RMS = 100.0
"""Largest allowed bound on the root mean square of an update's entries,
``scaling * |B| * |A| / sqrt(in * out)`` with Frobenius norms. Weights of language models lie far below 1."""

_PREFIX = "base_model.model."


class LoraModule(NamedTuple):
    """Low-rank update of one linear: ``W + scaling * B A``."""

    rank: int
    scaling: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSpec:
    """What an adapter's configuration means on a base."""

    modules: Mapping[str, LoraModule]
    """Full module name of each adapted linear to its rank and scaling."""
    features: Mapping[str, tuple[int, int]]
    """Module name to ``(out_features, in_features)``."""
    layers: tuple[int, ...]
    ffn_only: bool

    @property
    def rank(self) -> int:
        """The largest rank."""
        return max(module.rank for module in self.modules.values())


def lora_tensor_names(module: str) -> tuple[str, str]:
    """Return the names in PEFT's file of A ``(rank, in_features)`` and B ``(out_features, rank)``."""
    return f"{_PREFIX}{module}.lora_A.weight", f"{_PREFIX}{module}.lora_B.weight"


def lora_spec(config: Mapping[str, object], base: BaseDescription) -> LoraSpec:
    """Resolve an ``adapter_config.json`` on a base.

    Raises:
        AdmissionError: A key that is not allowed, or a target that is not a linear of the base's layers; every
            offender is listed.
    """
    parsed = parse_lora_config(config, embeds=base.embedding is not None)
    linears = base.layer_linears()
    targets = TargetMatcher(parsed)
    matched = [name for name in linears if targets.matches(name)]
    problems = [*_target_problems(targets, base, linears), *_layer_problems(parsed, base)]
    if problems:
        raise AdmissionError("adapter_config.json does not fit the base:", problems=capped(problems))
    ffn = {lin.name for layer in range(base.num_layers) for lin in base.ffn_linears(layer).values()}
    return LoraSpec(
        modules=_modules(parsed, matched),
        features={name: linears[name] for name in matched},
        layers=tuple(sorted({layer for name in matched if (layer := base.layer_of(name)) is not None})),
        ffn_only=ffn.issuperset(matched),
    )


def _modules(config: LoraConfig, names: list[str]) -> dict[str, LoraModule]:
    ranks = pattern_values(config.rank_pattern, names, default=config.r)
    alphas = pattern_values(config.alpha_pattern, names, default=config.lora_alpha)
    scale = math.sqrt if config.use_rslora else float
    return {
        name: LoraModule(rank=rank, scaling=alpha / scale(rank))
        for name, rank, alpha in zip(names, ranks, alphas, strict=True)
    }


def _target_problems(
    targets: TargetMatcher, base: BaseDescription, linears: Mapping[str, object]
) -> list[str]:
    """Every target must hit a linear of the base's layers, and nothing else."""
    outside = sorted({name.rpartition(".")[0] for name in base.tensors} - set(linears))
    stray = {target: name for name in reversed(outside) for target in targets.matches(name)}
    hit = {target for name in linears for target in targets.matches(name)}
    problems = [
        f"target_modules: '{target}' matches '{name}', which is not a linear of the base's layers"
        for target, name in stray.items()
    ]
    missed = [target for target in targets.names if target not in hit and target not in stray]
    return problems + [target_reason(target, linears) for target in missed]


def _layer_problems(config: LoraConfig, base: BaseDescription) -> list[str]:
    last = base.num_layers - 1
    return [
        f"layers_to_transform: the base has no layer {number}; it has 0 to {last}"
        for number in config.layers_to_transform or ()
        if not 0 <= number <= last
    ]


class AdapterKind(ExpertKind):
    """What PEFT LoRA adapters have in common, whatever they are made for."""

    config_file = "adapter_config.json"
    weights_file = "adapter_model.safetensors"

    def resolve(self, config: Mapping[str, object], base: BaseDescription) -> ResolvedConfig:
        """Take A and B of every linear that PEFT would adapt."""
        spec = lora_spec(config, base)
        shapes: dict[str, tuple[int, ...]] = {}
        for name, module in spec.modules.items():
            out_features, in_features = spec.features[name]
            name_a, name_b = lora_tensor_names(name)
            shapes[name_a] = (module.rank, in_features)
            shapes[name_b] = (out_features, module.rank)
        base_name = config.get("base_model_name_or_path")
        return ResolvedConfig(
            shapes=shapes,
            layers=spec.layers,
            rank=spec.rank,
            ffn_only=spec.ffn_only,
            dtype=None,
            base_name=None if base_name is None else str(base_name),
        )

    def sanitize_config(self, config: Mapping[str, object], base_ref: BaseRef) -> dict[str, object]:
        """Name the base, and drop options of later PEFT versions that are null: they say nothing."""
        kept = {key: value for key, value in config.items() if key in KNOWN_KEYS or value is not None}
        return {**kept, "base_model_name_or_path": base_ref.name, "revision": base_ref.revision}

    def value_problems(
        self, config: Mapping[str, object], base: BaseDescription, norms: Mapping[str, float]
    ) -> list[str]:
        """Bound the update of each linear: a huge factor may hide behind the other one or the scaling."""
        spec = lora_spec(config, base)
        problems = []
        for name, module in spec.modules.items():
            name_a, name_b = lora_tensor_names(name)
            size = math.sqrt(math.prod(spec.features[name]))
            rms = abs(module.scaling) * norms[name_a] * norms[name_b] / size
            if rms > MAX_UPDATE_RMS:
                problems.append(
                    f"linear '{name}': scaling * |B| * |A| / sqrt(in * out) is {rms:.3g}; "
                    f"at most {MAX_UPDATE_RMS:g} is allowed"
                )
        return problems


@final
class LoraKind(AdapterKind):
    """PEFT LoRA adapters on language models."""

    name = "lora"
