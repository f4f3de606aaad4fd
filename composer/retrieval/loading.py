"""Loads the query encoder of a composed folder, and the sentence-transformers model around it.

A left-out owner's files are never opened. Knows files, layers and slots; how a query is routed is `composer.retrieval
.router`'s business.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from composer.members import BASE_FOLDER, Member, Members
from composer.membership import Membership
from composer.model import replace_ffn
from composer.retrieval.config import RetrieverConfig
from composer.retrieval.engine import Engine
from composer.retrieval.form import RetrieverLock
from composer.retrieval.model import RetrieverEncoder
from composer.retrieval.options import RetrievalRouter
from composer.retrieval.pooling import Pooler
from composer.retrieval.published import facts_of, state_layer
from composer.retrieval.router import Router
from composer.retrieval.scorers import RETRIEVAL_SCORERS, RETRIEVAL_SELECTORS
from composer.retrieval.settings import check_settings
from composer.retrieval.stacked import Factors, StackedLoRA
from composer.retrieval.whole import is_whole, load_whole
from experts.base import BaseDescription
from experts.errors import BuildError
from experts.kinds.lora import lora_spec, lora_tensor_names

if TYPE_CHECKING:
    from composer.retrieval.sentence import Retriever
    from registry import Registry

__all__ = ["load_encoder", "load_retriever"]


def load_retriever(
    members: Members, lock: RetrieverLock, *, dtype: Any = None, device: Any = None, **options: Any
) -> Retriever:
    """Load the whole model; see `composer.loading.load`, which calls this.

    Args:
        members: The experts to load.
        lock: Of the whole composition.
        dtype: Of the weights.
        device: Where the model goes; None: the CPU.
        options: ``attn_implementation``.
    """
    from sentence_transformers.base.modules import Normalize
    from sentence_transformers.sentence_transformer.modules import Pooling

    import composer.hf  # noqa: F401 - registers the encoder that the folder's config.json names
    from composer.retrieval.sentence import Retriever, RoutedTransformer

    folder = members.folder
    check_settings(folder, lock, members.description)
    chosen = {name: value for name, value in options.items() if value is not None}
    first = RoutedTransformer.load(
        str(folder),
        local_files_only=True,
        model_kwargs={"members": members, "lock": lock, "dtype": dtype or "auto", **chosen},
    )
    modules: list[nn.Module] = [first, Pooling.load(str(folder), subfolder="1_Pooling")]
    if _embedding(members.description).normalize:
        modules.append(Normalize())
    settings = json.loads((folder / "config_sentence_transformers.json").read_text(encoding="utf-8"))
    model = Retriever(
        modules=modules,
        device=_device(device),
        prompts=settings.get("prompts"),
        default_prompt_name=settings.get("default_prompt_name"),
        similarity_fn_name=_embedding(members.description).similarity,
    )
    model.membership = first.model.membership
    model.eval()
    return model


def _device(device: Any) -> str:
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return "cpu" if device is None else str(device)


def load_encoder(
    path: Path | str,
    *,
    opt_out: Collection[str] = (),
    registry: Registry | Path | str | None = None,
    verify: bool = False,
    members: Members | None = None,
    lock: RetrieverLock | None = None,
    dtype: Any = None,
    attn_implementation: str | None = None,
    **kwargs: Any,
) -> RetrieverEncoder:
    """Load the encoder alone, as `transformers.AutoModel` and sentence-transformers do.

    Args:
        path: A folder composed with ``router_retriever``.
        opt_out: Owners whose files are not opened.
        registry: Whose consent ledger is read too.
        verify: Whether to hash every expert file that is opened; what is published for routing always is.
        members: The experts, where they are opened already.
        lock: The lock, where it is read already.
        dtype: Of the weights; None: the manifest's, else the base's own.
        attn_implementation: As in `transformers`.
        kwargs: ``torch_dtype`` is understood as in `transformers`; others are refused.

    Raises:
        BuildError: The folder is not such a one, or a file was changed.
        IntegrityError: A file's bytes differ from its digest.
        UnknownNameError: ``opt_out`` names an owner who is not in this composition.
    """
    from composer.loading import left_out

    folder = Path(path)
    dtype = kwargs.pop("torch_dtype", dtype)
    if kwargs:
        raise BuildError(
            f"Unknown arguments for loading a composed retriever: {', '.join(sorted(kwargs))}. Allowed: opt_out, "
            "registry, verify, dtype, attn_implementation."
        )
    lock = lock or RetrieverLock.read(folder)
    if members is None:
        members = Members.open(folder, lock, without=left_out(lock, opt_out, registry))
        check_settings(folder, lock, members.description)
        if verify:
            members.check_digests()
    encoder = _base_encoder(folder, lock, members, dtype, attn_implementation)
    _install(encoder, members)
    encoder.requires_grad_(False)
    encoder.eval()
    return encoder


def _embedding(description: BaseDescription) -> Any:
    if description.embedding is None:
        raise BuildError("The base is not an embedding model. Build the folder again.")
    return description.embedding


def _base_encoder(
    folder: Path, lock: RetrieverLock, members: Members, dtype: Any, attn_implementation: str | None
) -> RetrieverEncoder:
    from transformers import AutoModel

    chosen = lock.dtype or "auto" if dtype in (None, "auto") else dtype
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    base = AutoModel.from_pretrained(folder / BASE_FOLDER, dtype=chosen, local_files_only=True, **options)
    config = RetrieverConfig(
        base_config=base.config,
        composition=lock.membership_digest,
        name_or_path=str(folder),
        dtype=base.dtype,
        attn_implementation=base.config._attn_implementation,
    )
    membership = Membership(
        experts=tuple(member.locked.name for member in members.experts),
        owners=tuple(member.locked.owner for member in members.experts),
        parent_owners=tuple(member.locked.parent_owners for member in members.experts),
        known_owners=frozenset(lock.composed_owners),
        digest=members.lock.membership_digest,
        folder=str(folder),
    )
    return RetrieverEncoder(config, base=base, membership=membership)


def _install(encoder: RetrieverEncoder, members: Members) -> None:
    """Stack the adapters, put whole query encoders beside the base, and make the router."""
    description = members.description
    options: RetrievalRouter = members.lock.router  # type: ignore[assignment]
    embedding = _embedding(description)
    encoder.default_task = options.default_task
    if not members.experts:
        return  # the base alone, untouched
    # the router is solved from all of it together: one changed byte would move everybody's queries, where one of a
    # weight moves its owner's answers alone
    members.check_published()
    layers = encoder.base.get_submodule(description.layers_prefix)
    assert isinstance(layers, nn.ModuleList)
    for name, factors in _factors(members, description).items():
        linear = encoder.base.get_submodule(name)
        assert isinstance(linear, nn.Linear), f"{name} is no linear"
        replace_ffn(encoder.base, name, StackedLoRA(linear, factors, num_slots=len(members.experts)))
    encoder.install_gates(layers)
    whole = [member for member in members.experts if is_whole(member)]
    for member in whole:
        encoder.whole[str(member.id)] = load_whole(member, encoder.base, description)
    similarity = embedding.similarity if options.similarity == "base" else options.similarity
    router = Router(
        facts_of(members, options),
        scorer=RETRIEVAL_SCORERS.load(options.scorer)(options, similarity=similarity),
        selector=RETRIEVAL_SELECTORS.load(options.selector)(temperature=options.temperature),
        min_margin=options.min_margin,
        temperature=options.temperature,
    )
    encoder.engine = Engine(
        encoder.run_base,
        router,
        Pooler(embedding),
        state_layer=state_layer(members, options),
        lowest=[min(member.locked.layers) for member in members.experts],
        share_lower_layers=options.share_lower_layers,
        whole={member.id: partial(encoder.run_whole, member.id) for member in whole},
        tokens=encoder.get_input_embeddings() if options.route_on == "static_tokens" else None,
    )


def _factors(members: Members, description: BaseDescription) -> dict[str, dict[int, Factors]]:
    """Read every adapter: module name -> slot -> its update."""
    found: dict[str, dict[int, Factors]] = {}
    for member in members.experts:
        if is_whole(member):
            continue
        spec = lora_spec(_adapter_config(member), description)
        with member.tensors("adapter_model.safetensors") as tensors:
            for name, module in spec.modules.items():
                down, up = (tensors[tensor] for tensor in lora_tensor_names(name))
                found.setdefault(name, {})[member.id] = Factors(down, up, module.scaling)
    return found


def _adapter_config(member: Member) -> Mapping[str, object]:
    config: Mapping[str, object] = json.loads(member.file("adapter_config.json").read_text(encoding="utf-8"))
    return config
