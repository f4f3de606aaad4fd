"""Experts that were made from other owners' experts leave with them, through every door and without a registry."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from composer.editing import add_experts, remove_experts
from composer.loading import load
from composer.lock import Lock
from composer.planning import plan
from composer.verify import verify_optout
from experts.card import BaseRef
from experts.errors import AdmissionError, ConsentError, PlanError, RegistryError
from experts.fingerprint import tokenizer_fingerprint
from experts.package import pack
from pipelines.compression.run import find_expert
from registry import Registry

EVERYBODY = ("acme/low", "bob/low", "bob/made", "yan/again", "zoe/low")


@pytest.fixture(scope="module")
def make_expert(pico: Any) -> Callable[..., Path]:
    """Pack an expert that says it was made from others."""
    base = pico.description()
    reference = BaseRef(
        name="llama",
        fingerprint=base.fingerprint,
        tokenizer_fingerprint=tokenizer_fingerprint(pico.base()),
    )

    def make(name: str, *parents: str, seed: int) -> Path:
        artifacts = pico.artifacts(seed=seed - 4, layers=(1, 3))  # there are domains 1 to 3
        raw = pico.write_lora(pico.scratch("raw"), seed=seed, r=2, layers_to_transform=[1, 3])
        artifacts.save(raw)
        out: Path = pico.scratch("package")
        settings = {"version": 1, "domain": "x", "license": "Apache-2.0", "routing": artifacts.info}
        pack(raw, out, name=name, base=base, base_ref=reference, derived_from=parents, **settings)
        return out

    return make


@pytest.fixture(scope="module")
def descended(pico: Any, make_expert: Any) -> Registry:
    """Three owners' experts, one that bob made from acme's, and one that yan made from bob's."""
    registry: Registry = pico.fresh_library()
    made = registry.register(make_expert("bob/made", registry.expert("acme/full").digest, seed=5))
    registry.register(make_expert("yan/again", made.digest, seed=6))
    return registry


@pytest.fixture
def registry(descended: Registry, pico: Any) -> Registry:
    """A copy to be changed."""
    return Registry(shutil.copytree(descended.path, pico.scratch("registry")))


@pytest.fixture(scope="module")
def compose(descended: Registry, pico: Any) -> Callable[..., Path]:
    """A folder of experts, shared."""

    def make(*experts: str, **settings: Any) -> Path:
        manifest = pico.manifest(experts=experts, top_k=2, **settings)
        path: Path = pico.once(
            lambda: pico.compose(manifest, registry=descended), "descent", experts, str(settings)
        )
        return path

    return make


def _logits(model: Any, pico: Any, **request: Any) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(pico.prompts(), **request).logits
    return logits


def test_the_lock_names_them_all(compose: Any) -> None:
    lock = Lock.read(compose(*EVERYBODY))
    parents = {expert.name: expert.parent_owners for expert in lock.experts}
    assert parents == {
        "acme/low": (),
        "bob/low": (),
        "bob/made": ("acme",),
        "yan/again": ("acme", "bob"),
        "zoe/low": (),
    }
    (again,) = (expert for expert in lock.experts if expert.name == "yan/again")
    assert all(lock.lineage[f"{again.folder}/{f.path}"] == ("acme", "bob", "yan") for f in again.files)
    assert lock.optout_class == "exact"
    without = Lock.read(compose("bob/made", "zoe/low"))
    assert without.involved == ("acme", "bob", "zoe")
    assert without.owners == ("bob", "zoe")


LEAVING = [
    ("acme", ("bob/low", "zoe/low")),
    ("bob", ("acme/low", "zoe/low")),
    ("yan", ("acme/low", "bob/low", "bob/made", "zoe/low")),
]


@pytest.mark.parametrize(("owner", "left"), LEAVING)
def test_whoever_leaves_takes_along_what_was_made_of_theirs(
    compose: Any, pico: Any, descended: Registry, owner: str, left: Any
) -> None:
    """At build, at load, by removal and after saving, without a registry; as if they had never been there."""
    folder = compose(*EVERYBODY)
    expected = _logits(load(compose(*left)), pico)
    model = load(folder, opt_out={owner})
    assert model.expert_names == left
    saved = pico.scratch("saved")
    model.save_pretrained(saved)
    removed = Path(shutil.copytree(folder, pico.scratch("removed")))
    remove_experts(removed, [owner])
    assert Lock.read(removed).experts == Lock.read(compose(*left)).experts
    built = compose(*EVERYBODY, opt_out=(owner,))
    assert Lock.read(built).experts == Lock.read(compose(*left)).experts
    for other in (model, load(removed), load(built), load(saved)):
        assert torch.equal(_logits(other, pico), expected)


def test_the_proof_covers_owners_of_parents(compose: Any) -> None:
    rows = verify_optout(compose("bob/made", "zoe/low"), owner="acme")
    assert [(row.door, row.passed) for row in rows] == [("build", True), ("load", True), ("request", True)]


def test_a_ledger_takes_them_along(registry: Registry, compose: Any, pico: Any) -> None:
    registry.opt_out("acme", reason="left", by="ann")
    assert load(compose(*EVERYBODY), registry=registry).expert_names == ("bob/low", "zoe/low")
    with pytest.raises(ConsentError) as caught:
        plan(pico.manifest(experts=("bob/made", "zoe/low")), registry)
    (problem,) = caught.value.problems
    assert problem.startswith("bob/made: made from an expert of acme; acme opted out on ")
    folder = Path(shutil.copytree(compose("bob/low", "zoe/low"), pico.scratch("grows")))
    with pytest.raises(ConsentError, match="acme opted out on "):
        add_experts(folder, ["bob/made"], registry=registry)
    with pytest.raises(ConsentError, match="yan/again cannot be converted: acme opted out on "):
        find_expert("yan/again", registry)


def test_nothing_is_made_of_experts_of_somebody_who_left(registry: Registry, make_expert: Any) -> None:
    package = make_expert("zoe/late", registry.expert("yan/again").digest, seed=7)
    registry.opt_out("acme", reason="left", by="ann")
    with pytest.raises(ConsentError) as caught:
        registry.register(package)
    assert str(caught.value).startswith(
        "'zoe/late' was made from an expert of 'acme'. 'acme' has opted out: since "
    )


def test_parents_must_be_registered(registry: Registry, make_expert: Any) -> None:
    with pytest.raises(AdmissionError) as caught:
        registry.register(make_expert("zoe/late", "ab" * 32, seed=7))
    assert str(caught.value) == (
        f"'zoe/late' was made from experts that the registry '{registry.path}' does not have, so nobody can say whose "
        f"opt-out is one of it too. Register them first (card digests):\n  - {'ab' * 32}"
    )


def test_parents_that_a_registry_lost_are_not_guessed(
    registry: Registry, pico: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Registered before parents had to be: neither planned nor added."""
    card = registry.card("bob/made").model_copy(update={"derived_from": ("ab" * 32,)})
    with pytest.raises(RegistryError, match="bob/made was made from experts that the registry"):
        registry.parent_owners(card)
    monkeypatch.setattr(Registry, "card", lambda self, record: card)
    with pytest.raises(PlanError, match=r"experts\[0\]: bob/made was made from experts that the registry"):
        plan(pico.manifest(experts=("bob/made",)), registry)


@pytest.mark.parametrize(("owner", "left"), LEAVING)
def test_requests_leave_descendants_out_too(compose: Any, pico: Any, owner: str, left: Any) -> None:
    """Row by row, beside a row that leaves nobody out; an owner of a parent alone can be named."""
    model = load(compose(*EVERYBODY))
    got = _logits(model, pico, opt_out=[{owner}, set(), {owner}, set()])
    never, whole = _logits(load(compose(*left)), pico), _logits(model, pico)
    torch.testing.assert_close(got[::2], never[::2], atol=1e-5, rtol=0)
    torch.testing.assert_close(got[1::2], whole[1::2], atol=1e-5, rtol=0)
    if owner == "acme":
        made = load(compose("bob/made", "zoe/low"))
        alone = _logits(load(compose("zoe/low")), pico)
        torch.testing.assert_close(_logits(made, pico, opt_out={"acme"}), alone, atol=1e-5, rtol=0)


def test_show_names_everybody_whose_leaving_takes_it_along(registry: Registry) -> None:
    from typer.testing import CliRunner

    from pipelines.cli.app import app

    registry.opt_out("acme", reason="left")
    result = CliRunner().invoke(app, ["--registry", str(registry.path), "show", "yan/again"])
    lines = [line.split(":", 1) for line in result.stdout.splitlines() if ":" in line]
    shown = {name.strip(): value.strip() for name, value in lines}
    assert (result.exit_code, shown["owner"]) == (0, "yan")
    assert shown["parent owners"] == "acme (opted out), bob"


def test_evaluate_names_who_was_left_out_and_not_whose_expert_went_along(
    compose: Any, registry: Registry, tmp_path: Path
) -> None:
    import json

    from typer.testing import CliRunner

    from pipelines.cli.app import app

    text = tmp_path / "law.jsonl"
    text.write_text(json.dumps({"text": "whoever signs is bound " * 40}) + "\n")
    folder = compose("bob/made", "zoe/low")
    asked = ["evaluate", str(folder), "--data", f"law={text}", "--opt-out", "acme", "--json"]
    result = CliRunner().invoke(app, ["--registry", str(registry.path), *asked, "--max-tokens", "64"])
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["opt_out"] == ["acme"]
