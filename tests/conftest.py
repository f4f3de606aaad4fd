"""Pico models of six decoder families, three owners' experts on each, and compositions of them, made on demand.

Everything is made once per session and shared; what the fixtures return must not be changed, unless a docstring
says that it is fresh. Nothing here imports torch before a test asks for a model.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

if TYPE_CHECKING:
    import torch

    from composer.manifest import Manifest
    from composer.model import ComposedForCausalLM
    from experts.base import BaseDescription
    from experts.card import ExpertCard
    from registry import Registry

WIDTH = 32
LAYERS = 4
GATE_LAYER = 1
VOCABULARY = 97
_SIZES = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "olmo2": {},
    "gemma3_text": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16},
    "gpt_neox": {},
    "phi3": {},
}
"""Gated, gated with QK norm, post-norm, sliding window, biases without a gate, fused gate and up."""
_MORE_FAMILIES: dict[str, dict[str, Any]] = {
    "cohere": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 8},
}
"""For recipes that copy attention: parallel blocks, and windows in every layer."""

OWNERS: dict[str, tuple[int, int, tuple[int, ...]]] = {
    "acme": (1, 2, (1, 2, 3)),
    "bob": (2, 3, (2, 3)),
    "zoe": (3, 4, (1, 3)),
}
"""Owner -> seed, rank and layers of every expert; so one layer has all experts and two lack one."""

BLOCKS: dict[str, tuple[str, ...]] = {
    "low_rank": ("acme/low", "bob/low", "zoe/low"),
    "stacked": ("acme/full", "bob/full", "zoe/full"),
    "mixed": ("acme/low", "bob/full", "zoe/low"),
    "dense": ("acme/dense", "bob/dense", "zoe/dense"),
}
"""Block kind -> experts that make a layer of it."""


@pytest.hookimpl(trylast=True)
def pytest_sessionstart() -> None:
    """Let Hypothesis register its random generator before anything is frozen: it looks for referrers of it."""
    from hypothesis import given, settings
    from hypothesis.strategies import none

    settings(database=None, derandomize=True, max_examples=1)(given(none())(lambda _: None))()
    gc.callbacks.append(_freeze_imported)


_seen_modules = 0


def _freeze_imported(phase: str, info: dict[str, int]) -> None:
    """After a full collection, take what new modules brought out of the garbage collector's sight.

    It would go through all of torch and transformers again each time, at about 0.3 s.
    """
    global _seen_modules
    if phase == "stop" and info["generation"] == 2 and len(sys.modules) > _seen_modules + 50:
        _seen_modules = len(sys.modules)
        gc.freeze()


class Pico:
    """Makes pico bases, registries and compositions and keeps them for the session."""

    families = tuple(_FAMILIES)
    owners = tuple(OWNERS)
    blocks = tuple(BLOCKS)
    gate_layer = GATE_LAYER
    vocabulary = VOCABULARY
    width = WIDTH

    def __init__(self, root: Path) -> None:
        self.root = root
        self._made: dict[tuple[Any, ...], Any] = {}
        self._number = itertools.count()

    def once(self, make: Callable[[], Any], *key: Any) -> Any:
        """Return what ``make`` returned at the first call with this key."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def scratch(self, name: str) -> Path:
        """A path that does not exist yet, in a new folder."""
        folder = self.root / f"{next(self._number)}"
        folder.mkdir()
        return folder / name

    # Bases

    def network(self, family: str = "llama", *, seed: int = 0) -> Any:
        """A fresh model of the family with random weights, in evaluation mode."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.set_num_threads(1)
        torch.manual_seed(seed)
        config = AutoConfig.for_model(family, **_SIZES, **{**_FAMILIES, **_MORE_FAMILIES}[family])
        model = AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():  # biases and norms must not be trivial
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter, mean=0.0 if "bias" in name else 1.0, std=0.1)
        return model.eval()

    def base(self, family: str = "llama", *, seed: int = 0) -> Path:
        """The folder of a base with its tokenizer."""
        return self.once(lambda: self._save_base(family, seed), "base", family, seed)

    def _save_base(self, family: str, seed: int) -> Path:
        folder = self.scratch(family)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.network(family, seed=seed).save_pretrained(folder)
            _tokenizer().save_pretrained(folder)
        return folder

    def dense(self, family: str = "llama") -> Any:
        """The base as transformers alone loads it; shared."""
        from transformers import AutoModelForCausalLM

        return self.once(
            lambda: AutoModelForCausalLM.from_pretrained(self.base(family), local_files_only=True).eval(),
            "dense",
            family,
        )

    def description(self, family: str = "llama", *, seed: int = 0) -> BaseDescription:
        """The base as `experts` sees it."""
        from experts.base import BaseDescription

        return self.once(
            lambda: BaseDescription.from_folder(self.base(family, seed=seed)), "description", family, seed
        )

    # Embedding bases

    def encoder(self, *, seed: int = 0) -> Any:
        """A fresh BERT with random weights, in evaluation mode."""
        import torch
        from transformers import BertConfig, BertModel

        torch.set_num_threads(1)
        torch.manual_seed(seed)
        sizes = {key: _SIZES[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers")}
        model = BertModel(
            BertConfig(
                **sizes,
                num_attention_heads=4,
                vocab_size=len(_syllables()),
                max_position_embeddings=128,
                initializer_range=0.2,  # so that different texts get different vectors
                hidden_dropout_prob=0.1,  # as in published models: whoever forgets eval() is found out
            )
        )
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter, mean=0.0 if "bias" in name else 1.0, std=0.1)
        return model.eval()

    def embedder(
        self,
        *,
        seed: int = 0,
        pooling: str = "mean",
        normalize: bool = True,
        similarity: str = "cosine",
        max_seq_length: int = 64,
        prompts: dict[str, str] | None = None,
    ) -> Path:
        """The folder of a pico embedding model, as sentence-transformers 6 writes one; shared."""
        key = (seed, pooling, normalize, similarity, max_seq_length, tuple(sorted((prompts or {}).items())))
        return self.once(lambda: self._save_embedder(*key[:-1], dict(key[-1])), "embedder", *key)

    def _save_embedder(
        self, seed: int, pooling: str, normalize: bool, similarity: str, longest: int, prompts: dict[str, str]
    ) -> Path:
        folder = self.scratch("embedder")
        self.encoder(seed=seed).save_pretrained(folder)
        _wordpieces(longest).save_pretrained(folder)
        modules = ["base.modules.transformer.Transformer", "sentence_transformer.modules.pooling.Pooling"]
        modules += ["base.modules.normalize.Normalize"] if normalize else []
        paths = ["", "1_Pooling", "2_Normalize"]
        key = "sentence_embedding"
        files: dict[str, Any] = {
            "modules.json": [
                {"idx": n, "name": str(n), "path": paths[n], "type": f"sentence_transformers.{kind}"}
                for n, kind in enumerate(modules)
            ],
            "sentence_bert_config.json": {
                "transformer_task": "feature-extraction",
                "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
                "module_output_name": "token_embeddings",
            },
            "config_sentence_transformers.json": {
                "__version__": {"sentence_transformers": "6.2.0"},
                "default_prompt_name": None,
                "model_type": "SentenceTransformer",
                "prompts": {"document": "", "query": "", **prompts},
                "similarity_fn_name": similarity,
            },
            "1_Pooling/config.json": {
                "embedding_dimension": WIDTH,
                "pooling_mode": pooling,
                "include_prompt": True,
            },
        }
        if normalize:
            files["2_Normalize/config.json"] = {"module_input_name": key, "module_output_name": key}
        for name, content in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(json.dumps(content, indent=2))
        return folder

    def embedder_description(self, **settings: Any) -> BaseDescription:
        """An embedding base as `experts` sees it; the settings are those of `embedder`."""
        from experts.base import BaseDescription

        folder = self.embedder(**settings)
        return self.once(lambda: BaseDescription.from_folder(folder), "embedder description", folder)

    def domain_texts(self, seed: int, *, count: int, words: int = 8) -> list[str]:
        """Texts of a domain: words of two syllables out of a third of them, by seed; seed 0 uses all."""
        import random

        pairs = [c + v for c in "bcdfghjklmnprstvwxyz" for v in "aeiou"]
        third = len(pairs) // 3
        own = pairs[third * (seed - 1) : third * seed] if seed else pairs
        draw = random.Random(100 + seed)
        return [" ".join("".join(draw.choices(own, k=2)) for _ in range(words)) for _ in range(count)]

    def write_retriever(
        self, folder: Path, *, seed: int, layers: Sequence[int] = (2, 3), zero: bool = False, **config: Any
    ) -> Path:
        """Write an adapter on the pico embedder's query, value and FFN-in linears with PEFT itself."""
        import torch
        from peft import LoraConfig, get_peft_model

        settings = {
            "r": 2,
            "lora_alpha": 8,
            "target_modules": ["query", "value", "intermediate.dense"],
            "layers_to_transform": list(layers),
            "layers_pattern": "layer",
            "task_type": "FEATURE_EXTRACTION",
            **config,
        }
        base = self.encoder()
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = get_peft_model(base, LoraConfig(**settings))
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name and not zero:
                    torch.nn.init.normal_(parameter, std=0.3)
            adapted.peft_config["default"].base_model_name_or_path = str(self.embedder())
            adapted.save_pretrained(folder)
        return folder

    def retrieval_artifacts(self, seed: int, *, layer: int = 2, count: int = 96, **settings: Any) -> Any:
        """Sums over the embeddings and the states of a domain's texts, and a pilot of the owner's own expert."""
        from experts.retrieval_artifacts import Moments, RetrievalArtifacts

        vectors, states = self.once(
            lambda: self._embed(self.domain_texts(seed, count=count), layer), "embedded", seed, layer, count
        )
        tokens = self._token_means(self.domain_texts(seed, count=count))
        return RetrievalArtifacts.create(
            embedding=Moments.from_vectors(vectors),
            normalization="l2",
            state=Moments.from_vectors(states),
            state_layer=layer,
            **{"static": Moments.from_vectors(tokens), **settings},
        )

    def retrieval_scores(self, seed: int, experts: Sequence[str] = ()) -> Any:
        """Qualities of a few values on a domain's first texts, bundled by five; of everybody in the library."""
        import numpy as np

        from experts.retrieval_artifacts import Scores

        names = tuple(sorted(experts or (f"{owner}/search" for owner in OWNERS)))
        vectors, _ = self._embed(self.domain_texts(seed, count=40), 2)
        quality = np.random.default_rng(seed).integers(0, 3, size=(8, 1 + len(names))) / 2
        means = vectors.astype("f8").reshape(8, 5, -1).mean(axis=1)
        return Scores(experts=names, counts=np.full(8, 5.0), vectors=means, quality=quality)

    def retrieval_utility(self, seed: int) -> Any:
        """Sums for the gains over the base of everybody in the library, on a domain's first texts."""
        import numpy as np

        from experts.retrieval_artifacts import Utility

        names = tuple(sorted(f"{owner}/search" for owner in OWNERS))
        x = self._embed(self.domain_texts(seed, count=40), 2)[0].astype("f8")
        quality = np.random.default_rng(seed).uniform(-1, 1, size=(40, 1 + len(names)))
        return Utility(queries=40, experts=names, gram=x.T @ x, cross=x.T @ quality)

    def _embed(self, texts: Sequence[str], layer: int) -> tuple[Any, Any]:
        """The pico embedder's embeddings, and the mean states entering a layer, of length 1; by hand."""
        import torch
        from torch.nn.functional import normalize

        inputs = _wordpieces(64)(list(texts), padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            states = self.encoder()(**inputs, output_hidden_states=True).hidden_states
        mask = inputs["attention_mask"][..., None].float()
        pooled = [
            normalize((s * mask).sum(1) / mask.sum(1), dim=1).numpy() for s in (states[-1], states[layer])
        ]
        return pooled[0], pooled[1]

    def _token_means(self, texts: Sequence[str]) -> Any:
        """Mean rows of the pico embedder's embedding matrix, of length 1; text by text, without padding."""
        import torch
        from torch.nn.functional import normalize

        table, tokenizer = self.encoder().get_input_embeddings().weight.detach(), _wordpieces(64)
        means = [table[torch.tensor(tokenizer(text)["input_ids"])].mean(dim=0) for text in texts]
        return normalize(torch.stack(means), dim=1).numpy()

    def pack_retriever(
        self,
        raw: Path,
        *,
        name: str,
        artifacts: Any = None,
        version: int = 1,
        derived_from: Sequence[str] = (),
        **embedder: Any,
    ) -> Path:
        """Pack a raw retriever for publication; ``embedder`` chooses the base, see `embedder`."""
        from experts.card import BaseRef
        from experts.fingerprint import tokenizer_fingerprint
        from experts.package import pack
        from experts.routing_artifacts import RoutingArtifacts, RoutingInfo

        routing = None
        if artifacts is not None:
            routing = RoutingInfo(retrieval=artifacts.info)
            RoutingArtifacts(info=routing, tensors=artifacts.tensors()).save(raw)
        base = self.embedder_description(**embedder)
        ref = BaseRef(
            name="embedder",
            fingerprint=base.fingerprint,
            tokenizer_fingerprint=tokenizer_fingerprint(self.embedder(**embedder)),
            embedding=base.embedding,
        )
        package = self.scratch("package")
        pack(
            raw,
            package,
            name=name,
            version=version,
            domain=name.partition("/")[0],
            license="Apache-2.0",
            base=base,
            base_ref=ref,
            routing=routing,
            derived_from=derived_from,
        )
        return package

    def retriever_library(self, *, scored: bool = False) -> Registry:
        """A registry with the pico embedder and one retriever of every owner, ``acme/search`` and so on; shared.

        With ``scored`` every owner publishes how well all of them serve the owner's queries, row by row and summed.
        """
        return self.once(lambda: self._fill_retrievers(scored), "retriever library", scored)

    def _fill_retrievers(self, scored: bool) -> Registry:
        from registry import Registry

        registry = Registry(self.scratch("registry"))
        registry.add_base(self.embedder(), name="embedder")
        for owner, (seed, rank, _) in OWNERS.items():
            raw = self.write_retriever(self.scratch("raw"), seed=seed, r=rank)
            scores = self.retrieval_scores(seed) if scored else None
            utility = self.retrieval_utility(seed) if scored else None
            artifacts = self.retrieval_artifacts(seed, scores=scores, utility=utility)
            registry.register(self.pack_retriever(raw, name=f"{owner}/search", artifacts=artifacts))
        return registry

    # Experts

    def write_lora(self, folder: Path, *, family: str = "llama", seed: int, **config: Any) -> Path:
        """Write an adapter on the FFN linears with PEFT itself; its B is random unless ``zero`` is set."""
        import torch
        from peft import LoraConfig, get_peft_model

        zero = config.pop("zero", False)
        layout = self.description(family).layout
        settings = {"lora_alpha": 8, "target_modules": list(layout.linears.values()), **config}
        if "layers_to_transform" in settings:
            settings["layers_pattern"] = "layers"
        base = self.network(family)
        torch.manual_seed(seed)  # after the network, which has a seed of its own
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name and not zero:
                    torch.nn.init.normal_(parameter, std=0.3)
            adapted.peft_config["default"].base_model_name_or_path = str(self.base(family))
            adapted.save_pretrained(folder, save_embedding_layers=False)
        return folder

    def write_ffn(
        self, folder: Path, *, family: str = "llama", seed: int, layers: Sequence[int], copy: bool = False
    ) -> Path:
        """Write full FFNs: random ones, or copies of the base's."""
        import torch
        from safetensors.torch import save_file

        base = self.description(family)
        generator = torch.Generator().manual_seed(seed)
        own = self.dense(family).state_dict()
        tensors = {}
        for layer in layers:
            for linear in base.ffn_linears(layer).values():
                for what in ("weight", "bias") if linear.bias else ("weight",):
                    name = f"{linear.name}.{what}"
                    noise = torch.randn(own[name].shape, generator=generator) * 0.2
                    tensors[name] = own[name].clone() if copy else noise
        folder.mkdir(parents=True)
        save_file(tensors, folder / "ffn.safetensors")
        (folder / "config.json").write_text(json.dumps({"format_version": 1, "layers": list(layers)}))
        return folder

    def artifacts(
        self,
        *,
        family: str = "llama",
        seed: int,
        layers: Sequence[int] = (1, 2, 3),
        statistics: bool = True,
        rows: bool = True,
        gate_layer: int = GATE_LAYER,
        public_digest: str | None = None,
        inputs: bool = False,
    ) -> Any:
        """Routing artefacts of a domain, from the base's true states on its tokens.

        A domain is a third of the vocabulary, by seed; seed 0 is public text over all of it.
        """
        import numpy as np

        from experts.routing_artifacts import (
            InputsInfo,
            RoutingArtifacts,
            RoutingInfo,
            RowsInfo,
            StatisticsInfo,
        )
        from experts.routing_origin import rows_digest

        random = np.random.default_rng(seed)
        tensors: dict[str, Any] = {}
        taken = written = None
        if statistics:
            summed = self.once(lambda: self._statistics(family, seed, gate_layer), family, seed, gate_layer)
            tensors["statistics.count"] = np.array([summed.count])
            tensors["statistics.sum"], tensors["statistics.scatter"] = summed.sum, summed.scatter
            taken = StatisticsInfo(layer=gate_layer, normalization="rms", tokens=512, documents=16)
        if rows:
            for layer in layers:
                row, bias = self._row(family, seed, layer, random)
                tensors[f"row.{layer}.weight"] = row.astype("f4")
                tensors[f"row.{layer}.bias"] = np.array([bias], dtype="f4")
            if public_digest is None and seed == 0:
                public_digest = rows_digest({layer: tensors[f"row.{layer}.weight"] for layer in layers})
            digest = public_digest or self.public_digest(family)
            written = RowsInfo(layers=tuple(layers), has_bias=True, public_digest=digest, init="x")
        read = None
        if inputs:
            sums = self.once(lambda: self._inputs(family, seed), "inputs", family, seed)
            tensors |= sums
            read = InputsInfo(
                layers=tuple(range(LAYERS)), branches=("ffn", "attention"), tokens=512, documents=16
            )
        anchor = self.anchor_info(family) if seed == 0 else None
        info = RoutingInfo(statistics=taken, rows=written, inputs=read, anchor=anchor)
        return RoutingArtifacts(info=info, tensors=tensors)

    def public_digest(self, family: str = "llama", *, layers: Sequence[int] = (1, 2, 3)) -> str:
        """The digest of the base's public rows, beside which owners train theirs."""
        public = self.artifacts(family=family, seed=0, layers=layers, statistics=False)
        return str(public.info.rows.public_digest)

    def anchor_info(self, family: str = "llama", *, seed: int = 0) -> Any:
        """What public artefacts say of the base that they were made on."""
        from experts.fingerprint import tokenizer_fingerprint
        from experts.routing_origin import AnchorInfo

        return AnchorInfo(
            fingerprint=self.description(family, seed=seed).fingerprint,
            tokenizer_fingerprint=tokenizer_fingerprint(self.base(family, seed=seed)),
        )

    def domain_tokens(self, seed: int, *, rows: int, length: int) -> torch.Tensor:
        """Random text of a domain, int64 ``(rows, length)``."""
        import torch

        third = VOCABULARY // 3
        low, high = (1, VOCABULARY) if seed == 0 else (1 + third * (seed - 1), third * seed)
        generator = torch.Generator().manual_seed(100 + seed)
        return torch.randint(low, high, (rows, length), generator=generator)

    def _statistics(self, family: str, seed: int, layer: int) -> Any:
        import torch

        from experts.routing_artifacts import Statistics

        ids = self.domain_tokens(seed, rows=16, length=32)
        with torch.no_grad():
            states = self.dense(family)(ids, output_hidden_states=True).hidden_states[layer]
        states = states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + 1e-6)
        return Statistics.from_states(states.flatten(0, 1).numpy())

    def _inputs(self, family: str, seed: int) -> dict[str, Any]:
        """Sums of the inputs of every layer's FFN and attention on a domain's text, by their names in the file."""
        import numpy as np
        import torch

        from composer.upcycling.partition import attention_module
        from experts.routing_artifacts import Statistics

        base, dense = self.description(family), self.dense(family)
        found: dict[str, Any] = {}

        def watch(name: str) -> Any:
            def hook(_: Any, args: Any, kwargs: Any) -> None:
                states = (args[0] if args else kwargs["hidden_states"]).flatten(0, 1).numpy()
                summed = Statistics.from_states(states)
                found[f"{name}.count"] = np.array([summed.count])
                found[f"{name}.sum"], found[f"{name}.scatter"] = summed.sum, summed.scatter

            return hook

        modules = {"ffn": base.layout.module, "attention": attention_module(base)}
        hooks = [
            dense.get_submodule(f"{base.layers_prefix}.{layer}.{module}").register_forward_pre_hook(
                watch(f"inputs.{branch}.{layer}"), with_kwargs=True
            )
            for layer in range(LAYERS)
            for branch, module in modules.items()
        ]
        with torch.no_grad():
            dense(self.domain_tokens(seed, rows=16, length=32))
        for hook in hooks:
            hook.remove()
        return found

    def prompt(self, seed: int, *, length: int = 12) -> str:
        """Text of a domain, which the pico tokenizer turns into the domain's tokens."""
        # the printable characters of ASCII stand at the beginning of the vocabulary, behind two special tokens
        return "".join(
            chr(max(int(token), 2) + 31) for token in self.domain_tokens(seed, rows=1, length=length)[0]
        )

    def tokens(self, text: str) -> list[int]:
        """Token ids of a text."""
        from transformers import AutoTokenizer

        load = AutoTokenizer.from_pretrained
        return list(
            self.once(lambda: load(self.base("llama"), local_files_only=True), "tokenizer")(text).input_ids
        )

    def _row(self, family: str, seed: int, layer: int, random: Any) -> tuple[Any, float]:
        """A router row that is high on the domain's states and about 0 on public ones, with its bias."""
        noise = random.normal(size=WIDTH, scale=0.02)
        if seed == 0:
            return noise, 0.0
        public, own = (self.once(lambda s=s: self._means(family, s), family, s)[layer] for s in (0, seed))
        towards = own - public
        towards = towards - public * (towards @ public) / (public @ public)
        return towards * min(4.0 / (towards @ towards), 20.0 / (towards @ towards) ** 0.5) + noise, -1.0

    def _means(self, family: str, seed: int) -> dict[int, Any]:
        """Mean input of every layer's FFN on a domain's text."""
        import torch

        base, dense = self.description(family), self.dense(family)
        means: dict[int, Any] = {}
        hooks = [
            dense.get_submodule(
                f"{base.layers_prefix}.{layer}.{base.layout.module}"
            ).register_forward_pre_hook(
                lambda _, inputs, layer=layer: means.update({layer: inputs[0].flatten(0, 1).mean(0).numpy()})
            )
            for layer in range(LAYERS)
        ]
        with torch.no_grad():
            dense(self.domain_tokens(seed, rows=16, length=32))
        for hook in hooks:
            hook.remove()
        return means

    def pack(
        self,
        raw: Path,
        *,
        name: str,
        family: str = "llama",
        base_seed: int = 0,
        artifacts: Any = None,
        version: int = 1,
    ) -> Path:
        """Pack a raw expert folder for publication; return the package."""
        from experts.card import BaseRef
        from experts.fingerprint import tokenizer_fingerprint
        from experts.package import pack

        if artifacts is not None:
            artifacts.save(raw)
        base = self.description(family, seed=base_seed)
        ref = BaseRef(
            name=family,
            fingerprint=base.fingerprint,
            tokenizer_fingerprint=tokenizer_fingerprint(self.base(family, seed=base_seed)),
        )
        package = self.scratch("package")
        pack(
            raw,
            package,
            name=name,
            version=version,
            domain=name.partition("/")[0],
            license="Apache-2.0",
            base=base,
            base_ref=ref,
            routing=None if artifacts is None else artifacts.info,
        )
        return package

    def write_dense(self, folder: Path, *, family: str = "llama", seed: int) -> Path:
        """Write a whole model: the base with noise on every tensor, or its copy where ``seed`` is 0."""
        import torch

        model = self.network(family)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for parameter in model.parameters() if seed else ():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
            model.save_pretrained(folder)
        return folder

    # Registries

    def dense_library(self, family: str = "llama") -> Registry:
        """A registry with the family's base and a whole model per owner, statistics taken where layer 0 begins."""
        return self.once(lambda: self._fill_dense(family), "dense library", family)

    def fresh_dense_library(self, family: str = "llama") -> Registry:
        """A copy of the family's registry of whole models that a test may change."""
        from registry import Registry

        return Registry(shutil.copytree(self.dense_library(family).path, self.scratch("registry")))

    def _fill_dense(self, family: str) -> Registry:
        from registry import Registry

        empty = self.once(self._empty_registry, "empty")
        registry = Registry(shutil.copytree(empty, self.scratch("registry")))
        registry.add_base(self.base(family), name=family)
        public = self.artifacts(family=family, seed=0, layers=range(LAYERS), gate_layer=0, inputs=True)
        folder = self.scratch("public")
        folder.mkdir()
        public.save(folder)
        registry.set_base_routing(family, folder, public.info)
        for owner, (seed, _, _) in OWNERS.items():
            artifacts = None
            if family in _FAMILIES:  # the others are for what needs no router of the owners'
                artifacts = self.artifacts(
                    family=family,
                    seed=seed,
                    layers=range(LAYERS),
                    gate_layer=0,
                    public_digest=public.info.rows.public_digest,
                    inputs=True,
                )
            raw = self.write_dense(self.scratch("raw"), family=family, seed=seed)
            registry.register(self.pack(raw, name=f"{owner}/dense", family=family, artifacts=artifacts))
        return registry

    def library(self, family: str = "llama") -> Registry:
        """A registry with the family's base, its public artefacts, and per owner a ``low`` and a ``full`` expert."""
        return self.once(lambda: self._fill(family), "library", family)

    def fresh_library(self, family: str = "llama") -> Registry:
        """A copy of the family's registry that a test may change."""
        from registry import Registry

        return Registry(shutil.copytree(self.library(family).path, self.scratch("registry")))

    def _fill(self, family: str) -> Registry:
        from registry import Registry

        empty = self.once(self._empty_registry, "empty")
        registry = Registry(shutil.copytree(empty, self.scratch("registry")))
        registry.add_base(self.base(family), name=family)
        public = self.artifacts(family=family, seed=0)
        folder = self.scratch("public")
        folder.mkdir()
        public.save(folder)
        registry.set_base_routing(family, folder, public.info)
        for owner, (seed, rank, layers) in OWNERS.items():
            artifacts = self.artifacts(family=family, seed=seed, layers=layers)
            lora = self.write_lora(
                self.scratch("raw"), family=family, seed=seed, r=rank, layers_to_transform=list(layers)
            )
            full = self.write_ffn(self.scratch("raw"), family=family, seed=seed, layers=layers)
            for name, raw in {"low": lora, "full": full}.items():
                registry.register(self.pack(raw, name=f"{owner}/{name}", family=family, artifacts=artifacts))
        return registry

    def _empty_registry(self) -> Path:
        """A registry after its migrations, which take longer than copying it."""
        from registry import Registry

        path = self.scratch("registry")
        Registry(path).add_base(self.base("llama"), name="llama")
        return path

    def card(self, name: str, *, family: str = "llama") -> ExpertCard:
        """The card of a registered expert."""
        return self.library(family).card(name)

    # Compositions

    def manifest(
        self,
        block: str = "low_rank",
        *,
        family: str = "llama",
        experts: Sequence[str] | None = None,
        opt_out: Sequence[str] = (),
        dtype: str | None = None,
        recipe: str = "flexolmo",
        upcycle: dict[str, Any] | None = None,
        name: str = "pico",
        description: str = "",
        **router: Any,
    ) -> Manifest:
        """A manifest over the family's registry; further arguments go to ``router``."""
        from composer.manifest import Manifest

        named: list[Any] = list(BLOCKS[block] if experts is None else experts)
        if router.get("scorer") == "prompts":
            named = [
                {"ref": ref, "positive_prompts": [self.prompt(OWNERS[ref.partition("/")[0]][0])]}
                for ref in named
            ]
        return Manifest.from_dict(
            {
                "name": name,
                "recipe": recipe,
                "base": family,
                "experts": named,
                "opt_out": list(opt_out),
                "dtype": dtype,
                "description": description,
                "router": router,
                **({} if upcycle is None else {"upcycle": upcycle}),
            }
        )

    def compose(self, manifest: Manifest, *, registry: Registry | None = None) -> Path:
        """Plan and build a new folder."""
        from composer.building import build
        from composer.planning import plan

        library = self.library if manifest.recipe == "flexolmo" else self.dense_library
        source = library(manifest.base) if registry is None else registry
        return build(plan(manifest, source), self.scratch("out"), registry=source)

    def composed(self, block: str = "low_rank", **settings: Any) -> Path:
        """A composed folder, shared; see `manifest` for the settings."""
        manifest = self.manifest(block, **settings)
        return self.once(lambda: self.compose(manifest), "composed", manifest.digest)

    def loaded(self, block: str = "low_rank", **settings: Any) -> ComposedForCausalLM:
        """The loaded model of `composed`, shared."""
        from composer.loading import load

        folder = self.composed(block, **settings)
        return self.once(lambda: load(folder), "loaded", folder)

    def prompts(self, *, rows: int = 4, length: int = 24, seed: int = 0) -> torch.Tensor:
        """Token ids ``(rows, length)``: the first rows are text of one owner each, then mixed text."""
        import torch

        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(1, VOCABULARY, (rows, length), generator=generator)
        for row, number in zip(range(rows - 1), range(1, 4), strict=False):
            ids[row] = self.domain_tokens(number, rows=1, length=length)[0]
        return ids


def _tokenizer() -> Any:
    """Bytes below the pico vocabulary's size; the rest of a text is unknown."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[: VOCABULARY - 2]
    vocabulary = {token: number for number, token in enumerate(["<|end|>", "<|unknown|>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<|unknown|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>", unk_token="<|unknown|>"
    )


def _syllables() -> list[str]:
    """Word pieces that spell every lower-case text: special tokens, characters, syllables, each also inside words."""
    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    pairs = [c + v for c in "bcdfghjklmnprstvwxyz" for v in "aeiou"]
    pieces = [*letters, *pairs]
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces, *(f"##{piece}" for piece in pieces)]


def _wordpieces(longest: int) -> Any:
    """A BERT tokenizer over `_syllables` that cuts off after ``longest`` tokens."""
    from transformers import BertTokenizer

    vocabulary = {piece: number for number, piece in enumerate(_syllables())}
    return BertTokenizer(vocab=vocabulary, do_lower_case=True, model_max_length=longest)


_LONG = (
    "tests/conformance",
    "tests/train/test_ray.py",
    "tests/composer",
    "tests/cli",
    "tests/retriever",
    "tests/train",
    "tests/benchmarks",
    "tests/registry",
    "tests/project",
    "tests/experiments",
    "tests/experiments/retrieval",
    "tests/baselines",
    "tests/export",
    "tests/upcycling",
)
"""Units of work that take longest, longest first: a folder, or a file of its own."""


def _unit(nodeid: str) -> str:
    """The unit that a test is in; what fixtures of a session make is made once where a folder stays together."""
    path, _, _ = nodeid.partition("::")
    return path if path in _LONG else "/".join(path.split("/")[:-1])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest: a process that begins it at the end works alone."""
    rank = {unit: number for number, unit in enumerate(_LONG)}
    items.sort(key=lambda item: rank.get(_unit(item.nodeid), len(rank)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With ``--dist loadfile``, deal out the units in the order of the items and not by their numbers of tests."""
    from xdist.scheduler import LoadFileScheduling

    class Units(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _unit(nodeid)

    if config.getoption("dist") != "loadfile":
        return None
    config.option.loadscopereorder = False
    return Units(config, log)


@pytest.fixture(autouse=True)
def _own_user_folders(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep the user's own registry, caches and settings out of reach."""
    home = tmp_path_factory.getbasetemp() / "home"
    for variable, name in {
        "XDG_DATA_HOME": "data",
        "XDG_CACHE_HOME": "cache",
        "XDG_CONFIG_HOME": "config",
        "XDG_STATE_HOME": "state",
    }.items():
        monkeypatch.setenv(variable, str(home / name))
    monkeypatch.delenv("COTERIE_REGISTRY", raising=False)
    monkeypatch.delenv("COTERIE_TRACEBACK", raising=False)


@pytest.fixture(scope="session")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Pico:
    """Pico bases, registries and compositions; see the methods."""
    return Pico(tmp_path_factory.mktemp("pico"))


@pytest.fixture(scope="session")
def pico_embedder(pico: Pico) -> Path:
    """The folder of a pico embedding model: mean pooling, normalised, cosine, 64 tokens; see `Pico.embedder`."""
    return pico.embedder()


@pytest.fixture
def composed(pico: Pico) -> Callable[..., Path]:
    """A composed folder: ``composed("stacked", family="qwen3", scorer="learned")``; shared."""
    return pico.composed


@pytest.fixture
def manifest(pico: Pico) -> Callable[..., Manifest]:
    """A manifest over a pico registry: ``manifest("mixed", top_k=1)``."""
    return pico.manifest
