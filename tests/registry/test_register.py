"""Registering experts: what is entered, what is refused, and whose bytes are checked."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from experts.base import BaseDescription
from experts.card import BaseRef, ExpertCard
from experts.errors import AdmissionError, CardError, ConsentError, RegistryError
from experts.files import sha256_file
from registry import ExpertRecord, Registry


def test_a_registered_expert_can_be_read_back(registry: Registry, make_expert: Any) -> None:
    folder = make_expert("acme/contracts", routing=True)
    record = registry.register(folder)
    card = ExpertCard.from_bytes((folder / "card.json").read_bytes())
    assert record == ExpertRecord(
        name="acme/contracts",
        version=1,
        owner="acme",
        domain="law",
        kind="lora",
        license="Apache-2.0",
        base_name="pico",
        base_fingerprint=card.base.fingerprint,
        digest=sha256_file(folder / "card.json"),
        parameters=3 * (8 + 12) * 2,  # three linears of 8 x 12 at rank 2
        bytes=sum(path.stat().st_size for path in folder.iterdir() if path.name != "card.json"),
        created="2026-01-31T12:00:00Z",
        sequence=1,
        opted_out=False,
    )
    assert record.ref == "acme/contracts@1"
    assert registry.card(record) == registry.card("acme/contracts") == card
    expected = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "card.json"}
    assert {path: file.read_bytes() for path, file in registry.files(record).items()} == expected
    assert registry.files(card) == registry.files(record)
    assert len(expected) == 3


def test_the_copy_shares_nothing_with_the_publishers_folder(registry: Registry, make_expert: Any) -> None:
    folder = make_expert()
    record = registry.register(folder)
    weights = registry.files(record)["adapter_model.safetensors"]
    assert weights.stat().st_ino != (folder / "adapter_model.safetensors").stat().st_ino
    (folder / "adapter_model.safetensors").write_bytes(b"swapped")
    assert registry.verify(record.ref).ok


def test_registering_again_changes_nothing(registry: Registry, make_expert: Any) -> None:
    folder = make_expert()
    record = registry.register(folder)
    before = registry.audit()
    assert registry.register(folder) == record
    assert registry.audit() == before


def test_registering_again_heals_a_damaged_blob(registry: Registry, make_expert: Any) -> None:
    folder = make_expert()
    record = registry.register(folder)
    path = registry.files(record)["adapter_model.safetensors"]
    path.unlink()
    assert not registry.verify(record.ref).ok
    registry.register(folder)
    assert registry.verify(record.ref).ok


def test_a_version_never_changes(registry: Registry, make_expert: Any) -> None:
    first = registry.register(make_expert(seed=1))
    other = make_expert(seed=2)
    with pytest.raises(RegistryError) as caught:
        registry.register(other)
    assert str(caught.value) == (
        "'acme/contracts' version 1 was registered on 2026-01-31T12:00:00Z with another content (card "
        f"sha256:{first.digest}, this one is sha256:{sha256_file(other / 'card.json')}): a version never "
        "changes. Pack this one as version 2."
    )
    assert registry.experts(all_versions=True) == [first]


def test_versions_only_go_up(registry: Registry, make_expert: Any) -> None:
    registry.register(make_expert(version=3))
    with pytest.raises(RegistryError) as caught:
        registry.register(make_expert(version=2))
    assert str(caught.value) == (
        "'acme/contracts' has version 3 already, so version 2 cannot be added: versions only go up. Pack "
        "this one as version 4."
    )


def test_an_expert_of_another_anchor_of_equal_shape_is_refused(
    registry: Registry, make_expert: Any, make_base: Any, base_ref: BaseRef
) -> None:
    other = make_base(seed=9)
    description = BaseDescription.from_folder(other)
    reference = base_ref.model_copy(update={"fingerprint": description.fingerprint})
    folder = make_expert(base=description, base_ref=reference)
    with pytest.raises(AdmissionError) as caught:
        registry.register(folder)
    tokenizer = base_ref.tokenizer_fingerprint
    assert str(caught.value) == (
        f"'acme/contracts' was made for the base 'pico' (tensors sha256:{description.fingerprint}, "
        f"tokenizer sha256:{tokenizer}), which the registry '{registry.path}' does not have. Add that base "
        "with 'coterie base add', or train the expert on one that is there:\n  - base 'pico': tensors "
        f"sha256:{base_ref.fingerprint}, tokenizer sha256:{tokenizer}"
    )
    assert registry.experts() == []


def test_an_expert_of_another_tokenizer_is_refused(
    registry: Registry, make_expert: Any, base_ref: BaseRef
) -> None:
    folder = make_expert(base_ref=base_ref.model_copy(update={"tokenizer_fingerprint": "0" * 64}))
    with pytest.raises(AdmissionError, match=f"tokenizer sha256:{'0' * 64}"):
        registry.register(folder)


def test_a_registry_without_bases_says_so(tmp_path: Path, make_expert: Any, base_ref: BaseRef) -> None:
    registry = Registry(tmp_path / "registry")
    with pytest.raises(AdmissionError) as caught:
        registry.register(make_expert())
    assert str(caught.value) == (
        f"'acme/contracts' was made for the base 'pico' (tensors sha256:{base_ref.fingerprint}, tokenizer "
        f"sha256:{base_ref.tokenizer_fingerprint}), which the registry '{registry.path}' does not have. Add "
        "that base with 'coterie base add', or train the expert on one that is there; there is no base yet."
    )
    assert not registry.path.exists()


def test_a_base_is_known_by_its_bytes_and_not_by_its_name(
    registry: Registry, make_expert: Any, base_ref: BaseRef, base_folder: Path
) -> None:
    reference = base_ref.model_copy(update={"name": "what-others-call-it"})
    assert registry.register(make_expert("a/one", base_ref=reference)).base_name == "pico"
    registry.add_base(base_folder, name="what-others-call-it")
    assert registry.register(make_expert("a/two", base_ref=reference)).base_name == "what-others-call-it"


def test_an_owner_who_is_out_registers_nothing(registry: Registry, make_expert: Any) -> None:
    registry.register(make_expert())
    registry.opt_out("acme", reason="left", by="ann")
    with pytest.raises(ConsentError) as caught:
        registry.register(make_expert("acme/other"))
    assert str(caught.value) == (
        "'acme' has opted out: since 2026-01-31T12:01:00Z, by ann, because: left. The registry takes no "
        "expert of this owner until the opt-out is taken back (coterie opt-out remove acme)."
    )
    assert registry.fsck().orphans == ()  # refused before anything was copied
    registry.opt_in("acme", reason="back", by="ann")
    registry.register(make_expert("acme/other"))


def test_an_opt_out_during_the_registration_counts(
    registry: Registry, make_expert: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import registry.enrol as enrol

    registry.register(make_expert())

    def check_and_leave(*arguments: Any) -> Any:
        summary = check_expert(*arguments)
        registry.opt_out("acme", reason="left", by="ann")
        return summary

    check_expert = enrol.check_expert
    monkeypatch.setattr(enrol, "check_expert", check_and_leave)
    with pytest.raises(ConsentError) as caught:
        registry.register(make_expert("acme/other"))
    assert str(caught.value).startswith(
        "'acme' has opted out: since 2026-01-31T12:01:00Z, by ann, because: left."
    )
    assert [record.name for record in registry.experts()] == ["acme/contracts"]


def test_the_check_sees_the_copy_and_the_publisher_cannot_change_it(
    registry: Registry, make_expert: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Swap the weights between the digest check and the admission, as a hostile publisher would."""
    import registry.enrol as enrol

    folder = make_expert()
    weights = folder / "adapter_model.safetensors"
    honest = weights.read_bytes()
    tensors = load_file(weights)
    seen: list[Path] = []

    def swap_and_check(staged: Path, card: ExpertCard, base: BaseDescription) -> Any:
        save_file({name: np.full_like(array, np.nan) for name, array in tensors.items()}, weights)
        (folder / "extra.py").write_text("hostile")
        seen.append(staged)
        return check_expert(staged, card, base)

    check_expert = enrol.check_expert
    monkeypatch.setattr(enrol, "check_expert", swap_and_check)
    record = registry.register(folder)
    assert seen[0].is_relative_to(registry.path / "tmp")
    assert registry.files(record)["adapter_model.safetensors"].read_bytes() == honest
    assert set(registry.files(record)) == {"adapter_config.json", "adapter_model.safetensors"}


def test_a_swap_between_check_and_copy_is_caught(
    registry: Registry, make_expert: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import registry.enrol as enrol

    folder = make_expert()
    weights = folder / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    before = sha256_file(weights)

    def check_and_swap(*arguments: Any) -> None:
        check_files(*arguments)
        data[-1] ^= 1
        weights.write_bytes(data)

    check_files = enrol.check_files
    monkeypatch.setattr(enrol, "check_files", check_and_swap)
    with pytest.raises(AdmissionError) as caught:
        registry.register(folder)
    size = len(data)
    assert str(caught.value) == (
        f"'adapter_model.safetensors' has {size} bytes with the digest sha256:{sha256_file(weights)}, but "
        f"its card declares {size} bytes with sha256:{before}: pack the expert again."
    )
    assert registry.experts() == []
    assert registry.fsck().orphans == ()


def tamper_extra_file(folder: Path) -> str:
    (folder / "x.py").write_text("print()")
    return "x.py: a regular file that the card does not list; remove it"


def tamper_symlink(folder: Path) -> str:
    target = folder.parent / "moved"
    (folder / "adapter_config.json").rename(target)
    (folder / "adapter_config.json").symlink_to(target)
    return "adapter_config.json: a symbolic link; a regular file is needed"


def tamper_fifo(folder: Path) -> str:
    (folder / "adapter_config.json").unlink()
    os.mkfifo(folder / "adapter_config.json")
    return "adapter_config.json: a FIFO; a regular file is needed"


def tamper_hard_link(folder: Path) -> str:
    os.link(folder / "adapter_config.json", folder.parent / "another")
    return "adapter_config.json: has 2 hard links; copy the file, so that nothing else can change it"


@pytest.mark.parametrize("tamper", [tamper_extra_file, tamper_symlink, tamper_fifo, tamper_hard_link])
def test_a_folder_that_is_not_as_packed_is_refused(
    registry: Registry, make_expert: Any, tmp_path: Path, tamper: Any
) -> None:
    folder = shutil.copytree(make_expert(), tmp_path / "package")
    problem = tamper(folder)
    with pytest.raises(AdmissionError) as caught:
        registry.register(folder)
    message = "The folder of expert 'acme/contracts' is not as packed:"
    assert (message, problem) == (str(caught.value).partition("\n")[0], caught.value.problems[0])
    assert registry.experts() == []
    assert registry.fsck().orphans == ()


def test_a_hostile_adapter_that_was_packed_by_hand_is_refused(
    registry: Registry, make_expert: Any, tmp_path: Path
) -> None:
    """PEFT would write the extra tensor into the shared base."""
    folder = shutil.copytree(make_expert(), tmp_path / "package")
    weights = folder / "adapter_model.safetensors"
    name = "base_model.model.lm_head.weight"
    save_file(load_file(weights) | {name: np.zeros((16, 8), np.float32)}, weights)
    fields = json.loads((folder / "card.json").read_text())
    for entry in fields["files"]:
        path = folder / entry["path"]
        entry |= {"size": path.stat().st_size, "sha256": sha256_file(path)}
    (folder / "card.json").write_bytes(ExpertCard.create(**fields).to_bytes())
    with pytest.raises(AdmissionError) as caught:
        registry.register(folder)
    assert str(caught.value) == (
        "adapter_model.safetensors of expert 'acme/contracts' does not hold exactly the tensors that "
        "adapter_config.json gives on the base 'pico' (all of one dtype out of F32, BF16, F16):\n"
        f"  - tensor '{name}': F32 (16, 8) found, not allowed here"
    )
    assert registry.experts() == []
    assert registry.fsck().orphans == ()


def test_a_folder_without_a_card_is_refused(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(CardError) as caught:
        registry.register(tmp_path)
    assert str(caught.value) == f"'{tmp_path}' holds no card.json; pack the expert first."


def test_an_edited_card_is_refused(registry: Registry, make_expert: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(make_expert(), tmp_path / "package")
    card = json.loads((folder / "card.json").read_text())
    (folder / "card.json").write_text(json.dumps(card, indent=2))
    with pytest.raises(CardError, match="is not in canonical form"):
        registry.register(folder)
