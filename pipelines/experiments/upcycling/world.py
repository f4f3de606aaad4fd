"""What the arms of one seed share: the owners' whole models in a registry, and mixtures of them, composed and tuned.

Knows how models are trained, packed, composed and tuned through the project's own interfaces; knows nothing of arms.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.experiments.upcycling.settings import UpcyclingExperiment
from pipelines.experiments.world import BASE, Tell, Texts, World

if TYPE_CHECKING:
    from torch import Tensor, nn

    from composer.model import ComposedForCausalLM
    from registry import Registry

__all__ = ["UpcyclingWorld", "read_texts"]

COPIES = ("copies/one", "copies/two")
"""The seed itself, as experts, for arms that have more experts than there are owners."""


def read_texts(experiment: UpcyclingExperiment, *, tell: Tell | None = None) -> Texts:
    """Fetch and divide the texts: the first documents of every domain are public, the rest is the owner's.

    Raises:
        AssetError: A text cannot be had.
    """
    from pipelines.assets import domain_text

    owned, held_out = {}, {}
    public: list[str] = []
    for name in experiment.domains:
        text = domain_text(name, progress=tell)
        cut = int(len(text.training) * experiment.public_share)
        public += text.training[:cut]
        owned[name] = text.training[cut:]
        held_out[name] = text.held_out
    general = domain_text(experiment.general, progress=tell)
    held_out[experiment.general] = general.held_out
    return Texts(owned=owned, held_out=held_out, public=[*public, *general.training])


class UpcyclingWorld(World):
    """One seed of an upcycling comparison, which computes on the CPU; arguments as of `World`."""

    def __init__(
        self,
        experiment: UpcyclingExperiment,
        texts: Texts,
        *,
        folder: Path,
        seed: int,
        tell: Tell | None = None,
    ) -> None:
        super().__init__(
            experiment,  # type: ignore[arg-type]
            texts,
            folder=folder,
            seed=seed,
            tell=tell,
            device="cpu",
        )
        self.settings = experiment

    @cached_property
    def registry(self) -> Registry:
        """The seed's registry, with the seed model, the owners' models and copies of the seed model."""
        from registry import Registry

        registry = Registry(self.folder / "registry")
        registry.add_base(self.anchor_folder, name=BASE)
        known = {record.name for record in registry.experts()}
        folders = {self.expert_name(domain): self.dense_folder(domain) for domain in self.settings.domains}
        folders |= dict.fromkeys(COPIES, self.anchor_folder)
        for name, folder in folders.items():
            if name not in known:
                registry.register(self._packed(registry, name, folder))
        return registry

    # ---------------------------------------------------------------- dense models

    def expert_name(self, domain: str) -> str:
        """Name of an owner's model."""
        return f"{self.owner(domain)}/whole"

    def dense_folder(self, domain: str) -> Path:
        """The checkpoint folder of an owner's model, trained on first use on mostly the owner's text."""
        out = self.folder / "dense" / domain
        if out.is_dir():
            return out
        from pipelines.experiments.optimize import optimize

        budget = self.settings.experts
        model = self.anchor()
        optimize(
            model,
            self._owners_mix(domain),
            parameters=list(model.parameters()),
            steps=budget.steps,
            batch_size=budget.batch_size,
            learning_rate=budget.learning_rate,
            seed=self.seed,
            progress=lambda done, total, loss: self.tell(
                f"{domain}: step {done} of {total}, loss {loss:.3f}"
            ),
        )
        beside = out.with_name(f"{domain}.partial")
        model.save_pretrained(beside)  # type: ignore[operator]
        beside.rename(out)
        return out

    def dense(self, domain: str) -> nn.Module:
        """Load an owner's model, frozen, in float32."""
        import torch
        from transformers import AutoModelForCausalLM

        model: nn.Module = AutoModelForCausalLM.from_pretrained(
            self.dense_folder(domain), dtype=torch.float32, local_files_only=True
        )
        return model.requires_grad_(False).eval()

    def _owners_mix(self, domain: str) -> Tensor:
        import torch

        total = self.settings.experts.steps * self.settings.experts.batch_size
        general = max(1, round(total * self.settings.general_share))
        return torch.cat(
            [
                self.training_windows(self.texts.owned[domain], count=max(1, total - general)),
                self.training_windows(self.texts.public, count=general),
            ]
        )

    def _packed(self, registry: Registry, name: str, folder: Path) -> Path:
        from experts.card import BaseRef
        from experts.errors import ExpertWarning
        from experts.package import pack

        base = registry.base(BASE)
        staging = self.folder / "packed" / name
        staging.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExpertWarning)  # the copies are the seed itself, on purpose
            pack(
                folder,
                staging,
                name=name,
                version=1,
                domain=name.partition("/")[0],
                license="Apache-2.0",
                base=base.description,
                base_ref=BaseRef(
                    name=BASE, fingerprint=base.fingerprint, tokenizer_fingerprint=base.tokenizer_fingerprint
                ),
                kind="dense",
            )
        return staging

    # ---------------------------------------------------------------- mixtures

    def mixture(
        self,
        arm: str,
        *,
        recipe: str,
        router: Mapping[str, Any],
        upcycle: Mapping[str, Any] | None = None,
        experts: tuple[str, ...] | None = None,
        steps: int | None = None,
    ) -> ComposedForCausalLM:
        """Compose a mixture, train it on equal parts of every domain and the general text, and load it.

        Args:
            arm: Name of its folder, which is kept for the next time.
            recipe: Of the manifest.
            router: Of the manifest.
            upcycle: Of the manifest.
            experts: Of the manifest; None: every owner's model.
            steps: How long to train; None: as long as the experiment says.
        """
        import composer
        from composer import Manifest, build, plan
        from pipelines.tune import plan_tuning, tune

        out = self.folder / "tuned" / arm
        if not out.is_dir():
            untuned = self.folder / "composed" / arm
            for folder in (out, untuned):
                folder.parent.mkdir(parents=True, exist_ok=True)
            names = experts or tuple(self.expert_name(domain) for domain in self.settings.domains)
            if not untuned.is_dir():
                manifest = {
                    "name": arm.replace("_", "-"),
                    "recipe": recipe,
                    "base": BASE,
                    "experts": list(names),
                    "router": {"scorer": "random", "context": "token", **router},
                    **({} if upcycle is None else {"upcycle": dict(upcycle)}),
                }
                build(plan(Manifest.from_dict(manifest), self.registry), untuned, registry=self.registry)
            job = self._tuning_job(steps or self.settings.mixture.steps)
            tune(
                plan_tuning(untuned, job, registry=self.registry),
                job,
                out,
                registry=self.registry,
                device="cpu",
                progress=lambda done, total: self.tell(f"{arm}: {done:,} of {total:,} tokens"),
            )
        model: ComposedForCausalLM = composer.load(out, dtype="float32")
        return model

    def _tuning_job(self, steps: int) -> Any:
        from pipelines.tune import TuneJob

        mixture = self.settings.mixture
        own = [
            {"text": str(self._owners_text(domain)), "owner": self.owner(domain)}
            for domain in self.settings.domains
        ]
        return TuneJob.from_dict(
            {
                "train": mixture.train,
                "data": [*own, {"text": str(self.public_file), "public": True}],
                "sequence_length": self.settings.sequence_length,
                "batch_size": mixture.batch_size,
                "steps": steps,
                "learning_rate": mixture.learning_rate,
                "warmup": max(1, steps // 10),
                "weight_decay": mixture.weight_decay,
                "load_balancing": {"weight": mixture.load_balancing},
                "router_z_loss": mixture.router_z_loss,
                "seed": self.seed,
                "workdir": str(self.folder / "work"),
            }
        )
