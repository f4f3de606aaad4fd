"""Loads a composed folder, leaving owners out by never opening their files.

Knows the folder's layout and the registry's ledger; recipes know how experts go into the base model.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from composer.lock import Lock
from composer.members import BASE_FOLDER, Members
from composer.optout import check_owners
from composer.recipes import RECIPES
from experts.errors import BuildError, OptOutError

if TYPE_CHECKING:
    import torch

    from composer.model import ComposedForCausalLM
    from registry import Registry

__all__ = ["left_out", "load", "load_language_model", "load_untuned"]


def load(
    path: Path | str,
    *,
    opt_out: Collection[str] = (),
    registry: Registry | Path | str | None = None,
    verify: bool = False,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    attn_implementation: str | None = None,
    experts_implementation: str | None = None,
    **kwargs: Any,
) -> ComposedForCausalLM:
    """Load a composed model: a language model or, of recipe ``router_retriever``, a SentenceTransformer.

    Args:
        path: A folder that `composer.building.build` wrote.
        opt_out: Owners whose files are not opened. The result is bit for bit the model composed without them.
        registry: A registry or its path. Its consent ledger is read, and owners who have opted out since the build
            are left out too.
        verify: Whether to hash every expert file that is opened; sizes and tensor names are always checked.
        dtype: Of the weights; None: the manifest's, else the anchor's own.
        device: Where the model goes; None: the CPU.
        attn_implementation: As in `transformers`.
        experts_implementation: Kernel for full FFN experts, as in `transformers`.
        kwargs: ``torch_dtype`` and ``device_map`` are understood as in `transformers`; others are refused.

    Raises:
        BuildError: The folder is not a composed one, or a file was changed.
        IntegrityError: A file's bytes differ from its digest.
        UnknownNameError: ``opt_out`` names an owner who is not in this composition.
    """
    folder = Path(path)
    lock = Lock.read(folder)
    dtype = kwargs.pop("torch_dtype", dtype)
    device = kwargs.pop("device_map", device)
    if kwargs:
        raise BuildError(
            f"Unknown arguments for loading a composed model: {', '.join(sorted(kwargs))}. Allowed: opt_out, "
            "registry, verify, dtype, device, attn_implementation, experts_implementation."
        )
    members = Members.open(folder, lock, without=left_out(lock, opt_out, registry))
    if verify:
        members.check_digests()
    model: ComposedForCausalLM = RECIPES.load(lock.recipe)().load(
        members,
        lock,
        dtype=dtype,
        device=device,
        attn_implementation=attn_implementation,
        experts_implementation=experts_implementation,
    )
    return model


def load_language_model(
    members: Members,
    lock: Lock,
    *,
    dtype: Any = None,
    device: Any = None,
    attn_implementation: str | None = None,
    experts_implementation: str | None = None,
) -> ComposedForCausalLM:
    """Load the base, put the members in, and move the model; see `load`.

    Args:
        members: The experts to load.
        lock: Of the whole composition, owners who are left out included.
        dtype: Of the weights.
        device: Where the model goes.
        attn_implementation: As in `transformers`.
        experts_implementation: As in `transformers`.
    """
    model = _base_model(members.folder, lock, dtype, attn_implementation, experts_implementation)
    _join(model, members, lock)
    if device is not None:
        model.to(device if isinstance(device, str) and device != "auto" else _device(device))
    model.eval()
    return model


def load_untuned(
    folder: Path, lock: Lock, *, dtype: Any, without: Collection[str] = ()
) -> ComposedForCausalLM:
    """Load a tuned folder as it was composed, without some owners; on the CPU. The lock is that of the composition."""
    members = Members.open(folder, lock, without=without)
    model = _base_model(folder, lock, dtype, None, None)
    _join(model, members, lock)
    model.eval()
    return model


def _device(device: Any) -> Any:
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if isinstance(device, dict):
        raise BuildError("A composed model lives on one device; give device='cuda:0' or device_map='auto'.")
    return device


def left_out(lock: Lock, opt_out: Collection[str], registry: Registry | Path | str | None) -> frozenset[str]:
    """Return the owners to leave out: those that are named, and those who are out in the registry now."""
    if isinstance(opt_out, str):
        raise OptOutError(f"opt_out is the string '{opt_out}'. Write {{'{opt_out}'}}.")
    owners = check_owners(opt_out, lock.involved)
    if isinstance(registry, str | Path):
        from registry import Registry

        registry = Registry(registry)
    if registry is not None:
        revoked = {entry.owner for entry in registry.opt_outs()}
        owners |= revoked & set(lock.involved)
    return owners


def _base_model(
    folder: Path,
    lock: Lock,
    dtype: Any,
    attn_implementation: str | None,
    experts_implementation: str | None,
) -> ComposedForCausalLM:
    from transformers import AutoModelForCausalLM

    from composer.configuration import ComposedConfig
    from composer.model import ComposedForCausalLM

    chosen = dtype if dtype is not None else lock.dtype or "auto"
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    base = AutoModelForCausalLM.from_pretrained(
        folder / BASE_FOLDER, dtype=chosen, local_files_only=True, **options
    )
    config = ComposedConfig(
        base_config=base.config,
        composition=lock.membership_digest,
        name_or_path=str(folder),
        dtype=base.dtype,
        # a configuration hands these down to the ones inside it, None included
        attn_implementation=base.config._attn_implementation,
        experts_implementation=experts_implementation,
    )
    model = ComposedForCausalLM(config, base=base)
    if base.generation_config is not None:
        model.generation_config = base.generation_config
    model.requires_grad_(False)
    return model


def _join(model: ComposedForCausalLM, members: Members, lock: Lock) -> None:
    """Let the recipe put the experts in, and say who they are."""
    from composer.membership import Membership

    model.membership = Membership(
        experts=tuple(member.locked.name for member in members.experts),
        owners=tuple(member.locked.owner for member in members.experts),
        parent_owners=tuple(member.locked.parent_owners for member in members.experts),
        known_owners=frozenset(lock.involved),
        digest=members.lock.membership_digest,
        folder=str(members.folder),
    )
    RECIPES.load(lock.recipe)().assemble(model, members)
    model.requires_grad_(False)
    if members.lock.tuned is not None:
        from composer.tuned import Untuned, apply_tuned

        apply_tuned(model, members.folder, members.lock.tuned)
        free = _joined_afterwards(members.lock)
        model.untuned = Untuned(
            members.folder,
            lock=lock,
            involved=members.lock.involved,
            free=free,
            free_ids=[member.id for member in members.experts if member.locked.whose <= free],
            without=set(lock.composed_owners) - set(members.lock.composed_owners),
        )


def _joined_afterwards(lock: Lock) -> set[str]:
    """Return the owners who can be left out of a tuned composition and leave the tuned weights as they are."""
    return {owner for owner in lock.composed_owners if lock.without({owner}).tuned is not None}
