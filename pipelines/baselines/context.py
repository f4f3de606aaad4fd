"""What every baseline is made from: an anchor, the experts by domain, and where to compute.

Knows references, consent and lineage; opens no tensor before `BaselineContext.anchor` is asked for.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from experts.errors import ConsentError, CoterieError, PlanError
from experts.names import unknown_name

if TYPE_CHECKING:
    from composer.source import Source
    from experts.card import ExpertCard
    from pipelines.baselines.anchor import Anchor
    from registry.records import ExpertRecord

__all__ = ["BaselineContext", "Member"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One expert as the baselines see it.

    Attributes:
        domain: The name it goes by in the comparison.
        record: Its line in the registry.
        card: Its card.
        files: Where its files are, by their path in the package.
    """

    domain: str
    record: ExpertRecord
    card: ExpertCard
    files: Mapping[str, Path]


@dataclass(frozen=True, slots=True, kw_only=True)
class BaselineContext:
    """An anchor and experts on it. Whoever is not listed is not opened.

    Attributes:
        registry: A registry, or a composed folder as `composer.source.FolderSource`.
        base: The anchor's name there.
        experts: Domain -> reference of its expert. Arms go through them by name, whatever the order here.
        dtype: ``float32`` or ``bfloat16``; None: what `pipelines.train.anchor.compute_dtype` says.
        device: Where to compute: ``cpu``, ``cuda``, ``cuda:1``, or ``auto``, a GPU where there is one.
        scratch: Folder for temporary files; None: the system's.
        state_bytes: How much memory states of the layers below all experts may take, which the arms share.
    """

    registry: Source
    base: str
    experts: Mapping[str, str]
    dtype: str | None = None
    device: str = "cpu"
    scratch: Path | None = None
    state_bytes: int = 256 << 20
    _opened: dict[tuple[Any, ...], list[Anchor]] = field(default_factory=dict, repr=False, compare=False)
    """Anchors once they are loaded, which are nobody's; shared with the contexts that `without` returns."""

    @classmethod
    def from_composed(
        cls,
        folder: Path | str,
        *,
        opt_out: Collection[str] = (),
        registry: Source | None = None,
        **settings: Any,
    ) -> Self:
        """Take anchor and experts from a composed folder.

        A domain with several experts is named after each of them instead.

        Args:
            folder: What `composer.build` wrote.
            opt_out: Owners who are not listed.
            registry: Its consent ledger is read, and owners who have opted out since the build are not listed.
            settings: ``dtype``, ``device``, ``scratch``, ``state_bytes``.

        Raises:
            BuildError: It is not a composed folder.
            UnknownNameError: ``opt_out`` names somebody who is not in it.
        """
        from composer.optout import check_owners
        from composer.source import FolderSource

        source = FolderSource(Path(folder))
        left_out = check_owners(opt_out, source.lock.composed_owners)
        if registry is not None:
            left_out |= {entry.owner for entry in registry.opt_outs()}
        locked = [expert for expert in source.lock.experts if expert.whose.isdisjoint(left_out)]
        domains = [expert.domain for expert in locked]
        experts = {
            expert.domain if domains.count(expert.domain) == 1 else expert.name: (
                f"{expert.name}@{expert.version}"
            )
            for expert in locked
        }
        return cls(registry=source, base=source.lock.base.name, experts=experts, **settings)

    @property
    def domains(self) -> tuple[str, ...]:
        """The experts' domains, sorted: the order of every sum."""
        return tuple(sorted(self.experts))

    def without(self, *domains: str) -> BaselineContext:
        """The same without some domains' experts; a loaded anchor is kept.

        Raises:
            UnknownNameError: There is no such domain.
        """
        for domain in domains:
            self.check_domain(domain)
        kept = {domain: ref for domain, ref in self.experts.items() if domain not in domains}
        return replace(self, experts=kept)

    def check_domain(self, domain: str) -> str:
        """Return ``domain`` if there is an expert for it, else raise `UnknownNameError`."""
        if domain not in self.experts:
            raise unknown_name("domain", domain, self.experts)
        return domain

    def members(self) -> dict[str, Member]:
        """Look every expert up and check it.

        Returns:
            By domain, sorted.

        Raises:
            PlanError: A reference is unknown, or the expert was trained on another anchor; all are listed.
            ConsentError: An owner has opted out.
        """
        base = self.registry.base(self.base)
        found, problems = {}, []
        for domain in self.domains:
            try:
                record = self.registry.expert(self.experts[domain])
            except CoterieError as error:
                problems.append(f"{domain}: {error}")
                continue
            if record.base_fingerprint != base.fingerprint:
                problems.append(
                    f"{domain}: {record.ref} was trained on another anchor: '{record.base_name}' with fingerprint "
                    f"{record.base_fingerprint}; this one is '{base.name}' with {base.fingerprint}"
                )
            found[domain] = record
        if problems:
            raise PlanError("These experts cannot be compared:", problems=problems)
        self._check_consent(found)
        return {domain: self._member(domain, record) for domain, record in found.items()}

    def _check_consent(self, records: Mapping[str, ExpertRecord]) -> None:
        out = {entry.owner: entry for entry in self.registry.opt_outs()}
        problems = [
            f"{domain}: {record.name}: {owner} opted out on {out[owner].when}"
            for domain, record in records.items()
            for owner in (record.owner, *self.registry.parent_owners(self.registry.card(record)))
            if owner in out
        ]
        if problems:
            raise ConsentError(
                "The baseline names experts of owners who have opted out. Do not list them:",
                problems=problems,
            )

    def _member(self, domain: str, record: ExpertRecord) -> Member:
        return Member(
            domain=domain,
            record=record,
            card=self.registry.card(record),
            files=self.registry.files(record),
        )

    def anchor(self) -> Anchor:
        """Return the anchor, loaded at the first call.

        Raises:
            ManifestError: The device is not there.
            UnknownNameError: The registry has no such base.
            PlanError: An expert is unknown or belongs to another anchor.
            ConsentError: An owner has opted out.
        """
        from pipelines.baselines.anchor import Anchor, load_model

        layers = [layer for member in self.members().values() for layer in member.card.layers]
        first = min(layers, default=0)
        # a context changed with dataclasses.replace shares this table, not what no longer fits
        opened = self._opened.setdefault((id(self.registry), self.base, self.dtype, self.device), [])
        for anchor in opened:
            if anchor.first <= first or not layers:
                return anchor
        description = opened[0].description if opened else self.registry.base(self.base).description
        model = opened[0].model if opened else load_model(self, description)
        opened.append(Anchor(model, description, first=first, state_bytes=self.state_bytes))
        return opened[-1]
