"""Windows of public text that look like each owner's text, for tuning routers without anybody's text.

Each owner's are chosen by that owner's classifier alone. Knows a world's texts and windows; knows nothing of training.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipelines.experiments.world import World

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["owner_proxies", "proxy_windows"]

_CANDIDATES = 512
_SHARE = 0.05


def owner_proxies(world: World, domain: str, candidates: Tensor) -> Tensor:
    """Pick the public windows that a domain's owner takes for their own text.

    Args:
        world: The seed's world.
        domain: Whose; nothing of another owner is looked at.
        candidates: Public windows, int64 ``(windows, length)``.

    Returns:
        Their positions, int64, the most alike first.
    """
    import torch

    from pipelines.train.proxies import choose_proxies

    count = max(4, int(_SHARE * len(candidates)))
    own = world.training_windows(world.texts.owned[domain], count=len(candidates))
    chosen = choose_proxies(_texts(world, own), _texts(world, candidates), count=count)
    return torch.tensor(chosen, dtype=torch.int64)


def _texts(world: World, windows: Tensor) -> list[str]:
    texts: list[str] = world.tokenizer.batch_decode(windows)
    return texts


def proxy_windows(world: World, model: Any) -> Tensor:
    """Every owner's proxies, and as many public windows at random.

    Args:
        world: The seed's world.
        model: A composition; its owners' proxies are chosen.

    Returns:
        int64 ``(windows, length)``.
    """
    import torch

    candidates = world.training_windows(world.texts.public, count=_CANDIDATES)
    domains = [domain for domain in world.experiment.domains if world.owner(domain) in model.owners]
    chosen = [owner_proxies(world, domain, candidates) for domain in domains]
    count = max(4, int(_SHARE * len(candidates)))
    others = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(world.seed))[:count]
    return candidates[torch.cat([*chosen, others])]
