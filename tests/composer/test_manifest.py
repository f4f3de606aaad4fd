"""Manifests: the format, and what is said about every mistake."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from composer.manifest import Manifest
from experts.errors import ManifestError, PlanError

GOOD = """\
format_version: 1
name: friends
base: pico
experts:
  - acme/contracts
  - ref: hosp/icd@2
opt_out: [soft]
router: {scorer: learned, context: token, top_k: 3, options: {bias: false}}
"""


def _mistakes(tmp_path: Path, text: str) -> str:
    path = tmp_path / "friends.yaml"
    path.write_text(text)
    with pytest.raises(ManifestError) as caught:
        Manifest.from_file(path)
    return str(caught.value)


def test_reading(tmp_path: Path) -> None:
    path = tmp_path / "friends.yaml"
    path.write_text(GOOD)
    manifest = Manifest.from_file(path)
    assert [entry.ref for entry in manifest.experts] == ["acme/contracts", "hosp/icd@2"]
    assert manifest.opt_out == ("soft",)
    assert (manifest.recipe, manifest.dtype, manifest.router.selector) == ("flexolmo", None, "topk")
    assert (manifest.router.scorer, manifest.router.top_k, manifest.router.options) == (
        "learned",
        3,
        {"bias": False},
    )
    assert manifest.router.normalize is True
    again = Manifest.from_dict(manifest.to_dict())
    assert again == manifest
    assert again.digest == manifest.digest
    assert Manifest.from_dict({**manifest.to_dict(), "name": "foes"}).digest != manifest.digest


def test_all_mistakes_at_once_with_the_nearest_keys(tmp_path: Path) -> None:
    text = """\
name: friends
bass: pico
experts: [contracts, acme/contracts@first]
router: {scorer_: lda, top_k: 0, context: sentence}
"""
    assert _mistakes(tmp_path, text) == (
        "manifest friends.yaml has 7 problems:\n"
        "  - base: missing\n"
        "  - experts.0: 'contracts' is not an expert name: write owner/expert, for instance 'acme/contracts', each "
        "part 1 to 64 lower-case letters, digits, '_', '.' or '-', starting with a letter or digit.\n"
        "  - experts.1: 'acme/contracts@first' is not an expert reference: write owner/expert, owner/expert@3 or "
        "owner/expert@sha256:<64 hexadecimal digits>.\n"
        "  - router.context: input should be 'prompt_mean', 'running_mean' or 'token', given 'sentence'\n"
        "  - router.top_k: input should be greater than or equal to 1, given 0\n"
        "  - router.scorer_: unknown key; did you mean 'scorer'? Allowed: context, layer, normalize, options, "
        "preset, public_prompts, scorer, selector, selector_options, token_weight, top_k\n"
        "  - bass: unknown key; did you mean 'base'? Allowed: base, description, dtype, experts, format_version, "
        "name, opt_out, recipe, router, upcycle"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "name: a\nname: b\n",
            "manifest friends.yaml, line 2, column 1: key 'name' occurs twice; keep one of them.",
        ),
        (
            "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n",
            "manifest friends.yaml, line 1, column 4: anchor '&a' is not allowed; remove it.",
        ),
        (
            "name: " + "[" * 100 + "]" * 100,
            "manifest friends.yaml, line 1, column 38: nested more than 32 levels deep.",
        ),
        (
            "name: !!python/object/apply:os.system [ls]\n",
            "manifest friends.yaml, line 1, column 7: tag 'tag:yaml.org,2002:python/object/apply:os.system' is not "
            "allowed; remove it.",
        ),
        ("- acme\n", "manifest friends.yaml: not a mapping; write 'name:', 'base:' and 'experts:'."),
        ("", "manifest friends.yaml: empty; write at least one key."),
    ],
    ids=["duplicate key", "alias bomb", "100 levels", "python tag", "a list", "empty"],
)
def test_hostile_yaml(tmp_path: Path, text: str, message: str) -> None:
    assert _mistakes(tmp_path, text) == message


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ManifestError) as caught:
        Manifest.from_file(tmp_path / "none.yaml")
    assert str(caught.value) == f"There is no manifest at {tmp_path / 'none.yaml'}."
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"experts": []}, "experts: name at least one expert"),
        ({"format_version": 2}, "format_version: input should be 1, given 2"),
        ({"dtype": "int8"}, "dtype: input should be 'float32', 'bfloat16' or 'float16', given 'int8'"),
        (
            {"opt_out": ["Acme Inc"]},
            "opt_out: 'Acme Inc' is not an owner name: use 1 to 64 lower-case letters, digits, '_', '.' or '-', "
            "starting with a letter or digit.",
        ),
    ],
)
def test_single_mistakes(change: dict[str, Any], problem: str) -> None:
    good = {"name": "friends", "base": "pico", "experts": ["acme/contracts"]}
    with pytest.raises(ManifestError) as caught:
        Manifest.from_dict({**good, **change})
    assert str(caught.value) == f"manifest has 1 problem:\n  - {problem}"


def test_mistakes_are_no_plan_errors() -> None:
    assert not issubclass(ManifestError, PlanError)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.yaml")
    with pytest.raises(ManifestError) as caught:
        Manifest.from_file(tmp_path / "m.yaml")
    assert str(caught.value) == f"'{tmp_path / 'm.yaml'}' is a FIFO; a regular file is needed."
    assert caught.value.exit_code == 2
