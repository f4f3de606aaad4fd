"""The model card of a composed folder: what it is made of, whose it is and how to leave somebody out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from composer.lock import Lock
from composer.recipes import RECIPES

if TYPE_CHECKING:
    from composer.recipes.base import Recipe

__all__ = ["expert_table", "language_model_card", "optout_promise", "write_model_card"]

_TRAINED = {
    "routers": "routers were",
    "trunk": "routers and everything that is no expert were",
    "all": "weights were all",
}


def write_model_card(path: Path, lock: Lock, *, description: str = "") -> None:
    """Write ``README.md``.

    Args:
        path: The file.
        lock: What the folder is made of.
        description: The builder's own words.
    """
    recipe: Recipe = RECIPES.load(lock.recipe)()
    path.write_text(recipe.model_card(lock, description=description), encoding="utf-8")


def language_model_card(lock: Lock, description: str) -> str:
    """Return the card of a composed language model."""
    example = lock.owners[0] if lock.owners else "owner"
    router = f", router `{lock.router.scorer}` over `{lock.router.context}`, top-{lock.router.top_k}"
    return f"""---
library_name: coterie
base_model: {json.dumps(lock.base.name)}
tags: [coterie, mixture-of-experts]
---

# {lock.name}

{description or f"A composition of {len(lock.experts)} experts around the public base '{lock.base.name}'."}

Recipe `{lock.recipe}`{router if RECIPES.load(lock.recipe).routes else ""}. Base
fingerprint `{lock.base.fingerprint}`.

{expert_table(lock)}

## Leaving an owner out

Class `{lock.optout_class}`: {optout_promise(lock)}

```python
import composer.hf
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(".", opt_out={{"{example}"}})
```

Weights and routing artefacts are functions of their owners' data. Keeping the data apart is not a proof that
nothing of them can be learned from this model.
"""


def expert_table(lock: Lock) -> str:
    """Return a table of the experts and a sentence on their licences."""
    licenses = sorted({expert.license for expert in lock.experts})
    rows = "\n".join(
        f"| {e.name} | {e.version} | {e.owner} | {e.domain} | {e.license} | {e.kind} | {e.parameters:,} "
        f"| `{e.digest[:12]}` |"
        for e in lock.experts
    )
    return f"""| expert | version | owner | domain | licence | kind | parameters | card |
|---|---|---|---|---|---|---|---|
{rows}

Licences of the parts: {", ".join(licenses)}; the base has its own. They hold side by side."""


def optout_promise(lock: Lock) -> str:
    """Say what leaving an owner out means."""
    if lock.optout_class == "exact":
        return (
            "no file here mixes owners. Leaving one out gives the model that was never composed with them; "
            "`coterie verify-optout` proves it."
        )
    if lock.optout_class == "recompose":
        return "some files mix owners; leaving one out rebuilds them from the others' sources, or is refused."
    if lock.tuned is not None:
        return (
            f"after composing, its {_TRAINED[lock.tuned.trained]} trained on text of "
            f"{', '.join(lock.tuned.text_owners) or 'nobody in particular'}, and every tuned tensor holds "
            f"{', '.join(lock.tuned.owners)}. What it was trained from is kept: leaving anybody out gives the "
            "composition from before the training, without them."
        )
    return "parts were trained jointly; leaving one out needs a state from before they joined."
