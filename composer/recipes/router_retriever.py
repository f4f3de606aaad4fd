"""RouterRetriever: query encoders of many owners beside one frozen base, the right ones chosen for every query.

Documents are encoded once, by the base (arXiv 2409.02685). Every adapter and every published sum stays in its owner's
own files, and the router is solved at load from those that are opened, so an owner leaves by not being opened.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from composer.lock import Lock, OptOutClass
from composer.manifest import Manifest
from composer.recipes.base import Candidate, Recipe, unsupported_kinds
from composer.retrieval.form import MODULES_NAME, QUERY_KWARGS, TOP_FILES, RetrieverLock, RetrieverManifest
from composer.retrieval.published import publication_problems
from composer.retrieval.scorers import RETRIEVAL_SCORERS, RETRIEVAL_SELECTORS
from experts.base import BaseDescription
from experts.card import ExpertCard
from experts.errors import BuildError, CoterieError
from experts.routing_artifacts import RoutingInfo

if TYPE_CHECKING:
    from composer.members import Members
    from composer.model import ComposedForCausalLM
    from composer.planning import Plan
    from composer.probes import Probe
    from composer.retrieval.options import RetrievalRouter

__all__ = ["RouterRetriever"]


class RouterRetriever(Recipe):
    """Routes every query among owners' adapters on one embedding model."""

    summary = "query encoders beside one embedding model, routed per query; documents stay the base's"
    kinds = ("retriever",)
    optout_class: ClassVar[OptOutClass] = "exact"
    manifest: ClassVar[type[Manifest]] = RetrieverManifest
    lock: ClassVar[type[Lock]] = RetrieverLock
    top_files: ClassVar[tuple[str, ...]] = TOP_FILES
    generates: ClassVar[bool] = False

    def problems(
        self,
        *,
        router: Any,
        base: BaseDescription,
        public: RoutingInfo | None,
        experts: Sequence[Candidate],
    ) -> list[str]:
        """Check the base, the kinds, the names of scorer and selector, and what the owners published."""
        if base.embedding is None:
            return ["router_retriever composes embedding models; the base is a language model"]
        found = unsupported_kinds("router_retriever", self.kinds, experts) + _name_problems(router)
        if found:
            return found
        if router.selector != "top1" and base.embedding.pooling == "max":
            found.append(
                f"selector '{router.selector}' fuses embeddings, which the base's pooling 'max' does not allow; use "
                "`selector: top1`"
            )
        cards = [e.card for e in experts]
        return found + publication_problems(cards, router, RETRIEVAL_SCORERS.load(router.scorer).needs)

    def manifest_problems(self, manifest: Manifest, base: BaseDescription) -> list[str]:
        """Refuse what only mixtures of language models have."""
        found = (
            []
            if manifest.upcycle is None
            else ["upcycle: router_retriever has no such settings; leave it out"]
        )
        prompted = [e.ref for e in manifest.experts if e.positive_prompts or e.negative_prompts]
        return found + [f"{ref}: prompts are given, but router_retriever reads none" for ref in prompted]

    def warnings(self, *, router: Any, experts: Sequence[ExpertCard]) -> list[str]:
        """Say where fewer queries than dimensions were summed: the sums then tell what the queries span."""
        few = [
            f"{card.name} sums up {info.queries} queries in {info.dimension} dimensions; its second moment tells what "
            "they span"
            for card in experts
            if (info := card.routing.retrieval if card.routing else None) is not None
            and info.second_moment
            and info.queries < info.dimension
        ]
        return few if router.scorer == "lda" else []

    def optout(self, manifest: Manifest) -> OptOutClass:
        """Labels and utilities are computed with each other's experts, so other owners' files remember who left."""
        router: RetrievalRouter = manifest.router  # type: ignore[assignment]
        needs = (
            RETRIEVAL_SCORERS.load(router.scorer).needs if router.scorer in RETRIEVAL_SCORERS else frozenset()
        )
        return "recompose" if needs & {"pilots", "utility"} else "exact"

    def active_experts(self, *, router: Any, experts: Sequence[ExpertCard]) -> int:
        """Count the experts that a query meets at most."""
        most = RETRIEVAL_SELECTORS.load(router.selector).most
        return len(experts) if most is None else min(most, len(experts))

    def write_files(self, folder: Path, plan: Plan, lock: Lock) -> None:
        """Write ``config.json`` and the base's ``modules.json`` with what must be handed on to the encoder."""
        config = {
            "model_type": "coterie_retriever",
            "architectures": ["RetrieverEncoder"],
            "base_config": dict(plan.base.description.config),
            "composition": lock.membership_digest,
            "dtype": plan.manifest.dtype or plan.base.description.config.get("dtype"),
        }
        _write(folder / "config.json", config)
        modules = json.loads((folder / "base" / MODULES_NAME).read_text(encoding="utf-8"))
        modules[0]["kwargs"] = list(QUERY_KWARGS)
        _write(folder / MODULES_NAME, modules)

    def model_card(self, lock: Lock, *, description: str) -> str:
        """Return the text of ``README.md``."""
        from composer.retrieval.card import retriever_card

        return retriever_card(lock, description)

    def load(self, members: Members, lock: Lock, **options: Any) -> Any:
        """Load the sentence-transformers model; see `composer.retrieval.loading.load_retriever`."""
        from composer.retrieval.loading import load_retriever

        if options.pop("experts_implementation", None) is not None:
            raise BuildError(
                "experts_implementation chooses kernels of FFN experts; a retriever has none. Leave it out."
            )
        assert isinstance(lock, RetrieverLock), "read as such"
        return load_retriever(members, lock, **options)

    def probe(self, folder: Path, prompts: Sequence[str], *, seed: int) -> Probe:
        """Compare embeddings of queries and documents."""
        from composer.retrieval.probe import EmbeddingProbe

        return EmbeddingProbe(prompts, seed=seed)

    def assemble(self, model: ComposedForCausalLM, members: Members) -> None:
        """Refuse: a retriever is no language model.

        Raises:
            BuildError: Always.
        """
        raise BuildError("A composed retriever is loaded as a whole: composer.load(folder).")


def _name_problems(router: RetrievalRouter) -> list[str]:
    found = []
    for table, name in ((RETRIEVAL_SCORERS, router.scorer), (RETRIEVAL_SELECTORS, router.selector)):
        try:
            table[name]
        except CoterieError as error:
            found.append(str(error))
    return found


def _write(path: Path, data: object) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
