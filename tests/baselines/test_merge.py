"""Merged models: averages by hand, TIES and DARE worked out on paper, and mergekit's own run over checkpoints."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from experts.errors import DataError, ManifestError, UnknownNameError
from pipelines.baselines import make_baseline, write_dense
from pipelines.baselines.merge import merge_tensors, validation_weights


def average(states, weights):
    total = sum(weights)
    return {
        name: sum(w / total * state[name].double() for w, state in zip(weights, states, strict=True)).float()
        for name in states[0]
    }


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_a_soup_is_the_mean_of_the_dense_models(context, by_hand, logits_of, pico, family) -> None:
    """An expert without a layer takes part with the anchor's, as its checkpoint does."""
    given = context(family)
    states = [by_hand(family, given.experts[domain]) for domain in given.domains]
    mean = average(states, [1, 1, 1])
    arm = make_baseline("soup", given)
    for name, tensor in arm.tensors.items():
        torch.testing.assert_close(tensor, mean[name], rtol=0, atol=1e-6)
    untouched = set(mean) - set(arm.tensors)
    assert all(torch.equal(states[0][name], states[1][name]) for name in untouched)
    ids = pico.prompts()
    torch.testing.assert_close(arm.logits(ids), logits_of(family, mean, ids), rtol=0, atol=2e-5)


def test_a_weighted_soup_takes_shares(context, by_hand) -> None:
    given = context()
    states = [by_hand("llama", given.experts[domain]) for domain in given.domains]
    mean = average(states, [1, 3, 0.5])
    arm = make_baseline("weighted_soup", given, weights={"zoe": 0.5, "bob": 3, "acme": 1})
    for name, tensor in arm.tensors.items():
        torch.testing.assert_close(tensor, mean[name], rtol=0, atol=1e-6)


def test_weight_zero_is_not_listing(context, pico) -> None:
    ids = pico.prompts()
    given = context()
    zero = make_baseline("weighted_soup", given, weights={"acme": 1, "bob": 0, "zoe": 1})
    assert torch.equal(zero.logits(ids), make_baseline("soup", given.without("bob")).logits(ids))


def test_validation_weights_are_gains_in_perplexity(context, by_hand, logits_of, pico) -> None:
    given = context()
    states = {domain: by_hand("llama", given.experts[domain]) for domain in given.domains}

    def perplexity(state, ids):
        logits = logits_of("llama", state, ids)
        return float(F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).double().exp())

    own = {domain: pico.domain_tokens(n, rows=3, length=16) for n, domain in enumerate(given.domains, 1)}
    public = pico.domain_tokens(0, rows=3, length=16)
    base = pico.dense("llama").state_dict()
    for validation, temperature in (({"public": public}, 1.0), (own, 0.5)):
        gains = {}
        for domain, state in states.items():
            ids = validation.get(domain, public)
            # on public text the anchor cancels
            alone = 1.0 if "public" in validation else perplexity(base, ids)
            gains[domain] = (alone / perplexity(state, ids)) ** (1 / temperature)
        found = validation_weights(given, validation, temperature=temperature)
        assert found == pytest.approx(
            {domain: gain / sum(gains.values()) for domain, gain in gains.items()}, rel=1e-4
        )
        assert max(found.values()) > 1.03 * min(found.values())
    soup = make_baseline("weighted_soup", given, validation=own, temperature=0.5)
    same = make_baseline("weighted_soup", given, weights=found)
    assert all(torch.equal(tensor, same.tensors[name]) for name, tensor in soup.tensors.items())


class Named:
    """An anchor of one tensor."""

    def __init__(self, **weights):
        self.weights = weights

    def weight(self, name):
        return self.weights[name]


def test_ties_by_hand() -> None:
    """Trim to the two largest of four, elect the sign of the larger sum, average those that agree (2306.01708)."""
    own = torch.tensor([1.0, 1.0, 1.0, 1.0])
    deltas = {"a": [4.0, 3.0, 0.1, -0.2], "b": [2.0, -5.0, 0.3, 0.4]}
    experts = {name: {"w": own + torch.tensor(delta)} for name, delta in deltas.items()}
    merged = merge_tensors(
        Named(w=own),
        experts,
        "ties",
        weights={"a": 1.0, "b": 1.0},
        with_anchor=True,
        density={"a": 0.5, "b": 0.5},
        normalize=True,
        **{"lambda": 0.5},
    )
    # trimmed: a keeps 4 and 3, b keeps 2 and -5; signs: +, -; means: (4 + 2) / 2 and -5; half of both is added
    torch.testing.assert_close(merged["w"], torch.tensor([1 + 1.5, 1 - 2.5, 1.0, 1.0]))


def test_ties_of_everything_with_one_expert_is_that_expert(context, by_hand) -> None:
    given = context(experts={"bob": "bob/full"})
    state = by_hand("llama", "bob/full")
    for name, tensor in make_baseline("ties", given, density=1.0).tensors.items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=1e-6)


def test_dare_drops_at_random_and_keeps_the_sum_of_magnitudes() -> None:
    own = torch.zeros(64, 64)
    delta = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))

    def merge(seed):
        return merge_tensors(
            Named(w=own),
            {"a": {"w": own + delta}},
            "dare_ties",
            weights={"a": 1.0},
            with_anchor=True,
            seed=seed,
            density={"a": 0.25},
            normalize=True,
        )["w"]

    state = torch.get_rng_state()
    merged = merge(0)
    assert torch.equal(torch.get_rng_state(), state)
    kept = merged != 0
    assert 0.2 < kept.float().mean() < 0.3
    factor = merged[kept] / delta[kept]
    torch.testing.assert_close(factor, factor[0].expand_as(factor))
    assert float(merged.abs().sum()) == pytest.approx(float(delta.abs().sum()), rel=1e-4)
    assert torch.equal(merge(0), merged)
    assert not torch.equal(merge(1), merged)


RUN = """
import json, sys, warnings
warnings.simplefilter("ignore")
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
for config, out in json.load(sys.stdin):
    run_merge(MergeConfiguration.model_validate(config), out, MergeOptions(write_model_card=False))
"""


def test_merges_equal_mergekits_run_over_dense_checkpoints(context, pico) -> None:
    """In a process of its own: mergekit keeps open checkpoints for good, and its import warns."""
    from safetensors.torch import load_file

    given = context()
    weights = {"acme": 1.0, "bob": 0.5, "zoe": 2.0}
    folders = {domain: write_dense(given, domain, pico.scratch(domain)) for domain in given.domains}

    def config(method, **parameters):
        models = [
            {"model": str(folders[d]), "parameters": {"weight": weights[d], **parameters}}
            for d in given.domains
        ]
        base = {} if method == "linear" else {"base_model": str(pico.base("llama"))}
        return {"merge_method": method, "models": models, "dtype": "float32", **base}

    outs = {"weighted_soup": pico.scratch("linear"), "ties": pico.scratch("ties")}
    jobs = [(config("linear"), outs["weighted_soup"]), (config("ties", density=0.3), outs["ties"])]
    process = subprocess.run(
        [sys.executable, "-c", RUN],
        input=json.dumps([(job, str(out)) for job, out in jobs]),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    for name, options in {"weighted_soup": {}, "ties": {"density": 0.3}}.items():
        theirs = load_file(next(outs[name].glob("*.safetensors")))
        ours = make_baseline(name, given, weights=weights, **options).tensors
        assert ours
        for tensor, value in ours.items():
            torch.testing.assert_close(value, theirs[tensor], rtol=0, atol=1e-6)


def test_no_expert_is_the_anchor(context, pico) -> None:
    ids = pico.prompts()
    none = context(experts={})
    for name in ("soup", "ties", "dare_ties", "oracle", "prompt_router"):
        assert torch.equal(
            make_baseline(name, none)("x", slice(0, 4), ids), pico.dense("llama")(ids).logits
        ), name


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("weighted_soup", {}, "A weighted soup needs either 'weights' or 'validation', and not both."),
        ("weighted_soup", {"weights": {"acme": 1}}, "weights: none for bob, zoe. Give one for every expert."),
        (
            "weighted_soup",
            {"weights": {"acme": 1, "bob": -1, "zoe": 1}},
            "weights: {'acme': 1.0, 'bob': -1.0, 'zoe': 1.0} found; every weight must be a number of at least 0, and "
            "one above 0.",
        ),
        (
            "weighted_soup",
            {"validation": {}, "temperature": 0},
            "temperature: 0 found; it must be above 0.",
        ),
        ("ties", {"density": 0}, "density: 0 found; it must be above 0 and at most 1."),
        ("dare_ties", {"scale": float("inf")}, "scale: inf found; it must be a finite number."),
    ],
)
def test_bad_values_are_refused(context, name, options, message) -> None:
    with pytest.raises(ManifestError) as error:
        make_baseline(name, context(), **options)
    assert str(error.value) == message


def test_unknown_domains_and_missing_text_are_refused(context, pico) -> None:
    with pytest.raises(UnknownNameError) as unknown:
        make_baseline("ties", context(), weights={"bop": 1})
    assert str(unknown.value) == "Unknown domain 'bop'. Did you mean 'bob'? Known: acme, bob, zoe."
    with pytest.raises(DataError) as missing:
        make_baseline(
            "weighted_soup", context(), validation={"acme": pico.prompts(), "public": pico.prompts()}
        )
    assert str(missing.value) == (
        "validation: no text for bob, zoe. Give text for every expert's domain, or 'public' alone."
    )
