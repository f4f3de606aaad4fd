"""The arms of the upcycling comparison: one function each, from a seed's world to a measured model and its cost.

Arms and what they are compared for follow Branch-Attend-Mix (arXiv 2408.08274, tables 2, 4 and 9) and Branch-Train-MiX
(arXiv 2403.07816, table 2). Knows how each arm differs from the others; training and composing are done elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from experts.plugins import PluginTable
from pipelines.experiments.upcycling.compute import TRAINING, Shape, flops_per_token
from pipelines.experiments.upcycling.world import COPIES, UpcyclingWorld

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pipelines.evaluate import Evaluation

__all__ = ["ARMS", "Measured"]

_HERE = "pipelines.experiments.upcycling.arms"

ARMS = PluginTable(
    "upcycling arm",
    {
        "seed": f"{_HERE}:seed",
        "expert": f"{_HERE}:single_experts",
        "soup": f"{_HERE}:soup",
        "btm": f"{_HERE}:btm",
        "btx_top1": f"{_HERE}:btx_top1",
        "btx_top2": f"{_HERE}:btx_top2",
        "btx_soft": f"{_HERE}:btx_soft",
        "btx_active_matched": f"{_HERE}:btx_active_matched",
        "bam_own_kv": f"{_HERE}:bam_own_kv",
        "bam_shared_kv": f"{_HERE}:bam_shared_kv",
        "bam_own_kv_equal_compute": f"{_HERE}:bam_own_kv_equal_compute",
        "bam_shared_kv_equal_compute": f"{_HERE}:bam_shared_kv_equal_compute",
        "unrestricted": f"{_HERE}:unrestricted",
    },
)
"""Every arm, in the order of the tables."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What one arm gave.

    Attributes:
        evaluation: On held-out text.
        tokens: Trained on since the seed model, by all owners and in the mixture phase.
        training_flops: Of that training, by `flops_per_token`.
        flops: Of one token, forward.
        parameters: In all.
        owned: Whether its experts are the owners'.
    """

    evaluation: Evaluation
    tokens: int
    training_flops: int
    flops: int
    parameters: int
    owned: bool = True


Results = Mapping[str, Measured]
ArmFunction = Callable[[UpcyclingWorld], Results]


# ---------------------------------------------------------------- dense models


def seed(world: UpcyclingWorld) -> Results:
    """The seed model alone."""
    model = world.anchor()
    return {"seed": _dense(world, _evaluate(world, model), model, owners=0)}


def single_experts(world: UpcyclingWorld) -> Results:
    """Each owner's model alone, on every domain."""
    found = {}
    for domain in world.settings.domains:
        model = world.dense(domain)
        found[f"expert:{domain}"] = _dense(world, _evaluate(world, model), model, owners=1)
    return found


def soup(world: UpcyclingWorld) -> Results:
    """The uniform average of the seed model and the owners': the trunk's rule, for everything."""
    import torch

    states = [model.state_dict() for model in _models(world).values()]
    model = world.anchor()
    model.load_state_dict({name: torch.stack([s[name] for s in states]).mean(0) for name in states[0]})
    return {"soup": _dense(world, _evaluate(world, model), model)}


def btm(world: UpcyclingWorld) -> Results:
    """Branch-Train-Merge (arXiv 2208.03306): all models' probabilities, mixed by their likelihood so far."""
    from torch import nn

    from pipelines.evaluate import measure

    models = _models(world)
    evaluation = measure(nn.Identity(), world.windows, batch_size=8, run=_ensemble(models))
    forward = len(models) * _flops(world, Shape())
    size = sum(_size(model) for model in models.values())
    return {"btm": _cost(world, evaluation, flops=forward, parameters=size, mixture=0)}


def _models(world: UpcyclingWorld) -> dict[str, nn.Module]:
    return {"seed": world.anchor(), **{domain: world.dense(domain) for domain in world.settings.domains}}


def _ensemble(models: Mapping[str, nn.Module]) -> Any:
    import torch

    from pipelines.baselines.btm import log_weights, mix, token_log_likelihoods

    prior = torch.zeros(len(models)).log_softmax(0)

    def run(domain: str, part: slice, ids: Tensor) -> Tensor:
        with torch.inference_mode():
            predicted = [model(input_ids=ids, use_cache=False).logits for model in models.values()]
            likelihoods = torch.stack([token_log_likelihoods(logits, ids[:, 1:]) for logits in predicted])
            return mix(predicted, log_weights(likelihoods, prior), of="probabilities")

    return run


# ---------------------------------------------------------------- mixtures


def _seats(world: UpcyclingWorld) -> int:
    return len(world.settings.domains) + 1


def _btx(world: UpcyclingWorld, arm: str, *, top_k: int, copies: tuple[str, ...] = ()) -> Results:
    """Branch-Train-MiX; with one expert a token, the gate is not renormalised, or it would learn nothing."""
    # however often the seed is an expert, it weighs once in the average
    weights = dict.fromkeys((*copies, "base") if copies else (), 1.0 / (len(copies) + 1))
    names = tuple(world.expert_name(domain) for domain in world.settings.domains)
    model = world.mixture(
        arm,
        recipe="btx",
        router={"top_k": top_k, "normalize": top_k > 1},
        upcycle={"trunk": {"method": "average", "weights": weights}},
        experts=(*names, *copies),
    )
    return {arm: _mixture(world, model, Shape(seats=_seats(world) + len(copies), ffn=top_k))}


def btx_top1(world: UpcyclingWorld) -> Results:
    """One FFN a token, as BAM's paper has it."""
    return _btx(world, "btx_top1", top_k=1)


def btx_top2(world: UpcyclingWorld) -> Results:
    """Two FFNs a token, as BTX's paper has it."""
    return _btx(world, "btx_top2", top_k=2)


def btx_soft(world: UpcyclingWorld) -> Results:
    """All FFNs for every token."""
    return _btx(world, "btx_soft", top_k=_seats(world))


def btx_active_matched(world: UpcyclingWorld) -> Results:
    """As many parameters as BAM with own keys and values, active and in all: two more copies of the seed, top-3.

    That is exact for the paper's shapes, FFNs twice as wide as the states and four models: an attention has
    ``4 d^2`` parameters and an FFN ``6 d^2``.
    """
    return _btx(world, "btx_active_matched", top_k=3, copies=COPIES)


def _bam_shape(world: UpcyclingWorld, kv: str) -> Shape:
    return Shape(seats=_seats(world), ffn=1, attention=_seats(world), shared_kv=kv == "shared")


def _bam(world: UpcyclingWorld, arm: str, *, kv: str, steps: int | None = None) -> Results:
    model = world.mixture(
        arm,
        recipe="bam",
        router={"top_k": 1, "normalize": False},
        upcycle={"attention": {"kv": kv}},
        steps=steps,
    )
    return {arm: _mixture(world, model, _bam_shape(world, kv), steps=steps)}


def bam_own_kv(world: UpcyclingWorld) -> Results:
    """Attention experts with keys and values of their own, soft routing; one FFN a token."""
    return _bam(world, "bam_own_kv", kv="own")


def bam_shared_kv(world: UpcyclingWorld) -> Results:
    """Attention experts that share keys and values, soft routing; one FFN a token."""
    return _bam(world, "bam_shared_kv", kv="shared")


def bam_own_kv_equal_compute(world: UpcyclingWorld) -> Results:
    """The same, trained only as long as BTX top-1 computes."""
    return _bam(world, "bam_own_kv_equal_compute", kv="own", steps=_equal_compute(world, "own"))


def bam_shared_kv_equal_compute(world: UpcyclingWorld) -> Results:
    """The same, trained only as long as BTX top-1 computes."""
    return _bam(world, "bam_shared_kv_equal_compute", kv="shared", steps=_equal_compute(world, "shared"))


def _equal_compute(world: UpcyclingWorld, kv: str) -> int:
    """Return the steps of BAM that cost what the mixture phase costs BTX top-1."""
    ratio = _flops(world, Shape(seats=_seats(world))) / _flops(world, _bam_shape(world, kv))
    return max(1, round(world.settings.mixture.steps * ratio))


def unrestricted(world: UpcyclingWorld) -> Results:
    """Everybody's text in one place from the start: copies of the seed's FFN, trained on as many tokens in all."""
    steps = world.settings.mixture.steps + _owners_tokens(world) // _tokens_per_step(world)
    model = world.mixture(
        "unrestricted",
        recipe="sparse_upcycle",
        router={"top_k": 2, "normalize": True},
        upcycle={"copies": _seats(world)},
        experts=COPIES[:1],
        steps=steps,
    )
    return {"unrestricted": _mixture(world, model, Shape(seats=_seats(world), ffn=2), steps=steps, owners=0)}


# ---------------------------------------------------------------- measuring and counting


def _evaluate(world: UpcyclingWorld, model: nn.Module) -> Evaluation:
    from pipelines.evaluate import measure

    return measure(model, world.windows, batch_size=8)


def _flops(world: UpcyclingWorld, shape: Shape) -> int:
    return flops_per_token(world.settings.anchor, shape, context=world.settings.sequence_length)


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _owners_tokens(world: UpcyclingWorld, owners: int | None = None) -> int:
    budget = world.settings.experts
    count = len(world.settings.domains) if owners is None else owners
    return count * budget.steps * budget.batch_size * world.settings.sequence_length


def _tokens_per_step(world: UpcyclingWorld) -> int:
    return world.settings.mixture.batch_size * world.settings.sequence_length


def _dense(
    world: UpcyclingWorld, evaluation: Evaluation, model: nn.Module, *, owners: int | None = None
) -> Measured:
    flops = _flops(world, Shape())
    return _cost(world, evaluation, flops=flops, parameters=_size(model), mixture=0, owners=owners)


def _mixture(
    world: UpcyclingWorld,
    model: nn.Module,
    shape: Shape,
    *,
    steps: int | None = None,
    owners: int | None = None,
) -> Measured:
    tokens = (steps or world.settings.mixture.steps) * _tokens_per_step(world)
    evaluation = _evaluate(world, model)
    return _cost(
        world,
        evaluation,
        flops=_flops(world, shape),
        parameters=_size(model),
        mixture=tokens,
        owners=owners,
    )


def _cost(
    world: UpcyclingWorld,
    evaluation: Evaluation,
    *,
    flops: int,
    parameters: int,
    mixture: int,
    owners: int | None = None,
) -> Measured:
    before = _owners_tokens(world, owners)
    return Measured(
        evaluation=evaluation,
        tokens=before + mixture,
        owned=owners != 0,
        training_flops=TRAINING * (before * _flops(world, Shape()) + mixture * flops),
        flops=flops,
        parameters=parameters,
    )
