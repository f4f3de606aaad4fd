"""What a request may say about owners."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from composer.optout import allowed_experts, check_owners, owners_per_row
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
