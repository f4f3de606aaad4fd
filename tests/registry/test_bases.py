"""Anchors in the registry: what is taken, what is refused, what is attached."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from experts.base import BaseDescription
from experts.errors import AdmissionError, RegistryError, UnknownNameError
from experts.files import sha256_file
from experts.fingerprint import fingerprint_tensors, tokenizer_fingerprint
from experts.routing_artifacts import RoutingInfo
from registry import Registry


def test_a_base_is_its_files_and_its_description(registry: Registry, base_folder: Path) -> None:
    base = registry.base("pico")
    taken = ["LICENSE", "README.md", "config.json", "model.safetensors", "tokenizer.json"]
    assert [(file.path, file.size, file.sha256) for file in base.files] == [
        (name, (base_folder / name).stat().st_size, sha256_file(base_folder / name)) for name in taken
    ]
    assert {name: path.read_bytes() for name, path in registry.files(base).items()} == {
        name: (base_folder / name).read_bytes() for name in taken
    }
    assert base.fingerprint == fingerprint_tensors(base_folder)
    assert base.tokenizer_fingerprint == tokenizer_fingerprint(base_folder)
    assert base.description == BaseDescription.from_folder(base_folder)
    assert base.created == "2026-01-01T00:00:00Z"
    assert (base.routing, base.routing_sha256) == (None, None)
    assert registry.bases() == [base]


def test_links_are_followed_as_in_a_hub_cache(tmp_path: Path, base_folder: Path) -> None:
    (tmp_path / "snapshot").mkdir()
    for path in base_folder.iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    registry = Registry(tmp_path / "registry")
    added = registry.add_base(tmp_path / "snapshot", name="pico")
    assert added.fingerprint == fingerprint_tensors(base_folder)
    assert not any(path.is_symlink() for path in registry.files(added).values())


def test_adding_the_same_files_again_changes_nothing(registry: Registry, base_folder: Path) -> None:
    before = registry.audit()
    assert registry.add_base(base_folder, name="pico") == registry.base("pico")
    assert registry.audit() == before


def test_a_base_of_the_same_name_with_other_files_is_refused(
    registry: Registry, base_folder: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(base_folder, tmp_path / "other")
    (other / "tokenizer.json").write_text("{}")
    (other / "README.md").unlink()
    (other / "LICENSE.txt").touch()
    with pytest.raises(RegistryError) as caught:
        registry.add_base(other, name="pico")
    assert str(caught.value) == (
        f"The registry has a base 'pico' already, and '{other}' holds other files; a base never changes. "
        "Add this one under another name:\n  - 'LICENSE.txt' is not among the base's files\n  - "
        "'README.md' is missing\n  - 'tokenizer.json' has other bytes"
    )
    assert registry.add_base(other, name="pico-2").fingerprint == registry.base("pico").fingerprint


def test_a_base_that_another_process_adds_meanwhile_wins(
    root: Path, base_folder: Path, make_base: Any
) -> None:
    other = make_base(seed=4)
    registry, rival = Registry(root), Registry(root)

    def race(done: int, total: int) -> None:
        if done == total:
            rival.add_base(other, name="pico")

    with pytest.raises(RegistryError) as caught:
        registry.add_base(base_folder, name="pico", progress=race)
    assert str(caught.value) == (
        f"The registry has a base 'pico' already, and '{base_folder}' holds other files; a base never "
        "changes. Add this one under another name:\n  - 'model.safetensors' has other bytes"
    )
    assert len(registry.audit()) == 1
    assert registry.fsck().ok


def test_progress_counts_every_byte_twice(tmp_path: Path, base_folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    registry = Registry(tmp_path / "registry")
    base = registry.add_base(
        base_folder, name="pico", progress=lambda done, total: seen.append((done, total))
    )
    total = 2 * sum(file.size for file in base.files)
    assert {of for _, of in seen} == {total}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (total, total)


@pytest.mark.parametrize("name", ["Pico", "a/b", "", "x" * 65, "-x", "pico\n"])
def test_a_malformed_name_is_refused(registry: Registry, base_folder: Path, name: str) -> None:
    with pytest.raises(RegistryError) as caught:
        registry.add_base(base_folder, name=name)
    assert str(caught.value) == (
        f"'{name}' is not a name for a base: use 1 to 64 lower-case letters, digits, '_', '.' or '-', "
        "starting with a letter or digit, for instance 'smollm2'."
    )


def test_a_folder_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RegistryError) as caught:
        Registry(tmp_path / "registry").add_base(tmp_path / "none", name="pico")
    assert str(caught.value) == (
        f"The base folder '{tmp_path / 'none'}' does not exist or is not a folder: give a model's folder."
    )


def test_a_pickled_checkpoint_is_refused(tmp_path: Path, base_folder: Path) -> None:
    folder = shutil.copytree(base_folder, tmp_path / "pickled")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    registry = Registry(tmp_path / "registry")
    with pytest.raises(AdmissionError) as caught:
        registry.add_base(folder, name="pico")
    assert str(caught.value) == (
        f"'{folder}' holds no safetensors: pytorch_model.bin is a pickle, which is never read; convert it where you "
        'trust it: python -c "from transformers import AutoModelForCausalLM as M; '
        f"M.from_pretrained('{folder}', dtype='auto').save_pretrained('NEW_FOLDER')\""
    )
    assert not registry.path.exists()


def test_an_unknown_base_is_named_with_the_nearest(registry: Registry) -> None:
    with pytest.raises(UnknownNameError) as caught:
        registry.base("pcio")
    assert str(caught.value) == (
        "Unknown base 'pcio'. Did you mean 'pico'? Known: pico. Add it to the registry "
        f"'{registry.path}' with: coterie base add PATH --name pcio"
    )


def test_the_newest_routing_artefacts_count(registry: Registry, tmp_path: Path, write_routing: Any) -> None:
    first = write_routing(tmp_path / "first", seed=1)
    attached = registry.set_base_routing("pico", tmp_path / "first", first)
    assert attached.routing == first
    assert attached.routing_sha256 == sha256_file(tmp_path / "first" / "routing.safetensors")
    second = write_routing(tmp_path / "second", seed=2)
    registry.set_base_routing("pico", tmp_path / "second", second)
    registry.set_base_routing("pico", tmp_path / "second", second)  # once more changes nothing
    newest = registry.base("pico")
    assert newest.routing_sha256 == sha256_file(tmp_path / "second" / "routing.safetensors")
    assert newest.routing_sha256 is not None
    assert (
        registry.blob_path(newest.routing_sha256).read_bytes()
        == (tmp_path / "second" / "routing.safetensors").read_bytes()
    )
    assert [(entry.action, entry.detail.get("version")) for entry in registry.audit()] == [
        ("base.add", None),
        ("base.routing", 1),
        ("base.routing", 2),
    ]
    assert registry.fsck().ok


def test_routing_artefacts_must_be_what_they_are_declared_to_be(
    registry: Registry, tmp_path: Path, write_routing: Any
) -> None:
    write_routing(tmp_path / "routing")
    with pytest.raises(AdmissionError, match="does not hold what it declares"):
        registry.set_base_routing("pico", tmp_path / "routing", RoutingInfo())
    assert registry.base("pico").routing is None


def test_routing_artefacts_need_a_base(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"^Unknown base 'nano'"):
        registry.set_base_routing("nano", tmp_path, RoutingInfo())
