"""The words beside an exported checkpoint: a model card, and whose expert stands at which index.

The order of experts is all that a stock checkpoint knows of them, so the names have to travel beside it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import yaml

from composer.export.seats import Seat
from composer.export.target import StockTarget
from composer.members import Members

__all__ = ["write_card", "write_owners"]


def write_owners(path: Path, members: Members) -> None:
    """Write ``owners.yaml``, which `composer.export.importing` reads back."""
    experts = [
        {
            "name": member.locked.name,
            "version": member.locked.version,
            "domain": member.locked.domain,
            "license": member.locked.license,
        }
        for member in members.experts
    ]
    data = {"format_version": 1, "base": members.lock.base.name, "experts": experts}
    path.write_text(yaml.safe_dump(data, sort_keys=False, allow_unicode=True), encoding="utf-8")


def write_card(
    path: Path, members: Members, seats: Sequence[Seat], stock: StockTarget, *, changes: Sequence[str]
) -> None:
    """Write ``README.md``; ``changes`` says what is mixed in it, and how it differs from the composition."""
    lock = members.lock
    rows = "\n".join(
        f"| {index} | {seat.name} | {m.locked.version} | {m.locked.owner} | {m.locked.domain} "
        f"| {m.locked.license} | `{m.locked.digest[:12]}` |"
        for index, seat in enumerate(seats)
        if (m := seat.member) is not None
    )
    base = f"public base '{lock.base.name}' (fingerprint\n`{lock.base.fingerprint}`)"
    if seats[0].member is None:
        who = f"In every layer that has experts, expert 0 is the {base}; the others are:"
    else:
        who = f"It was made beside the {base}. The experts of every layer are:"
    licenses = ", ".join(sorted({member.locked.license for member in members.experts}))
    changed = "".join(f"\n- {text}" for text in changes) + ("\n" if changes else "")
    path.write_text(
        f"""---
base_model: {json.dumps(lock.base.name)}
tags: [coterie, mixture-of-experts]
---

# {lock.name} as {stock.title}

`{stock.architecture}` made of the composition '{lock.name}', with its logits up to rounding unless a line below says
otherwise. {who}

| index | expert | version | owner | domain | licence | card |
|---|---|---|---|---|---|---|
{rows}
{changed}
Licences of the parts: {licenses}; the base has its own. They hold side by side.

A stock class cannot leave an owner out. Export again without them: `coterie export FOLDER OUT --opt-out OWNER`.
""",
        encoding="utf-8",
    )
