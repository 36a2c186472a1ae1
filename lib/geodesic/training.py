"""Train a network by SGD with momentum and weight decay λ, resumable after every epoch.

λ is torch's `weight_decay`: the loss carries (λ/2) Σ‖W‖² over weight matrices and kernels; biases and normalisation
parameters are not decayed. The whole data set stays on the network's device; nothing synchronises inside an epoch.
Used by every chapter that trains. Source: arXiv:2102.09235, eqs 13–14 (its optimiser is not known).
"""

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from geodesic.data import Dataset
from geodesic.networks import Network

SCHEDULES = ("onecycle", "cosine", "constant")
PRECISIONS = ("float32", "bfloat16")
AUGMENTS = ("none", "crop", "crop-flip")
_WARM_UP = 0.2  # share of the steps in which the one-cycle schedule rises


def _setting(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train. Every field's metadata["help"] says what it is."""

    weight_decay: float = _setting(0.0, "λ: the loss carries (λ/2)·Σ‖W‖²")
    epochs: int = _setting(6, "passes over the training set; 0 leaves the network untrained")
    batch_size: int = _setting(256, "points per step; an incomplete last batch is left out")
    learning_rate: float = _setting(0.05, "peak step size of SGD")
    momentum: float = _setting(0.9, "heavy-ball momentum, in [0, 1)")
    schedule: str = _setting("onecycle", f"course of the step size: {', '.join(SCHEDULES)}")
    augment: str = _setting("none", f"random changes of training images: {', '.join(AUGMENTS)}")
    precision: str = _setting(
        "float32",
        f"of the matrix products in training: {', '.join(PRECISIONS)} (slow on a processor that has no such products)",
    )

    def __post_init__(self) -> None:
        for name, ok, rule in (
            ("weight_decay", math.isfinite(self.weight_decay) and self.weight_decay >= 0, "finite and at least 0"),
            ("epochs", self.epochs >= 0, "at least 0"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("learning_rate", math.isfinite(self.learning_rate) and self.learning_rate > 0, "finite and above 0"),
            ("momentum", 0 <= self.momentum < 1, "in [0, 1)"),
            ("schedule", self.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
            ("augment", self.augment in AUGMENTS, f"one of {', '.join(AUGMENTS)}"),
            ("precision", self.precision in PRECISIONS, f"one of {', '.join(PRECISIONS)}"),
        ):
            if not ok:
                raise ValueError(f"{name}={getattr(self, name)!r} must be {rule}")


@dataclass
class Progress:
    """What a training run has done so far; all of it is in the checkpoint."""

    epoch: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)  # what on_epoch returned, from epoch 0 (untrained)
    snapshots: dict[str, Tensor] = field(default_factory=dict)  # tensors that on_epoch wants to keep
    diverged: bool = False  # a non-finite training loss: the run was stopped


def train(
    network: Network,
    dataset: Dataset,
    recipe: Recipe,
    *,
    generator: torch.Generator,
    on_epoch: Callable[[Progress], dict[str, Any]] | None = None,
    checkpoint: Path | None = None,
    show: bool = False,
) -> Progress:
    """Train in place and return the history.

    Args:
        network: on the device where it is to be trained; `dataset` must be on the same.
        dataset: its training set is used.
        recipe: step sizes, λ, epochs, precision.
        generator: CPU generator of the order of the points and the augmentation.
        on_epoch: called before the first epoch and after each; what it returns (JSON) goes into the history.
        checkpoint: file to continue from if it exists, and to write after each epoch; the caller names it after the
            settings, so that it never meets another run's.
        show: draw a progress bar.

    Raises:
        ValueError: if a batch is larger than the training set.
    """
    check_batch(recipe, dataset)
    optimiser = _optimiser(network, recipe)
    progress = _restore(checkpoint, network, optimiser, generator) or Progress()
    if not progress.history and on_epoch:
        progress.history.append(on_epoch(progress))
    bar = tqdm(range(progress.epoch, recipe.epochs), "epochs", disable=not show, leave=False)
    for epoch in bar:
        loss = _train_epoch(network, dataset, recipe, optimiser, generator, epoch)
        progress.epoch = epoch + 1
        progress.diverged = not math.isfinite(loss)
        if progress.diverged:
            break
        bar.set_postfix(loss=f"{loss:.4f}")
        if on_epoch:
            progress.history.append(on_epoch(progress))
        _save(checkpoint, network, optimiser, generator, progress)
    return progress


def check_batch(recipe: Recipe, dataset: Dataset) -> None:
    """Refuse a batch that the training set cannot fill.

    Raises:
        ValueError: if there is one.
    """
    n = len(dataset.y_train)
    if recipe.epochs and recipe.batch_size > n:
        raise ValueError(f"batch_size={recipe.batch_size} is larger than the training set of {n} points; lower it")


def _optimiser(network: Network, recipe: Recipe) -> torch.optim.SGD:
    weights = network.weights()
    ids = {id(p) for p in weights}
    others = [p for p in network.parameters() if id(p) not in ids]
    groups = [{"params": weights, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=recipe.learning_rate, momentum=recipe.momentum, fused=True)


def _train_epoch(
    network: Network,
    dataset: Dataset,
    recipe: Recipe,
    optimiser: torch.optim.SGD,
    generator: torch.Generator,
    epoch: int,
) -> float:
    """One pass in random order; returns the mean training loss (λ's term not counted)."""
    network.train()
    x, y = dataset.x_train, dataset.y_train
    order = torch.randperm(len(y), generator=generator).to(y.device)
    steps = len(y) // recipe.batch_size
    total = torch.zeros((), device=y.device)
    for step in range(steps):
        points = order[step * recipe.batch_size : (step + 1) * recipe.batch_size]
        batch = augment(x[points], recipe.augment, generator)
        for group in optimiser.param_groups:
            group["lr"] = recipe.learning_rate * schedule(recipe.schedule, (epoch + step / steps) / recipe.epochs)
        with torch.autocast(y.device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16"):
            loss = F.cross_entropy(network(batch), y[points])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        total += loss.detach()
    return total.item() / steps


def schedule(name: str, t: float) -> float:
    """Step size over its peak at time t in [0, 1): a linear rise then a half cosine, the half cosine alone, or 1."""
    if name == "constant":
        return 1.0
    if name == "onecycle" and t < _WARM_UP:
        return (t + 1e-3) / (_WARM_UP + 1e-3)  # the first step is small, not zero
    start = _WARM_UP if name == "onecycle" else 0.0
    return 0.5 * (1 + math.cos(math.pi * (t - start) / (1 - start)))


def augment(x: Float[Tensor, "n *shape"], kind: str, generator: torch.Generator) -> Float[Tensor, "n *shape"]:
    """Shift every image by up to an eighth of its side (edges filled with 0) and, with "crop-flip", mirror half."""
    if kind == "none":
        return x
    n, _, height, width = x.shape
    pad = max(1, height // 8)
    shift = torch.randint(0, 2 * pad + 1, (2, n, 1), generator=generator).to(x.device)
    rows = shift[0] + torch.arange(height, device=x.device)
    columns = shift[1] + torch.arange(width, device=x.device)
    if kind == "crop-flip":
        flip = torch.rand((n, 1), generator=generator).to(x.device) < 0.5
        columns = torch.where(flip, columns.flip(1), columns)
    points = torch.arange(n, device=x.device)[:, None, None]
    padded = F.pad(x, (pad, pad, pad, pad)).permute(0, 2, 3, 1)
    return padded[points, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _save(
    checkpoint: Path | None,
    network: Network,
    optimiser: torch.optim.SGD,
    generator: torch.Generator,
    progress: Progress,
) -> None:
    """Write network, momentum, random state and history as one safetensors file, atomically."""
    if checkpoint is None:
        return
    tensors = {f"network.{name}": value for name, value in network.state_dict().items()}
    for name, p in network.named_parameters():
        if (momentum := optimiser.state[p].get("momentum_buffer")) is not None:
            tensors[f"momentum.{name}"] = momentum
    tensors |= {f"snapshot.{name}": value for name, value in progress.snapshots.items()}
    tensors["generator"] = generator.get_state()
    about = {"epoch": str(progress.epoch), "history": json.dumps(progress.history)}
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    partial = checkpoint.with_suffix(f".{os.getpid()}.partial")
    save_file({name: value.contiguous() for name, value in tensors.items()}, partial, about)
    os.replace(partial, checkpoint)


def _restore(
    checkpoint: Path | None, network: Network, optimiser: torch.optim.SGD, generator: torch.Generator
) -> Progress | None:
    """Continue from a checkpoint; None if there is none, or it cannot be read (the run then starts afresh)."""
    if checkpoint is None or not checkpoint.exists():
        return None
    try:
        with safe_open(checkpoint, "pt") as file:
            about = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError:
        return None
    network.load_state_dict(_under("network.", tensors))
    momenta = _under("momentum.", tensors)
    for name, p in network.named_parameters():
        if name in momenta:
            optimiser.state[p]["momentum_buffer"] = torch.empty_like(p).copy_(momenta[name])  # in memory as p is
    generator.set_state(tensors["generator"])
    return Progress(int(about["epoch"]), json.loads(about["history"]), _under("snapshot.", tensors))


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
