"""Folders: what is saved is what is loaded, a build is deterministic, the order of a manifest is not its meaning."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from composer.loading import load
from composer.lock import Lock


def _tree(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_u7_save_and_load_bit_for_bit(pico: Any, model: Any, ids: torch.Tensor) -> None:
    out = pico.scratch("saved")
    model.save_pretrained(out)
    with torch.inference_mode():
        assert torch.equal(type(model).from_pretrained(out)(ids).logits, model(ids).logits)


def test_u7_a_model_without_an_owner_is_saved_without_them(
    pico: Any, case: Any, never: Any, absent: str, ids: torch.Tensor
) -> None:
    folder = pico.composed(**case.settings)
    model = load(folder, opt_out={absent})
    out = pico.scratch("saved")
    model.save_pretrained(out)
    theirs = {e.digest for e in Lock.read(folder).experts if e.owner == absent}
    assert {path.name for path in (out / "experts").iterdir()} == {
        path.name for path in (folder / "experts").iterdir()
    } - theirs
    for name in ("composition.json", "config.json", "README.md"):
        assert absent not in (out / name).read_text()
    with torch.inference_mode():
        assert torch.equal(load(out)(ids).logits, never(ids).logits)


def test_u7_a_build_is_deterministic(pico: Any, case: Any) -> None:
    first, second = pico.composed(**case.settings), pico.compose(pico.manifest(**case.settings))
    assert first != second
    assert _tree(first) == _tree(second)


def test_u8_the_order_of_experts_does_not_matter(pico: Any, case: Any, model: Any, ids: torch.Tensor) -> None:
    """F8: the order is canonical, so digests and logits agree."""
    manifest = pico.manifest(**case.settings)
    turned = pico.manifest(**case.settings, experts=[entry.ref for entry in reversed(manifest.experts)])
    folder = pico.compose(turned)
    assert Lock.read(folder).membership_digest == model.membership.digest
    other = load(folder)
    assert other.expert_names == model.expert_names
    with torch.inference_mode():
        assert torch.equal(other(ids).logits, model(ids).logits)
