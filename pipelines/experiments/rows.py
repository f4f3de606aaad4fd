"""Experts with router rows that nobody trained: the starting point, or the control, of arms with learned rows.

Knows an expert's files and how to pack it again; knows nothing of arms.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from experts.routing_artifacts import RoutingArtifacts, RoutingInfo, RowsInfo
from pipelines.experiments.world import BASE, World

if TYPE_CHECKING:
    import torch

__all__ = ["copies_with_rows", "experts_with_rows"]

Init = Literal["mean", "random"]


def experts_with_rows(world: World, variant: str, source: Mapping[str, str], *, init: Init) -> dict[str, str]:
    """Give trained experts rows: the mean FFN input of the owner's text, or random ones.

    Args:
        world: The seed's world.
        variant: Name of the new experts, after their owner.
        source: Trained experts, by domain.
        init: ``mean``, as owners initialise rows, or ``random``.

    Returns:
        Reference by domain.
    """
    names = {}
    for domain, reference in source.items():
        name = f"{world.owner(domain)}/{variant}"
        names[domain] = name
        if name not in {record.name for record in world.registry.experts()}:
            files = world.registry.files(world.registry.expert(reference))
            _register(world, domain, name, _rows(world, domain, init), files, init=init)
    return names


def copies_with_rows(world: World, variant: str) -> dict[str, str]:
    """Make experts that are the anchor's own FFNs, with random rows: where training on pooled text starts."""
    from safetensors.torch import save_file

    names = {}
    for domain in world.experiment.domains:
        name = f"{world.owner(domain)}/{variant}"
        names[domain] = name
        if name in {record.name for record in world.registry.experts()}:
            continue
        raw = _empty(world.folder / "raw" / name)
        save_file(_anchor_ffns(world), raw / "ffn.safetensors")
        (raw / "config.json").write_text(_config(world.layers))
        files = {path.name: path for path in raw.iterdir()}
        _register(world, domain, name, _rows(world, domain, "random"), files, init="random")
    return names


def _config(layers: tuple[int, ...]) -> str:
    import json

    return json.dumps({"format_version": 1, "layers": list(layers), "base": BASE})


def _anchor_ffns(world: World) -> dict[str, torch.Tensor]:
    description = world.registry.base(BASE).description
    state = world.anchor().state_dict()
    names = [spec.name for layer in world.layers for spec in description.ffn_linears(layer).values()]
    return {
        key: tensor.clone()
        for key, tensor in state.items()
        if any(key.startswith(f"{name}.") for name in names)
    }


def _rows(world: World, domain: str, init: Init) -> dict[int, torch.Tensor]:
    from pipelines.train.routing import ffn_modules
    from pipelines.train.rows import ffn_input_rows, random_rows
    from pipelines.train.states import SplitDecoder

    description = world.registry.base(BASE).description
    if init == "random":
        label = f"{domain}/{world.seed}"
        return random_rows(world.layers, hidden_size=description.hidden_size, label=label)
    anchor = world.anchor()
    split = SplitDecoder(anchor, layers_prefix=description.layers_prefix, first=world.layers[0])
    ids = world.training_windows(world.texts.owned[domain], count=64)
    return ffn_input_rows(split, ids, ffns=ffn_modules(anchor, description, world.layers))


def _register(
    world: World,
    domain: str,
    name: str,
    rows: Mapping[int, torch.Tensor],
    files: Mapping[str, Path],
    *,
    init: Init,
) -> None:
    from experts.card import BaseRef
    from experts.package import pack

    raw = _empty(world.folder / "raw" / f"{name}-with-rows")
    for file in ("config.json", "ffn.safetensors"):
        shutil.copyfile(files[file], raw / file)
    base = world.registry.base(BASE)
    assert base.routing is not None, "the world attached it"
    assert base.routing.rows is not None, "with rows"
    info = RoutingInfo(
        rows=RowsInfo(
            layers=tuple(sorted(rows)),
            has_bias=False,
            public_digest=base.routing.rows.public_digest,
            init="anchor" if init == "mean" else init,
        )
    )
    tensors = {f"row.{layer}.weight": row.numpy() for layer, row in rows.items()}
    RoutingArtifacts(info=info, tensors=tensors).save(raw)
    staging = _empty(world.folder / "packed" / name)
    pack(
        raw,
        staging,
        name=name,
        version=1,
        domain=domain,
        license="Apache-2.0",
        base=base.description,
        base_ref=BaseRef(
            name=BASE, fingerprint=base.fingerprint, tokenizer_fingerprint=base.tokenizer_fingerprint
        ),
        routing=info,
    )
    world.registry.register(staging)


def _empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
