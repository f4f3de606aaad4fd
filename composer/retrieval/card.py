"""The model card of a composed retriever: what it is made of, how to search with it and how to leave somebody out."""

from __future__ import annotations

import json

from composer.lock import Lock
from composer.model_card import expert_table, optout_promise

__all__ = ["retriever_card"]


def retriever_card(lock: Lock, description: str) -> str:
    """Return the text of ``README.md``."""
    example = lock.owners[0] if lock.owners else "owner"
    router = lock.router
    return f"""---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
base_model: {json.dumps(lock.base.name)}
tags: [coterie, sentence-transformers, retrieval]
---

# {lock.name}

{description or f"{len(lock.experts)} query encoders beside the public embedding model '{lock.base.name}'."}

Recipe `{lock.recipe}`, router `{router.scorer}`, selector `{router.selector}`. Base fingerprint
`{lock.base.fingerprint}`. Documents are encoded by the base alone, so an index made with it serves this model too.

{expert_table(lock)}

## Use

```python
import composer.hf
from sentence_transformers import SentenceTransformer

model = SentenceTransformer(".")
documents = model.encode_document(["..."])
queries = model.encode_query(["..."])
```

`base/` is the stock model; it needs nothing but sentence-transformers.

## Leaving an owner out

Class `{lock.optout_class}`: {optout_promise(lock)}

```python
model.encode_query(["..."], opt_out={{"{example}"}})
```

Weights and published sums are functions of their owners' data. Keeping the data apart is not a proof that nothing of
them can be learned from this model.
"""
