"""Registers composed models with the Auto classes of transformers; importing it is all there is to do.

import composer.hf
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("out", opt_out={"acme"})

A composed retriever is a folder of sentence-transformers: after the same import, ``SentenceTransformer("out")``.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from composer.configuration import ComposedConfig
from composer.model import ComposedForCausalLM
from composer.retrieval.config import RetrieverConfig
from composer.retrieval.model import RetrieverEncoder

__all__ = ["ComposedConfig", "ComposedForCausalLM", "RetrieverConfig", "RetrieverEncoder"]

AutoConfig.register(ComposedConfig.model_type, ComposedConfig, exist_ok=True)
AutoModelForCausalLM.register(ComposedConfig, ComposedForCausalLM, exist_ok=True)
AutoConfig.register(RetrieverConfig.model_type, RetrieverConfig, exist_ok=True)
AutoModel.register(RetrieverConfig, RetrieverEncoder, exist_ok=True)
