"""base add, list, show and public-routing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

BASE_KEYS = ["name", "fingerprint", "tokenizer_fingerprint", "bytes", "created", "routing", "files"]


def test_add(run: Any, base_folder: Path, tmp_path: Path) -> None:
    outcome = run("base", "add", base_folder, "--name", "pico", registry=tmp_path / "r")
    assert (outcome.code, outcome.err) == (0, "")
    (row,) = run("base", "list", "--json", registry=tmp_path / "r").json
    assert list(row) == BASE_KEYS
    assert row["routing"] is None
    size = sum((base_folder / file["path"]).stat().st_size for file in row["files"])
    assert row["bytes"] == size
    assert outcome.out == (
        f"Added base pico: {len(row['files'])} files, {size / 1000:.1f} kB, fingerprint {row['fingerprint'][:12]}.\n"
    )
    again = run("base", "add", base_folder, "--name", "pico", "--json", registry=tmp_path / "r")
    assert again.json == row


def test_list(run: Any, filled: Path, tmp_path: Path) -> None:
    lines = run("base", "list", registry=filled).out.splitlines()
    assert lines[0].split("  ")[0] == "BASE"
    assert lines[1].startswith("pico  ")
    assert "  yes             " in lines[1]
    assert run("base", "list", registry=tmp_path).out == (
        f"There is no base in the registry '{tmp_path}' yet. Add one with 'coterie base add PATH --name NAME'.\n"
    )


def test_show(run: Any, filled: Path) -> None:
    shown = run("base", "show", "pico", "--json", registry=filled).json
    assert list(shown) == [*BASE_KEYS, "shape"]
    assert shown["shape"] == {
        "model_type": "llama",
        "layers": 4,
        "hidden_size": 32,
        "intermediate_size": 48,
        "dtype": "F32",
    }
    text = run("base", "show", "pico", registry=filled).out
    assert "hidden size:           32\n" in text
    assert f"fingerprint:           {shown['fingerprint']}\n" in text


def test_unknown_base(run: Any, filled: Path) -> None:
    outcome = run("base", "show", "pica", registry=filled)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("Error: Unknown base 'pica'. Did you mean 'pico'? Known: pico.")


def test_no_such_folder(run: Any, tmp_path: Path) -> None:
    outcome = run("base", "add", tmp_path / "none", "--name", "x", registry=tmp_path / "r")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == (
        f"Error: There is no folder '{tmp_path}/none'. Give a checkpoint folder, or a model id of the Hugging Face "
        "hub such as HuggingFaceTB/SmolLM2-135M.\n"
    )
    assert not (tmp_path / "r").exists()


def test_the_hub_is_asked_for_an_id(
    run: Any, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: list[tuple[str, Any]] = []

    def fetch(repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repo, revision))
        assert not any("bin" in pattern or "py" in pattern for pattern in allow_patterns)
        return str(base_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    outcome = run("base", "add", "org/pico", "--name", "pico", "--revision", "v1", registry=tmp_path / "r")
    assert outcome.code == 0, outcome.err
    assert asked == [("org/pico", "v1")]


def test_the_hub_is_out_of_reach(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def fail(*args: object, **kwargs: object) -> str:
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    outcome = run("base", "add", "org/pico", "--name", "pico", registry=tmp_path / "r")
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err == (
        "Error: 'org/pico' is no folder here and could not be fetched from the Hugging Face hub "
        "(LocalEntryNotFoundError). Check the name and the connection, or give a folder.\n"
    )


def test_a_revision_of_a_folder(run: Any, base_folder: Path) -> None:
    outcome = run("base", "add", base_folder, "--name", "pico", "--revision", "main")
    assert outcome.code == 2
    assert (
        outcome.err == f"Error: --revision is for the hub, but '{base_folder}' is a folder. Leave it out.\n"
    )


def test_an_interrupted_add_leaves_no_base(
    run: Any, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from experts.base import BaseDescription

    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(BaseDescription, "from_folder", interrupt)
        outcome = run("base", "add", base_folder, "--name", "pico", registry=tmp_path / "r")
    assert (outcome.code, outcome.out, outcome.err) == (130, "", "Interrupted.\n")
    assert run("base", "list", "--json", registry=tmp_path / "r").json == []
    assert run("verify", registry=tmp_path / "r").code == 0
    assert run("base", "add", base_folder, "--name", "pico", registry=tmp_path / "r").code == 0


class TestPublicRouting:
    def test_computed(self, run: Any, registry: Path, texts: dict[str, Path]) -> None:
        outcome = run(
            "base",
            "public-routing",
            "pico",
            "--text",
            texts["public"],
            "--layers",
            "1-3",
            "--rows",
            registry=registry,
        )
        assert (outcome.code, outcome.err) == (0, "")
        assert outcome.out == (
            "Attached public routing artefacts to base pico: statistics of 22.7 k tokens at layer 1 and rows for 3 "
            "layers.\n"
        )
        (row,) = run("base", "list", "--json", registry=registry).json
        assert row["routing"]["statistics"]["layer"] == 1
        assert row["routing"]["rows"]["layers"] == [1, 2, 3]

    def test_made_elsewhere(
        self, run: Any, base_folder: Path, registry: Path, tmp_path: Path, texts: dict[str, Path]
    ) -> None:
        from pipelines.train import public_routing
        from pipelines.train.windows import read_documents

        made = public_routing(base_folder, read_documents([texts["law"]]), out=tmp_path / "made", layer=3)
        outcome = run("base", "public-routing", "pico", "--from", made, "--json", registry=registry)
        assert outcome.code == 0, outcome.err
        assert outcome.json["routing"]["statistics"]["layer"] == 3

    def test_one_source_only(self, run: Any, registry: Path, texts: dict[str, Path], tmp_path: Path) -> None:
        message = (
            "Error: Give either --text (public text to compute from) or --from (artefacts made elsewhere).\n"
        )
        assert run("base", "public-routing", "pico", registry=registry).err == message
        both = run(
            "base", "public-routing", "pico", "--text", texts["law"], "--from", tmp_path, registry=registry
        )
        assert (both.code, both.err) == (2, message)

    def test_an_embedder_that_is_none(self, run: Any, registry: Path, texts: dict[str, Path]) -> None:
        given = ("--text", texts["public"], "--embedder", texts["public"].parent)
        outcome = run("base", "public-routing", "pico", *given, registry=registry)
        assert outcome.code == 2
        assert outcome.err == (
            f"Error: --embedder '{texts['public'].parent}' is not the folder of a SentenceTransformer (no modules.json "
            "in it).\n"
        )

    def test_not_an_artefact(self, run: Any, registry: Path, tmp_path: Path) -> None:
        outcome = run("base", "public-routing", "pico", "--from", tmp_path, registry=registry)
        assert outcome.code == 2
        assert (
            outcome.err == f"Error: '{tmp_path}' holds no routing.json, which says what its artefacts are.\n"
        )

    def test_a_layer_that_does_not_exist(self, run: Any, registry: Path, texts: dict[str, Path]) -> None:
        outcome = run(
            "base", "public-routing", "pico", "--text", texts["law"], "--layers", "2-4", registry=registry
        )
        assert outcome.code == 2
        assert outcome.err == "Error: layers: layer 4 does not exist; the base has layers 0 to 3.\n"

    def test_text_that_is_not_there(self, run: Any, registry: Path, tmp_path: Path) -> None:
        outcome = run("base", "public-routing", "pico", "--text", tmp_path / "x.txt", registry=registry)
        assert outcome.code == 2
        assert outcome.err == "Error: x.txt cannot be read: No such file or directory.\n"


def test_another_base_under_a_taken_name(run: Any, base_folder: Path, registry: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(base_folder, tmp_path / "other"))
    config = (other / "config.json").read_text()
    (other / "config.json").write_text(config.replace('"rms_norm_eps"', '"_x": 1, "rms_norm_eps"'))
    outcome = run("base", "add", other, "--name", "pico", registry=registry)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("Error: ")
    assert "pico" in outcome.err
