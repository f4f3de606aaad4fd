"""Of a whole model: its difference to the anchor as an expert of kind ``ffn`` or ``lora``, and what that leaves out.

FFNs are taken as they are. A low-rank expert takes every linear of the decoder layers, decomposed by mergekit through
its Python API. Knows cards and the kinds' files; knows nothing of text.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from experts.card import ExpertCard
from experts.kinds.lora import lora_tensor_names
from pipelines.compression import CompressionError

if TYPE_CHECKING:
    from experts.base import BaseDescription
    from pipelines.train.anchor import ResolvedBase
    from registry import Registry

__all__ = ["Extracted", "LeftOut", "extract_expert"]

Kind = Literal["ffn", "lora"]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """Tensors of the whole model that the extracted expert has no place for."""

    what: str
    tensors: int
    share: float
    """Of the squared Frobenius norm of the whole difference."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Extracted:
    """What came of it.

    Attributes:
        source: Card of the whole model.
        name: Of the extracted expert.
        version: Of the extracted expert.
        kind: Of the extracted expert.
        card: Its card; None where nothing was written.
        kept_error: Frobenius norm of what the expert's own tensors lack, relative to those tensors' difference.
        relative_error: Frobenius norm of everything that is lost, relative to the whole difference.
        left_out: What has no place, by part of the model.
    """

    source: ExpertCard
    name: str
    version: int
    kind: Kind
    card: ExpertCard | None
    kept_error: float
    relative_error: float
    left_out: tuple[LeftOut, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for ``--json``."""
        return {
            "source": {
                "name": self.source.name,
                "version": self.source.version,
                "digest": self.source.digest,
            },
            "name": self.name,
            "version": self.version,
            "kind": self.kind,
            "digest": self.card.digest if self.card else None,
            "kept_error": self.kept_error,
            "relative_error": self.relative_error,
            "left_out": [
                {"what": row.what, "tensors": row.tensors, "share": row.share} for row in self.left_out
            ],
        }


def extract_expert(
    source: str | Path,
    *,
    kind: Kind,
    registry: Registry,
    rank: int | None = None,
    out: Path | None = None,
    name: str | None = None,
    progress: Progress | None = None,
) -> Extracted:
    """Make an FFN or low-rank expert out of a whole model.

    Args:
        source: A reference (``owner/expert``), or a folder with a card.
        kind: Of the result.
        registry: Holds the anchor, and the expert where a reference is given.
        rank: Largest rank of a low-rank expert's matrices.
        out: The folder to make, ready to be registered; it must not exist, or be empty. None: only measure.
        name: ``owner/expert`` of the result; None: the whole model's name with ``-ffn`` or ``-lora`` behind it.
        progress: Told of every tensor that was compared.

    Raises:
        CompressionError: The expert is no whole model, the rank is missing or out of place, a name of another owner,
            an anchor that the registry does not have, or an ``out`` in use.
        ConsentError: The owner has opted out.
        UnknownNameError: There is no such expert.
        AdmissionError: The folder is not what its card says.
    """
    from pipelines.compression import run

    if (rank is None) != (kind == "ffn") or (rank is not None and rank < 1):
        raise CompressionError(
            "A low-rank expert needs --rank, a whole number from 1; an FFN expert has none, as its matrices are taken "
            f"whole. Given: {kind}, rank {rank}."
        )
    card, found = run.find_expert(source, registry)
    if card.kind != "dense":
        raise CompressionError(
            f"{card.name} is of kind '{card.kind}'. Only whole models (kind 'dense') can be extracted from; `coterie "
            "expert compress` makes full FFNs low-rank."
        )
    target, version = run.target_of(card, name or f"{card.name}-{kind}", registry)
    run.check_out(out)

    from experts.admission import check_expert
    from pipelines.compression.expert import check_owner

    check_owner(card, target)
    with (
        run.base_of(card, registry) as base,
        tempfile.TemporaryDirectory(prefix="coterie-extract-") as scratch,
    ):
        if isinstance(found, Path):
            check_expert(found, card, base.description)
            found = {entry.path: found / entry.path for entry in card.files}
        raw = Path(scratch) / "raw"
        raw.mkdir()
        with _whole(found, Path(scratch) / "model") as model:
            if kind == "ffn":
                _write_ffn(model, raw, base.description)
            else:
                assert rank is not None
                _write_lora(model, raw, base, rank=rank)
        errors = _measure(found["model.safetensors"], raw, base, kind=kind, progress=progress)
        written = None if out is None else _pack(card, found, raw, out, base, target, version, errors, kind)
    return Extracted(source=card, name=target, version=version, kind=kind, card=written, **errors)


@contextmanager
def _whole(files: Mapping[str, Path], folder: Path) -> Iterator[Path]:
    """Lay links to an expert's files where other programs expect a model."""
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).symlink_to(files[name].resolve())
    yield folder


def _write_ffn(model: Path, raw: Path, base: BaseDescription) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    from experts.kinds import get_kind

    kind = get_kind("ffn")
    layers = list(range(base.num_layers))
    config: dict[str, object] = {"format_version": 1, "layers": layers}
    names = kind.resolve(config, base).shapes
    with safe_open(model / "model.safetensors", framework="pt") as file:
        save_file({name: file.get_tensor(name) for name in names}, raw / kind.weights_file)
    (raw / kind.config_file).write_text(json.dumps(config) + "\n")


def _write_lora(model: Path, raw: Path, base: ResolvedBase, *, rank: int) -> None:
    """Let mergekit decompose every linear of the decoder layers, and keep what an adapter may hold."""
    from safetensors.torch import load_file, save_file

    found = base.description.layer_linears()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mergekit imports what others have renamed
        _decompose(model, base.folder, raw, sorted(found), rank=rank)
    tensors = load_file(raw / "adapter_model.safetensors")
    kept = {name: tensors[name] for module in found for name in lora_tensor_names(module) if name in tensors}
    if len(kept) != 2 * len(found):
        raise CompressionError(
            f"mergekit decomposed {len(kept) // 2} of {len(found)} linears of {base.ref.name}; extract --to ffn."
        )
    # its tasks hand back views of larger tensors
    kept = {name: tensor.contiguous() for name, tensor in kept.items()}
    save_file(kept, raw / "adapter_model.safetensors", metadata={"format": "pt"})
    ranks = {module: kept[lora_tensor_names(module)[0]].shape[0] for module in found}
    (raw / "adapter_config.json").write_text(json.dumps(_adapter_config(base, ranks), indent=2) + "\n")


def _decompose(model: Path, anchor: Path, raw: Path, modules: list[str], *, rank: int) -> None:
    import re

    from mergekit.common import ModelReference
    from mergekit.graph import Executor
    from mergekit.io.tasks import LoaderCache
    from mergekit.options import MergeOptions
    from mergekit.scripts.extract_lora import plan_extraction

    references = [ModelReference.model_validate({"model": {"path": str(p)}}) for p in (anchor, model)]
    exactly = "|".join(re.escape(module) for module in modules)
    plan = plan_extraction(
        base_model_ref=references[0],
        model_ref=references[1],
        modules_to_save=[],
        out_path=str(raw),
        options=MergeOptions(),
        max_rank=rank,
        include_regexes=[rf"^(?:{exactly})$"],
        exclude_regexes=[rf"^(?!(?:{exactly})$)"],
        skip_undecomposable=True,
    )
    try:
        for _ in Executor(plan.tasks, math_device="cpu", storage_device="cpu").run(quiet=True):
            pass
    finally:
        for (
            reference
        ) in references:  # the cache is never cleared, and would serve a folder made anew from the old
            LoaderCache().loaders.pop(reference, None)


def _adapter_config(base: ResolvedBase, ranks: Mapping[str, int]) -> dict[str, object]:
    rank = max(ranks.values())
    others = {name: own for name, own in ranks.items() if own != rank}
    return {
        "alpha_pattern": others,  # alpha = rank everywhere: the scale is 1
        "base_model_name_or_path": base.ref.name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": others,
        "target_modules": sorted({name.rpartition(".")[2] for name in ranks}),
        "task_type": "CAUSAL_LM",
    }


# ---------------------------------------------------------------- what it costs


def _measure(
    weights: Path, raw: Path, base: ResolvedBase, *, kind: Kind, progress: Progress | None
) -> dict[str, Any]:
    """Compare every tensor of the whole model with the anchor's and with what the expert makes of it."""
    from safetensors import safe_open

    from experts.fingerprint import checkpoint_files

    description = base.description
    ffn = {
        f"{linear.name}.{what}"
        for layer in range(description.num_layers)
        for linear in description.ffn_linears(layer).values()
        for what in ("weight", "bias")
    }
    lost: dict[str, list[float]] = {}
    kept = error = total = 0.0
    with ExitStack() as stack:
        opened = {
            name: stack.enter_context(safe_open(path, framework="pt"))
            for path, held in checkpoint_files(base.folder).items()
            for name in held
        }
        model: Any = stack.enter_context(safe_open(weights, framework="pt"))
        names = list(model.keys())
        factors: Any = None
        if kind == "lora":
            factors = stack.enter_context(safe_open(raw / "adapter_model.safetensors", framework="pt"))
        present = set(factors.keys()) if factors is not None else set()
        for done, name in enumerate(names, start=1):
            change = model.get_tensor(name).double() - opened[name].get_tensor(name).double()
            squared = float(change.square().sum())
            total += squared
            a, b = lora_tensor_names(name.removesuffix(".weight"))
            if a in present:
                kept += squared
                product = factors.get_tensor(b).double() @ factors.get_tensor(a).double()
                error += float((change - product).square().sum())
            elif kind == "ffn" and name in ffn:
                kept += squared
            else:
                lost.setdefault(_part(name, description, ffn), []).append(squared)
            if progress is not None:
                progress(done, len(names))
    everything = total or 1.0
    rows = [
        LeftOut(what=what, tensors=len(squares), share=sum(squares) / everything)
        for what, squares in sorted(lost.items())
    ]
    return {
        "kept_error": (error / (kept or 1.0)) ** 0.5,
        "relative_error": ((error + sum(map(sum, lost.values()))) / everything) ** 0.5,
        "left_out": tuple(rows),
    }


def _part(name: str, base: BaseDescription, ffn: set[str]) -> str:
    """Return what part of a model a tensor belongs to."""
    if name in ffn:
        return "FFN biases"
    if base.layer_of(name) is None:
        return "final norm" if "norm" in name else "embeddings and head"
    if "norm" in name.rpartition(".")[0].rpartition(".")[2]:
        return "norms"
    return "attention biases" if name.endswith(".bias") else "attention"


def _pack(
    card: ExpertCard,
    files: Mapping[str, Path],
    raw: Path,
    out: Path,
    base: ResolvedBase,
    name: str,
    version: int,
    errors: Mapping[str, Any],
    kind: Kind,
) -> ExpertCard:
    import shutil

    from experts.card import TrainingInfo
    from experts.package import pack

    given = card.training.model_dump(mode="json")
    training = TrainingInfo.model_validate(
        {**given, "method": f"{card.training.method[:80]}+extracted-{kind}"}
    )
    if card.routing is not None:
        shutil.copyfile(files[card.routing.file], raw / card.routing.file)
    return pack(
        raw,
        out,
        name=name,
        version=version,
        domain=card.domain,
        license=card.license,
        base=base.description,
        base_ref=card.base,
        training=training,
        routing=card.routing,
        metrics={"extraction.relative_error": errors["relative_error"]},
        description=card.description,
        terms=card.terms,
        derived_from=(card.digest,),
        optout_class=card.optout_class,
    )
