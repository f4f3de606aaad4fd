"""Branch-Train-Merge against a loop over positions, and what must hold of any such ensemble."""

from __future__ import annotations

import math

import pytest
import torch

from experts.errors import ManifestError, UnknownNameError
from pipelines.baselines import make_baseline
from pipelines.baselines.btm import log_weights, mix


def slow(logits, ids, *, prior, temperature=1.0, top_k=None, prompt_tokens=None, of="probabilities"):
    """``(batch, length, vocabulary)`` probabilities in float64: sums and products as the formula has them."""
    members, (batch, length) = len(logits), ids.shape
    p = [torch.softmax(one.double(), -1) for one in logits]
    mixed = torch.zeros_like(p[0])
    for row in range(batch):
        for t in range(length):
            history = range(1, min(t, length if prompt_tokens is None else prompt_tokens - 1) + 1)
            joint = [
                prior[j]
                * math.prod(float(p[j][row, s - 1, ids[row, s]]) for s in history) ** (1 / temperature)
                for j in range(members)
            ]
            kept = sorted(range(members), key=lambda j: -joint[j])[: top_k or members]
            total = sum(joint[j] for j in kept)
            for j in kept:
                part = p[j][row, t] if of == "probabilities" else p[j][row, t].log()
                mixed[row, t] += joint[j] / total * part
    return mixed if of == "probabilities" else torch.softmax(mixed, -1)


CASES = {
    "plain": {},
    "tempered": {"temperature": 4.0},
    "two": {"top_k": 2},
    "one": {"top_k": 1},
    "prior": {"prior": {"acme": 1, "bob": 5, "zoe": 2}},
    "prompt": {"prompt_tokens": 5},
    "logits": {"of": "logits", "top_k": 2},
    "uniform": {"temperature": math.inf},
}


@pytest.mark.parametrize("case", CASES)
def test_the_ensemble_equals_a_loop(context, pico, case) -> None:
    options = CASES[case]
    given = context()
    ids = pico.prompts(rows=4, length=12)
    members = [make_baseline("single", given, domain=domain).logits(ids) for domain in given.domains]
    prior = options.get("prior", dict.fromkeys(given.domains, 1))
    total = sum(prior.values())
    expected = slow(members, ids, **{**options, "prior": [prior[d] / total for d in given.domains]})
    found = make_baseline("btm", given, **options).logits(ids)
    assert found.dtype == torch.float32
    torch.testing.assert_close(torch.softmax(found.double(), -1), expected, rtol=0, atol=1e-6)


def test_the_anchor_may_be_a_member(context, pico) -> None:
    given = context()
    ids = pico.prompts(length=12)
    arms = [
        make_baseline("anchor", given),
        *(make_baseline("single", given, domain=d) for d in given.domains),
    ]
    expected = slow([arm.logits(ids) for arm in arms], ids, prior=[0.25] * 4)
    found = make_baseline("btm", given, anchor=True)
    torch.testing.assert_close(torch.softmax(found.logits(ids).double(), -1), expected, rtol=0, atol=1e-6)
    assert list(found.weights(ids)) == ["anchor", "acme", "bob", "zoe"]


def test_one_member_is_that_member(context, pico) -> None:
    ids = pico.prompts()
    alone = context(experts={"bob": "bob/full"})
    expected = torch.log_softmax(make_baseline("single", alone, domain="bob").logits(ids), -1)
    assert torch.equal(make_baseline("btm", alone).logits(ids), expected)


def test_weights_sum_to_one_and_begin_with_the_prior(context, pico) -> None:
    ids = pico.prompts()
    for options in ({}, {"top_k": 2}, {"temperature": 0.1}):
        found = make_baseline("btm", context(), **options).weights(ids)
        total = sum(found.values())
        torch.testing.assert_close(total, torch.ones_like(total))
        assert (torch.stack(list(found.values())) > 0).sum(0).max() <= options.get("top_k", 3)
    for domain, weight in make_baseline("btm", context()).weights(ids).items():
        torch.testing.assert_close(weight[:, 0], torch.full((len(ids),), 1 / 3), msg=domain)


def test_later_tokens_do_not_matter(context, pico) -> None:
    """Neither in the members nor in the weights; and with a prompt, later tokens never reach the weights."""
    ids = pico.prompts(length=16)
    changed = ids.clone()
    changed[:, 9:] = (changed[:, 9:] + 7) % pico.vocabulary
    arm = make_baseline("btm", context(), top_k=2)
    a, b = arm.logits(ids), arm.logits(changed)
    torch.testing.assert_close(a[:, :9], b[:, :9], rtol=0, atol=1e-5)
    assert (a[:, 9:] - b[:, 9:]).abs().max() > 1e-2
    fixed = make_baseline("btm", context(), prompt_tokens=9)
    for name, weight in fixed.weights(ids).items():
        torch.testing.assert_close(weight, fixed.weights(changed)[name], rtol=0, atol=1e-5)
        assert torch.equal(weight[:, 8:], weight[:, 8:9].expand_as(weight[:, 8:]))


def test_a_member_without_weight_adds_nothing_even_if_it_is_sure_or_impossible() -> None:
    likely = torch.randn(1, 3, 5)
    impossible = torch.full((1, 3, 5), -math.inf)
    impossible[..., 0] = 0.0
    weights = torch.tensor([0.0, -math.inf])[:, None, None].expand(2, 1, 3)
    expected = torch.log_softmax(likely, -1)
    for of in ("probabilities", "logits"):
        assert torch.equal(mix([likely, impossible], weights, of=of), expected)


def test_long_histories_do_not_underflow() -> None:
    """A thousand tokens at p = e^-20 each are far below the least float; their ratios are not."""
    likelihoods = torch.full((2, 1, 1000), -20.0)
    likelihoods[1] -= 0.001
    found = log_weights(likelihoods, torch.tensor([0.5, 0.5]).log()).exp()[:, 0, -1]
    expected = torch.sigmoid(torch.tensor(1.0))
    torch.testing.assert_close(found, torch.stack([expected, 1 - expected]), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, "temperature: 0 found; it must be above 0."),
        ({"top_k": 0}, "top_k: 0 found; it must be at least 1, or left out."),
        ({"prompt_tokens": 0}, "prompt_tokens: 0 found; it must be at least 1, or left out."),
        ({"of": "weights"}, "of: 'weights' found; allowed: probabilities, logits."),
        ({"prior": {"acme": 1}}, "prior: {'acme': 1} found; every member needs a number above 0."),
    ],
)
def test_bad_values_are_refused(context, options, message) -> None:
    with pytest.raises(ManifestError) as error:
        make_baseline("btm", context(), **options)
    assert str(error.value) == message


def test_members_must_exist(context) -> None:
    with pytest.raises(UnknownNameError) as unknown:
        make_baseline("btm", context(), prior={"acme": 1, "bop": 1})
    assert str(unknown.value) == "Unknown domain 'bop'. Did you mean 'bob'? Known: acme, bob, zoe."
    with pytest.raises(ManifestError) as none:
        make_baseline("btm", context(experts={}))
    assert str(none.value) == "An ensemble needs a member: list an expert, or set 'anchor'."
