"""What an owner of a whole model publishes so that routers can be solved for it: sums of what its routers read.

The states are those of the base's trunk with the model's FFNs, and if asked its attention, in every layer: what
`composer.upcycling.measuring` sees in a composition with ``trunk: frozen`` that sends all tokens to this model, without
composing one. Knows models and text; knows nothing of how a router is solved.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from composer.upcycling.measuring import Inputs, inputs_artifacts
from composer.upcycling.partition import attention_module, partition
from composer.upcycling.trunk import places
from experts.card import ExpertCard
from experts.routing_artifacts import RoutingArtifacts, RoutingInfo, Statistics
from pipelines.compression import CompressionError
from pipelines.train.anchor import ResolvedBase, load_anchor
from pipelines.train.rows import domain_embedding
from pipelines.train.windows import Windows, make_windows

if TYPE_CHECKING:
    from experts.base import BaseDescription
    from registry import Registry

__all__ = ["Attention", "publish_statistics", "sum_inputs"]

Attention = Literal["own", "shared"]
"""Which attention experts the sums are for: with keys and values of their own, or shared ones."""
_BATCH = 8


def sum_inputs(model: nn.Module, ids: Tensor, *, base: BaseDescription, attention: bool) -> Inputs:
    """Sum up what enters every FFN, and if asked every attention, over windows of token ids.

    Args:
        model: A causal LM of the base's class.
        ids: int64 ``(windows, length)``, on any device.
        base: Says where FFNs and attention are.
        attention: Whether attention is routed too.

    Returns:
        ``(branch, layer)`` -> n, sum x and sum x xT in float64.
    """
    found: Inputs = {}

    def watch(key: tuple[Any, int]) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> None:
            states = args[0] if args else kwargs["hidden_states"]
            part = Statistics.from_states(states.flatten(0, 1).double().cpu().numpy())
            found[key] = found[key] + part if key in found else part

        return hook

    modules = {"ffn": base.layout.module, **({"attention": attention_module(base)} if attention else {})}
    handles = [
        model.get_submodule(f"{base.layers_prefix}.{layer}.{name}").register_forward_pre_hook(
            watch((branch, layer)), with_kwargs=True
        )
        for layer in range(base.num_layers)
        for branch, name in modules.items()
    ]
    try:
        with torch.no_grad():
            for batch in torch.split(ids.to(next(model.parameters()).device), _BATCH):
                model(input_ids=batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


def publish_statistics(
    source: str | Path,
    texts: Sequence[str],
    *,
    registry: Registry,
    out: Path,
    attention: Attention | None = None,
    embedder: Path | None = None,
    sequence_length: int = 128,
    windows: int = 256,
    seed: int = 0,
) -> ExpertCard:
    """Pack a whole model again, with the sums of its routers' inputs beside what it publishes already.

    Args:
        source: A reference (``owner/expert``), or a folder with a card.
        texts: The owner's documents; they stay where they are.
        registry: Holds the base, and the expert where a reference is given.
        out: The folder to make, ready to be registered; it must not exist, or be empty.
        attention: Sums for attention routers too (recipe ``bam``), with this kind of attention experts; None: sums
            for FFN routers alone, as in ``btx``.
        embedder: Folder of a SentenceTransformer; publish the texts' mean embedding too.
        sequence_length: Tokens in a window.
        windows: At most this many are used.
        seed: Decides which.

    Raises:
        CompressionError: The expert is no whole model, the base is not in the registry, or ``out`` is in use.
        DataError: The text does not fill one window.
    """
    from experts.admission import check_expert
    from experts.package import pack
    from pipelines.compression import run

    card, found = run.find_expert(source, registry)
    if card.kind != "dense":
        raise CompressionError(
            f"{card.name} is of kind '{card.kind}'. Router inputs are summed for whole models (kind 'dense'); other "
            "experts publish what `coterie train` or `coterie register --text` gives them."
        )
    run.check_out(out)
    with (
        run.base_of(card, registry) as base,
        tempfile.TemporaryDirectory(prefix="coterie-statistics-") as scratch,
    ):
        if isinstance(found, Path):
            check_expert(found, card, base.description)
            found = {entry.path: found / entry.path for entry in card.files}
        model, tokenizer = load_anchor(base, dtype="float32")
        chosen = make_windows(
            texts, tokenizer, sequence_length=sequence_length, limit=windows, seed=seed, what="the text"
        )
        _put_in(model, found["model.safetensors"], base, attention)
        summed = _artifacts(model, chosen, base=base, attention=attention is not None)
        artifacts = _joined(card, found, base, summed, texts, embedder)
        raw = Path(scratch) / "raw"
        raw.mkdir()
        for name in ("config.json", "model.safetensors"):
            (raw / name).symlink_to(found[name].resolve())
        artifacts.save(raw)
        return pack(
            raw,
            out,
            name=card.name,
            version=max(card.version, registry.next_version(card.name)),
            domain=card.domain,
            license=card.license,
            base=base.description,
            base_ref=card.base,
            training=card.training,
            routing=artifacts.info,
            metrics=card.metrics,
            description=card.description,
            terms=card.terms,
            derived_from=card.derived_from,
            optout_class=card.optout_class,
            kind="dense",
        )


def _put_in(model: nn.Module, weights: Path, base: ResolvedBase, attention: Attention | None) -> None:
    """Give the base the model's FFNs, and what its attention experts would have of their own."""
    from safetensors import safe_open

    parts = partition(base.description, attention)
    with safe_open(weights, framework="pt") as file, torch.no_grad():
        for name, target in places(model, [*parts.ffn, *parts.attention]).items():
            target.copy_(file.get_tensor(name))


def _artifacts(model: nn.Module, chosen: Windows, *, base: ResolvedBase, attention: bool) -> RoutingArtifacts:
    ids = torch.from_numpy(chosen.ids).long()
    found = sum_inputs(model, ids, base=base.description, attention=attention)
    return inputs_artifacts(found, documents=chosen.documents)


def _joined(
    card: ExpertCard,
    files: Mapping[str, Path],
    base: ResolvedBase,
    summed: RoutingArtifacts,
    texts: Sequence[str],
    embedder: Path | None,
) -> RoutingArtifacts:
    """Put new sums, and an embedding if asked, beside what the expert publishes."""
    info, tensors = card.routing or RoutingInfo(), dict[str, Any]()
    if card.routing is not None:
        width = base.description.hidden_size
        tensors |= RoutingArtifacts.load(files[info.file], info, hidden_size=width).tensors
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("inputs.")}
    tensors |= summed.tensors
    info = info.model_copy(update={"inputs": summed.info.inputs})
    if embedder is not None:
        made_with, vector = domain_embedding(texts, embedder=embedder)
        tensors["embedding"] = vector
        info = info.model_copy(update={"embedding": made_with})
    return RoutingArtifacts(info=info, tensors=tensors)
