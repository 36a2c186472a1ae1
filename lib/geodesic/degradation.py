"""Why a deeper network may be harder to train: capacity counted and reached, one gradient step taken apart.

Two things are measured. How many random equations a ReLU chain can be made to satisfy, against the count of eqs 18–24.
How far the change of a layer's output in one gradient step is from the one its gradient asks for, and how far a step of
all layers at once is from steps of one layer after another (eqs 25–29). Source: arXiv:2102.09235, section 3.

| symbol | identifier | shape | meaning |
|---|---|---|---|
| m, L | width, depth | | units of a layer, m × m layers of a chain |
| θ, P | parameters | (P,) | all weights of a chain |
| A | inputs | (n, in) | inputs of a layer, one row a point |
| G | gradient | (n, out) | ∂loss/∂Z with respect to the outputs Z = A Wᵀ + b of that layer |
| K | gram | (n, n) | A Aᵀ, plus 1 in every entry where the layer has a bias |
| η | learning_rate | | step size |
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.func import grad_and_value, vmap
from torch.nn import functional as F

Loss = Callable[[Tensor, Tensor], Tensor]
_LEAST_DAMPING = 1e-12  # keeps the linear system solvable where points are inactive
_HOPELESS = 1e6  # growth of the damping after which no step, however short, has helped


# ------------------------------------------------------------------------------------------------------------ capacity
@dataclass(frozen=True)
class Chain:
    """f(x) = ⟨w, ReLU(z_L)⟩, z_1 = W_0 x, z_{l+1} = W_l ReLU(z_l) (+ z_l if residual): one number, no biases.

    With x_l = ReLU(z_l) the plain chain is x_{l+1} = ReLU(W_l x_l). Source: paper eqs (18)–(24).
    """

    width: int  # m: dimension of x and of every z
    depth: int  # L: m × m layers
    residual: bool = False

    def __post_init__(self) -> None:
        for name in ("width", "depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    @property
    def parameters(self) -> int:
        """P = L m² + m."""
        return self.depth * self.width**2 + self.width

    @property
    def equations(self) -> int:
        """Number of equations beyond which almost no right-hand side can be fitted.

        P less the directions that leave f unchanged: a unit's incoming weights may be scaled by c > 0 and its outgoing
        weights by 1/c. A plain chain has L m such directions. In a residual chain a coordinate must be scaled in all
        layers together, so that there are m.
        """
        return self.parameters - self.width * (1 if self.residual else self.depth)

    def draw(self, tries: int, generator: torch.Generator) -> Float[Tensor, "tries parameters"]:
        """He-initialised weights in float64; residual branches are scaled by 1/√L."""
        m, scale = self.width, self.depth**-0.5 if self.residual else 1.0
        sizes = torch.tensor([m * m, (self.depth - 1) * m * m, m])
        deviations = torch.tensor([1.0, 2**0.5 * scale, 2**0.5], dtype=torch.float64) / m**0.5
        return deviations.repeat_interleave(sizes) * torch.randn(
            tries, self.parameters, generator=generator, dtype=torch.float64
        )

    def __call__(self, theta: Shaped[Tensor, " parameters"], x: Shaped[Tensor, " width"]) -> Shaped[Tensor, ""]:
        """f(x) of one point; differentiable and batched by torch.func."""
        m = self.width
        first, *layers, last = theta.split([m * m] * self.depth + [m])
        z = first.view(m, m) @ x
        for weights in layers:
            v = weights.view(m, m) @ z.relu()
            z = z + v if self.residual else v
        return last @ z.relu()


class Fit(NamedTuple):
    """What was reached in each try to satisfy n equations."""

    residual: Float[Tensor, " tries"]  # ‖f(X) − y‖ / ‖y‖
    inactive: Float[Tensor, " tries"]  # share of points at which no weight moves f: there is no equation left to solve


def fit_equations(
    chain: Chain, n: int, tries: int, *, generator: torch.Generator, iterations: int = 150, tolerance: float = 1e-6
) -> Fit:
    """Solve f(x_i) = y_i, i < n, with x and y standard normal, by Levenberg–Marquardt from independent starts.

    Not reaching the tolerance is an outcome, not an error: it says that this method did not find a solution, not that
    there is none. Cost O(tries · iterations · (n³ + n² P)).

    Args:
        chain: the model.
        n: number of equations.
        tries: independent draws of points, right-hand sides and initial weights.
        generator: their source.
        iterations: at most so many steps.
        tolerance: stop once every try has a relative residual below this.

    Raises:
        ValueError: for n or tries below 1.
    """
    if n < 1 or tries < 1:
        raise ValueError(f"n={n} and tries={tries} must both be at least 1")
    theta = chain.draw(tries, generator)
    x = torch.randn(tries, n, chain.width, generator=generator, dtype=torch.float64)
    y = torch.randn(tries, n, generator=generator, dtype=torch.float64)
    linearise = vmap(vmap(grad_and_value(chain), (None, 0)))
    evaluate = vmap(vmap(chain, (None, 0)))
    jacobian, value = linearise(theta, x)
    first = damping = 10 * jacobian.square().sum((1, 2)).clamp_min(_LEAST_DAMPING) / n
    identity = torch.eye(n, dtype=torch.float64)
    for _ in range(iterations):
        error = (value - y).norm(dim=1)
        if ((error < tolerance * y.norm(dim=1)) | (damping > _HOPELESS * first)).all():
            break
        gram = jacobian @ jacobian.mT + damping[:, None, None] * identity
        step = jacobian.mT @ torch.linalg.solve(gram, (value - y)[..., None])
        proposed = theta - step[..., 0]
        better = (evaluate(proposed, x) - y).norm(dim=1) < error
        theta = torch.where(better[:, None], proposed, theta)
        damping = torch.where(better, damping / 2, damping * 3).clamp_min(_LEAST_DAMPING)
        jacobian, value = linearise(theta, x)
    return Fit((value - y).norm(dim=1) / y.norm(dim=1), (jacobian == 0).all(2).double().mean(1))


def jacobian_rank(chain: Chain, n: int, *, generator: torch.Generator) -> int:
    """Rank of ∂(f(x_1) … f(x_n))/∂θ at random weights and points: how many equations are independent there."""
    (theta,) = chain.draw(1, generator)
    x = torch.randn(n, chain.width, generator=generator, dtype=torch.float64)
    jacobian, _ = vmap(grad_and_value(chain), (None, 0))(theta, x)
    return int(torch.linalg.matrix_rank(jacobian))


# ----------------------------------------------------------------------------------------------------------- one step
def achieved_change(
    inputs: Float[Tensor, "n inputs"], gradient: Float[Tensor, "n outputs"], learning_rate: float, *, bias: bool = True
) -> Float[Tensor, "n outputs"]:
    """Change of a linear layer's outputs when it alone takes a gradient step, −η K G with K = A Aᵀ (+ 1 with a bias).

    The change that the gradient asks for is −η G: the two are parallel only if the columns of G are eigenvectors of K
    with one eigenvalue. Exact for a step of any size, because the layer is linear in its weights.
    Source: paper eqs (27)–(28).
    """
    gram = inputs @ inputs.mT + float(bias)
    return -learning_rate * gram @ gradient


class StepCosines(NamedTuple):
    """Cosine of intended and achieved change, one entry a linear layer in order of use; nan where the gradient is 0."""

    alone: Float[Tensor, " layers"]  # the layer moves, its inputs do not: never negative
    together: Float[Tensor, " layers"]  # all layers take their step at once


def intended_achieved_cosine(
    network: nn.Module,
    x: Float[Tensor, "n *shape"],
    y: Shaped[Tensor, "n *target"],
    learning_rate: float,
    loss: Loss = F.cross_entropy,
) -> StepCosines:
    """Cosine between −η G and what one gradient step makes of every layer's outputs, over all points.

    Outputs that the loss does not feel (their ReLU is shut) have no intended change and are left out of both.

    Args:
        network: all its parameters belong to linear layers, each of which is used once; it is left as it was.
        x: points; the step is that of the whole batch.
        y: targets.
        learning_rate: η; the cosine "alone" does not depend on it.
        loss: of the network's outputs and y.

    Raises:
        ValueError: if a parameter belongs to another kind of layer.
    Source: paper eqs (25)–(28).
    """
    layers, gradients, weights = _gradients(network, x, y, loss)
    moved = copy.deepcopy(network)
    with torch.no_grad():
        for p, gradient in zip(moved.parameters(), weights, strict=True):
            p -= learning_rate * gradient
        after = _trace(moved, x)[1]
        alone, together = [], []
        for layer, new, gradient in zip(layers, after, gradients, strict=True):
            own = achieved_change(layer.inputs, gradient, learning_rate, bias=layer.module.bias is not None)
            alone.append(_cosine(own, gradient))
            together.append(_cosine(new.outputs - layer.outputs, gradient))
    return StepCosines(torch.stack(alone), torch.stack(together))


@dataclass(frozen=True)
class Mismatch:
    """One step of all layers at once beside steps of one layer after another, each with its gradient renewed."""

    weights: float  # ‖Δθ_at once − Δθ_in turn‖ / ‖Δθ_in turn‖
    outputs: float  # the same of the network's outputs on all points
    loss: float  # before the step
    loss_at_once: float
    loss_in_turn: float


def simultaneous_mismatch(
    network: nn.Module,
    x: Float[Tensor, "n *shape"],
    y: Shaped[Tensor, "n *target"],
    learning_rate: float,
    loss: Loss = F.cross_entropy,
) -> Mismatch:
    """Compare θ − η∇loss(θ) with the step of block coordinate descent, from the first linear layer to the last.

    Back-propagation evaluates every layer's gradient on the track of the old weights; in turn, a layer sees the track
    that the layers before it have just made. Cost: one pass forwards and back a layer.

    Raises:
        ValueError: if a parameter belongs to another kind of layer than a linear one.
    Source: paper eq. (29).
    """
    start, before = _flat(network), network(x).detach()
    slopes = torch.autograd.grad(loss(network(x), y), list(network.parameters()))
    at_once, in_turn = copy.deepcopy(network), copy.deepcopy(network)
    with torch.no_grad():
        for p, slope in zip(at_once.parameters(), slopes, strict=True):
            p -= learning_rate * slope
    for layer in _trace(in_turn, x)[1]:
        own = list(layer.module.parameters())
        slopes = torch.autograd.grad(loss(in_turn(x), y), own)
        with torch.no_grad():
            for p, slope in zip(own, slopes, strict=True):
                p -= learning_rate * slope
    with torch.no_grad():
        outputs = at_once(x), in_turn(x)
        return Mismatch(
            _relative(_flat(at_once) - start, _flat(in_turn) - start),
            _relative(outputs[0] - before, outputs[1] - before),
            *(loss(output, y).item() for output in (before, *outputs)),
        )


def step_for_decrease(
    network: nn.Module,
    x: Float[Tensor, "n *shape"],
    y: Shaped[Tensor, "n *target"],
    share: float,
    loss: Loss = F.cross_entropy,
) -> float:
    """The step size η at which the gradient promises to lower the loss by a share of it, η ‖∇loss‖² = share · loss.

    A step of one size means more in a deeper network, which has more layers to move; steps of one promise compare.

    Raises:
        ValueError: if the gradient is zero.
    """
    value = loss(network(x), y)
    slopes = torch.autograd.grad(value, list(network.parameters()))
    squared = float(sum(slope.square().sum() for slope in slopes))
    if squared == 0:
        raise ValueError("the gradient is zero: no step lowers the loss; start from other weights")
    return share * value.item() / squared


# ----------------------------------------------------------------------------------------------------------- internals
class _Use(NamedTuple):
    """A linear layer at work."""

    module: nn.Linear
    inputs: Tensor
    outputs: Tensor


def _trace(network: nn.Module, x: Tensor) -> tuple[Tensor, list[_Use]]:
    """Run the network and keep inputs and outputs of its linear layers, in order of use."""
    seen: list[_Use] = []
    linear = [module for module in network.modules() if isinstance(module, nn.Linear)]
    others = {id(p) for p in network.parameters()} - {id(p) for module in linear for p in module.parameters()}
    if others:
        kinds = sorted({type(m).__name__ for m in network.modules() for p in m.parameters(False) if id(p) in others})
        raise ValueError(f"{', '.join(kinds)} hold parameters; measure networks of linear layers without normalisation")
    handles = [
        module.register_forward_hook(lambda layer, given, got: seen.append(_Use(layer, given[0], got)))
        for module in linear
    ]
    try:
        value = network(x)
    finally:
        for handle in handles:
            handle.remove()
    return value, seen


def _gradients(
    network: nn.Module, x: Tensor, y: Tensor, loss: Loss
) -> tuple[list[_Use], tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Layers at work, and the gradients of the loss with respect to their outputs and to all parameters."""
    value, layers = _trace(network, x)
    wanted = [layer.outputs for layer in layers] + list(network.parameters())
    slopes = torch.autograd.grad(loss(value, y), wanted)
    return layers, slopes[: len(layers)], slopes[len(layers) :]


def _cosine(change: Tensor, gradient: Tensor) -> Tensor:
    """Cosine of change and −gradient over the entries that have a gradient."""
    felt = gradient != 0
    return -(change * gradient).sum() / ((change * felt).norm() * gradient.norm())


def _flat(network: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def _relative(first: Tensor, second: Tensor) -> float:
    return ((first - second).norm() / second.norm()).item()
