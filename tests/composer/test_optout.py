"""What a request may say about owners."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from composer.optout import allowed_experts, check_owners, owner_names, owners_per_row
from experts.errors import CoterieError, OptOutError, UnknownNameError

KNOWN = ("acme", "bob", "zoe")


def _refused(call: Callable[[], Any], error: type[CoterieError] = OptOutError) -> str:
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    return str(caught.value)


def test_one_set_or_one_per_row() -> None:
    everyone = frozenset({"acme", "zoe"})
    assert owners_per_row({"acme", "zoe"}, batch=2, known=KNOWN) == [everyone, everyone]
    assert owners_per_row(["acme", "zoe"], batch=2, known=KNOWN) == [everyone, everyone]
    assert owners_per_row([{"acme"}, []], batch=2, known=KNOWN) == [frozenset({"acme"}), frozenset()]
    assert owners_per_row((), batch=2, known=KNOWN) == [frozenset(), frozenset()]


def test_masks_follow_the_order_of_experts() -> None:
    owners = ["acme", "acme", "bob", "zoe"]
    mask = allowed_experts([{"acme"}, {"zoe"}, ()], batch=3, owners=owners, known=KNOWN)
    assert mask.tolist() == [
        [True, False, False, True, True],
        [True, True, True, True, False],
        [True] * 5,
    ]


def test_mistakes() -> None:
    assert _refused(lambda: owners_per_row("acme", batch=1, known=KNOWN)) == (
        "opt_out is the string 'acme'. Write {'acme'} for every row or a list with one set per row."
    )
    assert _refused(lambda: owners_per_row([{"acme"}, set()], batch=3, known=KNOWN)) == (
        "opt_out has 2 entries for 3 rows. Give one collection of owner names per row, or one set of names for the "
        "whole batch."
    )
    assert _refused(lambda: owners_per_row([{"acme"}, "bob"], batch=2, known=KNOWN)) == (
        "opt_out has 2 entries for 2 rows. Give one collection of owner names per row, or one set of names for the "
        "whole batch."
    )
    unknown = "Unknown owner 'acne'. Did you mean 'acme'? Known: acme, bob, zoe."
    assert _refused(lambda: check_owners(["bob", "acne"], KNOWN), UnknownNameError) == unknown
    assert (
        _refused(lambda: owners_per_row([set(), {"acne"}], batch=2, known=KNOWN), UnknownNameError) == unknown
    )


def test_mistakes_at_the_model(pico: Any) -> None:
    model, ids = pico.loaded(), pico.prompts(rows=2)
    assert _refused(lambda: model(ids, opt_out={"acne"}), UnknownNameError) == (
        "Unknown owner 'acne'. Did you mean 'acme'? Known: acme, bob, zoe."
    )
    assert _refused(lambda: model.generate(ids, opt_out=[{"acme"}], max_new_tokens=1)) == (
        "opt_out has 1 entries for 2 rows. Give one collection of owner names per row, or one set of names for the "
        "whole batch."
    )
    mask = torch.ones(2, 4, dtype=torch.bool)
    assert (
        _refused(lambda: model(ids, opt_out=(), allowed=mask)) == "Give either opt_out or allowed, not both."
    )
    assert _refused(lambda: model(ids, allowed=mask[:, :3])) == (
        "allowed has shape (2, 3); it must be (batch, experts + 1) = (2, 4), the anchor first."
    )


# What can be read only once


ITERATORS: dict[str, Callable[[], Any]] = {
    "map": lambda: map(str.strip, ["acme"]),
    "generator": lambda: (name for name in ("acme",)),
    "list_iterator": lambda: iter(["acme"]),
}


def _once(kind: str) -> str:
    return (
        f"opt_out is or holds a '{kind}', which is no collection of owner names: what can be read only once leaves "
        "nobody out the next time. Write a set, a list or a tuple."
    )


@pytest.mark.parametrize("kind", ITERATORS)
def test_iterators_are_refused_before_they_are_read(kind: str) -> None:
    given = ITERATORS[kind]()
    for call in (
        lambda: owners_per_row(given, batch=1, known=KNOWN),
        lambda: owners_per_row([given], batch=1, known=KNOWN),
        lambda: allowed_experts(given, batch=2, owners=KNOWN, known=KNOWN),
        lambda: check_owners(given, KNOWN),
        lambda: owner_names(given),
    ):
        assert _refused(call) == _once(kind)
    assert list(given) == ["acme"], "nothing was taken out of it"


def test_other_things_that_are_no_names() -> None:
    assert _refused(lambda: owner_names("acme")) == "opt_out is the string 'acme'. Write {'acme'}."
    assert _refused(lambda: owner_names([{"acme"}])) == (  # type: ignore[list-item]
        "opt_out holds {'acme'}, which is no owner's name. Write one set of names."
    )
    assert _refused(lambda: owner_names(7)) == _once("int")  # type: ignore[arg-type]
    assert _refused(lambda: owners_per_row([None, {"acme"}], batch=2, known=KNOWN)) == _once("NoneType")  # type: ignore[list-item]
    views = {"acme": 1}.keys(), {"acme": 1}, ("acme",), frozenset({"acme"})
    assert [check_owners(view, KNOWN) for view in views] == [{"acme"}] * 4


@pytest.mark.parametrize("kind", ["map", "generator"])
@pytest.mark.parametrize("door", ["forward", "forward, by row", "generate", "load", "export", "baselines"])
def test_no_door_takes_an_iterator(pico: Any, door: str, kind: str) -> None:
    from composer.export.exporting import plan_export
    from composer.loading import load
    from pipelines.baselines.context import BaselineContext

    given, folder, ids = ITERATORS[kind](), pico.composed(), pico.prompts(rows=2)
    doors: dict[str, Callable[[], Any]] = {
        "forward": lambda: pico.loaded()(ids, opt_out=given),
        "forward, by row": lambda: pico.loaded()(ids, opt_out=[given, {"bob"}]),
        "generate": lambda: pico.loaded().generate(ids, opt_out=given, max_new_tokens=1),
        "load": lambda: load(folder, opt_out=given),
        "export": lambda: plan_export(folder, "mixtral", opt_out=given),
        "baselines": lambda: BaselineContext.from_composed(folder, opt_out=given),
    }
    assert _refused(doors[door]) == _once(kind)
