"""Train many networks of one architecture as one tensor program.

The members of a stack differ in λ, step size and seed. Their weights lie on a new first axis, so that every product of
theirs is one batched product (of convolutions, one grouped convolution). Each keeps the initial weights, the order of
the points and the augmentation of its single run (`training.train` with the same generator), and so takes the same
steps up to rounding. No member sees another: one that diverges harms only itself. It pays where one network leaves
the device idle. Used by `experiment.run_many`; measured in the chapter on speed.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import fields
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F
from tqdm import tqdm

from geodesic import training
from geodesic.data import Dataset
from geodesic.networks import Network
from geodesic.training import Progress, Recipe

FREE = ("weight_decay", "learning_rate")  # what the members' recipes may differ in


def train(
    networks: Sequence[Network],
    datasets: Sequence[Dataset],
    recipes: Sequence[Recipe],
    *,
    generators: Sequence[torch.Generator],
    on_epoch: Sequence[Callable[[Progress], dict[str, Any]]] | None = None,
    show: bool = False,
) -> list[Progress]:
    """Train all networks in place, each as `training.train` would, and return their histories.

    Args:
        networks: of one architecture, on the device where they are to be trained. Their parameters become views of
            the stack.
        datasets: one a network, with the same points; labels may differ.
        recipes: one a network, different in λ and step size alone.
        generators: one a network, as in `training.train`.
        on_epoch: one a network, called for those that have not diverged.
        show: draw a progress bar.

    Raises:
        ValueError: if a batch is larger than the training set, or the recipes differ in more.
    """
    recipe = _common(recipes)
    training.check_batch(recipe, datasets[0])
    stack = _Stack(networks, recipes)
    x, y = datasets[0].x_train, torch.stack([dataset.y_train for dataset in datasets])
    progress = [Progress() for _ in networks]

    def note() -> None:
        for each, call in zip(progress, on_epoch or [], strict=bool(on_epoch)):
            if not each.diverged:
                each.history.append(call(each))

    note()
    for epoch in tqdm(range(recipe.epochs), "epochs", disable=not show, leave=False):
        losses = stack.train_epoch(x, y, recipe, generators, epoch)
        for each, finite in zip(progress, losses.isfinite().tolist(), strict=True):
            if not each.diverged:
                each.epoch, each.diverged = epoch + 1, not finite
        if all(each.diverged for each in progress):
            break
        note()
    return progress


def _common(recipes: Sequence[Recipe]) -> Recipe:
    """The recipe that all members share, but for what is free."""
    for name in sorted({field.name for field in fields(Recipe)} - set(FREE)):
        if len(seen := {getattr(recipe, name) for recipe in recipes}) > 1:
            raise ValueError(
                f"{name} takes {len(seen)} values; members of a stack differ in {', '.join(FREE)} alone: make a stack "
                f"for each {name} ({', '.join(sorted(map(str, seen)))})"
            )
    return recipes[0]


class _Stack:
    """Weights and momenta of m networks as tensors (m, …), and the step of SGD on them."""

    def __init__(self, networks: Sequence[Network], recipes: Sequence[Recipe]):
        self.parameters, self.buffers = stack_module_state(list(networks))
        for k, network in enumerate(networks):  # a member is a view: it can be scored at any time
            for name, parameter in network.named_parameters():
                parameter.data = self.parameters[name].detach()[k]
            for name, buffer in network.named_buffers():
                buffer.data = self.buffers[name][k]
        self.momenta = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.skeleton = deepcopy(networks[0]).to("meta").train()
        device = networks[0].head[-1].weight.device
        self.rates = torch.tensor([recipe.learning_rate for recipe in recipes], device=device)
        self.decays = torch.tensor([recipe.weight_decay for recipe in recipes], device=device)

    def train_epoch(
        self,
        x: Float[Tensor, "n *shape"],
        y: Int64[Tensor, "m n"],
        recipe: Recipe,
        generators: Sequence[torch.Generator],
        epoch: int,
    ) -> Float[Tensor, "m"]:
        """One pass, each member in its own random order; returns the mean training losses (λ's term not counted)."""
        order = torch.stack([torch.randperm(len(x), generator=g) for g in generators]).to(y.device)
        steps = len(x) // recipe.batch_size
        totals = torch.zeros(len(y), device=y.device)
        for step in range(steps):
            points = order[:, step * recipe.batch_size : (step + 1) * recipe.batch_size]
            batch = x[points]
            if recipe.augment != "none":
                batch = torch.stack(
                    [training.augment(b, recipe.augment, g) for b, g in zip(batch, generators, strict=True)]
                )
            with torch.autocast(y.device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16"):
                losses = vmap(self._loss)(self.parameters, self.buffers, batch, y.gather(1, points))
            gradients = torch.autograd.grad(losses.sum(), list(self.parameters.values()))
            self._descend(gradients, training.schedule(recipe.schedule, (epoch + step / steps) / recipe.epochs), recipe)
            totals += losses.detach()
        return totals / steps

    def _loss(self, parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(self.skeleton, (parameters, buffers), x), y)

    @torch.no_grad()
    def _descend(self, gradients: Sequence[Tensor], course: float, recipe: Recipe) -> None:
        """One step of SGD, each member at its own λ and step size; biases and normalisation are not decayed."""
        for (name, p), gradient in zip(self.parameters.items(), gradients, strict=True):
            momentum, own = self.momenta[name], (-1, *[1] * (p.ndim - 1))
            momentum.mul_(recipe.momentum).add_(gradient)
            if p.ndim > 2:  # (m, out, in, …), as in Network.weights
                momentum.addcmul_(p, self.decays.view(own))
            p.addcmul_(momentum, (course * self.rates).view(own), value=-1)
