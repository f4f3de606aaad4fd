"""register: raw folders, packed folders, dry runs and refusals; nothing half-written."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

RAW = ("--domain", "law", "--license", "Apache-2.0")


@pytest.fixture(scope="session")
def untouched(run: Any, base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    registry = tmp_path_factory.mktemp("untouched") / "registry"
    assert run("base", "add", base_folder, "--name", "pico", registry=registry).code == 0
    return registry


@pytest.fixture
def bare(untouched: Path, tmp_path: Path) -> Path:
    """A registry with the base and no expert, which a test may change."""
    return Path(shutil.copytree(untouched, tmp_path / "bare"))


@pytest.fixture
def packed(run: Any, filled: Path, tmp_path: Path) -> Path:
    """acme's expert as 'coterie train' would have left it: a folder with a card."""
    from registry import Registry

    store = Registry(filled)
    card = store.card("acme/contracts")
    folder = tmp_path / "packed"
    folder.mkdir()
    for name, blob in store.files(card).items():
        shutil.copyfile(blob, folder / name)
    (folder / "card.json").write_bytes(card.to_bytes())
    return folder


def test_raw_folder(run: Any, bare: Path, adapters: dict[str, Path]) -> None:
    before = {path.name: path.read_bytes() for path in adapters["acme"].iterdir()}
    outcome = run(
        "register", adapters["acme"], "--name", "acme/contracts", "--owner", "acme", *RAW, registry=bare
    )
    (row,) = run("list", "--json", registry=bare).json
    assert (outcome.code, outcome.err) == (
        0,
        "Note: without --text the expert publishes no statistics, so only routers that need none can reach it.\n",
    )
    assert outcome.out == (
        f"Registered acme/contracts@1: law, lora, Apache-2.0, 960 parameters, {row['bytes'] / 1000:.1f} kB, digest "
        f"{row['digest'][:12]}.\n"
    )
    assert {path.name: path.read_bytes() for path in adapters["acme"].iterdir()} == before


def test_text_becomes_statistics_and_stays(
    run: Any, bare: Path, adapters: dict[str, Path], texts: dict[str, Path]
) -> None:
    outcome = run(
        "register",
        adapters["acme"],
        "--name",
        "acme/contracts",
        *RAW,
        "--text",
        texts["law"],
        "--json",
        registry=bare,
    )
    assert (outcome.code, outcome.err) == (0, "")
    card = run("show", "acme/contracts", "--json", registry=bare).json["card"]
    assert card["routing"]["statistics"]["layer"] == 2
    assert [file["path"] for file in card["files"]] == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "routing.safetensors",
    ]
    secret = b"indemnify"
    assert secret in texts["law"].read_bytes()
    assert not [path for path in bare.rglob("*") if path.is_file() and secret in path.read_bytes()]


def test_the_next_version_is_taken(run: Any, registry: Path, adapters: dict[str, Path]) -> None:
    outcome = run("register", adapters["hosp"], "--name", "acme/contracts", *RAW, "--json", registry=registry)
    assert outcome.json["version"] == 2
    assert len(run("list", "--all-versions", "--json", registry=registry).json) == 4


def test_packed_folder_needs_no_option(run: Any, bare: Path, packed: Path) -> None:
    outcome = run("register", packed, registry=bare)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith("Registered acme/contracts@1: law, lora, Apache-2.0, 960 parameters, ")
    assert run("register", packed, registry=bare).code == 0  # the same bytes again change nothing
    assert len(run("audit", "list", "--json", registry=bare).json) == 2


def test_packed_folder_under_another_version(run: Any, bare: Path, packed: Path) -> None:
    outcome = run("register", packed, "--version", "4", "--json", registry=bare)
    assert (outcome.code, outcome.json["version"]) == (0, 4)
    assert run("verify", "acme/contracts@4", registry=bare).code == 0
    assert json.loads((packed / "card.json").read_text())["version"] == 1


def test_options_that_contradict_the_card(run: Any, bare: Path, packed: Path) -> None:
    outcome = run(
        "register", packed, "--name", "acme/other", "--license", "MIT", "--domain", "law", registry=bare
    )
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == (
        "Error: The options contradict the folder's card. Leave them out:\n"
        "  - --name is 'acme/other', the card says 'acme/contracts'\n"
        "  - --license is 'MIT', the card says 'Apache-2.0'\n"
    )


def test_text_for_a_packed_folder(run: Any, bare: Path, packed: Path, texts: dict[str, Path]) -> None:
    outcome = run("register", packed, "--text", texts["law"], registry=bare)
    assert outcome.code == 2
    assert (
        outcome.err
        == f"Error: '{packed}' carries its card, which says what it publishes: leave --text out.\n"
    )


@pytest.mark.parametrize("kind", ["raw", "packed"])
def test_dry_run_checks_and_registers_nothing(
    kind: str, run: Any, bare: Path, packed: Path, adapters: dict[str, Path]
) -> None:
    args = (packed,) if kind == "packed" else (adapters["acme"], "--name", "acme/contracts", *RAW)
    outcome = run("register", *args, "--dry-run", registry=bare)
    assert outcome.code == 0
    assert outcome.out.startswith("acme/contracts@1 would be accepted: lora, 960 parameters, ")
    assert outcome.out.endswith(". Nothing was registered (dry run).\n")
    shown = run("register", *args, "--dry-run", "--json", registry=bare).json
    assert list(shown) == ["dry_run", "digest", "card"]
    assert run("list", "--json", registry=bare).json == []


def test_dry_run_refuses_what_registering_would(run: Any, bare: Path, packed: Path) -> None:
    weights = packed / "adapter_model.safetensors"
    before = hashlib.sha256(weights.read_bytes()).hexdigest()
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    after = hashlib.sha256(weights.read_bytes()).hexdigest()
    dry = run("register", packed, "--dry-run", registry=bare)
    real = run("register", packed, registry=bare)
    assert dry == real
    assert (dry.code, dry.out) == (2, "")
    assert dry.err == (
        "Error: The folder of expert 'acme/contracts' is not as packed:\n"
        f"  - adapter_model.safetensors: sha256 is {after}, the card declares {before}\n"
    )


def test_missing_options(run: Any, bare: Path, adapters: dict[str, Path]) -> None:
    outcome = run("register", adapters["acme"], "--domain", "law", registry=bare)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == (
        f"Error: '{adapters['acme']}' carries no card (card.json). Give --name, --license to make one.\n"
    )


def test_another_owner_than_the_name_says(run: Any, bare: Path, adapters: dict[str, Path]) -> None:
    outcome = run("register", adapters["acme"], "--name", "acme/x", "--owner", "hosp", *RAW, registry=bare)
    assert outcome.code == 2
    assert outcome.err == "Error: --owner is 'hosp', but the name 'acme/x' belongs to 'acme'.\n"


def test_a_name_without_an_owner(run: Any, bare: Path, adapters: dict[str, Path]) -> None:
    outcome = run("register", adapters["acme"], "--name", "contracts", *RAW, registry=bare)
    assert outcome.code == 2
    assert outcome.err.startswith("Error: 'contracts' is not an expert name: write owner/expert, ")


def test_no_base_yet(run: Any, adapters: dict[str, Path], tmp_path: Path) -> None:
    outcome = run("register", adapters["acme"], "--name", "acme/x", *RAW, registry=tmp_path / "r")
    assert outcome.code == 2
    assert outcome.err == (
        "Error: The registry has no base yet. Add one with 'coterie base add PATH --name NAME'.\n"
    )
    assert not (tmp_path / "r").exists()


def test_which_base(run: Any, bare: Path, base_folder: Path, adapters: dict[str, Path]) -> None:
    assert run("base", "add", base_folder, "--name", "again", registry=bare).code == 0
    args = ("register", adapters["acme"], "--name", "acme/x", *RAW)
    assert run(*args, registry=bare).err == (
        "Error: The registry has 2 bases: again, pico. Name one with --base.\n"
    )
    assert run(*args, "--base", "pica", registry=bare).err == (
        "Error: Unknown base 'pica'. Did you mean 'pico'? Known: again, pico. Add one with 'coterie base add PATH "
        "--name NAME'.\n"
    )
    assert run(*args, "--base", "pico", registry=bare).code == 0


def test_no_such_folder(run: Any, bare: Path, tmp_path: Path) -> None:
    outcome = run("register", tmp_path / "none", "--name", "acme/x", *RAW, registry=bare)
    assert (outcome.code, outcome.err) == (2, f"Error: There is no folder '{tmp_path}/none'.\n")


def test_an_owner_who_has_opted_out(run: Any, registry: Path, adapters: dict[str, Path]) -> None:
    assert run("opt-out", "add", "acme", "--reason", "gone", "--by", "ann", registry=registry).code == 0
    (entry,) = run("opt-out", "list", "--json", registry=registry).json
    outcome = run("register", adapters["acme"], "--name", "acme/new", *RAW, registry=registry)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.splitlines()[-1] == (
        f"Error: 'acme' has opted out: since {entry['when']}, by ann, because: gone. The registry takes no expert of "
        "this owner until the opt-out is taken back (coterie opt-out remove acme)."
    )


def test_an_adapter_with_a_head_is_refused(
    run: Any, bare: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    import numpy as np
    from safetensors.numpy import load_file, save_file

    folder = Path(shutil.copytree(adapters["acme"], tmp_path / "evil"))
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.weight"] = np.zeros((257, 32), dtype=np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    outcome = run("register", folder, "--name", "acme/evil", *RAW, registry=bare)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == (
        "Error: adapter_model.safetensors of expert 'acme/evil' does not hold exactly the tensors that "
        "adapter_config.json gives on the base 'pico' (all of one dtype out of F32, BF16, F16):\n"
        "  - tensor 'base_model.model.lm_head.weight': F32 (257, 32) found, not allowed here\n"
    )
    assert run("list", "--json", registry=bare).json == []


def test_a_symbolic_link_is_refused_also_when_statistics_are_made(
    run: Any, bare: Path, adapters: dict[str, Path], texts: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(adapters["acme"], tmp_path / "linked"))
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.safetensors").symlink_to(adapters["acme"] / "adapter_model.safetensors")
    os.mkfifo(folder / "pipe")
    for extra in ((), ("--text", texts["law"])):
        outcome = run("register", folder, "--name", "acme/x", *RAW, *extra, registry=bare)
        assert (outcome.code, outcome.out) == (2, "")
        assert "  - adapter_model.safetensors: a symbolic link; a regular file is needed\n" in outcome.err


def test_an_interrupted_register_leaves_nothing(
    run: Any, bare: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from registry.blobs import Staging

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    before = sorted(bare.rglob("*"))
    with monkeypatch.context() as patch:

        def interrupt(self: Staging) -> None:
            raise KeyboardInterrupt

        patch.setattr(Staging, "publish", interrupt)
        outcome = run("register", packed, registry=bare)
    assert (outcome.code, outcome.out, outcome.err) == (130, "", "Interrupted.\n")
    assert sorted(bare.rglob("*")) == before
    assert run("register", packed, registry=bare).code == 0


def test_a_whole_model_is_registered_with_statistics_and_never_copied_into_scratch(
    run: Any, bare: Path, base_folder: Path, texts: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[str] = []
    real = shutil.copy2
    monkeypatch.setattr(shutil, "copy2", lambda *a, **k: copied.append(str(a[0])) or real(*a, **k))
    outcome = run(
        "register", base_folder, "--name", "acme/whole", *RAW, "--text", texts["law"], registry=bare
    )
    assert (outcome.code, copied) == (0, [])
    assert outcome.err == (
        f"Warning: acme/whole: every tensor in '{_raw(outcome.err)}' is byte for byte the base's: this expert changes "
        "nothing. Is it the folder that training wrote?\n"
    )
    card = run("show", "acme/whole", "--json", registry=bare).json["card"]
    assert (card["kind"], card["layers"]) == ("dense", [0, 1, 2, 3])
    assert [file["path"] for file in card["files"]] == [
        "config.json",
        "model.safetensors",
        "routing.safetensors",
    ]


def _raw(text: str) -> str:
    """The folder named in a remark; statistics were put beside links to the files."""
    return text.split("'")[1]
