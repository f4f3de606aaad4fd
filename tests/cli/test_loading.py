"""What every command that loads a model says of it: what it computes in, and when nobody is left."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

FASTER = (
    "Note: computing in float32, which is faster on this machine than the model's own bfloat16 and represents its "
    "weights exactly; --dtype bfloat16 keeps to it.\n"
)
GENERATE = ("--prompt", "x", "--max-new-tokens", "2", "--json")


@pytest.fixture(scope="module")
def brain_float(
    tmp_path_factory: pytest.TempPathFactory, run: Any, base_folder: Path, adapters: Any, texts: Any
) -> Path:
    """A folder composed on the same base, stored in bfloat16."""
    from transformers import AutoModelForCausalLM

    work = tmp_path_factory.mktemp("bfloat16")
    shutil.copytree(base_folder, work / "base")
    model = AutoModelForCausalLM.from_pretrained(base_folder, dtype="bfloat16")
    model.save_pretrained(work / "base")
    registry = work / "registry"

    def must(*words: object) -> None:
        outcome = run(*words, registry=registry)
        assert outcome.code == 0, outcome.err

    must("base", "add", work / "base", "--name", "pico")
    must("base", "public-routing", "pico", "--text", texts["public"])
    named = ("--name", "acme/contracts", "--domain", "law", "--license", "Apache-2.0", "--text", texts["law"])
    must("register", adapters["acme"], *named)
    for name, extra in {"plain": "", "chosen": "dtype: bfloat16\n"}.items():
        manifest = work / f"{name}.yaml"
        manifest.write_text(
            f"format_version: 1\nname: {name}\nrecipe: flexolmo\nbase: pico\nexperts: [acme/contracts]\n{extra}"
        )
        must("build", manifest, work / name)
    return work


@pytest.fixture
def without_matrix_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.train.anchor._has_matrix_units", lambda: False)


@pytest.mark.usefixtures("without_matrix_units")
def test_the_faster_dtype_is_taken_and_said(run: Any, brain_float: Path) -> None:
    outcome = run("generate", brain_float / "plain", *GENERATE)
    assert (outcome.code, outcome.err, outcome.json["dtype"]) == (0, FASTER, "float32")


@pytest.mark.usefixtures("without_matrix_units")
@pytest.mark.parametrize(
    ("folder", "options", "dtype"),
    [
        ("plain", ("--dtype", "bfloat16"), "bfloat16"),
        ("plain", ("--dtype", "float32"), "float32"),
        ("chosen", (), "bfloat16"),  # the manifest's word counts
    ],
)
def test_what_was_asked_for_is_not_commented(
    run: Any, brain_float: Path, folder: str, options: tuple[str, ...], dtype: str
) -> None:
    outcome = run("generate", brain_float / folder, *GENERATE, *options)
    assert (outcome.code, outcome.err, outcome.json["dtype"]) == (0, "", dtype)


def test_bfloat16_where_it_is_fast(run: Any, brain_float: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.train.anchor._has_matrix_units", lambda: True)
    outcome = run("generate", brain_float / "plain", *GENERATE)
    assert (outcome.code, outcome.err, outcome.json["dtype"]) == (0, "", "bfloat16")


def test_everybody_left_out_is_said(run: Any, composed: Path) -> None:
    everybody = [word for owner in ("acme", "hosp", "soft") for word in ("--opt-out", owner)]
    outcome = run("generate", composed, *GENERATE, *everybody)
    assert (outcome.code, outcome.json["owners"]) == (0, [])
    assert outcome.err == "Note: every owner is left out: the base model answers alone.\n"


def test_a_registry_that_does_not_exist_is_no_ledger(
    run: Any, brain_float: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Named in any of three places; whoever names none needs none, as the tests above show."""
    said = (
        f"Error: There is no registry '{tmp_path / 'typo'}', so nobody can say who has opted out. Correct the path "
        "given by --registry, COTERIE_REGISTRY or registry=, or name no registry.\n"
    )
    words = ("generate", brain_float / "chosen", *GENERATE)
    for outcome in (run(*words, registry=tmp_path / "typo"), run(*words, "--registry", tmp_path / "typo")):
        assert (outcome.code, outcome.out, outcome.err) == (2, "", said)
    monkeypatch.setenv("COTERIE_REGISTRY", str(tmp_path / "typo"))
    outcome = run(*words)
    assert (outcome.code, outcome.out, outcome.err) == (2, "", said)
