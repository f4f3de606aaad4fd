"""Leaving an owner out gives the model they never joined, through every door."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from composer.loading import load
from composer.lock import Lock
from composer.members import Members
from composer.trace import RoutingTrace
from experts.errors import ExpertWarning

TOLERANCE = 1e-5


def _passes(model: Any, ids: torch.Tensor, **settings: Any) -> torch.Tensor:
    """Logits of one pass, and of a pass whose last tokens go through the cache."""
    with torch.inference_mode():
        whole = model(ids, use_cache=False, **settings).logits
        out = model(ids[:, :-3], use_cache=True, **settings)
        steps = [out.logits]
        for position in range(ids.shape[1] - 3, ids.shape[1]):
            one = ids[:, position : position + 1]
            out = model(one, past_key_values=out.past_key_values, use_cache=True, **settings)
            steps.append(out.logits)
    return torch.stack([whole, torch.cat(steps, dim=1)])


def test_the_prompts_use_everybody(model: Any, ids: torch.Tensor) -> None:
    """Without this the other tests would prove nothing."""
    with RoutingTrace(model) as trace, torch.inference_mode():
        model(ids)
    assert all(share > 0.005 for share in trace.mass().values()), trace.mass()


def test_u1_request_door_equals_never_joined(
    model: Any, never: Any, absent: str, ids: torch.Tensor, pico: Any
) -> None:
    """Rows that leave the owner out stand between rows that do not (F14)."""
    batch = torch.cat([ids, pico.prompts(seed=1)])
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(0))
    opt_out = [{absent} if row < len(ids) else set() for row in order.tolist()]
    got = _passes(model, batch[order], opt_out=opt_out)
    back = got[:, torch.argsort(order)]
    torch.testing.assert_close(back[:, : len(ids)], _passes(never, ids), rtol=0, atol=TOLERANCE)
    # the other rows had everybody, and were not touched either
    whole = _passes(model, pico.prompts(seed=1))
    torch.testing.assert_close(back[:, len(ids) :], whole, rtol=0, atol=TOLERANCE)
    assert (whole - _passes(model, pico.prompts(seed=1), opt_out={absent})).abs().max() > 100 * TOLERANCE


def test_u1_load_door_equals_never_joined_bit_for_bit(
    left: Any, never: Any, absent: str, ids: torch.Tensor
) -> None:
    assert absent not in left.owners
    assert torch.equal(_passes(left, ids), _passes(never, ids))


def test_u1_build_door_equals_never_joined_bit_for_bit(
    pico: Any, case: Any, never: Any, absent: str, ids: torch.Tensor
) -> None:
    folder = pico.composed(**case.settings, opt_out=(absent,))
    assert absent not in Lock.read(folder).owners
    assert torch.equal(_passes(load(folder), ids), _passes(never, ids))


def test_u2_nan_of_an_absent_owner_changes_no_bit(
    model: Any, poison: Callable[[str], Any], absent: str, ids: torch.Tensor
) -> None:
    """F4: what is left out is not even multiplied by zero."""
    poisoned = poison(absent)
    everybody = poisoned(ids).logits
    assert everybody.isnan().any(), "the poison is not where the model looks"
    got = _passes(poisoned, ids, opt_out={absent})
    assert got.isfinite().all()
    assert torch.equal(got, _passes(model, ids, opt_out={absent}))


def test_u2_nan_stays_in_the_rows_that_allow_it(
    model: Any, poison: Callable[[str], Any], absent: str, ids: torch.Tensor
) -> None:
    opt_out = [{absent}, set(), {absent}, set()]
    got = _passes(poison(absent), ids, opt_out=opt_out)[:, ::2]
    assert got.isfinite().all()
    torch.testing.assert_close(got, _passes(model, ids, opt_out=opt_out)[:, ::2], rtol=0, atol=TOLERANCE)


def test_u10_nothing_of_an_absent_owner_is_reachable(
    pico: Any, case: Any, model: Any, left: Any, absent: str
) -> None:
    folder = pico.composed(**case.settings)
    lock = Lock.read(folder)
    theirs = _vectors_of(folder, lock, absent)
    assert theirs & _vectors(model), "the search does not find what is there"
    assert not theirs & _vectors(left)
    kept = lock.without({absent})
    assert absent not in kept.owners
    assert all(absent not in owners for owners in kept.lineage.values())
    assert set(lock.lineage) - set(kept.lineage) == {
        path for path, owners in lock.lineage.items() if absent in owners
    }


def test_u12_nobody_left_is_the_base_bit_for_bit(pico: Any, case: Any, model: Any, ids: torch.Tensor) -> None:
    """F5, through both doors."""
    with torch.inference_mode():
        expected = pico.dense(case.family)(ids).logits
    everybody = set(pico.owners)
    assert torch.equal(model(ids, opt_out=everybody).logits, expected)
    assert torch.equal(load(pico.composed(**case.settings), opt_out=everybody)(ids).logits, expected)
    # also as rows among others; a batch of another size takes other kernels
    mixed = model(torch.cat([ids, ids]), opt_out=[everybody] * len(ids) + [set()] * len(ids)).logits
    torch.testing.assert_close(mixed[: len(ids)], expected, rtol=0, atol=TOLERANCE)


def test_u12_experts_that_change_nothing_give_the_base(
    pico: Any, neutral: Any, case: Any, ids: torch.Tensor
) -> None:
    """F9: adapters with B = 0 and copies of the base's FFN, under any router whose weights sum to 1."""
    router = {**case.router, "normalize": True}
    if (
        "top_k" in router
    ):  # two experts are listed, and a manifest may not ask for more than them and the anchor
        router["top_k"] = min(router["top_k"], 3)
    names = {
        "low_rank": ("acme/zero", "bob/zero"),
        "stacked": ("acme/copy", "bob/copy"),
        "dense": ("acme/whole", "bob/whole"),
    }
    experts = names.get(case.block, ("acme/zero", "bob/copy"))
    manifest = pico.manifest(
        family=case.family, recipe=case.recipe, experts=experts, upcycle=case.upcycle, **router
    )
    model = load(pico.compose(manifest, registry=neutral(case.family, case.block)))
    with torch.inference_mode():
        torch.testing.assert_close(
            model(ids).logits, pico.dense(case.family)(ids).logits, rtol=0, atol=TOLERANCE
        )


@pytest.fixture(scope="module")
def neutral(pico: Any) -> Callable[[str, str], Any]:
    """A family's registry with experts that change nothing, of the kind that a block is made of."""

    def fill(family: str) -> Any:
        registry = pico.fresh_library(family)
        for owner, seed, layers in (("acme", 1, (1, 2, 3)), ("bob", 2, (2, 3))):
            artifacts = pico.artifacts(family=family, seed=seed, layers=layers)
            raw = {
                "zero": pico.write_lora(
                    pico.scratch("raw"),
                    family=family,
                    seed=9,
                    r=2,
                    layers_to_transform=list(layers),
                    zero=True,
                ),
                "copy": pico.write_ffn(pico.scratch("raw"), family=family, seed=9, layers=layers, copy=True),
            }
            for name, folder in raw.items():
                package = pico.pack(folder, name=f"{owner}/{name}", family=family, artifacts=artifacts)
                registry.register(package)
        return registry

    def fill_dense(family: str) -> Any:
        registry = pico.fresh_dense_library(family)
        for owner, seed in (("acme", 1), ("bob", 2)):
            artifacts = pico.artifacts(family=family, seed=seed, layers=range(4), gate_layer=0, inputs=True)
            raw = pico.write_dense(pico.scratch("raw"), family=family, seed=0)
            with pytest.warns(ExpertWarning, match="byte for byte the base's"):
                package = pico.pack(raw, name=f"{owner}/whole", family=family, artifacts=artifacts)
            registry.register(package)
        return registry

    def registry_for(family: str, block: str) -> Any:
        make = fill_dense if block == "dense" else fill
        return pico.once(lambda: make(family), "neutral", family, block == "dense")

    return registry_for


def _rows(tensor: Any) -> Iterator[bytes]:
    """The bytes of every vector along the last dimension, but those that are all alike."""
    array = np.asarray(tensor.detach().numpy() if isinstance(tensor, torch.Tensor) else tensor)
    if array.ndim and array.shape[-1] >= 8:
        for row in array.reshape(-1, array.shape[-1]):
            if (row != row[0]).any():
                yield row.tobytes()


def _vectors_of(folder: Any, lock: Lock, owner: str) -> set[bytes]:
    """Every vector that the owner published into a composed folder."""
    from safetensors.numpy import load_file

    found: set[bytes] = set()
    for member in Members.open(folder, lock, without=set(lock.owners) - {owner}).experts:
        for path in member.folder.glob("*.safetensors"):
            for array in load_file(path).values():
                found.update(_rows(array))
    return found


def _vectors(model: nn.Module) -> set[bytes]:
    """Every vector that can be reached from a model through modules, containers and objects."""
    found: set[bytes] = set()
    seen: set[int] = set()
    open_ends: list[Any] = [model]
    while open_ends:
        item = open_ends.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor | np.ndarray):
            found.update(_rows(item))
        elif isinstance(item, dict):
            open_ends.extend(item.values())
        elif isinstance(item, list | tuple | set | frozenset):
            open_ends.extend(item)
        else:
            open_ends.extend(vars(item).values() if hasattr(item, "__dict__") else ())
            for name in getattr(type(item), "__slots__", ()):
                open_ends.append(getattr(item, name, None))
            for cell in getattr(item, "__closure__", None) or ():
                open_ends.append(cell.cell_contents)
    return found
