"""Merging one tensor: against mergekit's own table and results, closed forms, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from composer.merge_methods import AVERAGE, COUNTS, METHODS, SWITCHES, merge_problems
from composer.merging import merge_tensors


@pytest.fixture(scope="session")
def mergekit() -> Any:
    """Importing it takes seconds."""
    return pytest.importorskip("mergekit.merge_methods")


@pytest.fixture(scope="module")
def tensors() -> dict[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(6, 8, generator=generator) for name in ("base", "acme/a", "bob/b", "zoe/c")}


def test_table_is_mergekits(mergekit: Any) -> None:
    from mergekit.merge_methods.base import MISSING, BasePolicy, ParameterScope

    specs = {method.spec.name: method.spec for method in mergekit.registered_methods()}
    assert set(METHODS) - {AVERAGE} == set(specs)
    policies = {
        BasePolicy.REQUIRED: "needed",
        BasePolicy.OPTIONAL: "possible",
        BasePolicy.IGNORED: "alike",
    }
    for name, spec in specs.items():
        ours, contract = METHODS[name], spec.contract
        shared = {p.name for p in spec.parameters if p.scope == ParameterScope.SHARED}
        each = {p.name for p in spec.parameters} - shared
        assert (name, ours.base) == (name, policies[contract.base])
        assert (name, ours.weighted) == (name, "weight" in each)
        assert (name, set(ours.settings), set(ours.each)) == (name, shared, each - {"weight"})
        types = {p.name: p.value_type for p in spec.parameters}
        assert {key for key, kind in types.items() if kind is bool} == SWITCHES & types.keys(), name
        assert {key for key, kind in types.items() if kind is int} == COUNTS & types.keys(), name
        missing = {p.name for p in spec.parameters if p.default is MISSING} - {"weight"}
        assert (name, set(ours.needed)) == (name, missing)
        alone = int(ours.base == "needed")  # mergekit counts the base among the inputs
        fewest = max(contract.min_inputs - alone, contract.min_non_base or 0)
        most = contract.max_non_base or (contract.max_inputs and contract.max_inputs - alone)
        assert (name, ours.fewest, ours.most) == (name, max(fewest, 1), most)


@pytest.mark.parametrize("method", sorted(set(METHODS) - {AVERAGE}))
def test_every_method_is_mergekits(method: str, mergekit: Any, tensors: dict[str, Any]) -> None:
    import torch

    found = METHODS[method]
    names = ["acme/a", "bob/b", "zoe/c"][: found.most or 3]
    parameters = {key: 0.3 for key in found.needed}
    base = tensors["base"] if found.base == "needed" else None
    assert merge_problems(method, names, base=base is not None, parameters=parameters) == []
    ours = merge_tensors(
        {n: tensors[n] for n in names}, method=method, base=base, parameters=parameters, name="x"
    )
    from composer.merging import _tensor_seed

    torch.manual_seed(_tensor_seed(0, "x"))
    theirs = mergekit.merge_tensors(
        [*([] if base is None else [base]), *(tensors[n] for n in names)],
        method,
        parameters={**parameters, **({"weight": 1.0} if found.weighted else {})},
        base_index=None if base is None else 0,
    )
    assert torch.equal(ours, theirs)
    assert ours.shape == (6, 8)


def test_what_is_drawn_depends_on_seed_and_name_alone(tensors: dict[str, Any], mergekit: Any) -> None:
    import torch

    def merge(**changes: Any) -> Any:
        wanted = {"method": "dare_linear", "parameters": {"density": 0.5}, "name": "x", "seed": 1, **changes}
        return merge_tensors({"acme/a": tensors["acme/a"]}, base=tensors["base"], **wanted)

    torch.manual_seed(7)
    first, state = merge(), torch.random.get_rng_state()
    torch.manual_seed(8)
    assert torch.equal(first, merge())
    assert not torch.equal(first, merge(name="y"))
    assert not torch.equal(first, merge(seed=2))
    torch.manual_seed(7)
    assert torch.equal(state, torch.random.get_rng_state())  # nobody else's draws are disturbed


def test_mean(tensors: dict[str, Any]) -> None:
    import torch

    a, b, base = tensors["acme/a"], tensors["bob/b"], tensors["base"]
    pair = {"acme/a": a, "bob/b": b}
    assert torch.equal(merge_tensors(pair, method=AVERAGE, name="x"), (a + b) / 2)
    assert torch.equal(merge_tensors(pair, method=AVERAGE, base=base, name="x"), (base + a + b) / 3)
    weighted = merge_tensors(pair, method=AVERAGE, base=base, weights={"base": 0, "bob/b": 3}, name="x")
    assert torch.equal(weighted, (a + 3 * b) / 4)
    halves = {name: tensor.bfloat16() for name, tensor in pair.items()}
    assert merge_tensors(halves, method=AVERAGE, name="x").dtype == torch.float32


def test_a_model_of_weight_zero_is_not_touched(tensors: dict[str, Any]) -> None:
    import torch

    poisoned = {"acme/a": tensors["acme/a"], "bob/b": torch.full((6, 8), float("nan"))}
    merged = merge_tensors(poisoned, method=AVERAGE, weights={"bob/b": 0.0}, name="x")
    assert torch.equal(merged, tensors["acme/a"])


def test_settings_of_each_model(tensors: dict[str, Any], mergekit: Any) -> None:
    import torch

    pair = {name: tensors[name] for name in ("acme/a", "bob/b")}
    ours = merge_tensors(
        pair, method="ties", base=tensors["base"], parameters={"density": {"bob/b": 0.5}}, name="x"
    )
    theirs = mergekit.merge_tensors(
        [tensors["base"], *pair.values()],
        "ties",
        parameters={"density": [1.0, 0.5], "weight": 1.0},
        base_index=0,
    )
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("arguments", "problems"),
    [
        ({"method": "tise"}, ["Unknown merge method 'tise'. Did you mean 'ties'? Known: "]),
        (
            {"parameters": {"densty": 0.5}},
            ["parameters: method 'ties' has no 'densty'; did you mean 'density'?"],
        ),
        (
            {"parameters": {"q": 0.5}},
            [
                "parameters: method 'ties' has no 'q'; allowed are density, int8_mask, lambda, normalize, rescale",
            ],
        ),
        (
            {"parameters": {"weight": 0.5}},
            ["parameters: method 'ties' has no 'weight' (give the models' weights under 'weights')"],
        ),
        (
            {"method": "arcee_fusion", "parameters": {"q": 1}},
            [
                "method 'arcee_fusion' merges exactly 1 models beside the base; 2 given",
                "parameters: method 'arcee_fusion' has no 'q'; it has none",
            ],
        ),
        ({"base": False}, ["method 'ties' merges differences to the base, which is left out"]),
        (
            {"method": "slerp", "models": ["acme/a"]},
            ["parameters: method 'slerp' needs 't'"],
        ),
        (
            {"method": "sce", "weights": {"acme/a": 1.0}},
            ["weights: method 'sce' has none; leave them out"],
        ),
        (
            {"weights": {"acme/b": 1.0, "base": 1.0}},
            [
                "weights: Unknown model 'acme/b'. Did you mean 'acme/a'? Known: acme/a, bob/b.",
                "weights: Unknown model 'base'. Known: acme/a, bob/b.",
            ],
        ),
        (
            {"weights": {"acme/a": float("inf")}},
            ["weights: acme/a has inf; a finite number is needed"],
        ),
        (
            {"method": "average", "base": False, "weights": {"acme/a": 1.0, "bob/b": -1.0}},
            ["weights: they sum to 0; their mean is not defined"],
        ),
        (
            {"parameters": {"density": "x", "lambda": float("nan"), "normalize": 1, "rescale": "yes"}},
            [
                "parameters: 'density' is 'x'; a number is needed",
                "parameters: 'lambda' is nan; a finite number is needed",
                "parameters: 'normalize' is 1; true or false is needed",
                "parameters: 'rescale' is 'yes'; true or false is needed",
            ],
        ),
        (
            {"parameters": {"density": {"acme/a": -0.5, "bob/b": True}}},
            [
                "parameters.density: 'acme/a' is -0.5; a number above 0 and at most 1 is needed",
                "parameters.density: 'bob/b' is True; a number is needed",
            ],
        ),
        (
            {"method": "average", "weights": {"acme/a": -1.0, "bob/b": 0.0}},
            ["weights: they sum to 0; their mean is not defined"],
        ),
        (
            {"method": "multislerp", "base": False, "weights": {"acme/a": 1.0, "bob/b": -1.0}},
            ["weights: they sum to 0; their mean is not defined"],
        ),
        (
            {
                "method": "linear",
                "base": False,
                "weights": {"acme/a": 1.0, "bob/b": -1.0},
                "parameters": {"normalize": False},
            },
            [],
        ),
        ({"weights": {"acme/a": 1.0, "bob/b": -1.0}}, []),
        (
            {"method": "della", "parameters": {"density": 0.5, "epsilon": 0.9}},
            [
                "parameters: method 'della' has density 0.5 and epsilon 0.9; density - epsilon must be above 0 and "
                "density + epsilon below 1, unless density is 1"
            ],
        ),
        (
            {"method": "della_linear", "parameters": {"density": {"bob/b": 0.9}}},
            [
                "parameters: method 'della_linear' has density 0.9 and epsilon 0.15 for bob/b; density - epsilon must "
                "be above 0 and density + epsilon below 1, unless density is 1"
            ],
        ),
        (
            {"method": "della", "parameters": {"epsilon": {"acme/a": -0.1}}},
            ["parameters.epsilon: 'acme/a' is -0.1; a number of at least 0 is needed"],
        ),
        (
            {"method": "breadcrumbs", "parameters": {"density": 0.5, "gamma": 2}},
            ["parameters: 'gamma' is 2; a number from 0 to 1 is needed"],
        ),
        (
            {"method": "ramplus_tl", "parameters": {"epsilon": 0, "alpha": -1, "r": -1}},
            [
                "parameters: 'epsilon' is 0; a number above 0 is needed",
                "parameters: 'alpha' is -1; a number of at least 0 is needed",
            ],
        ),
        (
            {"method": "nearswap", "models": ["acme/a"], "parameters": {"t": -0.1}},
            ["parameters: 't' is -0.1; a number of at least 0 is needed"],
        ),
        (
            {"method": "multislerp", "parameters": {"eps": 0.0}},
            ["parameters: 'eps' is 0.0; a number above 0 is needed"],
        ),
        (
            {"method": "karcher", "parameters": {"tol": 0.0}},
            ["parameters: 'tol' is 0.0; a number above 0 is needed"],
        ),
        (
            {"method": "karcher", "parameters": {"max_iter": 0, "tol": True}},
            [
                "parameters: 'max_iter' is 0; a whole number above 0 is needed",
                "parameters: 'tol' is True; a number is needed",
            ],
        ),
        (
            {"parameters": {"lambda": {"acme/a": 1.0}, "density": {"acme/x": 1.0}}},
            [
                "parameters: 'lambda' of method 'ties' is one value for all models",
                "parameters.density: Unknown model 'acme/x'. Did you mean 'acme/a'? Known: acme/a, bob/b.",
            ],
        ),
    ],
)
def test_refusals(arguments: dict[str, Any], problems: list[str]) -> None:
    wanted = {"method": "ties", "models": ["acme/a", "bob/b"], **arguments}
    found = merge_problems(wanted.pop("method"), wanted.pop("models"), **wanted)
    assert [text[: len(start)] for text, start in zip(found, problems, strict=True)] == problems


SETTINGS = [
    *(
        ("della", {"density": density, "epsilon": epsilon})
        for density in (0.05, 0.25, 0.5, 0.85, 0.9, 1.0)
        for epsilon in (0.0, 0.05, 0.1, 0.15, 0.5, 0.9)
    ),
    *(("della_linear", {"density": density}) for density in (0.1, 0.15, 0.5, 0.84, 0.85, 0.9)),
    *(("karcher", {"tol": tol}) for tol in (-1.0, 0.0, 1e-9)),
    *(("ramplus_tl", {"epsilon": epsilon}) for epsilon in (0, 0.5)),
    *(("multislerp", {"eps": eps}) for eps in (0.0, 1e-9)),
]


@pytest.mark.parametrize(
    ("method", "parameters"), SETTINGS, ids=lambda value: "-".join(map(str, getattr(value, "values", str)()))
)
def test_what_mergekit_cannot_use_is_refused_and_nothing_else(
    method: str, parameters: dict[str, float], mergekit: Any
) -> None:
    """mergekit itself says which settings it merges by: it raises, or gives what is no number, on some tensor."""
    import torch

    generator = torch.Generator().manual_seed(0)
    random = [torch.randn(6, 8, generator=generator) for _ in range(3)]
    kinds = [random, [random[0]] * 3, [random[0], torch.zeros(6, 8), random[1]]]
    needed = METHODS[method].base == "needed"
    weight = {"weight": 1.0} if METHODS[method].weighted else {}

    def works(tensors: Any) -> bool:
        try:
            merged = mergekit.merge_tensors(
                tensors, method, parameters={**weight, **parameters}, base_index=0 if needed else None
            )
        except (ValueError, RuntimeError):
            return False
        return bool(merged.isfinite().all())

    problems = merge_problems(method, ["acme/a", "bob/b"], base=needed, parameters=parameters)
    assert (problems == []) == all(works(tensors) for tensors in kinds), problems


def test_default_of_epsilon_is_mergekits(mergekit: Any) -> None:
    from composer.merge_methods import _DENSITY, _EPSILON

    defaults = {spec.name: spec.default for spec in mergekit.get("della").spec.parameters}
    assert (defaults["density"], defaults["epsilon"]) == (_DENSITY, _EPSILON)


def test_values_that_a_method_cannot_merge_are_bad_input(mergekit: Any) -> None:
    """Three directions that balance out: no setting tells, so no plan could."""
    import torch

    from experts.errors import BuildError

    third = 3**0.5 / 2
    directions = torch.tensor([[1.0, 0.0], [-0.5, third], [-0.5, -third]])
    with pytest.raises(BuildError) as caught:
        merge_tensors(dict(zip("abc", directions, strict=True)), method="multislerp", name="norm.weight")
    assert str(caught.value).startswith(
        "Method 'multislerp' cannot merge 'norm.weight': The weighted sum of the input tensors is zero."
    )
    assert caught.value.exit_code == 2
