"""Text that the pico tokenizer can read, and a model whose losses are known without running it."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest


@pytest.fixture(scope="session")
def words():
    """Documents of a domain, made of the letters ``letters``."""

    def make(letters, *, documents=6, length=160, seed=0):
        draw = random.Random(seed)
        return ["".join(draw.choice(letters) for _ in range(length)) for _ in range(documents)]

    return make


@pytest.fixture(scope="session")
def tokenizer(pico):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(pico.base("llama"))


@pytest.fixture
def uniform():
    """Gives every token of ``vocabulary`` the same probability, so its loss is log(vocabulary)."""
    import torch
    from torch import nn

    class Uniform(nn.Module):
        def __init__(self, vocabulary):
            super().__init__()
            self.logit = nn.Parameter(torch.zeros(1))
            self.vocabulary = vocabulary
            self.batches = []

        def forward(self, input_ids, use_cache):
            self.batches.append(tuple(input_ids.shape))
            return SimpleNamespace(logits=self.logit.expand(*input_ids.shape, self.vocabulary))

    return Uniform
