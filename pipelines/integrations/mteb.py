r"""Evaluates composed retrievers with MTEB on test collections that lie on this machine, without any network.

    from pipelines.integrations.mteb import CoterieEncoder, evaluate, local_task

    task = local_task(read_collection(Path("collections/med")))
    evaluate(CoterieEncoder.open("composed", opt_out={"acme"}), [task])

Needs the extra ``mteb``. Knows MTEB's tasks and its identity of models; knows nothing of routing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection as Owners
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from composer.optout import owner_names
from experts.errors import OptOutError
from pipelines.retrieval.collection import Collection
from pipelines.retrieval.encoders import Encoder, open_encoder
from pipelines.retrieval.search import Vectors

try:
    import mteb
    from datasets import Dataset
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.models.model_meta import ModelMeta
except ImportError as error:
    raise ImportError("MTEB is not installed. Install the extra: pip install 'coterie[mteb]'.") from error

__all__ = ["CoterieEncoder", "evaluate", "local_task"]

_SPLIT = "test"


def local_task(collection: Collection, *, name: str | None = None) -> Any:
    """Make a retrieval task of MTEB out of a collection; nothing is ever downloaded.

    Args:
        collection: As `pipelines.retrieval.read_collection` gives it.
        name: What the results are called; None: the collection's name.
    """
    shown = name or collection.name
    data = [
        [(document.id, document.text) for document in collection.documents],
        dict(collection.queries),
        {query: dict(grades) for query, grades in collection.judgements.items()},
    ]
    digest = hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
    metadata = TaskMetadata(
        name=shown,
        description=f"The test collection {shown}, on this machine.",
        dataset={"path": f"local/{shown}", "revision": digest},
        type="Retrieval",
        category="t2t",
        modalities=["text"],
        eval_splits=[_SPLIT],
        eval_langs=["eng-Latn"],
        main_score="ndcg_at_10",
    )

    class LocalRetrieval(AbsTaskRetrieval):  # type: ignore[misc]
        """A collection as MTEB's task."""

        def load_data(self, **kwargs: Any) -> None:
            """Put the collection where MTEB looks for it."""
            self.dataset = {"default": {_SPLIT: _split(collection)}}
            self.data_loaded = True

    LocalRetrieval.metadata = metadata
    return LocalRetrieval()


def _split(collection: Collection) -> dict[str, Any]:
    documents = [{"id": d.id, "title": "", "text": d.text} for d in collection.documents]
    queries = [{"id": query, "text": text} for query, text in collection.queries.items()]
    return {
        "corpus": Dataset.from_list(documents),
        "queries": Dataset.from_list(queries),
        "relevant_docs": {query: dict(grades) for query, grades in collection.judgements.items()},
        "top_ranked": None,
    }


class CoterieEncoder:
    """An embedding model as MTEB's encoder, with owners left out.

    Its name and revision are those of the composition without the owners who are left out, so that MTEB never takes
    the results of one for another's.

    Args:
        encoder: The model.
        name: Under which results are kept.
        opt_out: Owners who must not answer queries. Their documents are the task's: see
            `pipelines.retrieval.collection.without_owners`.

    Raises:
        OptOutError: ``opt_out`` is no collection of names.
    """

    def __init__(self, encoder: Encoder, *, name: str, opt_out: Owners[str] = ()) -> None:
        self.encoder = encoder
        self.opt_out = tuple(sorted(owner_names(opt_out)))
        self.mteb_model_meta = ModelMeta.create_empty(
            {"name": f"coterie/{name}", "revision": encoder.revision(opt_out=self.opt_out)}
        )

    @classmethod
    def open(cls, folder: Path | str, *, opt_out: Owners[str] = ()) -> CoterieEncoder:
        """Open a composed retriever or a stock folder; left-out owners' files are not opened.

        Raises:
            CoterieError: As `pipelines.retrieval.encoders.open_encoder`.
        """
        return cls(open_encoder(Path(folder), opt_out=opt_out), name=Path(folder).resolve().name)

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: Any = None,
        hf_split: str = "",
        hf_subset: str = "",
        prompt_type: Any = None,
        batch_size: int = 32,
        **kwargs: Any,
    ) -> Vectors:
        """Encode what MTEB hands over.

        Raises:
            OptOutError: Its ``encode_kwargs`` leave owners out, of which the results' revision would not tell.
        """
        if kwargs.get("opt_out"):
            raise OptOutError(
                "encode_kwargs leave owners out, which MTEB keeps under the same revision as if nobody were. Give "
                "opt_out to CoterieEncoder instead."
            )
        texts = [text for batch in inputs for text in batch["text"]]
        if getattr(prompt_type, "value", prompt_type) == "query":
            return self.encoder.queries(texts, opt_out=self.opt_out, batch_size=batch_size)
        return self.encoder.documents(texts, batch_size=batch_size)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Inner products: vectors that are compared by angle have length 1 already."""
        import torch

        return torch.from_numpy(np.asarray(embeddings1) @ np.asarray(embeddings2).T)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Inner products of rows."""
        import torch

        return torch.from_numpy((np.asarray(embeddings1) * np.asarray(embeddings2)).sum(axis=1))


def evaluate(model: CoterieEncoder, tasks: Sequence[Any], **options: Any) -> dict[str, dict[str, float]]:
    """Run MTEB without its cache and return its scores: task -> metric -> value.

    Args:
        model: What to evaluate.
        tasks: Of `local_task`, or any that MTEB has already downloaded.
        options: Of ``mteb.evaluate``.
    """
    settings = {"cache": None, "co2_tracker": False, "show_progress_bar": False, **options}
    found = mteb.evaluate(model, tasks, **settings)
    return {
        result.task_name: {
            metric: value
            for metric, value in result.scores[_SPLIT][0].items()
            if isinstance(value, float | int) and not isinstance(value, bool)
        }
        for result in found.task_results
    }
