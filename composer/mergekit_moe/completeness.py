"""Whether models have every tensor that a mixture class is to be given, in the shape that their settings say.

transformers fills what a checkpoint lacks with random numbers and says so only in a log. Knows names, shapes and
settings; reads no weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from composer.mergekit_moe.accounting import trunk_parts
from composer.mergekit_moe.families import Family
from composer.mergekit_moe.sources import SourceModel

__all__ = ["expected_trunk", "ffn_problems", "trunk_problems"]

Shape = tuple[int | None, ...]
"""None: the settings do not say."""


def expected_trunk(
    family: Family, config: Mapping[str, Any], *, layers: int, hidden: int
) -> dict[str, Shape]:
    """Return what a class is given of a base beside FFNs and routers: names and shapes.

    Args:
        family: The class.
        config: The base's ``config.json``.
        layers: Decoder layers.
        hidden: Width of the hidden states.
    """
    vocabulary = _number(config.get("vocab_size"))
    expected: dict[str, Shape] = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.get("tie_word_embeddings"):
        expected["lm_head.weight"] = (vocabulary, hidden)
    rows = _attention_rows(config, hidden)
    shapes: dict[str, Shape] = {f"self_attn.{r}_proj.weight": (rows[r], hidden) for r in "qkv"}
    shapes["self_attn.o_proj.weight"] = (hidden, rows["q"])
    if config.get("attention_bias"):
        shapes |= {f"self_attn.{role}_proj.bias": (rows[role],) for role in family.biases if role != "o"}
        shapes |= {f"self_attn.{role}_proj.bias": (hidden,) for role in family.biases if role == "o"}
    shapes |= {f"{norm}.weight": (hidden,) for norm in family.norms}
    heads = family.head_norms
    if heads is not None:
        width = _number(config.get("head_dim"))
        shapes |= {f"self_attn.{r}_norm.weight": (width if heads == "each" else rows[r],) for r in "qk"}
    for layer in range(layers):
        expected |= {f"model.layers.{layer}.{part}": shape for part, shape in shapes.items()}
    return expected


def _attention_rows(config: Mapping[str, Any], hidden: int) -> dict[str, int | None]:
    """Return the rows of the projections of queries, keys and values."""
    heads = _number(config.get("num_attention_heads"))
    groups = _number(config.get("num_key_value_heads"))
    width = _number(config.get("head_dim"))
    if width is None and heads and config.get("model_type") != "qwen3":  # which has a width of its own
        width = hidden // heads
    query = None if heads is None or width is None else heads * width
    key = None if groups is None or width is None else groups * width
    return {"q": query, "k": key, "v": key}


def _number(value: object) -> int | None:
    return value if isinstance(value, int) else None


def trunk_problems(base: SourceModel, names: list[str], family: Family) -> list[str]:
    """Say what a base lacks beside its FFNs, and which tensors are not of the shape that its ``config.json`` says.

    Args:
        base: The base.
        names: Its tensors beside its FFNs, as its files call them.
        family: The class that is to hold them.
    """
    held: dict[str, tuple[int, ...]] = {}
    for name in names:
        shape = base.tensors[name].shape
        held |= {
            new: shape if cut is None else (cut[1] - cut[0], *shape[1:])
            for new, cut in trunk_parts(base, name).items()
        }
    description = base.description
    expected = expected_trunk(
        family, description.config, layers=description.num_layers, hidden=description.hidden_size
    )
    if family.needs_biases:  # none at all means zeros, but a base with some has them everywhere
        expected |= {name: (None,) for name in _other_biases(held, description.num_layers) - set(expected)}
    problems = []
    width = description.config.get("intermediate_size")
    if width is not None and width != description.intermediate_size:
        problems.append(
            f"{base.ref}: its FFNs are {description.intermediate_size} wide, its config.json says {width!r}"
        )
    for name, wanted in expected.items():
        if name not in held:
            problems.append(f"{base.ref}: lacks {name}, which {family.name} needs; {_cure(name)}")
        elif not _fits(held[name], wanted):
            problems.append(
                f"{base.ref}: {name} is of shape {held[name]}, its config.json says {_shown(wanted)}"
            )
    return problems


def _cure(name: str) -> str:
    again = "download the model again, or save it again whole"
    if name != "lm_head.weight":
        return again
    return f"{again}, or set tie_word_embeddings in its config.json if its head is its embedding"


def _other_biases(held: Mapping[str, object], layers: int) -> set[str]:
    """Return the biases of queries, keys and values that there must be, as some layer has them."""
    found = {r for r in "qkv" for n in held if n.endswith(f".self_attn.{r}_proj.bias")}
    return {f"model.layers.{layer}.self_attn.{role}_proj.bias" for layer in range(layers) for role in found}


def _fits(found: tuple[int, ...], expected: Shape) -> bool:
    return len(found) == len(expected) and all(e in (None, f) for f, e in zip(found, expected, strict=True))


def _shown(shape: Shape) -> str:
    inside = ", ".join("any" if size is None else str(size) for size in shape)
    return f"({inside},)" if len(shape) == 1 else f"({inside})"


def ffn_problems(model: SourceModel) -> list[str]:
    """Say which matrices of a model's FFNs are not as wide as the down projection of their layer."""
    description = model.description
    problems = []
    for layer in range(description.num_layers):
        linears = description.ffn_linears(layer)
        width = linears["down"].in_features
        for role, linear in linears.items():
            found = (linear.out_features, linear.in_features)
            fitting = {
                "down": (description.hidden_size, width),
                "gate_up": (2 * width, description.hidden_size),
            }.get(role, (width, description.hidden_size))
            if found != fitting:
                problems.append(f"{model.ref}: {linear.name}.weight is of shape {found}, not {fitting}")
    return problems
