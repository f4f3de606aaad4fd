"""The table behind the suite: one row per plug-in, and the cases that the rows are combined into.

A new scorer, selector, block kind or recipe gets every test of this folder from one row here; a registered plug-in
without a row fails `test_table.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import combinations, product
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import torch

    from composer.model import ComposedForCausalLM

NAN = float("nan")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One plug-in.

    Attributes:
        poison: ``(plug-in, position)``: fill everything an expert put into it with NaN. A scorer is given the
            expert's id, a block its local index. None where the plug-in holds nothing of an expert's.
        router: Settings that the plug-in needs in the manifest's ``router``.
        same_shapes: Whether products have the same shapes whatever the tokens are, if ``top_k`` is everybody.
    """

    poison: Callable[[Any, int], None] | None = None
    router: Mapping[str, Any] = field(default_factory=dict)
    same_shapes: bool = True


def _poison_statistics(scorer: Any, expert: int) -> None:
    from experts.routing_artifacts import Statistics

    known = scorer.statistics[expert]
    scorer.statistics[expert] = Statistics(count=NAN, sum=known.sum * NAN, scatter=known.scatter * NAN)
    scorer._solved.clear()


def _poison_learned(scorer: Any, expert: int) -> None:
    scorer.rows.data[scorer.position[expert]] = NAN
    scorer.bias.data[scorer.position[expert]] = NAN


def _poison_random(scorer: Any, expert: int) -> None:
    scorer.rows.data[scorer.position[expert]] = NAN


def _poison_low_rank(block: Any, local: int) -> None:
    for parameter in block.experts[local - 1].parameters():
        parameter.data.fill_(NAN)


def _poison_stacked(block: Any, local: int) -> None:
    for parameter in block.parameters():
        parameter.data[local] = NAN


def _poison_attention(layer: Any, expert: int) -> None:
    from composer.layers.moa import RowWise

    for module in layer.experts[expert].modules():  # what is shared is the trunk's
        if isinstance(module, RowWise):
            for parameter in module.parameters():
                parameter.data.fill_(NAN)


def _poison_mixed(block: Any, local: int) -> None:
    if not hasattr(block, "first_full"):  # on a layer whose experts are of one kind
        (_poison_low_rank if hasattr(block, "anchor") else _poison_stacked)(block, local)
    elif local < block.first_full:
        _poison_low_rank(block.low_rank, local)
    else:
        _poison_stacked(block.stacked, local - block.first_full)


SCORERS = {
    "lda": Row(poison=_poison_statistics),
    "learned": Row(poison=_poison_learned),
    "ridge": Row(poison=_poison_statistics),
}
MADE_OTHERWISE = {
    "dume": Row(poison=_poison_statistics),
    "prompts": Row(poison=_poison_random),
    "random": Row(poison=_poison_random),
}
"""Scorers that differ from a row above in what they are made of only; each is in a case of the upcycling recipes."""
SELECTORS = {"topk": Row(), "topp": Row(router={"top_k": 3}, same_shapes=False)}
CONTEXTS = {"prompt_mean": Row(router={"token_weight": 0.25}), "running_mean": Row(), "token": Row()}
BLOCKS = {
    "low_rank": Row(poison=_poison_low_rank),
    "stacked": Row(poison=_poison_stacked),
    # a mixed layer groups tokens by the rank of their full expert
    "mixed": Row(poison=_poison_mixed, same_shapes=False),
}
RECIPES = {"flexolmo": Row()}
"""Recipes that take experts of the pico registries; each is combined with every other row."""
UPCYCLING = {"btx": Row(), "bam": Row()}
"""Recipes that take whole models; with a frozen trunk, so that leaving out is exact."""
ELSEWHERE = {
    "merge": "it makes one dense model, which routes nothing",
    "soup": "it makes one dense model, which routes nothing",
    "router_retriever": "it ranks documents and has no logits",
    "sparse_upcycle": "one owner's model is all of it, so nobody is left when that owner leaves",
}
"""Recipes that the properties here do not apply to, and why; they have tests of their own."""

OTHER_FAMILIES = ("qwen3", "olmo2", "gemma3_text", "gpt_neox", "phi3")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One composition that every property must hold for.

    Attributes:
        absent: The owners that are left out, one at a time, where a test leaves one out.
        router: The manifest's ``router``.
    """

    recipe: str
    family: str
    block: str
    scorer: str
    absent: tuple[str, ...]
    router: Mapping[str, Any]
    upcycle: Mapping[str, Any] | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments of the pico fixtures."""
        upcycle = {} if self.upcycle is None else {"upcycle": dict(self.upcycle)}
        return {
            "block": self.block,
            "family": self.family,
            "recipe": self.recipe,
            **upcycle,
            **self.router,
        }

    def __str__(self) -> str:
        names = [self.recipe, self.family, self.block, *(str(v) for v in self.router.values())]
        return "-".join(
            [*names, *(["own" if "own" in str(self.upcycle) else "shared"] if self.upcycle else [])]
        )


def _router(scorer: str, selector: str, context: str, **more: Any) -> dict[str, Any]:
    own = {**SCORERS[scorer].router, **SELECTORS[selector].router, **CONTEXTS[context].router}
    return {"scorer": scorer, "selector": selector, "context": context, **own, **more}


def _pairwise(*kinds: Iterable[str]) -> list[tuple[str, ...]]:
    """Few combinations in which any two plug-ins of different kinds meet: most failures take no more than two."""
    everything = list(product(*kinds))
    pairs = {row: set(combinations(enumerate(row), 2)) for row in everything}
    left = set().union(*pairs.values())
    chosen = []
    while left:
        best = max(everything, key=lambda row: len(pairs[row] & left))
        left -= pairs[best]
        chosen.append(best)
    return chosen


def _cases() -> list[Case]:
    """Every pair of plug-ins on one family; the blocks' parts on every other family, with settings in turn."""
    cases = []
    owners = ("acme", "bob", "zoe")
    rows = _pairwise(RECIPES, BLOCKS, SCORERS, SELECTORS, CONTEXTS)
    for i, (recipe, block, scorer, selector, context) in enumerate(rows):
        router = _router(scorer, selector, context)
        cases.append(
            Case(
                recipe=recipe,
                family="llama",
                block=block,
                scorer=scorer,
                absent=owners if context == "running_mean" and block != "mixed" else (owners[i % 3],),
                router=router,
            )
        )
    scorers, selectors, contexts = list(SCORERS), list(SELECTORS), list(CONTEXTS)
    for recipe in RECIPES:
        pairs = [
            (family, block)
            for family, block in product(OTHER_FAMILIES, BLOCKS)
            if block != "mixed" or family == "gpt_neox"  # it has biases, which a mixed layer must weigh
        ]
        for i, (family, block) in enumerate(pairs):
            router = _router(
                scorers[(i + i // 2) % len(scorers)],
                selectors[i % len(selectors)],
                contexts[(i // 2) % len(contexts)],
            )
            router["top_k"] = 1 + i % 4
            if family == "olmo2":  # its FFN's output is normed, so it alone can do without
                router["normalize"] = False
            cases.append(
                Case(
                    recipe=recipe,
                    family=family,
                    block=block,
                    scorer=router["scorer"],
                    absent=(owners[i % 3],),
                    router=router,
                )
            )
    return cases


def _upcycled() -> list[Case]:
    """FFN experts, attention experts of either kind, a router per layer and a router for the whole model."""
    frozen = {"trunk": "frozen"}
    own = {**frozen, "attention": {"kv": "own"}}
    plain = {"context": "token", "top_k": 2, "normalize": True, "selector": "topk"}
    solved = {"scorer": "dume", "context": "running_mean", "top_k": 3, "normalize": True, "selector": "topp"}
    rows = [
        ("btx", "llama", "acme", {"scorer": "prompts", **plain}, frozen),
        ("bam", "llama", "bob", {"scorer": "random", **plain}, own),
        ("bam", "qwen3", "zoe", solved, frozen),
    ]
    return [
        Case(
            recipe=recipe,
            family=family,
            block="dense",
            scorer=router["scorer"],
            absent=(absent,),
            router=router,
            upcycle=upcycle,
        )
        for recipe, family, absent, router, upcycle in rows
    ]


CASES = [*_cases(), *_upcycled()]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give every test that asks for a ``case`` all of them; with ``absent``, each owner in turn."""
    names = metafunc.fixturenames
    if "same_shapes" in names:
        rows = [
            (case, BLOCKS[case.block], SELECTORS[case.router["selector"]])
            for case in CASES
            if case.upcycle is None
        ]
        cases = [c for c, *rest in rows if c.family == "llama" and all(row.same_shapes for row in rest)]
        metafunc.parametrize("same_shapes", cases, ids=str)
    if "case" not in names:
        return
    if "absent" in names:
        pairs = [(case, owner) for case in CASES for owner in case.absent]
        metafunc.parametrize(("case", "absent"), pairs, ids=[f"{c}-{o}" for c, o in pairs])
    else:
        metafunc.parametrize("case", CASES, ids=str)


@pytest.fixture(scope="session")
def table() -> dict[str, Any]:
    """The rows by kind of plug-in, and the cases."""
    return {
        "scorers": SCORERS,
        "made otherwise": MADE_OTHERWISE,
        "selectors": SELECTORS,
        "contexts": CONTEXTS,
        "blocks": BLOCKS,
        "recipes": {**RECIPES, **UPCYCLING},
        "elsewhere": ELSEWHERE,
        "cases": CASES,
    }


@pytest.fixture
def model(pico: Any, case: Case) -> ComposedForCausalLM:
    """The case's model with every owner, shared."""
    return pico.loaded(**case.settings)


@pytest.fixture
def never(pico: Any, case: Case, absent: str) -> ComposedForCausalLM:
    """The model that ``absent`` never joined: planned and built from a manifest without their name; shared."""
    manifest = pico.manifest(**case.settings)
    kept = [entry.ref for entry in manifest.experts if not entry.ref.startswith(f"{absent}/")]
    top_k = min(
        manifest.router.top_k, len(kept) + 1
    )  # a manifest may not ask for more than it lists and the anchor
    return pico.loaded(**{**case.settings, "top_k": top_k}, experts=kept)


@pytest.fixture
def left(pico: Any, case: Case, absent: str) -> ComposedForCausalLM:
    """The case's model, loaded without ``absent``; shared."""
    from composer.loading import load

    folder = pico.composed(**case.settings)
    return pico.once(lambda: load(folder, opt_out={absent}), "left", folder, absent)


@pytest.fixture
def poison(pico: Any, case: Case) -> Callable[[str], ComposedForCausalLM]:
    """The case's model, loaded anew, with NaN in all that an owner put into it; shared."""

    def make(owner: str) -> ComposedForCausalLM:
        return pico.once(lambda: load(owner), "poisoned", pico.composed(**case.settings), owner)

    def load(owner: str) -> ComposedForCausalLM:
        from composer.layers.moa import MoALayer
        from composer.layers.moe import MoELayer
        from composer.loading import load
        from composer.routing.router import Router

        model = load(pico.composed(**case.settings))
        expert = 1 + model.owners_of_experts.index(owner)
        layers = [m for m in model.modules() if isinstance(m, MoELayer) and expert in m.present]
        routers = [m for m in model.modules() if isinstance(m, Router)]
        assert layers
        assert routers
        for layer in layers:
            row = BLOCKS["stacked" if case.block == "dense" else case.block]
            row.poison(layer.experts, 1 + layer.present.index(expert))
        for attention in (m for m in model.modules() if isinstance(m, MoALayer)):
            _poison_attention(attention, expert)
        for router in routers:
            if router.present is None or expert in router.present:
                {**SCORERS, **MADE_OTHERWISE}[case.scorer].poison(router.scorer, expert)
        return model

    return make


@pytest.fixture
def ids(pico: Any) -> torch.Tensor:
    """Four prompts of 24 tokens: one of each owner's domain and one of public text."""
    return pico.prompts()
