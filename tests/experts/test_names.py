"""Names that results give to the base model are no owners': their weights would be one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from composer.trace import ANCHOR_NAME
from experts.errors import CoterieError
from experts.names import RESERVED_OWNERS, check_expert_name, check_owner_name, parse_reference
from pipelines.retrieval.encoders import open_encoder


@pytest.mark.parametrize("name", ["anchor", "base"])
def test_reserved_names_are_refused(name: str) -> None:
    for given in (
        lambda: check_owner_name(name),
        lambda: check_expert_name(f"{name}/x"),
        lambda: parse_reference(f"{name}/x@1"),
    ):
        with pytest.raises(CoterieError) as caught:
            given()
        assert str(caught.value) == (
            f"'{name}' is no name for an owner: results call the base model so. Reserved: anchor, base. Choose another "
            "name."
        )
    assert check_expert_name(f"acme/{name}") == f"acme/{name}"
    assert check_owner_name(f"{name}s") == f"{name}s"


def test_what_results_call_the_base_is_reserved(pico: Any) -> None:
    _, (route,) = open_encoder(pico.embedder()).routed(["duba"])
    assert {*route.weights, ANCHOR_NAME} == set(RESERVED_OWNERS)


def test_nobody_publishes_under_such_a_name(pico: Any, tmp_path: Path) -> None:
    raw = pico.write_retriever(tmp_path / "raw", seed=1, r=2)
    with pytest.raises(
        CoterieError, match=r"^'base' is no name for an owner: results call the base model so\."
    ):
        pico.pack_retriever(raw, name="base/search")
