"""Building: what is linked, what is written, and that a failure leaves nothing behind."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import composer.building
from composer.building import build, link_file
from composer.lineage import optout_class, reachable_without
from composer.lock import Lock
from composer.planning import plan
from composer.source import FolderSource
from experts.errors import BuildError, IntegrityError, UnknownNameError


@pytest.fixture(scope="module")
def planned(pico: Any) -> tuple[Any, Any]:
    """A plan of three experts, two kinds, and the registry it is made from."""
    registry = pico.library()
    return plan(pico.manifest("mixed", description="Three friends."), registry), registry


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _refused(call: Callable[[], Any], error: type[Exception] = BuildError) -> str:
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    return str(caught.value)


def test_weights_are_the_registrys_own_files(planned: Any, tmp_path: Path) -> None:
    manifest, registry = planned
    told: dict[str, int] = {}
    out = build(manifest, tmp_path / "out", registry=registry, progress=told.__setitem__)
    lock = Lock.read(out)
    entries = {f"base/{e.path}": e for e in lock.base.files}
    entries |= {f"{expert.folder}/{e.path}": e for expert in lock.experts for e in expert.files}
    for path, entry in entries.items():
        assert (out / path).samefile(registry.blob_path(entry.sha256)), path
        assert told[path] == entry.size
        assert _sha256(out / path) == entry.sha256
    assert (out / "public/routing.safetensors").samefile(registry.blob_path(lock.base.routing_sha256))
    assert {"tokenizer.json", "tokenizer_config.json", "config.json", "README.md", "manifest.yaml"} <= {
        path.name for path in out.iterdir()
    }


def test_the_lock_says_whose_every_file_is(planned: Any, tmp_path: Path) -> None:
    manifest, registry = planned
    out = build(manifest, tmp_path / "out", registry=registry)
    lock = Lock.read(out)
    assert [(e.name, e.owner, e.kind, e.digest) for e in lock.experts] == [
        (name, name.partition("/")[0], kind, registry.expert(name).digest)
        for name, kind in {"acme/low": "lora", "bob/full": "ffn", "zoe/low": "lora"}.items()
    ]
    assert lock.optout_class == optout_class(lock.lineage) == "exact"
    files = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    weights = {path for path in files if path.endswith(".safetensors")}
    assert weights <= set(lock.lineage), "no tensor without a lineage"
    for path in weights:
        digest = path.split("/")[1] if path.startswith("experts/") else None
        assert lock.lineage[path] == tuple(e.owner for e in lock.experts if e.digest == digest)
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "coterie"
    assert config["composition"] == lock.membership_digest
    card = (out / "README.md").read_text()
    assert "Three friends." in card
    for expert in lock.experts:
        assert f"| {expert.name} | 1 | {expert.owner} |" in card


def test_the_base_in_it_loads_alone(planned: Any, tmp_path: Path, pico: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    manifest, registry = planned
    out = build(manifest, tmp_path / "out", registry=registry)
    model = AutoModelForCausalLM.from_pretrained(out / "base", local_files_only=True).eval()
    with torch.inference_mode():
        assert torch.equal(model(pico.prompts()).logits, pico.dense()(pico.prompts()).logits)
    assert AutoTokenizer.from_pretrained(out, local_files_only=True)("abc").input_ids


def test_a_copy_stands_alone(planned: Any, tmp_path: Path) -> None:
    manifest, registry = planned
    linked = build(manifest, tmp_path / "linked", registry=registry)
    out = build(manifest, tmp_path / "out", registry=registry, copy=True)
    for path in (p for p in out.rglob("*") if p.is_file()):
        assert path.stat().st_nlink == 1, path
        assert _sha256(path) == _sha256(linked / path.relative_to(out))


def test_another_file_system_is_copied_to(
    planned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def across(*_: Any, **__: Any) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", across)
    manifest, registry = planned
    out = build(manifest, tmp_path / "out", registry=registry)
    assert all(path.stat().st_nlink == 1 for path in out.rglob("*") if path.is_file())
    assert all(_sha256(out / "base" / e.path) == e.sha256 for e in Lock.read(out).base.files)


def test_what_a_link_may_not_hide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the errors that say "no links here" lead to a copy."""

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "source").write_bytes(b"x")
    monkeypatch.setattr(os, "link", full)
    with pytest.raises(OSError, match="No space left"):
        link_file(tmp_path / "source", tmp_path / "target")


@pytest.mark.parametrize("what", ["folder", "empty folder", "file", "dangling link"])
def test_an_output_that_exists(planned: Any, tmp_path: Path, what: str) -> None:
    out = tmp_path / "out"
    match what:
        case "file":
            out.write_text("mine")
        case "dangling link":
            out.symlink_to(tmp_path / "nowhere")
        case _:
            out.mkdir()
            if what == "folder":
                (out / "mine.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    manifest, registry = planned
    assert _refused(lambda: build(manifest, out, registry=registry)) == (
        f"The output folder {out} exists. Choose another name, or remove it first."
    )
    assert sorted(tmp_path.rglob("*")) == before


def test_an_output_that_appears_meanwhile(planned: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest, registry = planned

    def appear(*_: Any) -> None:
        out.mkdir(exist_ok=True)

    message = _refused(lambda: build(manifest, out, registry=registry, progress=appear))
    assert message == f"Could not write {out}: appeared meanwhile. Nothing was kept."
    assert list(tmp_path.rglob("*")) == [out]


def test_a_parent_that_is_missing(planned: Any, tmp_path: Path) -> None:
    manifest, registry = planned
    out = tmp_path / "no" / "out"
    assert _refused(lambda: build(manifest, out, registry=registry)) == (
        f"There is no folder {tmp_path / 'no'} to write out into. Create it first."
    )
    assert not out.parent.exists()


@pytest.mark.parametrize("function", ["link_file", "write_model_card", "_sync"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_no_space_left(
    planned: Any, tmp_path: Path, function: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(composer.building, function, full)
    manifest, registry = planned
    out = tmp_path / "out"
    assert _refused(lambda: build(manifest, out, registry=registry)) == (
        f"No space left while writing {out}; nothing was kept. Free some space, or build on the registry's file "
        "system, where files are linked and need none."
    )
    assert list(tmp_path.iterdir()) == []


def test_another_refusal_of_the_file_system(
    planned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(composer.building, "link_file", broken)
    manifest, registry = planned
    out = tmp_path / "out"
    assert _refused(lambda: build(manifest, out, registry=registry)) == (
        f"Could not write {out}: Input/output error. Nothing was kept."
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("after", [0, 3, 9])
def test_an_interruption_leaves_nothing(planned: Any, tmp_path: Path, after: int) -> None:
    seen = []

    def interrupt(path: str, _: int) -> None:
        seen.append(path)
        if len(seen) > after:
            raise KeyboardInterrupt

    manifest, registry = planned
    with pytest.raises(KeyboardInterrupt):
        build(manifest, tmp_path / "out", registry=registry, progress=interrupt)
    assert len(seen) == after + 1
    assert list(tmp_path.iterdir()) == []


def test_a_blob_that_is_missing(pico: Any, tmp_path: Path) -> None:
    registry = pico.fresh_library()
    made = plan(pico.manifest(), registry)
    blob = registry.files(registry.expert("bob/low"))["adapter_model.safetensors"]
    blob.chmod(0o644)
    blob.unlink()
    with pytest.raises(IntegrityError, match=blob.name):
        build(made, tmp_path / "out", registry=registry)
    assert list(tmp_path.iterdir()) == []


def test_leaving_and_coming_back_gives_the_same_folder(pico: Any) -> None:
    """F13: add, remove, add again: the same bytes as composing once."""
    registry = pico.fresh_library()
    first = pico.compose(pico.manifest(), registry=registry)
    registry.opt_out("bob", reason="a break", by="bob")
    without = pico.compose(pico.manifest(opt_out=["bob"]), registry=registry)
    registry.opt_in("bob", reason="back again", by="bob")
    again = pico.compose(pico.manifest(), registry=registry)

    def tree(folder: Path) -> dict[str, str]:
        return {
            p.relative_to(folder).as_posix(): _sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()
        }

    assert tree(again) == tree(first)
    bob = registry.expert("bob/low")
    assert not any(bob.digest in path for path in tree(without))
    theirs = {entry.sha256 for entry in registry.card(bob).files}
    assert theirs <= set(tree(first).values())
    assert not theirs & set(tree(without).values())


def test_a_folder_is_a_source_of_its_own_parts_only(pico: Any, composed: Callable[..., Path]) -> None:
    source = FolderSource(composed())
    assert source.expert("acme/low@1").owner == "acme"
    assert list(source.opt_outs()) == []
    assert _refused(lambda: source.expert("acme/full"), UnknownNameError) == (
        "Unknown expert 'acme/full'. Did you mean 'acme/low@1'? Known: acme/low@1, bob/low@1, zoe/low@1."
    )
    assert _refused(lambda: source.base("qwen3"), UnknownNameError) == "Unknown base 'qwen3'. Known: llama."
    missing = "0" * 64
    assert _refused(lambda: source.blob_path(missing), IntegrityError) == (
        f"{composed()} holds no file with sha256 {missing}. Build it again."
    )


def test_lineage() -> None:
    apart = {"base": (), "a": ("acme",), "b": ("bob",)}
    assert optout_class(apart) == "exact"
    assert optout_class({**apart, "merged": ("acme", "bob")}) == "recompose"
    assert reachable_without({**apart, "merged": ("acme", "bob")}, {"acme"}) == {"base", "b"}
