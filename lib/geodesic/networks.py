"""Plain and residual networks that return their data tracks.

A *stage* keeps its dimension; a dimension-changing map leads into it. Within a stage every block computes

    f(x) = W₂ ReLU(W₁ ReLU(x))          (with batch normalisation before each ReLU where norm="batch")

and the stage moves the state by x_{l+1} = x_l + f(x_l) ("resnet"), or x_{l+1} = f(x_l) ("plain": the same network
without the identity maps). The pre-activation form (He et al. 2016b) makes the two differ by the identity alone and
makes a residual block one Euler step of the velocity field f (paper, eqs 2 and 10). "radial" is a control: blocks
x_{l+1} = (1 + 1/L) x_l without weights, a perfect and useless geodesic.

Used by every chapter that trains; sizes from Table 1 of arXiv:2102.09235.

| symbol | identifier | meaning |
|---|---|---|
| L | depth | blocks per stage |
| K | stages | number of constant-dimension stages |
| x_l | state | representation after l blocks of a stage |
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

NETWORKS = ("resnet", "plain", "radial")
NORMS = ("none", "batch")


@dataclass(frozen=True)
class Architecture:
    """The sizes of a network. A stage shape is (width,) for fully connected stages or (channels, height, width)."""

    in_shape: tuple[int, ...]  # shape of one input
    stage_shapes: tuple[tuple[int, ...], ...]  # one constant-dimension shape per stage
    depth: int  # L: blocks per stage, of two layers each
    classes: int
    hidden: int | None = None  # units between the two layers of a fully connected block; None: the stage's width
    embed: bool = True  # False: the first stage starts from the input itself
    activate: bool = True  # False: blocks and head read the state without a ReLU, W₂ ReLU(W₁ x), as in paper eq. (10)


_CIFAR_K4 = ((64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4))

# Table 1 of the paper, and small networks for the data sets that the book adds.
ARCHITECTURES: dict[tuple[str, int], Architecture] = {
    ("mnist", 1): Architecture((1, 28, 28), ((1000,),), 5, 10),
    ("digits", 1): Architecture((1, 8, 8), ((100,),), 5, 10),
    ("cifar10", 1): Architecture((3, 32, 32), ((32, 16, 16),), 10, 10),
    ("cifar10", 4): Architecture((3, 32, 32), _CIFAR_K4, 5, 10),
    ("cifar100", 1): Architecture((3, 32, 32), ((32, 16, 16),), 10, 100),
    ("cifar100", 4): Architecture((3, 32, 32), _CIFAR_K4, 5, 100),
    # A planar state cannot spare its negative half to a ReLU.
    ("toy", 1): Architecture((2,), ((2,),), 10, 2, hidden=32, embed=False, activate=False),
}


def architecture(
    dataset: str,
    stages: int = 1,
    *,
    depth: int | None = None,
    width: int | None = None,
    in_shape: tuple[int, ...] | None = None,
    classes: int | None = None,
) -> Architecture:
    """Look up the sizes for a data set; image folders take the CIFAR-10 design at their own resolution.

    Args:
        dataset: a name of `data.load`; "moons", "circles" and "spirals" share the planar "toy" design.
        stages: K, the number of constant-dimension stages (1 or 4 for images, else 1).
        depth: blocks per stage; None takes the table's.
        width: units of a fully connected stage, or channels of the first convolutional stage; None takes the table's.
        in_shape: shape of one input where the table does not know it (image folders).
        classes: number of classes where the table does not know it.

    Raises:
        ValueError: for an unknown pair of data set and stages, or sizes below 1.
    """
    family = {"moons": "toy", "circles": "toy", "spirals": "toy"}.get(dataset, dataset)
    if family.startswith("folder:"):
        family = "cifar10"
        if in_shape is None or classes is None:
            raise ValueError(f"{dataset!r}: an image folder needs in_shape and classes; pass those of the loaded data")
    if (family, stages) not in ARCHITECTURES:
        known = ", ".join(f"{name} with stages={k}" for name, k in ARCHITECTURES)
        raise ValueError(f"no network for dataset={dataset!r} with stages={stages}; there are: {known}")
    arch = ARCHITECTURES[family, stages]
    if in_shape is not None and in_shape != arch.in_shape:
        scale = in_shape[-1] / arch.in_shape[-1]
        shapes = tuple((s[0], *(math.ceil(side * scale) for side in s[1:])) for s in arch.stage_shapes)
        arch = replace(arch, in_shape=in_shape, stage_shapes=shapes)
    if width is not None:
        _check_positive("width", width)
        first = arch.stage_shapes[0][0]
        arch = replace(arch, stage_shapes=tuple((s[0] * width // first, *s[1:]) for s in arch.stage_shapes))
        if not arch.embed and arch.stage_shapes[0] != arch.in_shape:
            arch = replace(arch, embed=True, activate=True)
    if depth is not None:
        _check_positive("depth", depth)
        arch = replace(arch, depth=depth)
    return arch if classes is None else replace(arch, classes=classes)


def build(
    network: str,
    dataset: str = "mnist",
    stages: int = 1,
    *,
    norm: str = "none",
    depth: int | None = None,
    width: int | None = None,
    in_shape: tuple[int, ...] | None = None,
    classes: int | None = None,
    generator: torch.Generator | None = None,
) -> "Network":
    """Build an initialised network of Table 1 on the CPU; the other arguments are those of `architecture`.

    Args:
        network: "resnet", "plain" (the same without the identity maps) or "radial" (control: x ↦ (1 + 1/L) x).
        dataset: see `architecture`, as for the sizes that follow.
        stages: K.
        norm: "none" or "batch" (batch normalisation before each ReLU).
        depth: L, blocks per stage.
        width: units, or channels of the first stage.
        in_shape: shape of one input of an image folder.
        classes: number of classes of an image folder.
        generator: source of the initial weights; None takes torch's global one.

    Raises:
        ValueError: for an unknown network, norm, data set or size.
    """
    if network not in NETWORKS:
        raise ValueError(f"network={network!r} is unknown; choose one of {', '.join(NETWORKS)}")
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r} is unknown; choose one of {', '.join(NORMS)}")
    arch = architecture(dataset, stages, depth=depth, width=width, in_shape=in_shape, classes=classes)
    return Network(arch, network, norm, generator)


def regauge(
    network: "Network",
    permutations: Sequence[Int64[Tensor, "_ _"]],
    scales: Sequence[Float[Tensor, "_ _"]] | None = None,
) -> "Network":
    """The same function with its units relabelled and rescaled: every logit stays, every state x_l becomes D_l P_l x_l.

    A positive factor and a permutation pass through a ReLU, so that the weights that read a state can undo what those
    that write it did: W₁ takes P_lᵀ D_l⁻¹, W₂ takes D_{l+1} P_{l+1}; entries and head follow. With batch normalisation
    W₁ takes P_lᵀ alone, the running statistics take D_l P_l, and γ what the statistics' ε leaves over (logits stay in
    evaluation mode; in training to ε). Between identity maps there is one gauge for a whole stage: a residual network
    takes the same P and D at all its states, a choice of the metric.

    Args:
        network: plain (any gauge), resnet or radial (one gauge a stage).
        permutations: per stage P_0 … P_L, (steps, units); unit i of the new state is unit permutations[l, i]
            of the old one.
        scales: per stage the positive factors D_0 … D_L, (steps, units); None takes 1. `tracks.align` finds both.

    Returns:
        a new network; the one given is left as it is.

    Raises:
        ValueError: for layer-wise gauges of a network with identity maps, gauges of another shape, no permutations,
            factors that are not positive and finite, or a gauge at the input of a stage without an entry map.
    Source: the rescaling symmetry of arXiv:1506.02617 and the permutation symmetry of arXiv:2110.06296.
    """
    if scales is None:
        scales = [torch.ones(order.shape) for order in permutations]
    _check_gauges(network, permutations, scales)
    new = copy.deepcopy(network)
    with torch.no_grad():
        for k, (stage, orders, sizes) in enumerate(zip(new.stages, permutations, scales, strict=True)):
            gauge = list(zip(orders, sizes, strict=True))
            if not isinstance(stage.entry, nn.Identity):
                _write(stage.entry[-1], *gauge[0])
            for block, before, after in zip(stage.blocks, gauge[:-1], gauge[1:], strict=True):
                if isinstance(block, Block):
                    _read(block.norm1, block.layer1, *before)
                    _write(block.layer2, *after)
            following = new.stages[k + 1].entry if k + 1 < len(new.stages) else new.head
            _read(following[0], following[-1], *gauge[-1])
    return new


def _read(norm: nn.Module, layer: nn.Module, order: Int64[Tensor, "units"], scale: Float[Tensor, "units"]) -> None:
    """Let a normalisation and the layer behind it read D P x as they did x."""
    device = layer.weight.device
    order, scale = order.to(device), scale.to(device).double()
    weight = layer.weight[:, order]
    if isinstance(norm, nn.Identity):
        layer.weight.copy_(weight / scale.to(weight).reshape(-1, *[1] * (weight.ndim - 2)))
        return
    layer.weight.copy_(weight)
    variance = norm.running_var[order].double()
    # (D x − D μ) / √(D² σ² + ε) is not (x − μ) / √(σ² + ε): γ takes the ratio.
    left = (scale.square() * variance + norm.eps).sqrt() / (scale * (variance + norm.eps).sqrt())
    norm.weight.copy_(norm.weight[order] * left)
    norm.bias.copy_(norm.bias[order])
    norm.running_mean.copy_(norm.running_mean[order] * scale)
    norm.running_var.copy_(variance * scale.square())


def _write(layer: nn.Module, order: Int64[Tensor, "units"], scale: Float[Tensor, "units"]) -> None:
    """Let a layer give D P x where it gave x."""
    for values in (layer.weight, layer.bias):
        if values is not None:
            scaled = scale.to(values).reshape(-1, *[1] * (values.ndim - 1))
            values.copy_(values[order.to(values.device)] * scaled)


def _check_gauges(network: "Network", permutations: Sequence[Tensor], scales: Sequence[Tensor]) -> None:
    want = [
        (len(stage.blocks) + 1, shape[0])
        for stage, shape in zip(network.stages, network.arch.stage_shapes, strict=True)
    ]
    for name, given in (("permutations", permutations), ("scales", scales)):
        if (got := [tuple(each.shape) for each in given]) != want:
            raise ValueError(f"{name} of shapes {got} for stages of (states, units) = {want}; pass one a stage")
    for stage, orders, sizes in zip(network.stages, permutations, scales, strict=True):
        natural = torch.arange(orders.shape[1], device=orders.device)
        if not (orders.sort(1).values == natural).all():
            raise ValueError("a row of permutations does not hold every unit once")
        if not ((sizes > 0) & sizes.isfinite()).all():
            raise ValueError(f"scales from {sizes.min():.3g} to {sizes.max():.3g} must be positive and finite")
        if network.network != "plain" and not ((orders == orders[0]).all() and (sizes == sizes[0]).all()):
            raise ValueError(
                f"the identity maps of network={network.network!r} tie the units of all states of a stage together: "
                "pass the same permutation and scales for each of them"
            )
        if isinstance(stage.entry, nn.Identity) and not ((orders[0] == natural).all() and (sizes[0] == 1).all()):
            raise ValueError("the first stage starts from the input itself: x_0 has no other gauge; pass order and 1")


class Network(nn.Module):
    """A classifier made of K stages: entry map, L blocks; then normalisation, ReLU, mean over space, linear head."""

    def __init__(self, arch: Architecture, network: str, norm: str, generator: torch.Generator | None = None):
        super().__init__()
        self.arch, self.network, self.norm = arch, network, norm
        shapes = (arch.in_shape, *arch.stage_shapes)
        self.stages = nn.ModuleList(
            Stage(before, shape, arch, network, norm, first=k == 0)
            for k, (before, shape) in enumerate(pairwise(shapes))
        )
        last = arch.stage_shapes[-1]
        self.head = nn.Sequential(
            _norm(norm, last),
            nn.ReLU(),
            SpatialMean() if len(last) == 3 else nn.Identity(),
            nn.Linear(last[0], arch.classes),
        )
        self._initialise(generator)
        self.to(memory_format=torch.channels_last)  # kernels, and so states; measured in the chapter on speed

    def forward(self, x: Float[Tensor, "n *shape"]) -> Float[Tensor, "n classes"]:
        """Logits."""
        for stage in self.stages:
            x = stage.entry(x)
            for block in stage.blocks:
                x = block(x)
        return self.head(x)

    def tracks(self, x: Float[Tensor, "n *shape"]) -> list[Float[Tensor, "steps n *state"]]:
        """The data track of every point, one tensor of states x_0 … x_L per stage (Definition 1/2 of the paper).

        `network.head(tracks[-1][-1])` gives the logits, so that one pass serves scores and accuracy.
        """
        return [torch.stack(states) for states in self.states(x)]

    def states(self, x: Float[Tensor, "n *shape"]) -> list[list[Float[Tensor, "n *state"]]]:
        """The same as a list of states per stage, which spares a copy of them all."""
        stages = []
        for stage in self.stages:
            x = stage.entry(x)
            states = [x]
            for block in stage.blocks:
                states.append(x := block(x))
            stages.append(states)
        return stages

    def read(self, x: Float[Tensor, "n *shape"]) -> tuple[list[list[Float[Tensor, "n *state"]]], Tensor]:
        """The states of a batch, stage by stage, and its logits: what `watch` finds in other models."""
        stages = self.states(x)
        return stages, self.head(stages[-1][-1])

    def resume(self, stage: int, block: int, state: Float[Tensor, "n *state"]) -> Float[Tensor, "n classes"]:
        """Logits when the network goes on from a state that stands after `block` blocks of stage `stage` (from 0)."""
        for k, later in enumerate(self.stages[stage:]):
            state = later.entry(state) if k else state
            for step in later.blocks[0 if k else block :]:
                state = step(state)
        return self.head(state)

    def weights(self) -> list[nn.Parameter]:
        """The weight matrices and kernels: what weight decay acts on (no biases, no normalisation parameters)."""
        return [p for p in self.parameters() if p.ndim > 1]

    def _initialise(self, generator: torch.Generator | None) -> None:
        """He initialisation; residual branches are scaled by 1/√L so that depth does not blow the states up.

        torch's default is √6 too small for ReLU: five plain blocks without normalisation then shrink every input to
        the same point and stay at chance on MNIST.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                fan_in = module.weight[0].numel()
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_in), generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.head[-1].weight, std=1 / math.sqrt(self.head[-1].in_features), generator=generator)
        if self.network == "resnet":
            with torch.no_grad():
                for stage in self.stages:
                    for block in stage.blocks:
                        block.layer2.weight /= math.sqrt(len(stage.blocks))


class Stage(nn.Module):
    """The dimension-changing map into the stage, then L blocks of constant dimension."""

    def __init__(
        self, before: tuple[int, ...], shape: tuple[int, ...], arch: Architecture, network: str, norm: str, first: bool
    ):
        super().__init__()
        if first and not arch.embed:
            self.entry: nn.Module = nn.Identity()
        elif first:
            self.entry = nn.Sequential(
                nn.Flatten() if len(shape) == 1 else nn.Identity(), _resize(before, shape, bias=True)
            )
        else:
            self.entry = nn.Sequential(_norm(norm, before), nn.ReLU(), _resize(before, shape, bias=norm == "none"))
        if network == "radial":
            self.blocks = nn.ModuleList(RadialBlock(1 + 1 / arch.depth) for _ in range(arch.depth))
        else:
            block = ResidualBlock if network == "resnet" else Block
            self.blocks = nn.ModuleList(block(shape, norm, arch.hidden, arch.activate) for _ in range(arch.depth))


class Block(nn.Module):
    """f(x) = W₂ ReLU(W₁ ReLU(x)), with batch normalisation before each ReLU where asked."""

    def __init__(self, shape: tuple[int, ...], norm: str, hidden: int | None = None, activate: bool = True):
        super().__init__()
        inner = (hidden, *shape[1:]) if hidden else shape
        self.activation = nn.ReLU() if activate else nn.Identity()
        self.norm1, self.norm2 = _norm(norm, shape), _norm(norm, inner)
        self.layer1 = _resize(shape, inner, bias=norm == "none")
        self.layer2 = _resize(inner, shape, bias=norm == "none")

    def forward(self, x: Tensor) -> Tensor:
        """The next state of a plain network."""
        return self.layer2(F.relu(self.norm2(self.layer1(self.activation(self.norm1(x))))))


class ResidualBlock(Block):
    """x + f(x): one Euler step of the velocity field f."""

    def forward(self, x: Tensor) -> Tensor:
        """The next state of a residual network."""
        return x + super().forward(x)


class RadialBlock(nn.Module):
    """c·x: straight, equally directed tracks and an optimal map for any c > 0, whatever the data."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """The scaled state."""
        return self.factor * x


class SpatialMean(nn.Module):
    """Mean over height and width."""

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c"]:
        """Channel means."""
        return x.mean((2, 3))


def _norm(norm: str, shape: tuple[int, ...]) -> nn.Module:
    if norm == "none":
        return nn.Identity()
    return nn.BatchNorm1d(shape[0]) if len(shape) == 1 else nn.BatchNorm2d(shape[0])


def _resize(before: tuple[int, ...], shape: tuple[int, ...], *, bias: bool) -> nn.Module:
    """A linear layer, or a 3×3 convolution whose stride makes the spatial sizes fit."""
    if len(shape) == 1:
        return nn.Linear(math.prod(before), shape[0], bias=bias)
    return nn.Conv2d(before[0], shape[0], 3, stride=max(1, round(before[1] / shape[1])), padding=1, bias=bias)


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name}={value} must be at least 1")
