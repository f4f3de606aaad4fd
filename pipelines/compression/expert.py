"""A full expert made low-rank, one linear in memory at a time, and written as an expert of its own.

``W_expert - W_anchor`` is replaced by its truncated singular value decomposition (FlexMoRE, arXiv 2602.08818): A =
sqrt(S) V^T, B = U sqrt(S), scale 1. Knows cards, the kinds' files and the anchor's; knows nothing of text.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from experts.base import LinearSpec
from experts.card import ExpertCard, TrainingInfo
from experts.fingerprint import checkpoint_files
from experts.kinds import get_kind
from experts.kinds.lora import lora_tensor_names
from experts.package import pack
from pipelines.compression import CompressionError
from pipelines.compression.factors import factorise
from pipelines.compression.report import CompressionReport, LinearCost

if TYPE_CHECKING:
    from pipelines.compression.ranks import RankRule
    from pipelines.train.anchor import ResolvedBase

__all__ = ["FullExpert", "check_kind", "check_owner", "compress", "write_card"]

Progress = Callable[[int, int], None]
"""Called with the linears done so far and in all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FullExpert:
    """An expert of kind ``ffn`` and the anchor it belongs to.

    Attributes:
        card: Its card.
        files: Where its files are, by their path in the package.
        base: The anchor.
    """

    card: ExpertCard
    files: Mapping[str, Path]
    base: ResolvedBase

    @property
    def linears(self) -> list[LinearSpec]:
        """Every linear that the expert brings, layer by layer."""
        description = self.base.description
        return [linear for layer in self.card.layers for linear in description.ffn_linears(layer).values()]


def compress(
    expert: FullExpert, rule: RankRule, folder: Path, *, progress: Progress | None = None
) -> CompressionReport:
    """Write the adapter's two files, in the full expert's dtype.

    Args:
        expert: What is compressed.
        rule: Chooses each linear's rank.
        folder: Existing and empty; receives ``adapter_config.json`` and ``adapter_model.safetensors``, which PEFT
            alone loads.
        progress: Told of every linear.

    Raises:
        CompressionError: The expert is not of kind ``ffn``, or changes a bias, which an adapter cannot.
    """
    check_kind(expert.card)
    tensors: dict[str, Tensor] = {}
    costs = []
    linears = expert.linears
    with ExitStack() as stack:
        own = _opened(expert.files[get_kind("ffn").weights_file], stack)
        anchor = _anchor(expert.base, stack)
        _check_biases(expert.card, linears, own, anchor)
        for done, linear in enumerate(linears, start=1):
            a, b, cost = _compress_linear(linear, own, anchor, rule)
            tensors |= dict(zip(lora_tensor_names(linear.name), (a, b), strict=True))
            costs.append(cost)
            if progress is not None:
                progress(done, len(linears))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = _config(expert, {cost.name: cost.rank for cost in costs})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return CompressionReport(rule=rule.text, linears=tuple(costs))


def check_kind(card: ExpertCard) -> None:
    """Refuse experts that are not full ones."""
    if card.kind == "lora":
        raise CompressionError(
            f"{card.name} is of kind 'lora', low-rank already (rank {card.rank}). Only full experts (kind 'ffn') can "
            "be compressed."
        )
    if card.kind != "ffn":
        raise CompressionError(
            f"{card.name} is of kind '{card.kind}'. Only full experts (kind 'ffn') can be compressed."
        )


Read = Callable[[str], Tensor]
"""Reads a tensor by its name in the anchor's checkpoint."""


def _opened(path: Path, stack: ExitStack) -> Read:
    file: Any = stack.enter_context(safe_open(path, framework="pt"))
    read: Read = file.get_tensor
    return read


def _anchor(base: ResolvedBase, stack: ExitStack) -> Read:
    """Map the anchor's shards; a tensor is read when it is asked for."""
    readers: dict[str, Read] = {}
    for path, held in checkpoint_files(base.folder).items():
        readers |= dict.fromkeys(held, _opened(path, stack))
    return lambda name: readers[name](name)


def _check_biases(card: ExpertCard, linears: list[LinearSpec], own: Read, anchor: Read) -> None:
    """A bias may only be what the anchor's is: adapters have none."""
    changed = [
        f"{name}: differs by up to {difference:.3g}"
        for name in (f"{linear.name}.bias" for linear in linears if linear.bias)
        if (difference := float((own(name).double() - anchor(name).double()).abs().max()))
    ]
    if changed:
        raise CompressionError(
            f"{card.name} changes biases of the anchor's FFNs, and a low-rank expert cannot carry biases (PEFT: bias "
            "'none'). Train the expert as kind 'lora' instead:",
            problems=changed,
        )


def _compress_linear(
    linear: LinearSpec, own: Read, anchor: Read, rule: RankRule
) -> tuple[Tensor, Tensor, LinearCost]:
    full = own(f"{linear.name}.weight")
    change = full.double() - anchor(f"{linear.name}.weight").double()
    factors = factorise(change, rule)
    a, b = (factor.to(full.dtype).contiguous() for factor in (factors.a, factors.b))
    size = full.element_size()
    bias = linear.out_features if linear.bias else 0
    return (
        a,
        b,
        LinearCost(
            name=linear.name,
            rank=factors.rank,
            full_rank=len(factors.squared),
            norm=float(change.norm()),
            error=float((change - b.double() @ a.double()).norm()),
            bytes_before=(full.numel() + bias) * size,
            bytes_after=(a.numel() + b.numel()) * size,
            capped=rule.capped(factors.squared, rank=factors.rank),
        ),
    )


def _config(expert: FullExpert, ranks: Mapping[str, int]) -> dict[str, object]:
    """PEFT's own fields; the commonest rank is the default, the others stand in the patterns."""
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {name: own for name, own in ranks.items() if own != rank}
    return {
        "alpha_pattern": others,  # alpha = rank everywhere: the scale is 1
        "base_model_name_or_path": expert.base.ref.name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "layers_pattern": expert.base.description.layers_prefix.rpartition(".")[2],
        "layers_to_transform": list(expert.card.layers),
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": others,
        "target_modules": sorted({name.rpartition(".")[2] for name in ranks}),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


def write_card(
    expert: FullExpert, adapter: Path, out: Path, *, name: str, version: int, report: CompressionReport
) -> ExpertCard:
    """Pack the adapter as an expert that can be registered.

    Owner, domain, licence, terms, data statement, privacy and routing artefacts are the full expert's: what is
    computed from published weights alone keeps a differential-privacy guarantee. Its metrics are not taken over,
    since they were measured on other weights.

    Args:
        expert: The full expert.
        adapter: What `compress` wrote.
        out: The folder to make; it must not exist, or be empty. Appears whole or not at all.
        name: ``owner/expert``; the owner must be the full expert's.
        version: From 1.
        report: What `compress` returned.

    Raises:
        CompressionError: The name belongs to another owner.
        AdmissionError: ``out`` is in use.
    """
    card = expert.card
    check_owner(card, name)
    if card.routing is not None:
        shutil.copyfile(expert.files[card.routing.file], adapter / card.routing.file)
    return pack(
        adapter,
        out,
        name=name,
        version=version,
        domain=card.domain,
        license=card.license,
        base=expert.base.description,
        base_ref=card.base,
        training=_training(card, report),
        routing=card.routing,
        metrics={"svd.relative_error": report.relative_error},
        description=card.description,
        terms=card.terms,
        derived_from=(card.digest,),
        optout_class=card.optout_class,
    )


def check_owner(card: ExpertCard, name: str) -> None:
    """Refuse a name that belongs to somebody else."""
    owner = name.partition("/")[0]
    if owner != card.owner:
        raise CompressionError(
            f"The name '{name}' belongs to '{owner}', and {card.name} is {card.owner}'s: what is made from it is too. "
            f"Choose a name that starts with '{card.owner}/'."
        )


def _training(card: ExpertCard, report: CompressionReport) -> TrainingInfo:
    given = card.training.model_dump(mode="json")
    settings = {**given["settings"], "svd.rank": report.rule}
    return TrainingInfo.model_validate(
        {**given, "method": f"{card.training.method[:96]}+svd", "settings": settings}
    )
