"""What the demonstration is made of: its sizes, its owners, and where their text comes from.

Knows numbers and names only; nothing is downloaded or computed here but in `DemoInputs.from_assets`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

__all__ = ["FULL", "QUICK", "DemoInputs", "DemoOwner", "DemoSettings"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoSettings:
    """Sizes. The defaults fit two cores and six minutes.

    Attributes:
        steps: Training steps of each expert.
        batch_size: Windows in a step.
        sequence_length: Tokens in a window, for training and measuring.
        rank: Of the low-rank experts.
        layers: Which layers have experts, as in a job.
        public_windows: Windows of public text behind the anchor's statistics.
        measured_windows: Held-out windows of each domain.
        new_tokens: Length of the sample texts.
        verified_characters: Length of the real prompts that opting out is verified on, one of each domain.
        runner: ``ray``: a process and a Ray for each owner, side by side; ``local``: here, one after the other.
    """

    steps: int = 30
    batch_size: int = 4
    sequence_length: int = 128
    rank: int = 16
    layers: str = "upper-half"
    public_windows: int = 96
    measured_windows: int = 12
    new_tokens: int = 40
    verified_characters: int = 96
    runner: Literal["ray", "local"] = "ray"


FULL = DemoSettings()
"""What ``coterie demo`` runs."""

QUICK = DemoSettings(steps=12, public_windows=48, measured_windows=4, new_tokens=16)
"""A look in about two minutes; too little training to reach every figure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoOwner:
    """One owner and the text that stays with them.

    Attributes:
        owner: Name of the owner.
        expert: Name of the expert, without the owner's.
        domain: What it is about; the name of the domain in every table.
        statement: What the text is, for the card.
        prompt: Beginning of a text of the domain, for the sample.
        training: Documents to train on.
        held_out: Documents to measure on.
    """

    owner: str
    expert: str
    domain: str
    statement: str
    prompt: str
    training: Sequence[str] = field(repr=False)
    held_out: Sequence[str] = field(repr=False)

    @property
    def name(self) -> str:
        """``owner/expert``."""
        return f"{self.owner}/{self.expert}"


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoInputs:
    """Everything that the demonstration does not make itself.

    Attributes:
        base_name: Name of the anchor in the registry.
        anchor: Its checkpoint folder.
        owners: In the order of the tables.
        public: Public documents: the class of text that is nobody's.
        unseen: Documents of domains that are nobody's and were never shown, by domain.
    """

    base_name: str
    anchor: Path
    owners: tuple[DemoOwner, ...]
    public: Sequence[str] = field(repr=False)
    unseen: Mapping[str, Sequence[str]] = field(repr=False)

    @classmethod
    def from_assets(
        cls, *, cache: Path | None = None, progress: Callable[[str], None] | None = None
    ) -> DemoInputs:
        """SmolLM2-135M; a software house, a hospital and a law firm; prose as public text, surgery unseen.

        Raises:
            AssetError: Something could not be downloaded.
        """
        from pipelines.assets import domain_text, smollm2

        texts = {
            name: domain_text(name, cache=cache, progress=progress)
            for name in ("python", "icd10", "licences", "prose", "surgery")
        }
        owners = (
            ("softhouse", "python", 'def read_lines(path, encoding="utf-8"):\n'),
            ("hospital", "icd10", "M16 Osteoarthritis of hip\nM16.0 "),
            ("lawfirm", "licences", "4. Redistribution. You may reproduce and distribute copies of the"),
        )
        return cls(
            base_name="smollm2",
            anchor=smollm2(cache=cache, progress=progress),
            owners=tuple(
                DemoOwner(
                    owner=owner,
                    expert=name,
                    domain=name,
                    statement=texts[name].source,
                    prompt=prompt,
                    training=texts[name].training,
                    held_out=texts[name].held_out,
                )
                for owner, name, prompt in owners
            ),
            public=texts["prose"].training,
            unseen={"surgery": texts["surgery"].held_out},
        )
