"""Arms whose weights see more than one owner's text, or public text in their stead: routers, or whole mixtures.

Knows which weights each arm trains on which windows; knows nothing of how a loop runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipelines.experiments.arms import COORDINATED, Results, learned_router, measured, plain

if TYPE_CHECKING:
    from torch import nn

    from pipelines.experiments.world import World

__all__ = [
    "btx_joint",
    "btx_public",
    "paper_rt",
    "pooled",
    "unrestricted_1x",
    "unrestricted_2x",
    "unrestricted_frozen_trunk",
]


def paper_rt(world: World) -> Results:
    """The paper's composition with its rows and biases trained on public text that looks like the owners'."""
    from pipelines.experiments.proxies import proxy_windows

    names = world.train("paper", **COORDINATED)
    model = world.compose("paper", list(names.values()), learned_router(world))
    _tune_routers(world, model, proxy_windows(world, model), "paper_rt")
    return {"paper_rt": measured(world, model)}


def _tune_routers(world: World, model: Any, ids: Any, arm: str) -> None:
    """Train the gates alone; the biases too, where there are any."""
    from composer.layers.moe import MoELayer
    from pipelines.experiments.optimize import optimize

    routers = [module.router for module in model.modules() if isinstance(module, MoELayer)]
    gates = [router.scorer for router in routers if router is not None]
    budget = world.experiment.tuning
    optimize(
        model,
        ids,
        parameters=[parameter for gate in gates for parameter in gate.parameters()],
        steps=budget.steps,
        batch_size=budget.batch_size,
        learning_rate=budget.learning_rate,
        seed=world.seed,
        cosine=False,
        progress=lambda done, total, loss: world.tell(f"{arm}: step {done} of {total}, loss {loss:.3f}"),
    )


def _btx(world: World, arm: str, ids: Any) -> Results:
    from pipelines.experiments.rows import experts_with_rows

    names = experts_with_rows(world, "random-rows", plain(world), init="random")
    router = {**learned_router(world), "normalize": True}
    model = world.compose("btx", list(names.values()), router)
    _tune_routers(world, model, ids, arm)
    return {arm: measured(world, model)}


def btx_public(world: World) -> Results:
    """Branch-Train-MiX (arXiv 2403.07816) where nobody shares: routers trained on public text alone."""
    return _btx(world, "btx_public", world.training_windows(world.texts.public, count=512))


def btx_joint(world: World) -> Results:
    """Branch-Train-MiX as it is meant: routers trained on everybody's text."""
    return _btx(world, "btx_joint", _pooled(world, count=512))


def _pooled(world: World, *, count: int) -> Any:
    """Windows of every owner's text, equally many of each."""
    import torch

    share = max(1, count // len(world.experiment.domains))
    parts = [world.training_windows(documents, count=share) for documents in world.texts.owned.values()]
    return torch.cat(parts)


def _train_on_everything(
    world: World, model: nn.Module, arm: str, *, trained: str = "", times: int = 1
) -> None:
    """Train the parameters whose names hold ``trained`` on all owners' text, with ``times`` their steps together."""
    from pipelines.experiments.optimize import optimize

    budget = world.experiment.experts
    steps = times * world.total_steps
    optimize(
        model,
        _pooled(world, count=min(steps * budget.batch_size, 8192)),
        parameters=[parameter for name, parameter in model.named_parameters() if trained in name],
        steps=steps,
        batch_size=budget.batch_size,
        learning_rate=budget.learning_rate,
        seed=world.seed,
        progress=lambda done, total, loss: world.tell(f"{arm}: step {done} of {total}, loss {loss:.3f}"),
    )


def _unrestricted(world: World, arm: str, **training: Any) -> Results:
    from pipelines.experiments.rows import copies_with_rows

    model = world.compose(
        "unrestricted",
        list(copies_with_rows(world, "copy").values()),
        {**learned_router(world), "normalize": True},
    )
    _train_on_everything(world, model, arm, **training)
    return {arm: measured(world, model)}


def unrestricted_1x(world: World) -> Results:
    """One mixture of the same size, everything trained on everybody's text, as many tokens as the owners took."""
    return _unrestricted(world, "unrestricted_1x")


def unrestricted_2x(world: World) -> Results:
    """The same with twice the tokens."""
    return _unrestricted(world, "unrestricted_2x", times=2)


def unrestricted_frozen_trunk(world: World) -> Results:
    """The same mixture with the anchor's other weights frozen, as the owners' experts have them."""
    return _unrestricted(world, "unrestricted_frozen_trunk", trained=".mlp.")


def pooled(world: World) -> Results:
    """One expert for everybody, its FFNs trained on everybody's text: a token meets as many weights as with one."""
    model = world.anchor()
    _train_on_everything(world, model, "pooled", trained=".mlp.")
    return {"pooled": measured(world, model)}
