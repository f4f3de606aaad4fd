"""An embedder is told by what it computes with, and artefacts by the anchor that they were made on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from experts.errors import AdmissionError
from experts.routing_origin import embedder_digest


def test_an_embedder_keeps_its_digest_under_any_name(pico: Any, tmp_path: Path) -> None:
    folder = pico.embedder()
    digest = embedder_digest(folder)
    assert embedder_digest(Path(shutil.copytree(folder, tmp_path / "renamed"))) == digest
    assert embedder_digest(pico.embedder(seed=1)) != digest


@pytest.mark.parametrize("change", ["weights", "tokenizer", "a module's weights"])
def test_whatever_an_embedder_computes_with_changes_its_digest(
    change: str, pico: Any, tmp_path: Path
) -> None:
    import numpy as np
    from safetensors.numpy import load_file, save_file

    folder = Path(shutil.copytree(pico.embedder(), tmp_path / "same-name"))
    if change == "tokenizer":
        path = folder / "tokenizer.json"
        path.write_text(path.read_text().replace("##", "#"))
    elif change == "weights":
        tensors = load_file(folder / "model.safetensors")
        name = min(tensors)
        save_file(tensors | {name: tensors[name] + 1}, folder / "model.safetensors")
    else:
        (folder / "2_Dense").mkdir()
        save_file({"linear.weight": np.eye(2, dtype="f4")}, folder / "2_Dense" / "model.safetensors")
    assert embedder_digest(folder) != embedder_digest(pico.embedder())


def test_an_embedder_without_safetensors(tmp_path: Path) -> None:
    with pytest.raises(AdmissionError) as caught:
        embedder_digest(tmp_path)
    assert str(caught.value) == (
        f"'{tmp_path}' holds neither model.safetensors nor model.safetensors.index.json; save the base with "
        "save_pretrained (pickled checkpoints are never read)."
    )


def test_an_expert_with_artefacts_of_another_anchor(pico: Any, tmp_path: Path) -> None:
    """A card names its base; artefacts that name another one were made on that."""
    import dataclasses

    artifacts = pico.artifacts(seed=1)
    theirs, ours = pico.anchor_info(seed=1), pico.anchor_info()
    strange = dataclasses.replace(artifacts, info=artifacts.info.model_copy(update={"anchor": theirs}))
    raw = pico.write_lora(tmp_path / "raw", seed=1, r=2, layers_to_transform=[1, 2, 3])
    with pytest.raises(AdmissionError) as caught:
        pico.pack(raw, name="acme/low", artifacts=strange)
    assert str(caught.value) == (
        "The routing artefacts were made on another anchor than the base of acme/low. Make them on that base, or leave "
        "'anchor' out of the card's routing.\n"
        f"  - tensors: sha256:{theirs.fingerprint} found, sha256:{ours.fingerprint} expected"
    )
