"""The arms of the FlexOlmo comparison: one function each, from a seed's world to a measured model.

Knows how each arm differs from the others; training, composing and measuring are done elsewhere. Arms and what they
are compared for follow arXiv 2507.07024, tables 1 and 3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from experts.plugins import PluginTable
from pipelines.experiments.world import BASE, World

if TYPE_CHECKING:
    from torch import nn

    from pipelines.evaluate import Evaluation

__all__ = ["ARMS", "COORDINATED", "ArmFunction", "Results", "learned_router", "measured", "plain"]

ArmFunction = Callable[[World], "Mapping[str, Evaluation]"]
"""Results by the name of the arm; most functions give one."""

ARMS = PluginTable(
    "experiment arm",
    {
        "anchor": "pipelines.experiments.arms:anchor",
        "expert": "pipelines.experiments.arms:single_experts",
        "soup": "pipelines.experiments.arms:soup",
        "weighted_soup": "pipelines.experiments.arms:weighted_soup",
        "ties": "pipelines.experiments.arms:ties",
        "btm": "pipelines.experiments.arms:btm",
        "btm_top2": "pipelines.experiments.arms:btm_top2",
        "prompt_router": "pipelines.experiments.arms:prompt_router",
        "btx_public": "pipelines.experiments.joint:btx_public",
        "btx_joint": "pipelines.experiments.joint:btx_joint",
        "unrestricted_1x": "pipelines.experiments.joint:unrestricted_1x",
        "unrestricted_2x": "pipelines.experiments.joint:unrestricted_2x",
        "unrestricted_frozen_trunk": "pipelines.experiments.joint:unrestricted_frozen_trunk",
        "pooled": "pipelines.experiments.joint:pooled",
        "paper": "pipelines.experiments.arms:paper",
        "paper_embedding": "pipelines.experiments.embedded:paper_embedding",
        "paper_rt": "pipelines.experiments.joint:paper_rt",
        "paper_no_bias": "pipelines.experiments.arms:paper_no_bias",
        "paper_no_init": "pipelines.experiments.arms:paper_no_init",
        "paper_no_coordination": "pipelines.experiments.arms:paper_no_coordination",
        "ridge": "pipelines.experiments.arms:ridge",
        "low_rank": "pipelines.experiments.arms:low_rank",
        "coterie": "pipelines.experiments.arms:coterie",
        "coterie_token": "pipelines.experiments.improvements:token_context",
        "coterie_topp": "pipelines.experiments.improvements:top_p",
        "coterie_anchor_prior": "pipelines.experiments.improvements:low_anchor_prior",
        "coterie_coordinated": "pipelines.experiments.improvements:coordinated",
        "without": "pipelines.experiments.arms:without_each_owner",
        "oracle": "pipelines.experiments.arms:oracle",
    },
)
"""Every arm, in the order of the tables."""

Results = dict[str, "Evaluation"]


def measured(world: World, model: nn.Module, **options: Any) -> Evaluation:
    """Measure a model on the world's held-out windows."""
    from pipelines.evaluate import measure

    return measure(model, world.windows, batch_size=8, **options)


# ---------------------------------------------------------------- without a router


def anchor(world: World) -> Results:
    """The public anchor alone."""
    return {"anchor": measured(world, world.anchor())}


def single_experts(world: World) -> Results:
    """Each owner's expert alone, on every domain."""
    return {
        f"expert:{domain}": _baseline(world, "single", domain=domain) for domain in world.experiment.domains
    }


def soup(world: World) -> Results:
    """The uniform average of the experts' weights."""
    return {"soup": _baseline(world, "soup")}


def weighted_soup(world: World) -> Results:
    """An average with weights from the experts' losses, each on text of its own owner."""
    validation = {
        domain: world.training_windows(documents, count=16) for domain, documents in world.texts.owned.items()
    }
    return {"weighted_soup": _baseline(world, "weighted_soup", validation=validation)}


def ties(world: World) -> Results:
    """TIES merging (arXiv 2306.01708) through mergekit."""
    return {"ties": _baseline(world, "ties")}


def btm(world: World) -> Results:
    """Branch-Train-Merge: the experts' and the anchor's probabilities mixed by their likelihood of the text so far."""
    return {"btm": _baseline(world, "btm", anchor=True)}


def btm_top2(world: World) -> Results:
    """The same with the two likeliest at each position; who they are, all models must still be run to know."""
    return {"btm_top2": _baseline(world, "btm", anchor=True, top_k=2)}


def prompt_router(world: World) -> Results:
    """One expert for the whole text, chosen by a classifier on its beginning."""
    return {"prompt_router": _baseline(world, "prompt_router")}


def oracle(world: World) -> Results:
    """Every domain with its own expert, known beforehand."""
    return {"oracle": _baseline(world, "oracle")}


def _baseline(world: World, name: str, **options: Any) -> Evaluation:
    from pipelines.baselines import make_baseline, score

    return score(make_baseline(name, world.baselines(plain(world)), **options), world.windows, batch_size=8)


# ---------------------------------------------------------------- experts trained alone


def plain(world: World) -> dict[str, str]:
    """Train every owner's expert alone; references by domain."""
    return world.train("plain")


def _top_k(world: World) -> dict[str, Any]:
    return {"top_k": world.experiment.top_k}


def coterie(world: World) -> Results:
    """Our default: experts trained alone, a router solved from additive statistics, causal context."""
    model = world.compose("coterie", list(plain(world).values()), _top_k(world))
    return {"coterie": measured(world, model)}


def without_each_owner(world: World) -> Results:
    """Our default with each owner left out by request, and the composition that the owner never joined."""
    names = plain(world)
    model = world.compose("coterie", list(names.values()), _top_k(world))
    results = {}
    for domain in names:
        owner = world.owner(domain)
        results[f"coterie-without:{domain}"] = measured(world, model, opt_out=(owner,))
        rest = [name for other, name in names.items() if other != domain]
        never = world.compose(f"never_{domain}", rest, _top_k(world))
        results[f"never-joined:{domain}"] = measured(world, never)
    return results


def ridge(world: World) -> Results:
    """Our default with the router solved by ridge regression."""
    model = world.compose("ridge", list(plain(world).values()), {"scorer": "ridge", **_top_k(world)})
    return {"ridge": measured(world, model)}


def low_rank(world: World) -> Results:
    """Our default with every expert compressed to low rank after its training."""
    from pipelines.experiments.compressed import compressed_experts

    names = compressed_experts(world, plain(world), rank=world.experiment.rank)
    model = world.compose("low_rank", list(names.values()), _top_k(world))
    return {"low_rank": measured(world, model)}


# ---------------------------------------------------------------- the paper's recipe

COORDINATED: Mapping[str, Any] = {"coordination": True, "bias": {"form": "clamp"}, "statistics": True}


def learned_router(world: World, **options: Any) -> dict[str, Any]:
    """Learned rows, token by token, renormalised only where the base's norms need it (the paper does not)."""
    post_norm = world.registry.base(BASE).description.config.get("model_type") == "olmo2"
    router = {"scorer": "learned", "context": "token", "normalize": not post_norm, **_top_k(world)}
    return {**router, "options": options} if options else router


def _learned_arm(world: World, arm: str, names: Mapping[str, str]) -> Results:
    return {arm: measured(world, world.compose(arm, list(names.values()), learned_router(world)))}


def paper(world: World) -> Results:
    """Coordinated experts, rows that start at the domain's mean FFN input, negative bias, no training together.

    The paper starts rows at embeddings of the domain, which is the arm ``paper_embedding``.
    """
    return _learned_arm(world, "paper", world.train("paper", **COORDINATED))


def paper_no_bias(world: World) -> Results:
    """Trained and composed without the negative bias."""
    names = world.train("no-bias", **{**COORDINATED, "bias": False})
    return _learned_arm(world, "paper_no_bias", names)


def paper_no_init(world: World) -> Results:
    """Rows that start at random and no bias (the paper takes one away after the other)."""
    names = world.train("no-init", **{**COORDINATED, "bias": False, "row_init": "random"})
    return _learned_arm(world, "paper_no_init", names)


def paper_no_coordination(world: World) -> Results:
    """Experts trained alone, put together under rows that are the means of their domains."""
    from pipelines.experiments.rows import experts_with_rows

    names = experts_with_rows(world, "rows", plain(world), init="mean")
    return _learned_arm(world, "paper_no_coordination", names)
