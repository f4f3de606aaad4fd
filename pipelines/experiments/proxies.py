"""Public text that looks like an owner's, for tuning routers without anybody's text.

A window of the public mix is scored by the solved gate of the owners' published statistics, so that the choice
needs nothing but what every owner has published. Knows windows and a gate; knows nothing of training.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipelines.experiments.world import BASE, World

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["proxy_windows"]

_CANDIDATES = 512
_SHARE = 0.05


def proxy_windows(world: World, model: Any) -> Tensor:
    """Pick, for every owner, the public windows that the owner's statistics claim most; add as many at random.

    Args:
        world: The seed's world.
        model: A composition whose experts publish statistics.

    Returns:
        int64 ``(windows, length)``.
    """
    import torch

    from composer.routing.scorers.lda import solve_lda

    candidates = world.training_windows(world.texts.public, count=_CANDIDATES)
    statistics = [_public_statistics(world), *(_statistics(world, name) for name in model.expert_names)]
    weights, biases = solve_lda(statistics)
    means = _means(world, candidates)
    scores = means @ torch.from_numpy(weights).T + torch.from_numpy(biases)
    margin = scores[:, 1:] - scores[:, :1]
    count = max(4, int(_SHARE * len(candidates)))
    chosen = [margin[:, expert].topk(min(count, len(margin))).indices for expert in range(margin.shape[1])]
    others = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(world.seed))[:count]
    return candidates[torch.cat([*chosen, others])]


def _statistics(world: World, name: str) -> Any:
    from experts.routing_artifacts import RoutingArtifacts

    record = world.registry.expert(name)
    info = world.registry.card(record).routing
    assert info is not None
    return RoutingArtifacts.load(world.registry.files(record)[info.file], info).statistics


def _public_statistics(world: World) -> Any:
    from experts.routing_artifacts import RoutingArtifacts

    base = world.registry.base(BASE)
    assert base.routing is not None, "the world publishes public statistics"
    assert base.routing_sha256 is not None
    return RoutingArtifacts.load(world.registry.blob_path(base.routing_sha256), base.routing).statistics


def _means(world: World, ids: Tensor) -> Tensor:
    """Return each window's mean normalised state, float64 ``(windows, d)``."""
    import torch

    from pipelines.train.states import SplitDecoder

    prefix = world.registry.base(BASE).description.layers_prefix
    split = SplitDecoder(world.anchor(), layers_prefix=prefix, first=world.layers[0])
    parts = []
    for batch in torch.split(ids, 16):
        states = split.lower(batch).double()
        parts.append((states * torch.rsqrt(states.square().mean(-1, keepdim=True) + 1e-6))[:, 1:].mean(1))
    return torch.cat(parts)
