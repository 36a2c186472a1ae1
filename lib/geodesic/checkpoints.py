"""The state of an unfinished run: one safetensors file that knows its data, its settings and the code that wrote it.

A checkpoint saves time, no more. One that cannot be read, or is of other data, settings or code, is named in a warning
and passed over: a run is continued bit for bit, or begun again.
"""

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor, nn

import geodesic
from geodesic import store

_CODE = store.library()  # as it was when this process read it: later the files may be others
_WORDS = {"data": "other data", "settings": "other settings", "device": "another kind of device"}  # else: other code


@runtime_checkable
class Progress(Protocol):
    """What a run has done so far."""

    epoch: int
    history: list[dict[str, Any]]
    snapshots: dict[str, Tensor]


@dataclass
class Saved:
    """What was in a checkpoint besides weights and random state, which `restore` puts in their place."""

    epoch: int
    history: list[dict[str, Any]]
    snapshots: dict[str, Tensor] = field(default_factory=dict)
    optimiser: dict[str, Tensor] = field(default_factory=dict)  # as it was given to `save`, on the CPU


def identity(data: str, settings: Mapping[str, Any], device: str | torch.device) -> dict[str, str]:
    """What must be the same for a run to be continued.

    Args:
        data: fingerprint of the data.
        settings: JSON values that decide the run's numbers.
        device: where it runs; its kind counts, for a record names one.
    """
    return {
        "data": data,
        "settings": store.digest(json.dumps(settings, sort_keys=True, default=list)),
        "device": torch.device(device).type,
        "geodesic": f"{geodesic.__version__} {_CODE}",
        "torch": str(torch.__version__),
    }


def save(
    path: Path | None,
    network: nn.Module,
    optimiser: Mapping[str, Tensor],
    generator: torch.Generator,
    progress: Progress,
    identity: Mapping[str, str],
) -> None:
    """Write a checkpoint, whole or not at all; without a path nothing is done.

    A disk that is full, or a folder that has gone, costs the checkpoint and not the run: a warning says so.

    Args:
        path: the file; the caller names it after the run's settings.
        network: its parameters and buffers are kept, those that several blocks share once.
        optimiser: any tensors by name. One with the name of a parameter behind its last "/" must have its shape.
        generator: CPU generator of the run.
        progress: history (JSON) and snapshots.
        identity: see `identity`.
    """
    if path is None:
        return
    tensors = {f"network/{name}": value for name, value in _state(network).items()}
    tensors |= {f"optimiser/{name}": value for name, value in optimiser.items()}
    tensors |= {f"snapshot/{name}": value for name, value in progress.snapshots.items()}
    tensors["generator"] = generator.get_state()
    about = {"epoch": str(progress.epoch), "history": json.dumps(progress.history)}
    about["identity"] = json.dumps({**identity})
    content = serialise({name: value.detach().contiguous() for name, value in tensors.items()}, about)
    try:
        store.write(path, content)
    except OSError as error:
        why = error.strerror or error
        warnings.warn(f"no checkpoint after epoch {progress.epoch}: {path}: {why}", store.Note, stacklevel=2)


def restore(
    path: Path | None, network: nn.Module, generator: torch.Generator, identity: Mapping[str, str]
) -> Saved | None:
    """Put weights and random state back as they were saved, in place; None if there is nothing to continue.

    A checkpoint that does not fit is named in a warning, and changes nothing.
    """
    if path is None or not path.exists():
        return None
    try:
        about, tensors = _read(path)
        _check(about, identity)
        target = _state(network)
        saved = Saved(
            int(about["epoch"]),
            json.loads(about["history"]),
            _under("snapshot/", tensors),
            _under("optimiser/", tensors),
        )
        weights, state = _under("network/", tensors), tensors["generator"]
        _check_shapes(weights, saved.optimiser, target)
        torch.Generator().set_state(state)  # raises where it is none, before anything has changed
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        why = f"it lacks {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
        warnings.warn(f"checkpoint {path} is passed over, the run begins again: {why}", store.Note, stacklevel=2)
        return None
    with torch.no_grad():
        for name, value in weights.items():
            target[name].copy_(value)  # in place: memory format, and what others see of the tensor, stay
    generator.set_state(state)
    return saved


def epochs_done(path: Path) -> int:
    """Epochs that a checkpoint is to spare whoever continues from it; 0 where there is none that can be read."""
    try:
        with safe_open(path, "pt") as file:
            return int((file.metadata() or {})["epoch"])
    except (OSError, SafetensorError, ValueError, KeyError):
        return 0


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    if path.is_dir():
        raise ValueError("it is a folder")
    with safe_open(path, "pt") as file:
        about = file.metadata() or {}
        return about, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)


def _check(about: Mapping[str, str], identity: Mapping[str, str]) -> None:
    """Refuse a checkpoint that says nothing of its data and code, or is of others."""
    if "identity" not in about:
        raise ValueError("it does not say which data and which code it is of")
    made = json.loads(about["identity"])
    for key in identity:
        if made.get(key) != identity[key]:
            what = _WORDS.get(key, "other code")
            raise ValueError(f"it is of {what} ({key} {made.get(key)}, here {identity[key]})")


def _check_shapes(weights: Mapping[str, Tensor], optimiser: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are not those of the network."""
    if odd := sorted(weights.keys() ^ target.keys()):
        raise ValueError(f"it is of another network, which differs in {', '.join(odd[:3])}")
    beside = [(name, value, target.get(name.rpartition("/")[2])) for name, value in optimiser.items()]
    for name, value, own in [*((name, value, target[name]) for name, value in weights.items()), *beside]:
        if own is not None and (value.shape != own.shape or value.dtype != own.dtype):
            raise ValueError(f"its {name} is {value.dtype} {tuple(value.shape)}, not {own.dtype} {tuple(own.shape)}")


def _state(network: nn.Module) -> dict[str, Tensor]:
    """Parameters and kept buffers by name, each tensor once, however many blocks share it."""
    kept = network.state_dict(keep_vars=True)
    named = dict(network.named_parameters()) | dict(network.named_buffers())
    return {name: value for name, value in named.items() if name in kept}


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
