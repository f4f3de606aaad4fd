"""Weights that were trained after composing: reading them, writing them, and answering without them.

Tuned tensors hold everybody whose text or experts they were computed from, so they count only where nobody is left
out; what they started from stays in the folder. Knows parameters by name; knows nothing of how they were trained.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from composer.building import link_file, new_folder
from composer.lock import LOCK_NAME, TUNED_FOLDER, Lock, LockedRows, LockedTuning, TrainedParts
from composer.model_card import write_model_card
from composer.optout import OptOut, owners_per_row
from experts.card import FileEntry
from experts.errors import BuildError, OptOutError
from experts.files import sha256_file

if TYPE_CHECKING:
    from composer.model import ComposedForCausalLM

__all__ = [
    "ROWS",
    "Group",
    "Untuned",
    "apply_tuned",
    "parameter_groups",
    "trained_names",
    "write_grown",
    "write_tuned",
]

Group = Literal["routers", "experts", "trunk"]

_TRAINED: Mapping[TrainedParts, tuple[Group, ...]] = {
    "routers": ("routers",),
    "trunk": ("routers", "trunk"),
    "all": ("routers", "trunk", "experts"),
}


def parameter_groups(model: nn.Module) -> dict[str, Group]:
    """Say of every parameter, by name, whether it is a router's, an expert's or the trunk's.

    A module says so itself, in ``parameter_group``; the nearest one around a parameter counts.
    """
    declared = {
        name: module.parameter_group
        for name, module in model.named_modules()
        if hasattr(module, "parameter_group")
    }
    return {name: _nearest(name, declared) for name, _ in model.named_parameters()}


def _nearest(name: str, declared: Mapping[str, Any]) -> Group:
    while name:
        name = name.rpartition(".")[0]
        if name in declared:
            group: Group = declared[name]
            return group
    return "trunk"


def trained_names(groups: Mapping[str, Group], trained: TrainedParts) -> tuple[str, ...]:
    """Return the parameters that ``routers``, ``trunk`` or ``all`` means, in the order of the model."""
    return tuple(name for name, group in groups.items() if group in _TRAINED[trained])


# ---------------------------------------------------------------- reading


def apply_tuned(model: nn.Module, folder: Path, tuned: LockedTuning) -> None:
    """Put a folder's tuned tensors into its model.

    Raises:
        BuildError: A file is missing, was changed, or holds another model's tensors.
    """
    from safetensors import safe_open

    parameters = dict(model.named_parameters())
    sources: list[tuple[FileEntry, str | None]] = [(entry, None) for entry in tuned.files]
    sources += [(rows.file, rows.expert) for rows in tuned.grown]
    for entry, expert in sources:
        path = folder / TUNED_FOLDER / entry.path
        if not path.is_file() or path.stat().st_size != entry.size:
            raise BuildError(
                f"{path} is missing or has been changed (expected {entry.size} bytes). Tune the folder again."
            )
        with safe_open(path, framework="pt") as file, torch.no_grad():
            for name in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
                tensor = file.get_tensor(name)
                places = None
                if name in parameters and tuned.grown and name.endswith(ROWS):
                    places = row_places(model, name, tuned, expert)
                    tensor = tensor if tensor.dim() == 2 else tensor[None]
                target = parameters.get(name)
                held = target if places is None or target is None else target[places]
                if target is None or held is None or held.shape != tensor.shape:
                    raise BuildError(
                        f"{path} holds '{name}' of shape {tuple(tensor.shape)}, which this composition has not. Tune "
                        "the folder again."
                    )
                target[slice(None) if places is None else places] = tensor.to(target)


ROWS = ".router.scorer.rows"
"""How the parameters end that have a row per expert."""


def row_places(model: nn.Module, name: str, tuned: LockedTuning, expert: str | None) -> list[int]:
    """Return where rows of a file stand in a router's: those of an expert who joined, or of all who were tuned."""
    scorer: Any = model.get_submodule(name.removesuffix(".rows"))
    membership: Any = model.membership
    ids = {who: number for number, who in enumerate(membership.experts, start=1)}
    if expert is not None:
        return [scorer.position[ids[expert]]]
    joined = {rows.expert for rows in tuned.grown}
    tuned_ids = [number for who, number in ids.items() if who not in joined]
    return [scorer.position[number] for number in ([0] if 0 in scorer.position else []) + tuned_ids]


class Untuned:
    """The composition from before the tuning, for requests that leave somebody out; loaded when one comes.

    It shares every weight that the tuning left alone. The folder must still be what it was when the tuned model was
    loaded: one that was edited since has other experts, or other weights under the same names.

    Args:
        folder: The tuned folder.
        lock: Of the folder, whole, as the tuned model was loaded from it.
        involved: Everybody whose text or experts are in the tuned weights, or who joined afterwards.
        free: Owners whose experts joined afterwards; they are left out of the tuned weights as of any others.
        free_ids: Ids of those experts.
        without: Owners who were left out when the folder was loaded.
    """

    def __init__(
        self,
        folder: Path,
        *,
        lock: Lock,
        involved: Sequence[str],
        free: Collection[str] = (),
        free_ids: Collection[int] = (),
        without: Collection[str] = (),
    ) -> None:
        self.folder = folder
        self.lock = lock
        self.changed = frozenset(_names(folder, lock))
        self.involved = tuple(involved)
        self.free = frozenset(free)
        self.free_ids = frozenset(free_ids)
        self.without = frozenset(without)
        self._model: ComposedForCausalLM | None = None

    def is_asked(self, opt_out: OptOut | None, allowed: torch.Tensor) -> bool:
        """Whether a request leaves somebody out.

        Args:
            opt_out: As given; names of owners of text, who have no expert, are in no mask.
            allowed: bool ``(batch, num_experts + 1)``, made of the request.

        Raises:
            OptOutError: Some rows do and others do not.
        """
        held = [number for number in range(1, allowed.shape[1]) if number not in self.free_ids]
        asked = ~allowed[:, held].all(dim=-1)
        if opt_out is not None:
            sets = owners_per_row(opt_out, batch=len(allowed), known=self.involved)
            asked = torch.tensor([bool(owners - self.free) for owners in sets])
        if not bool(asked.any()):
            return False
        if not bool(asked.all()):
            raise OptOutError(
                f"{int(asked.sum())} of {len(asked)} rows leave owners out. The weights of this composition were "
                "tuned on everybody's text, so these rows need the weights from before; give them a batch of their "
                "own."
            )
        return True

    def model(self, tuned: ComposedForCausalLM) -> ComposedForCausalLM:
        """Return the untuned model, on the tuned one's device and in its dtype.

        Raises:
            BuildError: The folder was changed since the tuned model was loaded.
        """
        if self._model is None:
            self._model = self._load(tuned)
        if self._model.device != tuned.device or self._model.dtype != tuned.dtype:
            self._model.to(tuned.device, tuned.dtype)
        return self._model

    def _load(self, tuned: ComposedForCausalLM) -> ComposedForCausalLM:
        from composer.loading import load_untuned

        config: Any = tuned.config
        if not self._is_unchanged():
            raise BuildError(self._changed_since())
        model = load_untuned(self.folder, self.lock.untuned, dtype=tuned.dtype, without=self.without)
        # edits swap whole folders: if it is the same one afterwards, nothing was read of another
        if not self._is_unchanged() or model.expert_names != tuned.expert_names:
            raise BuildError(self._changed_since())
        model.set_attn_implementation(config._attn_implementation)
        model.config._experts_implementation = config._experts_implementation
        theirs = dict(tuned.named_parameters())
        for name, _ in list(model.named_parameters()):
            if name not in self.changed:
                module, _, attribute = name.rpartition(".")
                model.get_submodule(module).register_parameter(attribute, theirs[name])
        return model

    def _is_unchanged(self) -> bool:
        try:
            return Lock.read(self.folder) == self.lock
        except BuildError:  # it is gone
            return False

    def _changed_since(self) -> str:
        return (
            f"{self.folder} was changed since this model was loaded. Requests that leave somebody out of a tuned model "
            "need the weights from before the tuning, which are read from it at the first such request. Load it again."
        )


def _names(folder: Path, lock: Lock) -> list[str]:
    from safetensors import safe_open

    names: list[str] = []
    for entry in lock.tuned.files if lock.tuned else ():
        with safe_open(folder / TUNED_FOLDER / entry.path, framework="pt") as file:
            names += file.keys()
    return names


# ---------------------------------------------------------------- writing


def write_tuned(
    model: ComposedForCausalLM,
    out: Path,
    *,
    trained: TrainedParts,
    text_owners: Sequence[str],
    settings: Mapping[str, str | int | float | bool | None],
    dtype: torch.dtype,
) -> Path:
    """Write the composed folder of a trained model: the folder it was loaded from, and the tuned tensors beside it.

    What an earlier tuning changed is written again, trained or not.

    Args:
        model: Loaded from a composed folder, with everybody in it.
        out: The folder to write; must not exist.
        trained: What was trained.
        text_owners: Whose text.
        settings: For the lock.
        dtype: In which the tensors are stored.

    Raises:
        BuildError: ``out`` cannot be written. Nothing is left behind.
    """
    assert model.membership.folder is not None, "a composed folder was loaded"
    folder = Path(model.membership.folder)
    lock = Lock.read(folder)
    groups = parameter_groups(model)
    names = {*trained_names(groups, trained), *_names(folder, lock)}
    earlier = lock.tuned.text_owners if lock.tuned else ()
    with new_folder(Path(out)) as staging:
        _link(folder, staging, lock.untuned)
        files = _write_tensors(model, staging / TUNED_FOLDER, groups, names, dtype=dtype)
        tuned = LockedTuning(
            trained=_widest(trained, lock.tuned),
            files=files,
            owners=tuple(sorted({*lock.involved, *text_owners})),
            text_owners=tuple(sorted({*earlier, *text_owners})),
            optout_class=lock.untuned.optout_class,
            settings=dict(settings),
        )
        _write_lock(staging, lock.untuned, tuned)
    return Path(out)


def write_grown(
    before: Path,
    plain: Path,
    out: Path,
    tuned: LockedTuning,
    *,
    rows: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
    beside: Mapping[str, Sequence[str]] | None = None,
    new_rows: str = "",
) -> Path:
    """Write an untuned composition with the tuned files of another one, and rows of those who joined.

    Args:
        before: The tuned folder.
        plain: The composition without tuned weights: that of ``before``, with other experts joined or gone.
        out: What is written; must not exist.
        tuned: Of ``before``, without those who are gone.
        rows: Expert who joins -> name of the router's rows -> its row ``(d,)``.
        beside: Expert who joins -> experts that its rows were computed from.
        new_rows: How they were.

    Raises:
        BuildError: ``out`` cannot be written. Nothing is left behind.
    """
    from safetensors.torch import save_file

    lock = Lock.read(plain)
    joined = []
    with new_folder(Path(out)) as staging:
        _link(plain, staging, lock)
        (staging / TUNED_FOLDER).mkdir()
        for entry in tuned.all_files:
            link_file(before / TUNED_FOLDER / entry.path, staging / TUNED_FOLDER / entry.path)
        for expert, tensors in (rows or {}).items():
            path = staging / TUNED_FOLDER / f"rows-{expert.replace('/', '--')}.safetensors"
            save_file({name: row.contiguous() for name, row in tensors.items()}, path)
            file = FileEntry(path=path.name, size=path.stat().st_size, sha256=sha256_file(path))
            sources = tuple(sorted((beside or {})[expert]))
            joined.append(LockedRows(expert=expert, beside=sources, new_rows=new_rows, file=file))
        _write_lock(staging, lock, tuned.model_copy(update={"grown": (*tuned.grown, *joined)}))
    return Path(out)


def _widest(trained: TrainedParts, before: LockedTuning | None) -> TrainedParts:
    order: list[TrainedParts] = ["routers", "trunk", "all"]
    return max(trained, before.trained if before else trained, key=order.index)


def _link(folder: Path, staging: Path, lock: Lock) -> None:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        written = name.as_posix() in (LOCK_NAME, "README.md", "config.json")
        if path.is_file() and not written and name.parts[0] != TUNED_FOLDER:
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            link_file(path, staging / name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _write_tensors(
    model: nn.Module, folder: Path, groups: Mapping[str, Group], names: set[str], *, dtype: torch.dtype
) -> tuple[FileEntry, ...]:
    from safetensors.torch import save_file

    folder.mkdir()
    entries = []
    for group in ("routers", "trunk", "experts"):
        tensors = {
            name: parameter.detach().to("cpu", dtype).contiguous()
            for name, parameter in model.named_parameters()
            if name in names and groups[name] == group
        }
        if tensors:
            path = folder / f"{group}.safetensors"
            save_file(tensors, path)
            entries.append(FileEntry(path=path.name, size=path.stat().st_size, sha256=sha256_file(path)))
    return tuple(entries)


def _write_lock(staging: Path, before: Lock, tuned: LockedTuning) -> None:
    lineage = {f"{TUNED_FOLDER}/{entry.path}": tuned.owners for entry in tuned.files}
    for rows in tuned.grown:
        names = {rows.expert, *rows.beside}
        whose = {owner for expert in before.experts if expert.name in names for owner in expert.whose}
        if rows.beside:  # whose rows are tuned ones
            whose |= set(tuned.owners)
        lineage[f"{TUNED_FOLDER}/{rows.file.path}"] = tuple(sorted(whose))
    lock = before.model_copy(
        update={"tuned": tuned, "optout_class": "retrain", "lineage": {**before.lineage, **lineage}}
    )
    (staging / LOCK_NAME).write_bytes(lock.to_bytes())
    path = staging / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["composition"] = lock.membership_digest
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_model_card(staging / "README.md", lock)
