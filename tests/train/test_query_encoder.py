"""The encoder cut in two gives what sentence-transformers gives, for every family and wherever it is cut."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experts.base import BaseDescription

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 400,
    "max_position_embeddings": 130,
    "initializer_range": 0.2,
}


def folder(pico: Any, family: str, target: Path) -> Path:
    """The pico embedder's folder with an encoder of another family in it."""
    import torch
    from transformers import AutoConfig, AutoModel

    copy = shutil.copytree(pico.embedder(), target)
    if family != "bert":
        torch.manual_seed(0)
        extra = {"type_vocab_size": 1} if "roberta" in family else {}
        AutoModel.from_config(AutoConfig.for_model(family, **SIZES, **extra)).save_pretrained(copy)
    return copy


@pytest.mark.parametrize("family", ["bert", "roberta", "mpnet"])
def test_both_parts_make_the_whole(pico: Any, tmp_path: Path, family: str) -> None:
    import torch

    from pipelines.train.query_encoder import QueryStates, RetrievalBase, mean_state

    base = folder(pico, family, tmp_path / "base")
    description = BaseDescription.from_folder(base)
    assert (description.layout.name, description.num_layers) == ("encoder", 4)
    texts = [text[: 5 + 9 * n] for n, text in enumerate(pico.domain_texts(0, count=6))]
    for first in (0, 2):
        model = RetrievalBase(base, description=description, first=first)
        expected = model.model.encode_query(texts)
        features = model.tokenize(texts)
        mask = features["attention_mask"]
        stored = QueryStates(32)
        lower = model.lower(features)
        stored.extend(lower, mask)
        states, again = stored.batch([3, 0, 5])
        assert torch.equal(again, mask[[3, 0, 5], : again.shape[1]])
        assert [stored.length(number) for number in range(6)] == mask.sum(dim=1).tolist()
        with torch.no_grad():
            got = model.pool(model.upper(states, again), again)
            hidden = model.encoder(**features, output_hidden_states=True).hidden_states[first]
        np.testing.assert_allclose(got.numpy(), expected[[3, 0, 5]], atol=2e-6)
        assert torch.equal(lower, hidden)
        mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        np.testing.assert_allclose(mean_state(lower, mask), mean / mean.norm(dim=1, keepdim=True), atol=1e-6)


def test_prompts_are_the_stock_models(pico: Any) -> None:
    from pipelines.train.query_encoder import RetrievalBase

    settings = {"prompts": {"query": "ask: ", "document": "say: "}}
    model = RetrievalBase(
        pico.embedder(**settings), description=pico.embedder_description(**settings), first=1
    )
    ids = model.tokenize(["ba"])["input_ids"]
    assert ids.tolist() == model.model.tokenizer(["ask: ba"])["input_ids"]
    found = model.embed_documents(["ba"], batch_size=2).numpy()
    plain = model.model.encode(["say: ba"])
    np.testing.assert_allclose(found, plain, atol=1e-6)
    assert json.loads((pico.embedder(**settings) / "config_sentence_transformers.json").read_text())[
        "prompts"
    ]
