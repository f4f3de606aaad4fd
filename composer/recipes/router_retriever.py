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
from composer.retrieval.published import foreign_names, publication_problems
from composer.retrieval.scorers import RETRIEVAL_SCORERS, RETRIEVAL_SELECTORS
from experts.base import BaseDescription
from experts.card import ExpertCard
from experts.errors import BuildError, CoterieError
from experts.kinds.retriever import is_full_encoder
from experts.routing_artifacts import RoutingInfo

if TYPE_CHECKING:
    from composer.members import Members
    from composer.model import ComposedForCausalLM
    from composer.planning import Plan
    from composer.probes import Probe
    from composer.retrieval.options import RetrievalRouter

__all__ = ["RouterRetriever"]


class RouterRetriever(Recipe):
    """Routes every query among owners' experts on one embedding model."""

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
        found += _depth_problems(router, experts)
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

    def warnings(self, *, manifest: Any, experts: Sequence[ExpertCard]) -> list[str]:
        """Say where sums tell what queries span, and whose cards name experts that are not here."""
        router = manifest.router
        if RETRIEVAL_SCORERS.load(router.scorer).needs & {"pilots", "utility"}:
            return _absent_names(experts)
        if router.scorer != "lda":
            return []
        even = [
            f"{card.name} publishes no second moment, so lda takes its queries to vary alike in all directions"
            for card in experts
            if card.routing is not None
            and card.routing.retrieval is not None
            and not card.routing.retrieval.second_moment
        ]
        few = [
            f"{card.name} sums up {info.queries} queries in {info.dimension} dimensions; its second moment tells what "
            "they span"
            for card in experts
            if (info := card.routing.retrieval if card.routing else None) is not None
            and info.second_moment
            and info.noise is None
            and info.queries < info.dimension
        ]
        return few + even

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


def _depth_problems(router: RetrievalRouter, experts: Sequence[Candidate]) -> list[str]:
    """Say who cannot go on from a state that the base's lower layers made."""
    if router.route_on != "layer_state":
        return []
    whole = [e.card.name for e in experts if is_full_encoder([entry.path for entry in e.card.files])]
    return [
        f"{name} is a whole query encoder: it shares no lower layers with the base, which `route_on: layer_state` goes "
        "on from; route on the embedding, or leave it out"
        for name in whole
    ]


def _name_problems(router: RetrievalRouter) -> list[str]:
    found = []
    for table, name in ((RETRIEVAL_SCORERS, router.scorer), (RETRIEVAL_SELECTORS, router.selector)):
        try:
            table[name]
        except CoterieError as error:
            found.append(str(error))
    return found


def _absent_names(experts: Sequence[ExpertCard]) -> list[str]:
    here = {card.name for card in experts}
    absent = {card.name: sorted(set(foreign_names(card)) - here) for card in experts}
    return [
        f"{name} publishes how well it was served by {', '.join(others)}, not in this composition; nothing of that is "
        "read, and the names go with the owner's next version"
        for name, others in absent.items()
        if others
    ]


def _write(path: Path, data: object) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
