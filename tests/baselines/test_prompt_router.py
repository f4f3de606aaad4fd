"""Prompt-level routing: the choice against the discriminants by hand, and who predicts what."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from experts.errors import ManifestError, PlanError, UnknownNameError
from pipelines.baselines import make_baseline

PROMPT = 8


@pytest.fixture(scope="module")
def texts(pico):
    """Windows of each owner's domain and of public text."""
    return {
        name: pico.domain_tokens(seed, rows=6, length=20)
        for seed, name in enumerate(("public", "acme", "bob", "zoe"))
    }


def test_the_choice_is_the_nearest_class_mean(context, pico, texts) -> None:
    """Mahalanobis distances with one shrunken covariance, worked out from raw states; equal priors."""
    given = context()
    classes = [pico._statistics("llama", seed, pico.gate_layer) for seed in range(4)]
    covariance = np.mean([c.scatter / c.count - np.outer(c.mean, c.mean) for c in classes], axis=0)
    covariance += 0.1 * np.trace(covariance) / pico.width * np.eye(pico.width)
    arm = make_baseline("prompt_router", given, prompt_tokens=PROMPT)
    names = ["anchor", "acme", "bob", "zoe"]
    for ids in texts.values():
        with torch.no_grad():
            states = pico.dense("llama")(ids, output_hidden_states=True).hidden_states[pico.gate_layer][
                :, :PROMPT
            ]
        unit = states / (states.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
        gaps = [unit.mean(1).double().numpy() - c.mean for c in classes]
        distances = np.stack([np.einsum("nd,nd->n", gap @ np.linalg.inv(covariance), gap) for gap in gaps])
        assert arm.classifier.choose(ids) == [names[index] for index in distances.argmin(0)]
        posteriors = arm.classifier.posteriors(ids)
        torch.testing.assert_close(posteriors.sum(-1), torch.ones(len(ids)))


def test_domains_find_their_experts_and_longer_prompts_help(context, pico) -> None:
    shares = []
    for length in (4, 16):
        router = make_baseline("prompt_router", context(), prompt_tokens=length)
        hits = [
            choice == name
            for seed, name in enumerate(("anchor", "acme", "bob", "zoe"))
            for choice in router.classifier.choose(pico.domain_tokens(seed, rows=24, length=20))
        ]
        shares.append(np.mean(hits))
    assert shares[0] < shares[1]
    assert shares[1] >= 0.85


def test_the_anchor_predicts_the_prompt_and_the_chosen_expert_the_rest(context, texts) -> None:
    given = context()
    ids = torch.cat([texts[name][:2] for name in ("acme", "public", "zoe", "bob")])
    router = make_baseline("prompt_router", given, prompt_tokens=PROMPT)
    peeking = make_baseline("prompt_router", given, prompt_tokens=PROMPT, peek=True)
    choices = router.classifier.choose(ids)
    assert {"acme", "bob", "zoe"} <= set(choices)
    arms = {domain: make_baseline("single", given, domain=domain) for domain in given.domains}
    arms["anchor"] = make_baseline("anchor", given)
    alone = arms["anchor"].logits(ids)
    found, peeked = router.logits(ids), peeking.logits(ids)
    for row, choice in enumerate(choices):
        own = arms[choice].logits(ids)[row]
        torch.testing.assert_close(peeked[row], own, rtol=0, atol=1e-5)
        # the last prompt token is read at position PROMPT - 1, which predicts the first token after the prompt
        assert torch.equal(found[row, : PROMPT - 1], alone[row, : PROMPT - 1])
        torch.testing.assert_close(found[row, PROMPT - 1 :], own[PROMPT - 1 :], rtol=0, atol=1e-5)


def test_later_tokens_do_not_matter(context, texts, pico) -> None:
    ids = torch.cat([texts["acme"][:2], texts["zoe"][:2]])
    router = make_baseline("prompt_router", context(), prompt_tokens=PROMPT)
    for position in (2, PROMPT - 1, 14):
        changed = ids.clone()
        changed[:, position + 1 :] = (changed[:, position + 1 :] + 40) % pico.vocabulary
        before, after = router.logits(ids), router.logits(changed)
        torch.testing.assert_close(before[:, : position + 1], after[:, : position + 1], rtol=0, atol=1e-5)
        assert (before - after).abs().max() > 1e-2


def test_doubt_goes_to_the_anchor(context, texts, pico) -> None:
    sure = make_baseline("prompt_router", context(), prompt_tokens=PROMPT, threshold=1.0)
    ids = torch.cat(list(texts.values()))
    assert set(sure.classifier.choose(ids)) == {"anchor"}
    assert torch.equal(sure.logits(ids), make_baseline("anchor", context()).logits(ids))


def test_a_short_window_is_all_prompt(context, texts) -> None:
    ids = texts["acme"]
    router = make_baseline("prompt_router", context(), prompt_tokens=64)
    assert torch.equal(router.logits(ids), make_baseline("anchor", context()).logits(ids))


def test_the_scorer_can_be_set(context, texts) -> None:
    ids = torch.cat(list(texts.values()))
    plain = make_baseline("prompt_router", context())
    other = make_baseline("prompt_router", context(), scorer="lda", scorer_options={"anchor_prior": 0.999})
    a, b = (arm.classifier.posteriors(ids)[:, 0] for arm in (plain, other))
    assert (b > a).all()


def test_statistics_are_needed(context, pico) -> None:
    registry = pico.fresh_library("llama")
    raw = pico.write_ffn(pico.scratch("raw"), seed=5, layers=(2,))
    registry.register(pico.pack(raw, name="eve/full"))
    with pytest.raises(PlanError) as error:
        make_baseline("prompt_router", context(experts={"eve": "eve/full"}, registry=registry))
    assert str(error.value) == (
        "A prompt router cannot be made:\n"
        "  - eve/full publishes no statistics (train it with `statistics: true`)"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_tokens": 0}, "prompt_tokens: 0 found; it must be at least 1."),
        ({"threshold": 2}, "threshold: 2 found; it must lie from 0 to 1."),
        (
            {"scorer": "learned"},
            "scorer: 'learned' scores every layer by itself. A prompt router needs one that decides once, such as "
            "lda.",
        ),
    ],
)
def test_bad_values_are_refused(context, options, message) -> None:
    with pytest.raises(ManifestError) as error:
        make_baseline("prompt_router", context(), **options)
    assert str(error.value) == message


def test_an_unknown_scorer_is_named(context) -> None:
    with pytest.raises(UnknownNameError, match=r"Unknown scorer 'ldo'\. Did you mean 'lda'"):
        make_baseline("prompt_router", context(), scorer="ldo")
    with pytest.raises(ManifestError, match="shrink"):
        make_baseline("prompt_router", context(), scorer_options={"shrink": 1.0})
