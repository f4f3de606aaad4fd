"""Loading and saving: owners left out, damaged folders, revocations, Auto classes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import composer.hf  # noqa: F401 - registers the Auto classes
from composer.loading import load
from composer.lock import Lock
from composer.model import ComposedForCausalLM
from experts.errors import (
    AdmissionError,
    BuildError,
    CoterieError,
    IntegrityError,
    OptOutError,
    RegistryError,
    UnknownNameError,
)


@pytest.fixture
def folder(pico: Any) -> Path:
    """A composed folder with files of its own, to be damaged."""
    return Path(shutil.copytree(pico.composed("mixed"), pico.scratch("folder")))


def _logits(model: Any, pico: Any) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(pico.prompts()).logits
    return logits


def _expert_folder(folder: Path, owner: str) -> Path:
    return folder / next(e.folder for e in Lock.read(folder).experts if e.owner == owner)


def _refused(call: Callable[[], Any], error: type[CoterieError] = BuildError) -> str:
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    return str(caught.value)


@pytest.mark.parametrize("damage", ["deleted", "poisoned", "unreadable"])
def test_an_absent_owners_files_are_never_opened(pico: Any, folder: Path, damage: str) -> None:
    expected = _logits(load(folder, opt_out={"bob"}), pico)
    theirs = _expert_folder(folder, "bob")
    if damage == "deleted":
        shutil.rmtree(theirs)
    else:
        for path in theirs.iterdir():
            path.unlink()
            if damage == "poisoned":
                path.write_bytes(b"\xff" * 1000)
            else:
                path.mkdir()  # no reader gets past this, root or not
    assert torch.equal(_logits(load(folder, opt_out={"bob"}), pico), expected)
    with pytest.raises(CoterieError):
        load(folder)


_opened: list[str] | None = None
"""Where the hook writes; None: nothing is recorded."""


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if _opened is not None and event == "open":
        _opened.append(str(args[0]))


def test_the_interpreter_sees_no_absent_file_opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's own audit events: every file that is opened during a load without an owner."""
    sys.addaudithook(_hook)  # for good: an audit hook cannot be taken away
    opened: list[str] = []
    monkeypatch.setattr(sys.modules[__name__], "_opened", opened)
    load(folder, opt_out={"bob"})
    monkeypatch.undo()
    theirs, others = _expert_folder(folder, "bob").name, _expert_folder(folder, "acme").name
    assert any(others in path for path in opened), "the hook does not see what is opened"
    assert not any(theirs in path for path in opened)


def test_owners_and_experts(pico: Any) -> None:
    model = load(pico.composed("mixed"), opt_out={"bob"})
    assert model.owners == ("acme", "zoe")
    assert model.expert_names == ("acme/low", "zoe/low")
    assert model.owners_of_experts == ("acme", "zoe")
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_whoever_is_out_at_load_may_be_named_at_request(pico: Any) -> None:
    model = load(pico.composed("mixed"), opt_out={"bob"})
    ids = pico.prompts()
    with torch.inference_mode():
        assert torch.equal(model(ids, opt_out={"bob"}).logits, model(ids).logits)


def test_owners_that_nobody_knows(pico: Any) -> None:
    assert _refused(lambda: load(pico.composed(), opt_out={"acne"}), UnknownNameError) == (
        "Unknown owner 'acne'. Did you mean 'acme'? Known: acme, bob, zoe."
    )
    assert _refused(lambda: load(pico.composed(), opt_out="acme"), OptOutError) == (
        "opt_out is the string 'acme'. Write {'acme'}."
    )


def test_a_registry_revokes(pico: Any) -> None:
    registry = pico.fresh_library()
    folder = pico.compose(pico.manifest("mixed"), registry=registry)
    assert load(folder, registry=registry).owners == ("acme", "bob", "zoe")
    registry.opt_out("bob", reason="left", by="bob")
    for ledger in (registry, registry.path, str(registry.path)):
        model = load(folder, registry=ledger)
        assert model.owners == ("acme", "zoe")
    assert torch.equal(_logits(model, pico), _logits(load(folder, opt_out={"bob"}), pico))
    assert load(folder, registry=registry, opt_out={"acme"}).owners == ("zoe",)
    with pytest.raises(
        RegistryError, match=r"There is no registry '.*-typo', so nobody can say who has opted out"
    ):
        load(folder, registry=f"{registry.path}-typo")
    registry.opt_in("bob", reason="back", by="bob")
    assert load(folder, registry=registry).owners == ("acme", "bob", "zoe")


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    assert _refused(lambda: load(tmp_path)) == (
        f"{tmp_path} is not a composed folder: it has no composition.json. Make one with `coterie build`."
    )


def test_unknown_arguments(pico: Any) -> None:
    assert _refused(lambda: load(pico.composed(), opt_outs={"acme"}, trust=True)) == (
        "Unknown arguments for loading a composed model: opt_outs, trust. Allowed: opt_out, registry, verify, dtype, "
        "device, attn_implementation, experts_implementation."
    )
    assert _refused(lambda: load(pico.composed(), device_map={"": 0})) == (
        "A composed model lives on one device; give device='cuda:0' or device_map='auto'."
    )


def test_a_file_of_another_size(folder: Path) -> None:
    path = _expert_folder(folder, "bob") / "ffn.safetensors"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes() + b"\0")
    assert _refused(lambda: load(folder)) == (
        f"{path} is missing or has been changed (expected {size} bytes). Build the folder again."
    )


def test_a_file_that_is_missing(folder: Path) -> None:
    path = _expert_folder(folder, "acme") / "adapter_model.safetensors"
    size = path.stat().st_size
    path.unlink()
    assert _refused(lambda: load(folder)) == (
        f"{path} is missing or has been changed (expected {size} bytes). Build the folder again."
    )


def test_a_byte_that_was_flipped(folder: Path) -> None:
    import hashlib

    path = _expert_folder(folder, "acme") / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    before = hashlib.sha256(data).hexdigest()
    data[-1] ^= 1
    path.unlink()
    path.write_bytes(bytes(data))
    assert load(folder, verify=True, opt_out={"acme"}).owners == ("bob", "zoe")
    assert _refused(lambda: load(folder, verify=True), IntegrityError) == (
        f"{path} has sha256 {hashlib.sha256(data).hexdigest()}, the composition says {before}. Build the folder again."
    )


def test_a_card_that_was_changed(folder: Path) -> None:
    import rfc8785

    path = _expert_folder(folder, "acme") / "card.json"
    digest = path.parent.name
    card = json.loads(path.read_bytes())
    path.unlink()
    path.write_bytes(rfc8785.dumps({**card, "domain": "other"}))
    import hashlib

    now = hashlib.sha256(path.read_bytes()).hexdigest()
    assert _refused(lambda: load(folder), IntegrityError) == (
        f"The card of acme/low in {path.parent} has digest {now}, the composition says {digest}. Build the folder "
        "again."
    )


def test_tensors_that_do_not_belong(folder: Path) -> None:
    """Same size, other names: what the base would take for its own weights is refused."""
    path = _expert_folder(folder, "acme") / "adapter_model.safetensors"
    data = path.read_bytes()
    name = b"base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"
    other = name.replace(b"layers.1.mlp", b"layers.0.mlp")
    assert data.count(name) == 1
    path.unlink()
    path.write_bytes(data.replace(name, other))
    assert _refused(lambda: load(folder), AdmissionError) == (
        f"The weights of acme/low are not what its configuration says: extra ['{other.decode()}'], missing "
        f"['{name.decode()}']. Build the folder again."
    )


@pytest.mark.parametrize("block", ["low_rank", "stacked", "mixed"])
def test_dtypes(pico: Any, block: str) -> None:
    folder = pico.composed(block, dtype="bfloat16")
    model = load(folder)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert _logits(model, pico).isfinite().all()
    assert {p.dtype for p in load(folder, dtype=torch.float32).parameters()} == {torch.float32}
    assert {p.dtype for p in load(folder, torch_dtype="float32").parameters()} == {torch.float32}
    assert {p.dtype for p in load(pico.composed(block)).parameters()} == {torch.float32}


@pytest.mark.parametrize("block", ["low_rank", "stacked", "mixed"])
@pytest.mark.parametrize("scorer", ["lda", "learned"])
def test_bfloat16_is_bit_identical_through_build_and_load(pico: Any, block: str, scorer: str) -> None:
    """Ties at the edge of the choice are frequent in bfloat16; they must fall alike."""
    settings = {"dtype": "bfloat16", "scorer": scorer}
    never = [entry.ref for entry in pico.manifest(block).experts if not entry.ref.startswith("bob/")]
    expected = _logits(pico.loaded(block, experts=never, **settings), pico)
    assert torch.equal(_logits(load(pico.composed(block, **settings), opt_out={"bob"}), pico), expected)


def test_auto_classes(pico: Any) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = pico.composed("mixed")
    config = AutoConfig.from_pretrained(folder)
    assert config.model_type == "coterie"
    assert config.base_config.model_type == "llama"
    assert config.composition == Lock.read(folder).membership_digest
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(model, ComposedForCausalLM)
    assert torch.equal(_logits(model, pico), _logits(load(folder), pico))
    without = AutoModelForCausalLM.from_pretrained(folder, opt_out={"acme"}, dtype=torch.float32)
    assert without.owners == ("bob", "zoe")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.decode(tokenizer("ABCabc").input_ids)
    assert text == tokenizer.decode(AutoTokenizer.from_pretrained(pico.base())("ABCabc").input_ids)


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys, composer; assert 'torch' not in sys.modules, 'torch'; composer.Manifest"
    subprocess.run([sys.executable, "-c", code + "; assert 'torch' not in sys.modules"], check=True)


def test_saving_refuses_changed_weights(pico: Any, tmp_path: Path) -> None:
    model = load(pico.composed("stacked"))
    name, parameter = next((n, p) for n, p in model.named_parameters() if n.endswith("down_proj"))
    parameter.data[1, 0, 0] += 1
    assert _refused(lambda: model.save_pretrained(tmp_path / "out")) == (
        f"'{name}' was changed after loading, so it is no owner's published weight and its lineage is not known. "
        "Publish the change as an expert, or save a state dict yourself."
    )
    assert list(tmp_path.iterdir()) == []


def test_saving_needs_a_folder_behind_the_model_and_none_before_it(pico: Any, tmp_path: Path) -> None:
    from composer.configuration import ComposedConfig

    config = ComposedConfig(base_config=pico.dense().config)
    assert _refused(lambda: ComposedForCausalLM(config).save_pretrained(tmp_path / "out")) == (
        "This model was not loaded from a composed folder, so there are no published files to save. Use "
        "`coterie build`."
    )
    model = pico.loaded("mixed")
    assert _refused(lambda: model.save_pretrained(tmp_path)) == (
        f"The output folder {tmp_path} exists. Choose another name, or remove it first."
    )


def test_saving_links(pico: Any, tmp_path: Path) -> None:
    folder = pico.composed("mixed")
    pico.loaded("mixed").save_pretrained(tmp_path / "out")
    for path in (p for p in (tmp_path / "out").rglob("*.safetensors")):
        assert path.samefile(folder / path.relative_to(tmp_path / "out"))
    assert Lock.read(tmp_path / "out") == Lock.read(folder)


def _files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("recipe", ["flexolmo", "btx", "soup"])
def test_saving_without_an_owner_leaves_what_removing_does(recipe: str, pico: Any, tmp_path: Path) -> None:
    """File for file, manifest and lock included: nothing tells the name, the prompts or the weights of who is out."""
    from composer.editing import add_experts, remove_experts
    from composer.manifest import Manifest

    wish = pico.manifest("mixed" if recipe == "flexolmo" else "dense", description="Three friends.").to_dict()
    wish["recipe"] = recipe
    wish["experts"].reverse()  # removing puts them in order
    if recipe == "btx":
        wish["router"] = {"scorer": "prompts"}
        for entry in wish["experts"]:
            owner = entry["ref"].partition("/")[0]
            entry |= {"positive_prompts": [f"secret of {owner}"], "negative_prompts": [f"not {owner}"]}
    if recipe != "flexolmo":
        weights = {entry["ref"]: 2.0 for entry in wish["experts"]}
        wish["upcycle"] = {"trunk": {"method": "average", "weights": weights}}
    if recipe == "soup":
        del wish["router"]
    folder = pico.compose(Manifest.from_dict(wish))
    assert any(b"bob" in content for content in _files(folder).values()), (
        "the search does not find what is there"
    )
    load(folder, opt_out={"bob"}).save_pretrained(tmp_path / "saved")
    shutil.copytree(folder, tmp_path / "removed")
    remove_experts(tmp_path / "removed", ["bob"])
    saved = _files(tmp_path / "saved")
    assert saved == _files(tmp_path / "removed")
    assert [name for name, content in saved.items() if b"bob" in content] == []
    # it is a folder like any other
    library = pico.library() if recipe == "flexolmo" else pico.dense_library()
    add_experts(
        tmp_path / "saved",
        ["bob/full" if recipe == "flexolmo" else "bob/dense"],
        registry=library,
        prompts=["again"] if recipe == "btx" else (),
    )
    assert load(tmp_path / "saved").owners == ("acme", "bob", "zoe")


def test_saving_everybody_keeps_the_manifest(pico: Any, tmp_path: Path) -> None:
    """In the order in which it was written; where nobody is left there is none to write."""
    wish = pico.manifest("mixed", experts=("zoe/low", "acme/low"), description="Two friends.")
    folder = pico.compose(wish)
    load(folder).save_pretrained(tmp_path / "all")
    assert _files(tmp_path / "all") == _files(folder)
    load(folder, opt_out={"acme", "zoe"}).save_pretrained(tmp_path / "none")
    left = _files(tmp_path / "none")
    assert "manifest.yaml" not in left
    assert [name for name, content in left.items() if b"zoe" in content or b"acme" in content] == []
    assert torch.equal(_logits(load(tmp_path / "none"), pico), _logits(pico.dense(), pico))


def test_an_expert_layer_alone_does_not_know_who_is_allowed(pico: Any) -> None:
    model = pico.loaded("mixed")
    with pytest.raises(RuntimeError) as caught:
        model.base(pico.prompts())
    assert str(caught.value) == (
        "An expert layer was called outside of a composed model's forward pass, so it does not know which experts are "
        "allowed. Call the composed model, not the base model inside it."
    )
