"""Adding and removing: the folder a fresh build gives, the others' files untouched, and nothing halfway."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import composer
import composer.editing
import composer.swap
from composer.building import build
from composer.editing import add_experts, apply_change, plan_change, remove_experts
from composer.lock import LOCK_NAME, Lock
from composer.manifest import Manifest
from composer.planning import plan
from composer.swap import exchange
from experts.errors import BuildError, ConsentError, PlanError

EXPERTS = ("acme/low", "bob/full", "zoe/low")


def tree(folder: Path) -> dict[str, str]:
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def inodes(folder: Path) -> dict[str, int]:
    return {p.relative_to(folder).as_posix(): p.stat().st_ino for p in folder.rglob("*.safetensors")}


def refused(call: Callable[[], Any], error: type[Exception]) -> str:
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    return str(caught.value)


@pytest.fixture
def fresh(pico: Any) -> Callable[..., Path]:
    """Compose a folder of these experts, alone in a folder of its own."""

    def make(*experts: str, registry: Any = None, **settings: Any) -> Path:
        manifest = pico.manifest(experts=experts, description="Three friends.", **settings)
        return pico.compose(manifest, registry=registry)

    return make


class TestEqualsAFreshBuild:
    @pytest.mark.parametrize("name", EXPERTS)
    def test_add(self, name: str, fresh: Any, pico: Any) -> None:
        folder = fresh(*(one for one in EXPERTS if one != name))
        before = inodes(folder)
        change = add_experts(folder, [name], registry=pico.library())
        assert (change.added, dict(change.replaced), change.removed) == ((f"{name}@1",), {}, ())
        assert tree(folder) == tree(fresh(*EXPERTS))
        after = inodes(folder)
        assert after == inodes(fresh(*EXPERTS)), "links to the registry's own files"
        assert before.items() <= after.items(), "what stays is the very same file"
        assert list(folder.parent.iterdir()) == [folder]

    @pytest.mark.parametrize("name", EXPERTS)
    def test_remove_needs_no_registry(self, name: str, fresh: Any) -> None:
        folder = fresh(*EXPERTS)
        before = inodes(folder)
        change = remove_experts(folder, [name])
        assert (change.added, change.removed) == ((), (f"{name}@1",))
        assert tree(folder) == tree(fresh(*(one for one in EXPERTS if one != name)))
        assert inodes(folder).items() < before.items()
        assert list(folder.parent.iterdir()) == [folder]

    def test_f13_add_remove_and_add_again(self, fresh: Any, pico: Any) -> None:
        folder = fresh(*EXPERTS)
        once = tree(folder)
        for name in reversed(EXPERTS):
            remove_experts(folder, [name])
            assert not any(Lock.read(fresh(name)).experts[0].digest in path for path in tree(folder))
            add_experts(folder, [name], registry=pico.library())
            assert tree(folder) == once

    def test_f13_the_same_model(self, fresh: Any, pico: Any) -> None:
        import torch

        folder = fresh("acme/low", "zoe/low")
        add_experts(folder, ["bob/full"], registry=pico.library())
        with torch.inference_mode():
            logits = composer.load(folder)(pico.prompts()).logits
            assert torch.equal(logits, pico.loaded(experts=EXPERTS)(pico.prompts()).logits)
            remove_experts(folder, ["acme"])
            logits = composer.load(folder)(pico.prompts()).logits
            never = pico.loaded(experts=("bob/full", "zoe/low"))
            assert torch.equal(logits, never(pico.prompts()).logits)

    def test_several_at_once(self, fresh: Any, pico: Any) -> None:
        folder = fresh("zoe/low")
        add_experts(folder, ["bob/full", "acme/full", "acme/low"], registry=pico.library())
        assert tree(folder) == tree(fresh("acme/full", "acme/low", "bob/full", "zoe/low"))
        remove_experts(folder, ["acme", "zoe/low@1"])
        assert tree(folder) == tree(fresh("bob/full"))

    def test_a_manifest_in_another_order_is_sorted(self, fresh: Any, pico: Any) -> None:
        folder = fresh("zoe/low", "acme/low")
        add_experts(folder, ["bob/full"], registry=pico.library())
        assert tree(folder) == tree(fresh(*EXPERTS))

    def test_what_a_manifest_leaves_out_stays_left_out(self, fresh: Any, pico: Any) -> None:
        folder = fresh(*EXPERTS, opt_out=["bob"])
        add_experts(folder, ["acme/full"], registry=pico.library())
        assert tree(folder) == tree(fresh("acme/full", *EXPERTS, opt_out=["bob"]))
        remove_experts(folder, ["acme/low"])
        assert tree(folder) == tree(fresh("acme/full", "bob/full", "zoe/low", opt_out=["bob"]))

    def test_a_model_saved_without_an_owner(self, fresh: Any, pico: Any) -> None:
        folder = pico.scratch("saved")
        composer.load(fresh(*EXPERTS), opt_out={"bob"}).save_pretrained(folder)
        add_experts(folder, ["acme/full"], registry=pico.library())
        assert tree(folder) == tree(fresh("acme/full", "acme/low", "zoe/low"))

    def test_a_copy_stands_alone(self, fresh: Any, pico: Any) -> None:
        manifest = pico.manifest(experts=EXPERTS[:2], description="Three friends.")
        folder = build(
            plan(manifest, pico.library()), pico.scratch("out"), registry=pico.library(), copy=True
        )
        add_experts(folder, ["zoe/low"], registry=pico.library(), copy=True)
        expected = fresh(*EXPERTS)
        assert tree(folder) == tree(expected)
        assert not set(inodes(folder).values()) & set(inodes(expected).values())
        assert list(folder.parent.iterdir()) == [folder]

    def test_a_link_to_the_folder_is_followed(self, fresh: Any, tmp_path: Path) -> None:
        folder = fresh(*EXPERTS)
        (tmp_path / "link").symlink_to(folder)
        remove_experts(tmp_path / "link", ["zoe"])
        assert (tmp_path / "link").is_symlink()
        assert Lock.read(folder).owners == ("acme", "bob")


class TestReplace:
    @pytest.fixture
    def versions(self, pico: Any) -> Any:
        """A registry with a second version of acme/low."""
        registry = pico.fresh_library()
        raw = pico.write_lora(pico.scratch("raw"), seed=9, r=3, layers_to_transform=[1, 2, 3])
        artifacts = pico.artifacts(seed=1)
        registry.register(pico.pack(raw, name="acme/low", version=2, artifacts=artifacts))
        return registry

    def test_another_version_takes_the_place(self, versions: Any, fresh: Any) -> None:
        folder = fresh("acme/low@1", "bob/full", registry=versions)
        change = add_experts(folder, ["acme/low"], registry=versions)
        assert (change.added, dict(change.replaced)) == ((), {"acme/low@1": "acme/low@2"})
        assert tree(folder) == tree(fresh("acme/low", "bob/full", registry=versions))
        add_experts(folder, ["acme/low@1"], registry=versions)
        assert tree(folder) == tree(fresh("acme/low@1", "bob/full", registry=versions))

    def test_the_others_keep_their_version(self, versions: Any, fresh: Any, pico: Any) -> None:
        """A reference without a version means the newest of the day of the build, not of the change."""
        folder = fresh("acme/low", registry=pico.library())
        add_experts(folder, ["zoe/low"], registry=versions)
        assert tree(folder) == tree(fresh("acme/low", "zoe/low", registry=pico.library()))

    def test_by_digest(self, versions: Any, fresh: Any) -> None:
        digest = versions.expert("acme/low@2").digest
        folder = fresh("acme/low@1", "zoe/low", registry=versions)
        add_experts(folder, [f"acme/low@sha256:{digest}"], registry=versions)
        remove_experts(folder, [f"acme/low@sha256:{digest}"])
        assert tree(folder) == tree(fresh("zoe/low", registry=versions))

    def test_newer_public_artefacts_are_told(self, versions: Any, fresh: Any, pico: Any) -> None:
        folder = fresh("acme/low@1", registry=versions)
        public = pico.artifacts(seed=0, rows=False)
        (place := pico.scratch("public")).mkdir()
        public.save(place)
        versions.set_base_routing("llama", place, public.info)
        kept = (folder / "public/routing.safetensors").read_bytes()
        change = add_experts(folder, ["zoe/low"], registry=versions)
        assert change.warnings == (
            "The registry has newer public routing artefacts for 'llama'; the folder keeps its own.",
        )
        assert (folder / "public/routing.safetensors").read_bytes() == kept


class TestRefused:
    @pytest.mark.parametrize(
        ("references", "problems"),
        [
            (
                ["acme/lo", "zoe/ful"],
                [
                    "Unknown expert 'acme/lo'. Did you mean 'acme/low'? Known: acme/full, acme/low, bob/full, bob/low, "
                    "zoe/full, zoe/low. The registry is 'REGISTRY'.",
                    "Unknown expert 'zoe/ful'. Did you mean 'zoe/full'? Known: acme/full, acme/low, bob/full, bob/low, "
                    "zoe/full, zoe/low. The registry is 'REGISTRY'.",
                ],
            ),
            (["acme/low@1"], ["acme/low@1 is there already"]),
            (["zoe/low", "zoe/low@1"], ["zoe/low is listed more than once"]),
        ],
    )
    def test_add(self, references: list[str], problems: list[str], fresh: Any, pico: Any) -> None:
        folder = fresh("acme/low", "bob/full")
        before = tree(folder), folder.stat().st_ino
        message = refused(lambda: add_experts(folder, references, registry=pico.library()), PlanError)
        lines = [f"{folder} cannot be changed:", *(f"  - {problem}" for problem in problems)]
        assert message == "\n".join(lines).replace("REGISTRY", str(pico.library().path))
        assert (tree(folder), folder.stat().st_ino) == before

    @pytest.mark.parametrize(
        ("names", "problems"),
        [
            (
                ["acne", "zoe/lo"],
                [
                    "Unknown owner 'acne'. Did you mean 'acme'? Known: acme, zoe.",
                    "Unknown expert 'zoe/lo'. Did you mean 'zoe/low'? Known: acme/low, zoe/low.",
                ],
            ),
            (["zoe/low@2"], ["zoe/low is there in version 1, not 2"]),
            (
                ["zoe/"],
                [
                    "'zoe/' is not an expert name: write owner/expert, for instance 'acme/contracts', each part "
                    "1 to 64 lower-case letters, digits, '_', '.' or '-', starting with a letter or digit."
                ],
            ),
        ],
    )
    def test_remove(self, names: list[str], problems: list[str], composed: Any) -> None:
        folder = composed(experts=("acme/low", "zoe/low"))
        message = refused(lambda: remove_experts(folder, names), PlanError)
        assert message == "\n".join(
            [f"{folder} cannot be changed:", *(f"  - {problem}" for problem in problems)]
        )

    def test_nobody_left(self, composed: Any) -> None:
        folder = composed(experts=("acme/low", "zoe/low"))
        assert refused(lambda: remove_experts(folder, ["zoe", "acme/low"]), PlanError) == (
            f"{folder} cannot be changed: without acme/low, zoe/low no expert is left in it. Use its base alone "
            "(base/ in it is an ordinary model folder), or delete the folder."
        )

    def test_join_and_leave(self, composed: Any, pico: Any) -> None:
        folder = composed(experts=("acme/low", "zoe/low"))
        change = plan_change(folder, add=["acme/full"], remove=["acme"], registry=pico.library())
        assert (change.added, change.removed) == (("acme/full@1",), ("acme/low@1",))
        other = pico.fresh_library()
        raw = pico.write_lora(pico.scratch("raw"), seed=9, r=3, layers_to_transform=[1])
        artifacts = pico.artifacts(seed=1, layers=(1,))
        other.register(pico.pack(raw, name="acme/low", version=2, artifacts=artifacts))
        message = refused(
            lambda: plan_change(folder, add=["acme/low"], remove=["acme"], registry=other), PlanError
        )
        assert message == f"{folder} cannot be changed: acme/low cannot both join and leave."

    def test_an_owner_who_is_out(self, fresh: Any, pico: Any) -> None:
        registry = pico.fresh_library()
        folder = fresh("acme/low", "zoe/low", registry=registry)
        entry = registry.opt_out("bob", reason="a break", by="ann")
        before = tree(folder)
        assert refused(lambda: add_experts(folder, ["bob/low"], registry=registry), ConsentError) == (
            f"{folder} cannot be changed, since owners of the new experts have opted out:\n"
            f"  - bob/low@1: bob opted out on {entry.when} (recorded by ann): a break"
        )
        entry = registry.opt_out("zoe", reason="gone", by="ann")
        assert refused(lambda: add_experts(folder, ["acme/full"], registry=registry), ConsentError) == (
            f"{folder} holds experts of owners who have opted out since it was built. Take them out first, with "
            f"`coterie remove`:\n  - zoe opted out on {entry.when} (recorded by ann): gone"
        )
        assert tree(folder) == before
        remove_experts(folder, ["zoe"])
        add_experts(folder, ["acme/full"], registry=registry)
        assert Lock.read(folder).owners == ("acme",)

    def test_an_owner_whom_the_manifest_leaves_out(self, composed: Any, pico: Any) -> None:
        folder = composed(experts=EXPERTS, opt_out=["bob"])
        assert refused(lambda: add_experts(folder, ["bob/low"], registry=pico.library()), PlanError) == (
            f"{folder} cannot be changed:\n  - bob/low@1: the folder's manifest leaves bob out (opt_out); build a "
            "new folder from a manifest that does not"
        )

    def test_another_anchor(self, fresh: Any, pico: Any) -> None:
        folder = fresh("acme/low")
        before = tree(folder)
        message = refused(lambda: add_experts(folder, ["bob/low"], registry=pico.library("qwen3")), PlanError)
        ours, theirs = (pico.description(family).fingerprint for family in ("llama", "qwen3"))
        assert message == (
            "Manifest 'pico' cannot be composed:\n  - bob/low was trained on another anchor: 'qwen3' with fingerprint "
            f"{theirs}; this composition's is 'llama' with {ours}"
        )
        assert tree(folder) == before

    def test_no_composed_folder(self, tmp_path: Path) -> None:
        assert refused(lambda: remove_experts(tmp_path, ["acme"]), BuildError) == (
            f"{tmp_path} is not a composed folder: it has no composition.json. Make one with `coterie build`."
        )

    def test_a_manifest_that_was_edited(self, fresh: Any) -> None:
        folder = fresh(*EXPERTS)
        manifest = Manifest.from_file(folder / "manifest.yaml")
        text = (folder / "manifest.yaml").read_text().replace("top_k: 2", "top_k: 1")
        (folder / "manifest.yaml").write_text(text)
        assert Manifest.from_file(folder / "manifest.yaml") != manifest
        assert refused(lambda: remove_experts(folder, ["acme"]), BuildError) == (
            f"{folder}/manifest.yaml was changed after the build, so it does not say what the folder is. Build a new "
            "folder from it: coterie build."
        )

    def test_a_manifest_of_an_older_format(self, fresh: Any) -> None:
        """Keys that came later are not in it, nor in the digest that was taken of it."""
        folder = fresh(*EXPERTS)
        data = yaml.safe_load((folder / "manifest.yaml").read_text())
        del data["description"]
        (folder / "manifest.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
        digest = hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
        lock = Lock.read(folder).model_copy(update={"manifest_sha256": digest})
        (folder / LOCK_NAME).write_bytes(lock.to_bytes())
        assert Manifest.from_file(folder / "manifest.yaml").digest != digest
        remove_experts(folder, ["acme"])
        assert Lock.read(folder).owners == ("bob", "zoe")

    def test_files_of_somebody_else(self, fresh: Any) -> None:
        folder = fresh(*EXPERTS)
        (folder / "notes.txt").write_text("mine")
        digest = Lock.read(folder).experts[0].digest
        (folder / "experts" / digest / "more.txt").write_text("mine too")
        before = tree(folder)
        assert refused(lambda: remove_experts(folder, ["acme"]), BuildError) == (
            f"{folder} holds files that no build wrote; move them elsewhere first:\n"
            f"  - experts/{digest}/more.txt\n  - notes.txt"
        )
        assert tree(folder) == before
        assert list(folder.parent.iterdir()) == [folder]


class TestNothingHalfway:
    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
    @pytest.mark.parametrize("where", ["composer.building.link_file", "composer.swap.exchange"])
    def test_the_file_system_refuses(
        self, where: str, number: int, fresh: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise OSError(number, os.strerror(number))

        folder = fresh(*EXPERTS)
        before = tree(folder), folder.stat().st_ino
        monkeypatch.setattr(where, fail)
        with pytest.raises(BuildError):
            remove_experts(folder, ["acme"])
        assert (tree(folder), folder.stat().st_ino) == before
        assert list(folder.parent.iterdir()) == [folder]

    @pytest.mark.parametrize(("at", "left"), [("exchange", EXPERTS), ("fsync_folder", EXPERTS[1:])])
    def test_killed(self, at: str, left: tuple[str, ...], fresh: Any) -> None:
        """Without a chance to tidy up: the old folder or the new one stands, and can be changed again."""
        folder = fresh(*EXPERTS)
        program = (
            "import os, sys, composer.editing as editing, composer.swap as swap\n"
            f"swap.{at} = lambda *_: os._exit(9)\n"
            "editing.remove_experts(sys.argv[1], ['acme'])\n"
        )
        done = subprocess.run([sys.executable, "-c", program, str(folder)], check=False)
        assert done.returncode == 9
        assert tree(folder) == tree(fresh(*left))
        remove_experts(folder, ["zoe"])
        assert tree(folder) == tree(fresh(*left[:-1]))

    def test_one_process_at_a_time(self, fresh: Any) -> None:
        folder = fresh(*EXPERTS)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            message = refused(lambda: remove_experts(folder, ["acme"]), BuildError)
        finally:
            os.close(descriptor)
        assert message == f"Another process is changing {folder}. Nothing was changed here; try again."
        remove_experts(folder, ["acme"])

    def test_changed_between_plan_and_write(self, fresh: Any) -> None:
        folder = fresh(*EXPERTS)
        change = plan_change(folder, remove=["acme"])
        remove_experts(folder, ["zoe"])
        assert refused(lambda: apply_change(change), BuildError) == (
            f"{folder} was changed meanwhile. Nothing was changed here; try again."
        )
        assert Lock.read(folder).owners == ("acme", "bob")


@pytest.mark.parametrize("swapped", [True, False], ids=["one step", "two steps"])
def test_exchange(tmp_path: Path, swapped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not swapped:
        monkeypatch.setattr(composer.swap, "_swapped", lambda *_: False)
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    exchange(tmp_path / "one", tmp_path / "other")
    assert [(tmp_path / name / "file").read_text() for name in ("one", "other")] == ["other", "one"]
    assert len(list(tmp_path.iterdir())) == 2
    shutil.rmtree(tmp_path / "one")
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "one", tmp_path / "other")
    assert (tmp_path / "other" / "file").read_text() == "one"
