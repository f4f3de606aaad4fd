"""Dense models of experts: as PEFT and the files say, on every family, in memory and on disk."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from experts.errors import (
    AdmissionError,
    BuildError,
    ConsentError,
    DataError,
    ManifestError,
    PlanError,
    UnknownNameError,
)
from pipelines.baselines import BASELINES, BaselineContext, make_baseline, score, write_dense
from pipelines.baselines.dense import open_dense

FAMILIES = ["llama", "olmo2", "gpt_neox", "phi3"]
"""Pre-norm, post-norm, biases without a gate, fused gate and up."""


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("domain", ["acme", "bob"])
def test_a_single_expert_equals_the_model_merged_by_hand(
    context, by_hand, logits_of, pico, family, domain
) -> None:
    given = context(family)
    ids = pico.prompts()
    arm = make_baseline("single", given, domain=domain)
    expected = logits_of(family, by_hand(family, given.experts[domain]), ids)
    torch.testing.assert_close(arm.logits(ids), expected, rtol=0, atol=2e-5)
    assert (
        expected - pico.dense(family)(ids).logits
    ).abs().max() > 1e-2  # the control: it differs from the anchor


def test_dense_tensors_are_those_that_change_and_no_others(context, by_hand, pico) -> None:
    given = context()
    anchor = pico.dense("llama").state_dict()
    for domain, tensors in open_dense(given).items():
        state = by_hand("llama", given.experts[domain])
        assert set(tensors) == {name for name, value in state.items() if not torch.equal(value, anchor[name])}
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, state[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_anchor_answers_as_transformers_alone(context, pico, family) -> None:
    ids = pico.prompts()
    assert torch.equal(make_baseline("anchor", context(family)).logits(ids), pico.dense(family)(ids).logits)


def test_arms_leave_the_anchor_as_it_was(context, pico) -> None:
    given = context(dtype="float32")
    ids = pico.prompts()
    before = make_baseline("anchor", given).logits(ids)
    for name, options in {"single": {"domain": "bob"}, "soup": {}, "ties": {}, "btm": {}}.items():
        make_baseline(name, given, **options).logits(ids)
    assert torch.equal(make_baseline("anchor", given).logits(ids), before)
    own = pico.dense("llama").state_dict()
    assert all(torch.equal(value, own[name]) for name, value in given.anchor().model.state_dict().items())


def test_shared_states_change_nothing_and_are_of_the_same_ids(context, pico) -> None:
    one, other = pico.prompts(), pico.prompts(seed=5)
    kept, unkept = context(dtype="float32"), context(dtype="float32", state_bytes=0)
    for given in (kept, unkept):
        for ids in (one, other, one):
            arm = make_baseline("single", given, domain="acme")
            assert torch.equal(
                arm("any", slice(0, 4), ids), make_baseline("single", context(), domain="acme").logits(ids)
            )
    assert len(kept.anchor()._kept) == 2
    assert len(unkept.anchor()._kept) == 0


def test_the_oracle_gives_each_domain_its_own_expert(context, pico) -> None:
    given = context()
    ids = pico.prompts()
    oracle = make_baseline("oracle", given)
    for domain in given.domains:
        own = make_baseline("single", given, domain=domain)
        assert torch.equal(oracle(domain, slice(0, 4), ids), own.logits(ids))
    assert torch.equal(oracle("news", slice(0, 4), ids), make_baseline("anchor", given).logits(ids))
    with pytest.raises(DataError) as error:
        oracle.logits(ids)
    assert str(error.value) == "The oracle has to be told the domain of the text. Give domain=..."


def test_score_measures_an_arm_like_a_model(context, pico, by_hand) -> None:
    from transformers import AutoModelForCausalLM

    from pipelines.evaluate import DomainWindows, measure

    windows = {name: DomainWindows(ids=pico.prompts(seed=n), text_bytes=9) for n, name in enumerate("ab")}
    model = AutoModelForCausalLM.from_pretrained(pico.base("llama"))
    model.load_state_dict(by_hand("llama", "acme/low"))
    expected = measure(model.eval(), windows)
    found = score(make_baseline("single", context(), domain="acme"), windows)
    assert found.mean_nll == pytest.approx(expected.mean_nll, abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_a_written_checkpoint_loads_with_transformers_alone(context, pico, family) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    given = context(family)
    ids = pico.prompts()
    for domain in ("acme", "bob"):
        out = write_dense(given, domain, pico.scratch(domain))
        model = AutoModelForCausalLM.from_pretrained(out).eval()
        arm = make_baseline("single", given, domain=domain)
        torch.testing.assert_close(model(ids).logits, arm.logits(ids), rtol=0, atol=1e-6)
        AutoTokenizer.from_pretrained(out)
        assert sorted(path.name for path in out.parent.iterdir()) == [domain]
    with pytest.raises(BuildError, match=f"The output folder {out} exists"):
        write_dense(given, "acme", out)
    base = AutoModelForCausalLM.from_pretrained(
        pico.base(family)
    ).eval()  # the registry's blobs were not touched
    assert torch.equal(
        base(ids).logits, make_baseline("anchor", context(family, dtype="float32")).logits(ids)
    )


def test_a_composed_folder_is_as_good_as_a_registry(context, pico) -> None:
    folder = pico.composed("mixed")
    ids = pico.prompts()
    inside = BaselineContext.from_composed(folder)
    assert dict(inside.experts) == {"acme": "acme/low@1", "bob": "bob/full@1", "zoe": "zoe/low@1"}
    assert torch.equal(
        make_baseline("soup", inside).logits(ids), make_baseline("soup", context()).logits(ids)
    )
    assert BaselineContext.from_composed(folder, opt_out=["bob"]).domains == ("acme", "zoe")
    with pytest.raises(UnknownNameError, match="'eve'"):
        BaselineContext.from_composed(folder, opt_out=["eve"])


@pytest.mark.parametrize("name", ["anchor", "btm", "dare_ties", "oracle", "prompt_router", "soup", "ties"])
def test_leaving_out_is_not_listing_bit_for_bit(context, pico, name) -> None:
    """Also when the anchor and its states were first used with the owner there."""
    ids = pico.prompts()
    whole = context(dtype="float32")
    make_baseline(name, whole)("bob", slice(0, 4), ids)
    left = make_baseline(name, whole.without("acme"))("bob", slice(0, 4), ids)
    never = context(experts={"zoe": "zoe/low", "bob": "bob/full"})
    assert torch.equal(left, make_baseline(name, never)("bob", slice(0, 4), ids))
    left = make_baseline(name, whole.without("acme", "zoe"))("bob", slice(0, 4), ids)
    never = context(experts={"bob": "bob/full"})  # whose anchor is cut one layer higher
    assert torch.equal(left, make_baseline(name, never)("bob", slice(0, 4), ids))
    assert (whole.anchor().first, never.anchor().first) == (1, 2)


def test_a_left_out_experts_files_are_not_opened(pico, context) -> None:
    registry = pico.fresh_library("llama")
    files = registry.files(registry.expert("acme/low"))
    poisoned = files["adapter_model.safetensors"]
    poisoned.chmod(0o644)
    poisoned.write_bytes(b"poison")
    given = context(experts={"acme": "acme/low", "bob": "bob/full"}, registry=registry)
    for name in ("soup", "btm", "oracle", "prompt_router"):
        make_baseline(name, given.without("acme"))
    with pytest.raises(Exception, match=r"[Hh]eader"):  # the control
        make_baseline("soup", given)


def test_owners_who_have_opted_out_are_refused(pico, context) -> None:
    registry = pico.fresh_library("llama")
    when = registry.opt_out("bob", reason="moved", by="me").when
    with pytest.raises(ConsentError) as error:
        make_baseline("soup", context(registry=registry))
    assert str(error.value) == (
        "The baseline names experts of owners who have opted out. Do not list them:\n"
        f"  - bob: bob/full: bob opted out on {when}"
    )
    make_baseline("soup", context(registry=registry).without("bob"))


def test_mistakes_are_named(context, pico) -> None:
    given = context()
    with pytest.raises(UnknownNameError) as unknown:
        make_baseline("btn", given)
    assert str(unknown.value).startswith(
        "Unknown baseline 'btn'. Did you mean 'btm'? Known: anchor, btm, dare_ties"
    )
    with pytest.raises(ManifestError) as option:
        make_baseline("ties", given, densty=0.1)
    assert str(option.value) == (
        "Baseline 'ties': Unknown option 'densty'. Did you mean 'density'? Known: density, scale, weights."
    )
    with pytest.raises(ManifestError) as missing:
        make_baseline("single", given)
    assert str(missing.value) == "Baseline 'single' needs the option 'domain'; it was not given."
    with pytest.raises(UnknownNameError) as domain:
        make_baseline("single", given, domain="bop")
    assert str(domain.value) == "Unknown domain 'bop'. Did you mean 'bob'? Known: acme, bob, zoe."


def test_a_changed_context_gets_an_anchor_of_its_own(context, pico) -> None:
    given = context(dtype="float32")
    ids = pico.prompts()
    wide = make_baseline("soup", given).logits(ids)
    narrow = make_baseline("soup", replace(given, dtype="bfloat16")).logits(ids)
    assert (wide.dtype, narrow.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(narrow.float(), wide, rtol=0, atol=0.1)


def test_kinds_without_a_dense_form_are_refused(context, monkeypatch) -> None:
    from experts.kinds.lora import LoraKind

    odd = LoraKind()
    monkeypatch.setattr(odd, "name", "odd", raising=False)
    monkeypatch.setattr("pipelines.baselines.dense.get_kind", lambda name: odd)
    with pytest.raises(PlanError) as error:
        make_baseline("soup", context(experts={"acme": "acme/low"}))
    assert str(error.value) == (
        "acme/low@1 is of kind 'odd', which has no dense form. Dense baselines take experts of the kinds 'ffn' and "
        "'lora'."
    )


def test_a_weights_file_with_other_tensors_is_refused(pico) -> None:
    from safetensors.torch import load_file, save_file

    folder = pico.compose(pico.manifest("stacked", experts=["bob/full"]))
    path = next(folder.glob("experts/*/ffn.safetensors"))
    tensors = load_file(path)
    tensors["stray"] = tensors.pop("model.layers.2.mlp.up_proj.weight")
    path.unlink()
    save_file(tensors, path)
    with pytest.raises(AdmissionError) as error:
        make_baseline("soup", BaselineContext.from_composed(folder))
    assert str(error.value) == (
        "The weights of bob/full@1 are not what its configuration says: extra ['stray'], missing "
        "['model.layers.2.mlp.up_proj.weight']. Register it again."
    )


def test_experts_of_another_anchor_are_refused(context, pico) -> None:
    registry = pico.fresh_library("llama")
    registry.add_base(pico.base("llama", seed=7), name="other")
    with pytest.raises(PlanError) as error:
        make_baseline(
            "soup", context(experts={"a": "acme/low", "b": "eve/low"}, registry=registry, base="other")
        )
    ours, theirs = (registry.base(name).fingerprint for name in ("other", "llama"))
    assert str(error.value).splitlines()[:2] == [
        "These experts cannot be compared:",
        f"  - a: acme/low@1 was trained on another anchor: 'llama' with fingerprint {theirs}; this one is 'other' "
        f"with {ours}",
    ]
    assert "b: Unknown expert 'eve/low'" in str(error.value)


def test_every_baseline_takes_a_context_and_makes_an_arm(context, pico) -> None:
    """Each row of the table; whatever is required is given."""
    needed = {"single": {"domain": "bob"}, "weighted_soup": {"weights": {"acme": 1, "bob": 2, "zoe": 3}}}
    ids = pico.prompts()
    for family in ("llama", "olmo2", "gpt_neox"):
        for name in BASELINES:
            arm = make_baseline(name, context(family), **needed.get(name, {}))
            logits = arm("bob", slice(0, 4), ids)
            assert logits.shape == (*ids.shape, pico.vocabulary)
            assert logits.isfinite().all(), (family, name)
