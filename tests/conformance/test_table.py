"""No plug-in without a row: whatever is registered is in the table, and every row is in a case."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from itertools import combinations, product
from typing import Any

from torch import nn

import composer.blocks
from composer.layers.moe import MoELayer
from composer.recipes import RECIPES
from composer.routing.contexts import CONTEXTS
from composer.routing.scorers import SCORERS
from composer.routing.selectors import SELECTORS


def test_every_registered_plug_in_has_a_row(table: dict[str, Any]) -> None:
    assert {*table["scorers"], *table["made otherwise"]} == set(SCORERS)
    assert set(table["selectors"]) == set(SELECTORS)
    assert {*table["recipes"], *table["elsewhere"]} == set(RECIPES)
    assert set(table["contexts"]) == set(CONTEXTS)


def test_every_row_is_in_a_case(table: dict[str, Any]) -> None:
    assert {case.scorer for case in table["cases"]} == {*table["scorers"], *table["made otherwise"]}
    for kind, key in {"selectors": "selector", "contexts": "context"}.items():
        assert {case.router[key] for case in table["cases"]} == set(table[kind])
    assert {case.block for case in table["cases"]} == {*table["blocks"], "dense"}
    assert {case.recipe for case in table["cases"]} == set(table["recipes"])


def test_any_two_rows_of_different_kinds_meet_in_a_case(table: dict[str, Any]) -> None:
    kinds = ("scorers", "selectors", "contexts", "blocks")
    found = {
        pair
        for case in table["cases"]
        for pair in combinations(
            (case.router["scorer"], case.router["selector"], case.router["context"], case.block), 2
        )
    }
    for one, other in combinations(kinds, 2):
        assert set(product(table[one], table[other])) <= found


def test_every_family_is_in_a_case(table: dict[str, Any], pico: Any) -> None:
    assert {case.family for case in table["cases"]} == set(pico.families)


def test_every_expert_block_is_in_a_case(table: dict[str, Any], pico: Any) -> None:
    """A block is a module of `composer.blocks` that is called with indices and weights."""
    blocks = {
        cls
        for info in pkgutil.iter_modules(composer.blocks.__path__, "composer.blocks.")
        for cls in vars(importlib.import_module(info.name)).values()
        if inspect.isclass(cls)
        and issubclass(cls, nn.Module)
        and {"indices", "weights"} <= set(inspect.signature(cls.forward).parameters)
    }
    used = set()
    for block in table["blocks"]:
        model = pico.loaded(block)
        used |= {type(module.experts) for module in model.modules() if isinstance(module, MoELayer)}
    assert used == blocks
