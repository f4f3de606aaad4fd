"""Which layers an expert changes, as a job or a command writes them.

Knows spellings and the number of layers; knows no model.
"""

from __future__ import annotations

import re

from experts.errors import ManifestError

__all__ = ["layer_numbers", "parse_layers"]

_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


def parse_layers(layers: str | tuple[int, ...], *, num_layers: int) -> tuple[int, ...]:
    """``all``, ``upper-half``, ``15-29``, ``3,7-9`` or a list, as ascending numbers.

    Raises:
        ManifestError: Another form, or a layer that a model with ``num_layers`` does not have.
    """
    try:
        return layer_numbers(layers, num_layers=num_layers)
    except ValueError as error:
        raise ManifestError(f"layers: {error}.") from None


def layer_numbers(layers: str | tuple[int, ...], *, num_layers: int) -> tuple[int, ...]:
    """Do as `parse_layers`, for a validator.

    Raises:
        ValueError: As `parse_layers`, without naming the field.
    """
    if layers == "all":
        return tuple(range(num_layers))
    if layers == "upper-half":
        return tuple(range(num_layers // 2, num_layers))
    numbers: set[int] = set()
    if isinstance(layers, str):
        for part in layers.replace(" ", "").split(","):
            match = _RANGE.fullmatch(part)
            if match is None or int(match[2] or match[1]) < int(match[1]):
                raise ValueError(
                    f"'{layers}' is not a choice of layers; write all, upper-half, ranges such as 15-29 or 3,7-9, "
                    "or a list of numbers"
                )
            if int(match[2] or match[1]) >= num_layers:
                numbers.add(int(match[2] or match[1]))
                break
            numbers.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    else:
        numbers.update(layers)
    if not numbers:
        raise ValueError("choose at least one layer")
    if max(numbers) >= num_layers:
        raise ValueError(f"layer {max(numbers)} does not exist; the base has layers 0 to {num_layers - 1}")
    return tuple(sorted(numbers))
