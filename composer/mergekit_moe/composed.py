"""What no stock class holds, as a coterie model: the same manifest, composed by recipe ``btx`` around the base's trunk.

A registry is made for the build and removed after it; every model is an owner of its own, so each can be left out
exactly. Router rows come from prompts or chance as `composer.routing.scorers` makes them, not as mergekit does.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from composer.mergekit_moe.manifest import PROMPTED, MoEManifest
from composer.mergekit_moe.merged import whole_folder
from composer.mergekit_moe.sources import SourceModel, Sources
from experts.errors import BuildError, PlanError

if TYPE_CHECKING:
    from experts.card import BaseRef
    from registry import BaseRecord

__all__ = ["compose_moe"]

_BASE = "base"


def compose_moe(
    manifest: MoEManifest, out: Path | str, *, near: Path = Path(), seed: int = 0
) -> tuple[str, ...]:
    """Write a composed folder of whole models.

    Args:
        manifest: What is wanted.
        out: The folder; it must not exist.
        near: Where relative paths are looked for if the working folder has them not.
        seed: Of random router rows.

    Returns:
        The names that the models have in the composition, in the manifest's order.

    Raises:
        PlanError: The manifest asks for what a composition does not have, or for models that cannot be composed.
        AdmissionError: A model differs from the base in a setting that decides the function, or in its tensors.
        BuildError: ``out`` exists or cannot be written. Nothing is left behind.
    """
    from composer.building import build
    from composer.manifest import Manifest
    from composer.planning import plan
    from registry import Registry

    target = Path(out)
    problems = _problems(manifest)
    if problems:
        raise PlanError("This manifest cannot become a coterie model:", problems=problems)
    if target.exists() or target.is_symlink():
        raise BuildError(f"The output folder {target} exists. Choose another name, or remove it first.")
    if not target.absolute().parent.is_dir():
        raise BuildError(
            f"There is no folder {target.absolute().parent} to write {target.name} into. Create it first."
        )
    sources = Sources(near=near)
    models = [sources(expert.source_model) for expert in manifest.experts]
    names = _names(models)
    # beside the output, so that the build can link its files
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.absolute().parent) as scratch:
        registry = Registry(Path(scratch) / "registry")
        base = whole_folder(sources(manifest.base_model), Path(scratch) / "base-merged")
        record = registry.add_base(base, name=_BASE)
        for name, model in zip(names, models, strict=True):
            staging = Path(scratch) / name.replace("/", "-")
            folder = whole_folder(model, staging.with_name(f"{staging.name}-merged"))
            registry.register(_packed(folder, staging, name, record))
        wish = Manifest.from_dict(_wish(manifest, target.name, names, seed))
        build(plan(wish, registry), target, registry=registry)
    return names


def _problems(manifest: MoEManifest) -> list[str]:
    """Say what a composition of whole models does not have."""
    found = []
    if manifest.shared_experts:
        found.append("shared_experts: recipe 'btx' has none; list the model among the experts")
    for number, expert in enumerate(manifest.experts):
        if expert.noise_scale is not None or expert.residual_scale is not None:
            found.append(f"experts.{number}: noise_scale and residual_scale would change an owner's model")
    return found


def _names(models: list[SourceModel]) -> tuple[str, ...]:
    """Name every model after its folder, or its adapter's, and tell those of one name apart."""
    folders = [Path(m.ref.lora.path) if m.ref.lora else m.folder.resolve() for m in models]
    slugs = [re.sub(r"[^a-z0-9_.-]+", "-", folder.name.lower()).strip("-.") for folder in folders]
    return tuple(
        f"{(slug or 'model')[:48]}{f'-{number}' if slugs.count(slug) > 1 else ''}/model"
        for number, slug in enumerate(slugs)
    )


def _packed(folder: Path, staging: Path, name: str, base: BaseRecord) -> Path:
    from experts.card import BaseRef, TrainingInfo
    from experts.package import pack

    reference: BaseRef = BaseRef(
        name=base.name, fingerprint=base.fingerprint, tokenizer_fingerprint=base.tokenizer_fingerprint
    )
    pack(
        folder,
        staging,
        name=name,
        version=1,
        domain=name.partition("/")[0],
        license="LicenseRef-not-stated",
        base=base.description,
        base_ref=reference,
        training=TrainingInfo(method="unknown"),
        kind="dense",
    )
    return staging


def _wish(manifest: MoEManifest, name: str, names: tuple[str, ...], seed: int) -> Mapping[str, Any]:
    prompted = manifest.gate_mode in PROMPTED
    experts: list[dict[str, Any]] = []
    for own, expert in zip(names, manifest.experts, strict=True):
        entry: dict[str, Any] = {"ref": own}
        if prompted:
            entry["positive_prompts"] = list(expert.positive_prompts or ())
            entry["negative_prompts"] = list(expert.negative_prompts or ())
        experts.append(entry)
    router: dict[str, Any] = {"top_k": manifest.experts_per_token, "normalize": True}
    if prompted:
        router["scorer"] = "prompts"
    else:
        distribution = "normal" if manifest.gate_mode == "random" else "uniform"
        router |= {"scorer": "random", "options": {"seed": seed, "distribution": distribution}}
    dtype = (manifest.dtype or "").removeprefix("torch.") or None
    return {
        "name": re.sub(r"[^A-Za-z0-9_.-]+", "-", name) or "model",
        "recipe": "btx",
        "base": _BASE,
        "experts": experts,
        "router": router,
        "upcycle": {"trunk": "frozen", "seed_expert": False},
        "dtype": dtype,
        "description": "From a manifest of mergekit-moe.",
    }
