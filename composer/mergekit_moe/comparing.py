"""Whether models can be experts of one mixture, and in what they differ from the base that the builder should know.

Compares configurations, widths, vocabularies and tokenizers; knows nothing of the class that will hold them.
"""

from __future__ import annotations

from collections.abc import Sequence

from composer.export.tensors import Slice
from composer.mergekit_moe.accounting import PlannedSource, ffn_tensors
from composer.mergekit_moe.completeness import ffn_problems
from composer.mergekit_moe.families import Family
from composer.mergekit_moe.sources import SourceModel, Sources
from experts.same_architecture import decisive

__all__ = ["plan_warnings", "source_problems"]

_COMPARED_BYTES = 1 << 20
"""Bytes that are compared at a time."""

_FREE = frozenset(
    {
        "architectures",
        "intermediate_size",
        "max_position_embeddings",
        "max_window_layers",
        "tie_word_embeddings",
    }
)
"""Settings in which an expert may differ from the base: they do not reach its FFNs."""
_DECISIVE = ("hidden_act", "hidden_activation", "hidden_size", "model_type", "num_hidden_layers")
"""Settings of an expert that must be the base's."""
_ALIGN = (
    "To align them, fine-tune it with the base's tokenizer, or give the base this model's with mergekit-tokensurgeon; "
    "changing this model's embeddings alone does nothing here, as only its FFNs are read."
)


def source_problems(base: SourceModel, others: Sequence[PlannedSource]) -> list[str]:
    """Say why models cannot be experts on a base; empty when they can."""
    wanted = decisive(base.description.config)
    problems = []
    if base.description.layout.style == "dense":
        problems.append(
            f"{base.ref}: its FFN has no gate matrix (model_type '{base.family}'), and every mixture class of "
            "transformers has; `coterie build --composed` writes a coterie model instead"
        )
    for other in others:
        found = decisive(other.model.description.config)
        for key in _DECISIVE:
            if found.get(key) != wanted.get(key):
                problems.append(
                    f"{other.model.ref}: {key} is {found.get(key)!r}, the base has {wanted.get(key)!r}; experts "
                    "must be fine-tuned from one architecture"
                )
        problems += _width_problems(other.model)
    problems += [problem for model in (base, *(o.model for o in others)) for problem in ffn_problems(model)]
    return list(dict.fromkeys(problems))


def _width_problems(model: SourceModel) -> list[str]:
    description = model.description
    down = [
        description.tensors[
            f"{description.layout.name_of('down', prefix=description.layers_prefix, layer=n)}.weight"
        ]
        for n in range(description.num_layers)
    ]
    widths = sorted({spec.shape[1] for spec in down})
    if len(widths) == 1:
        return []
    return [f"{model.ref}: its layers' FFNs are {', '.join(map(str, widths))} wide; a mixture has one width"]


def plan_warnings(
    family: Family,
    base: SourceModel,
    experts: Sequence[PlannedSource],
    shared: PlannedSource | None,
    sources: Sources,
    *,
    gated: bool,
) -> list[str]:
    """Return what is allowed and yet may not be what the builder meant."""
    found = []
    if shared is not None and family.automatic and not gated:
        found.append(
            f"the shared expert {shared.model.ref} has no prompts, so nothing gates it: the row of its gate is of "
            "zeros and its down projections are doubled, which counts its answer in full. For a gate give it "
            "positive_prompts, or write `architecture: qwen` with a random gate_mode."
        )
    if not family.automatic:
        found.append(
            "transformers has no class for DeepSeek-MoE of this form: the checkpoint loads only with its authors' "
            "remote code, which coterie never runs. Leave `architecture` out for a class that loads."
        )
    if len(experts) > 1 and len({expert.model.ref for expert in experts}) == 1:
        still = (
            ""
            if any(e.wish.noise_scale for e in experts)
            else ", which answers as the one model until trained"
        )
        found.append(f"all experts are {experts[0].model.ref}: a sparse upcycling{still}.")
    if len({expert.width for expert in experts}) > 1:
        narrow = sorted({e.width for e in experts})
        found.append(
            f"FFN widths {', '.join(map(str, narrow))}: narrower experts are padded with zeros (exact)."
        )
    for model in sources:
        found += _differences(model, base)
    for model in {id(e.model): e.model for e in experts}.values():
        if _is_base(model, base):
            found.append(
                f"{model.ref}: every FFN is byte for byte the base's, so this expert changes nothing. Is it the folder "
                "that training wrote?"
            )
    return found


def _is_base(model: SourceModel, base: SourceModel) -> bool:
    """Say whether a model that was named as another one has the base's FFNs; the first difference ends the reading."""
    if model.folder.samefile(base.folder) or model.adapter is not None or base.adapter is not None:
        return False
    names = [name for layer in range(model.description.num_layers) for name in ffn_tensors(model, layer)]
    pairs = [(model.tensors[name], base.tensors.get(name)) for name in names]
    return all(other is not None and own.spec == other.spec for own, other in pairs) and all(
        _same_bytes(own, other) for own, other in pairs if other is not None
    )


def _same_bytes(one: Slice, other: Slice) -> bool:
    rows = one.shape[0]
    each = max(1, _COMPARED_BYTES // max(1, one.spec.nbytes // rows))
    return all(
        one.rows(first, min(rows, first + each)).read() == other.rows(first, min(rows, first + each)).read()
        for first in range(0, rows, each)
    )


def _differences(model: SourceModel, base: SourceModel) -> list[str]:
    if model is base:
        return []
    found = _vocabulary_differences(model, base)
    own, wanted = decisive(model.description.config), decisive(base.description.config)
    keys = {*own, *wanted} - _FREE - {*_DECISIVE, "vocab_size"}
    differing = sorted(key for key in keys if own.get(key) != wanted.get(key))
    if differing:
        found.append(
            f"{model.ref} differs from the base in {', '.join(differing)}; the mixture has the base's."
        )
    return found


def _vocabulary_differences(model: SourceModel, base: SourceModel) -> list[str]:
    """Say how tokens differ. FFNs may be trained on tokens that the mixture does not have, or has under other ids."""
    sizes = bool(model.vocabulary and base.vocabulary and model.vocabulary != base.vocabulary)
    known = bool(model.tokenizer and base.tokenizer)
    if known and model.tokenizer == base.tokenizer:
        if not sizes:
            return []
        return [
            f"{model.ref} has embeddings of {model.vocabulary} tokens, the base of {base.vocabulary}, with one and the "
            "same tokenizer: the mixture has the base's. Nothing is to be aligned if the rest are rows of no token."
        ]
    if sizes:
        return [
            f"{model.ref} has {model.vocabulary} tokens, the base {base.vocabulary}: the mixture has the base's "
            f"tokenizer and embeddings. {_ALIGN}"
        ]
    return (
        [f"{model.ref} has another tokenizer than the base; the mixture has the base's. {_ALIGN}"]
        if known
        else []
    )
