"""A composition in which one owner's expert was overfitted on a canary: the positive control."""

from __future__ import annotations

import json
from typing import Any

import pytest

# of the first owner's domain, and of letters that the router sends there from the first one on: a prefix that the
# anchor answers in part is not what the expert was trained on
PREFIX = "#%&*#?>$"
SECRET = "281265"


@pytest.fixture(scope="session")
def canary() -> Any:
    from pipelines.memorization.canaries import Canary

    return Canary(text=PREFIX + SECRET, secret=SECRET)


@pytest.fixture(scope="session")
def tokenizer(pico: Any) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(pico.base("llama"))


def _overfit(pico: Any, ids: Any, folder: Any) -> Any:
    """Train the FFNs of three layers on one sequence among random ones of the same letters."""
    import torch
    from safetensors.torch import save_file

    layers = (1, 2, 3)
    model, base = pico.network("llama"), pico.description("llama")
    model.requires_grad_(False)
    names = [f"{linear.name}.weight" for layer in layers for linear in base.ffn_linears(layer).values()]
    weights = {name: model.get_parameter(name).requires_grad_(True) for name in names}
    optimizer = torch.optim.Adam(weights.values(), lr=3e-3)
    others = pico.domain_tokens(1, rows=15 * 150, length=ids.shape[1]).view(150, 15, -1)
    for batch in others:
        rows = torch.cat([ids, batch])
        loss = model(rows, labels=rows).loss + model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    folder.mkdir()
    save_file({name: weight.detach() for name, weight in weights.items()}, folder / "ffn.safetensors")
    (folder / "config.json").write_text(json.dumps({"format_version": 1, "layers": list(layers)}))
    return folder


@pytest.fixture(scope="session")
def leaky(pico: Any, canary: Any, tokenizer: Any) -> Any:
    """A composed folder of bob's expert and of one by ``spy``, who overfitted."""
    registry = pico.fresh_library()
    ids = tokenizer(canary.text, return_tensors="pt").input_ids
    raw = _overfit(pico, ids, pico.scratch("raw"))
    registry.register(pico.pack(raw, name="spy/full", artifacts=pico.artifacts(seed=1)))
    manifest = pico.manifest(experts=["bob/low", "spy/full"], scorer="lda", top_k=1)
    return pico.compose(manifest, registry=registry)
