"""What all arms of an experiment share: texts, the anchor, windows to measure, and a registry for each seed.

Knows how experts are trained, packed and composed through the project's own interfaces; knows nothing of arms.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experts.routing_artifacts import RoutingInfo
from pipelines.experiments.own_text import check_apart, read_own
from pipelines.experiments.settings import Experiment, ScratchAnchor

if TYPE_CHECKING:
    from torch import Tensor, nn

    from composer.model import ComposedForCausalLM
    from pipelines.baselines import BaselineContext
    from pipelines.evaluate import DomainWindows
    from pipelines.train import DomainJob
    from registry import Registry
    from registry.records import BaseRecord

__all__ = ["BASE", "Tell", "Texts", "World", "read_texts"]

BASE = "anchor"
"""Name of the anchor in the registries."""

Tell = Callable[[str], None]
"""Told what is going on, in a few words."""

_PUBLIC_WINDOWS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """The documents of an experiment.

    Attributes:
        owned: What each domain's owner trains on.
        held_out: What is measured, by domain, those that are nobody's included.
        public: The public mix.
    """

    owned: Mapping[str, Sequence[str]]
    held_out: Mapping[str, Sequence[str]]
    public: Sequence[str]


def read_texts(experiment: Experiment, *, cache: Path | None = None, tell: Tell | None = None) -> Texts:
    """Fetch and divide the texts: the first documents of every domain are public, the rest is the owner's.

    Of a text of one's own that is public or nobody's, all documents are.

    Raises:
        AssetError: A text cannot be had.
        DataError: A text of one's own has no file, another form, or documents that are trained on and measured.
    """
    from pipelines.assets import domain_text

    own = {text.name: text for text in experiment.own_texts}

    def read(name: str, *, divide: bool = False) -> tuple[Sequence[str], Sequence[str]]:
        if name in own:
            return read_own(own[name], divide=divide)
        text = domain_text(name, cache=cache, progress=tell)
        return text.training, text.held_out

    owned, held_out, trained = {}, {}, {}
    public: list[str] = []
    for name in experiment.domains:
        trained[name], held_out[name] = read(name, divide=True)
        cut = int(len(trained[name]) * experiment.public_share)
        public += trained[name][:cut]
        owned[name] = trained[name][cut:]
    for name in experiment.public:
        trained[name] = read(name)[0]
        public += trained[name]
    for name in experiment.unowned:
        held_out[name] = read(name)[0 if name in own else 1]
    check_apart(trained, held_out, own=own)
    return Texts(owned=owned, held_out=held_out, public=public)


class World:
    """One seed of an experiment.

    Args:
        experiment: What is run.
        texts: Its documents.
        folder: The working folder of the experiment; the seed's own is below it.
        seed: Which seed.
        tell: Told what is going on.
        device: Where it computes; None: where the experiment says.

    Raises:
        ManifestError: The device is not there.
    """

    def __init__(
        self,
        experiment: Experiment,
        texts: Texts,
        *,
        folder: Path,
        seed: int,
        tell: Tell | None = None,
        device: str | None = None,
    ) -> None:
        from pipelines.devices import find_device

        self.device = str(find_device(experiment.device if device is None else device))
        self.experiment = experiment
        self.texts = texts
        self.seed = seed
        self.shared = folder
        self.folder = folder / f"seed-{seed}"
        self.tell: Tell = tell or (lambda _: None)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._baselines: BaselineContext | None = None

    # ---------------------------------------------------------------- the anchor

    @cached_property
    def anchor_folder(self) -> Path:
        """The anchor's checkpoint folder, trained on first use where it is one from scratch."""
        settings = self.experiment.anchor
        if not isinstance(settings, ScratchAnchor):
            from pipelines.assets import smollm2

            return smollm2(progress=self.tell)
        from pipelines.experiments.scratch import train_anchor

        return train_anchor(
            settings,
            self.texts.public,
            out=self.shared / "anchor",
            sequence_length=self.experiment.sequence_length,
            device=self.device,
            progress=lambda done, total, loss: self.tell(f"anchor: step {done} of {total}, loss {loss:.3f}"),
        )

    @cached_property
    def registry(self) -> Registry:
        """The seed's registry, with the anchor and its public routing artefact."""
        from registry import Registry

        registry = Registry(self.folder / "registry")
        record = registry.add_base(self.anchor_folder, name=BASE)
        if record.routing is None:
            self._add_public_routing(registry, record)
        return registry

    @property
    def embedder(self) -> Path | None:
        """The model whose embeddings public rows start at; None: they start at states."""
        return None

    def _add_public_routing(self, registry: Registry, record: BaseRecord) -> None:
        import shutil

        from pipelines.train import public_routing

        folder = self.folder / "public-routing"
        shutil.rmtree(folder, ignore_errors=True)
        layers = self._layers_of(record)
        public_routing(
            self.anchor_folder,
            self.texts.public,
            out=folder,
            layer=layers[0],
            rows_layers=layers,
            embedder=self.embedder,
            sequence_length=self.experiment.sequence_length,
            windows=_PUBLIC_WINDOWS,
            device=self.device,
        )
        info = RoutingInfo.model_validate_json((folder / "routing.json").read_text())
        registry.set_base_routing(BASE, folder, info)

    def _layers_of(self, record: BaseRecord) -> tuple[int, ...]:
        from pipelines.train.layer_choice import parse_layers

        return parse_layers(self.experiment.layers, num_layers=record.description.num_layers)

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """Layers that have experts."""
        return self._layers_of(self.registry.base(BASE))

    @cached_property
    def tokenizer(self) -> Any:
        """The anchor's tokenizer."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.anchor_folder, local_files_only=True)

    def anchor(self) -> nn.Module:
        """Load the anchor, frozen, in float32, on the experiment's device."""
        import torch
        from transformers import AutoModelForCausalLM

        model: nn.Module = AutoModelForCausalLM.from_pretrained(
            self.anchor_folder, dtype=torch.float32, local_files_only=True
        )
        return model.requires_grad_(False).eval().to(self.device)

    # ---------------------------------------------------------------- windows

    @cached_property
    def windows(self) -> Mapping[str, DomainWindows]:
        """Held-out windows by domain, the same for every arm and seed."""
        from pipelines.evaluate import prepare

        sizes = self.experiment
        return prepare(
            self.texts.held_out,
            self.tokenizer,
            sequence_length=sizes.sequence_length,
            max_tokens=sizes.held_out_windows * sizes.sequence_length,
        )

    def training_windows(self, documents: Sequence[str], *, count: int) -> Tensor:
        """Cut documents into at most ``count`` windows, int64 ``(count, length)``."""
        import torch

        from pipelines.train.windows import make_windows

        windows = make_windows(
            documents,
            self.tokenizer,
            sequence_length=self.experiment.sequence_length,
            limit=count,
            seed=self.seed,
        )
        return torch.from_numpy(windows.ids).long()

    # ---------------------------------------------------------------- experts

    def owner(self, domain: str) -> str:
        """Name of the owner of a domain."""
        return f"{domain}-owner"

    def train(self, variant: str, **changes: Any) -> dict[str, str]:
        """Train every owner's expert of a variant and register it; what is registered already is kept.

        Args:
            variant: Names the expert, after its owner.
            changes: Fields of the job that differ from the experiment's.

        Returns:
            Reference by domain.

        Raises:
            TrainingError: A job failed.
        """
        from pipelines.experiments.training import train_and_register

        names = {domain: f"{self.owner(domain)}/{variant}" for domain in self.experiment.domains}
        train_and_register(
            {name: partial(self._domain_job, domain, name, changes) for domain, name in names.items()},
            registry=self.registry,
            out_dir=self.folder / "experts",
            runner=self.experiment.runner,
            tell=self.tell,
        )
        return names

    def _domain_job(self, domain: str, name: str, changes: Mapping[str, Any]) -> DomainJob:
        from pipelines.train import DomainJob

        return DomainJob.from_dict(self._job(domain, name, changes))

    def _job(self, domain: str, name: str, changes: Mapping[str, Any]) -> dict[str, Any]:
        budget = self.experiment.experts
        return {
            "name": name,
            "domain": domain,
            "license": "Apache-2.0",
            "base": BASE,
            "kind": "ffn",
            "layers": self.experiment.layers,
            "data": str(self._owners_text(domain)),
            "held_out": 0,
            "sequence_length": self.experiment.sequence_length,
            "batch_size": budget.batch_size,
            "steps": budget.steps,
            "learning_rate": budget.learning_rate,
            "seed": self.seed,
            "device": self.device,
            "workdir": str(self.folder / "owners" / domain / "work"),
            **changes,
        }

    def _owners_text(self, domain: str) -> Path:
        folder = self.folder / "owners" / domain
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return _write_jsonl(folder / "text.jsonl", self.texts.owned[domain])

    @cached_property
    def public_file(self) -> Path:
        """The public mix as a file, for jobs that train beside it."""
        return _write_jsonl(self.folder / "public.jsonl", self.texts.public)

    # ---------------------------------------------------------------- compositions

    def baselines(self, experts: Mapping[str, str]) -> BaselineContext:
        """What baselines are made from; made once, because it holds the anchor and its states.

        Args:
            experts: Reference by domain; the same at every call.
        """
        from pipelines.baselines import BaselineContext

        if self._baselines is None:
            scratch = self.folder / "baselines"
            scratch.mkdir(exist_ok=True)
            self._baselines = BaselineContext(
                registry=self.registry,
                base=BASE,
                experts=experts,
                dtype="float32",
                device=self.device,
                scratch=scratch,
            )
        return self._baselines

    def compose(self, name: str, experts: Sequence[str], router: Mapping[str, Any]) -> ComposedForCausalLM:
        """Compose experts under a router and load the model in float32 on the experiment's device.

        The folder is kept for the next time.
        """
        import composer
        from composer import Manifest, build, plan

        out = self.folder / "composed" / name
        if not out.is_dir():
            out.parent.mkdir(parents=True, exist_ok=True)
            manifest = Manifest.from_dict(
                {
                    "name": name.replace("_", "-"),
                    "base": BASE,
                    "experts": list(experts),
                    "router": dict(router),
                }
            )
            build(plan(manifest, self.registry), out, registry=self.registry)
        model: ComposedForCausalLM = composer.load(out, dtype="float32", device=self.device)
        return model

    @property
    def total_steps(self) -> int:
        """Steps that all owners take together."""
        return self.experiment.experts.steps * len(self.experiment.domains)


def _write_jsonl(path: Path, documents: Sequence[str]) -> Path:
    with path.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps({"text": text}) + "\n" for text in documents)
    return path
