"""The plan: a manifest resolved against a registry, checked and costed before a byte is written.

Pure: it reads the registry and returns a value that can be printed. Knows names, sizes and terms; opens no tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from composer.lock import OptOutClass
from composer.manifest import Manifest
from composer.presets import expand_preset, norms_ffn_output
from composer.recipes import RECIPES
from composer.recipes.base import Candidate, Recipe
from experts.base import BaseDescription
from experts.card import ExpertCard
from experts.errors import ConsentError, CoterieError, PlanError, RegistryError
from experts.kinds import get_kind
from experts.names import parse_reference, unknown_name

if TYPE_CHECKING:
    from composer.source import Source
    from registry.records import BaseRecord, ExpertRecord

__all__ = ["Plan", "PlannedExpert", "plan"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedExpert:
    """One expert as it will be composed.

    Attributes:
        record: Its line in the registry.
        card: Its card.
        parent_owners: Other owners of the experts that it was made from, directly or not.
    """

    record: ExpertRecord
    card: ExpertCard
    parent_owners: tuple[str, ...] = ()

    @property
    def whose(self) -> tuple[str, ...]:
        """Everybody whose leaving takes it along, its own owner first."""
        return (self.card.owner, *self.parent_owners)

    def to_dict(self) -> dict[str, Any]:
        """Return the row that tables show."""
        return {
            "name": self.card.name,
            "version": self.card.version,
            "owner": self.card.owner,
            "domain": self.card.domain,
            "license": self.card.license,
            "kind": self.card.kind,
            "layers": list(self.card.layers),
            "rank": self.card.rank,
            "parameters": self.record.parameters,
            "bytes": self.record.bytes,
            "digest": self.record.digest,
            **({"parent_owners": list(self.parent_owners)} if self.parent_owners else {}),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What `composer.building.build` will write.

    Attributes:
        manifest: The builder's wish, its preset written out.
        base: The anchor.
        experts: In canonical order, which is by name.
        left_out: Experts that the manifest's ``opt_out`` removed.
        optout_class: What opting out of the result can mean.
        parameters_total: Of the anchor and all experts.
        parameters_active: That one token meets at most.
        bytes: Of all files, linked or copied.
        flops_per_token: Two per active weight of a matrix product; attention over the context not counted.
        warnings: What the builder should know.
    """

    manifest: Manifest
    base: BaseRecord
    experts: tuple[PlannedExpert, ...]
    left_out: tuple[str, ...]
    optout_class: OptOutClass
    parameters_total: int
    parameters_active: int
    bytes: int
    flops_per_token: int
    warnings: tuple[str, ...]

    @property
    def owners(self) -> tuple[str, ...]:
        """Owners of the experts, sorted."""
        return tuple(sorted({expert.card.owner for expert in self.experts}))

    @property
    def involved(self) -> tuple[str, ...]:
        """Owners of the experts, and of those they were made from, sorted."""
        return tuple(sorted({owner for expert in self.experts for owner in expert.whose}))

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for printing and ``--json``."""
        return {
            "name": self.manifest.name,
            "recipe": self.manifest.recipe,
            "base": {
                "name": self.base.name,
                "fingerprint": self.base.fingerprint,
                "bytes": sum(entry.size for entry in self.base.files),
            },
            "router": self.manifest.router.model_dump(mode="json"),
            "experts": [expert.to_dict() for expert in self.experts],
            "owners": list(self.owners),
            "left_out": list(self.left_out),
            "optout_class": self.optout_class,
            "parameters_total": self.parameters_total,
            "parameters_active": self.parameters_active,
            "bytes": self.bytes,
            "flops_per_token": self.flops_per_token,
            "warnings": list(self.warnings),
        }


def plan(manifest: Manifest, registry: Source, *, changed: bool = False) -> Plan:
    """Resolve and check a manifest.

    Args:
        manifest: The builder's wish.
        registry: Where its names are looked up.
        changed: Whether owners came or left since the manifest was written; more experts a token than are left then
            mean all of them, as they do when an owner is left out.

    Raises:
        PlanError: Everything that stands in the way, at once.
        ConsentError: The manifest names experts of an owner who has opted out.
    """
    recipe: Recipe = RECIPES.load(manifest.recipe)()
    base = registry.base(manifest.base)
    too_many = _top_k_problems(manifest)  # of what was written: a preset is for any number of experts
    manifest = recipe.expand(expand_preset(manifest, base.description))
    wanted, left_out = _resolve(manifest, registry)
    manifest = _without_descendants(manifest, left_out)
    _check_consent(wanted, registry)
    experts = tuple(sorted(wanted, key=lambda expert: expert.card.name))
    if not experts:
        raise PlanError(
            f"Manifest '{manifest.name}': opt_out leaves no expert ({', '.join(left_out)}). Use the base "
            f"'{base.name}' itself, or leave fewer owners out."
        )
    cards = [expert.card for expert in experts]
    description = base.description
    problems = [*_base_problems(base, cards), *_duplicates(cards)]
    problems += [] if changed else too_many
    problems += recipe.manifest_problems(manifest, description)
    if not problems:
        candidates = [_candidate(expert, description, registry) for expert in experts]
        problems = recipe.problems(
            router=manifest.router, base=description, public=base.routing, experts=candidates
        )
    if problems:
        raise PlanError(f"Manifest '{manifest.name}' cannot be composed:", problems=problems)
    active = recipe.active_experts(router=manifest.router, experts=cards)
    counted = recipe.parameters(manifest=manifest, base=description, experts=cards)
    return Plan(
        manifest=manifest,
        base=base,
        experts=experts,
        left_out=left_out,
        optout_class=recipe.optout(manifest),
        warnings=(
            *recipe.warnings(manifest=manifest, experts=cards),
            *_scale_warnings(manifest, base, len(cards)),
        ),
        **_costs(base, description, experts, active, counted),
    )


def _resolve(manifest: Manifest, registry: Source) -> tuple[list[PlannedExpert], tuple[str, ...]]:
    """Look every reference up; collect all mistakes before failing."""
    experts, left_out, problems = [], [], []
    owners = set()
    for position, entry in enumerate(manifest.experts):
        try:
            record = registry.expert(entry.ref)
        except CoterieError as error:
            problems.append(f"experts[{position}]: {error}")
            continue
        owners.add(record.owner)
        if record.owner in manifest.opt_out:
            left_out.append(record.name)
            continue
        try:
            card = registry.card(record)
            parents = registry.parent_owners(card)
        except RegistryError as error:
            problems.append(f"experts[{position}]: {error}")
            continue
        owners.update(parents)
        if set(parents).isdisjoint(manifest.opt_out):
            experts.append(PlannedExpert(record=record, card=card, parent_owners=parents))
        else:
            left_out.append(record.name)
    for owner in manifest.opt_out:
        if owner not in owners and not problems:
            problems.append(f"opt_out: {unknown_name('owner', owner, owners)}")
    if problems:
        raise PlanError(f"Manifest '{manifest.name}' cannot be composed:", problems=problems)
    return experts, tuple(sorted(left_out))


def _without_descendants(manifest: Manifest, left_out: Sequence[str]) -> Manifest:
    """Drop experts that leave with owners of others, as if they had never been listed."""
    gone = {name for name in left_out if name.partition("/")[0] not in manifest.opt_out}
    if not gone:
        return manifest
    experts = tuple(entry for entry in manifest.experts if parse_reference(entry.ref)[0] not in gone)
    upcycle = manifest.upcycle and manifest.upcycle.without(gone)
    return manifest.model_copy(update={"experts": experts, "upcycle": upcycle})


def _check_consent(experts: Sequence[PlannedExpert], registry: Source) -> None:
    opted_out = {entry.owner: entry for entry in registry.opt_outs()}
    problems = []
    for expert in experts:
        for owner in expert.whose:
            entry = opted_out.get(owner)
            if entry is not None:
                made = "" if owner == expert.card.owner else f"made from an expert of {owner}; "
                problems.append(
                    f"{expert.card.name}: {made}{entry.owner} opted out on {entry.when} (recorded by {entry.who}): "
                    f"{entry.reason}"
                )
    if problems:
        raise ConsentError(
            "The manifest names experts of owners who have opted out. Remove them, or list the owners under "
            "'opt_out':",
            problems=problems,
        )


def _candidate(expert: PlannedExpert, description: BaseDescription, registry: Source) -> Candidate:
    """Resolve the expert's configuration on the base."""
    files = registry.files(expert.record)
    kind = get_kind(expert.card.kind).form(files)
    config = kind.read_config(files[kind.config_file])
    return Candidate(card=expert.card, ffn_only=kind.resolve(config, description).ffn_only)


def _base_problems(base: BaseRecord, cards: Sequence[ExpertCard]) -> list[str]:
    return [
        f"{card.name} was trained on another anchor: '{card.base.name}' with fingerprint "
        f"{card.base.fingerprint}; this composition's is '{base.name}' with {base.fingerprint}"
        for card in cards
        if card.base.fingerprint != base.fingerprint
    ]


def _duplicates(cards: Sequence[ExpertCard]) -> list[str]:
    names = [card.name for card in cards]
    return [f"{name} is listed more than once" for name in sorted({n for n in names if names.count(n) > 1})]


def _top_k_problems(manifest: Manifest) -> list[str]:
    """Compare the experts per token with those that are listed, whoever of them the manifest leaves out."""
    if manifest.recipe != "flexolmo" or "top_k" not in manifest.router.model_fields_set:
        return []
    top_k, listed = manifest.router.top_k, len(manifest.experts)
    if top_k <= listed + 1:
        return []
    noun = "expert" if listed == 1 else "experts"
    return [
        f"router.top_k: {top_k} found, but {listed} {noun} and the anchor are all that a token can be sent to; "
        f"write at most {listed + 1}"
    ]


def _scale_warnings(manifest: Manifest, base: BaseRecord, experts: int) -> list[str]:
    """Warn where weights that do not sum to 1 scale an FFN whose scale matters; all experts' weights do sum to 1."""
    router = manifest.router
    everybody = router.selector == "topk" and router.top_k > experts
    if manifest.recipe != "flexolmo" or router.normalize or everybody or norms_ffn_output(base.description):
        return []
    return [
        f"router.normalize is false, and '{base.name}' does not normalise what its FFNs return, as OLMo-2 does: the "
        "weights of the chosen experts sum to less than 1 and scale every FFN down, so that even copies of the "
        "anchor's would change the model. Write 'normalize: true'."
    ]


def _costs(
    base: BaseRecord,
    description: BaseDescription,
    experts: Sequence[PlannedExpert],
    active: int,
    counted: tuple[int, int] | None,
) -> dict[str, int]:
    """Count parameters, bytes and FLOPs; unless the recipe counted, the ``active`` largest experts are active."""
    anchor = description.num_parameters
    sizes = sorted(expert.record.parameters for expert in experts)
    total, most = anchor + sum(sizes), anchor + sum(sizes[len(sizes) - active :])
    if counted is not None:
        total, most = counted
    return {
        "parameters_total": total,
        "parameters_active": most,
        "bytes": sum(entry.size for entry in base.files) + sum(e.record.bytes for e in experts),
        "flops_per_token": 2 * (most - _lookup_only(description)),
    }


def _lookup_only(description: BaseDescription) -> int:
    """Count the input embedding's weights, unless it doubles as the output matrix."""
    config: Mapping[str, object] = description.config
    inner = config.get("text_config")
    decoder = inner if isinstance(inner, dict) else config
    vocab = decoder.get("vocab_size")
    heads = [name for name in description.tensors if name.endswith(("lm_head.weight", "embed_out.weight"))]
    tied = not heads or description.tied_head is not None
    return 0 if tied or not isinstance(vocab, int) else vocab * description.hidden_size
