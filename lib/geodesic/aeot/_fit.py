"""AE-OT: an autoencoder learns the manifold, a semi-discrete optimal map carries noise onto its codes.

Three rivals share the decoder and its training budget: a non-saturating GAN, WGAN-GP and a VAE with a Gaussian prior.
`fit` trains any of the four by name and returns a `Model` whose `sample` draws new points.

Source: Lei, An, Guo, Su, Liu, Luo, Yau & Gu, Engineering 6 (2020); Goodfellow et al., arXiv:1406.2661, Section 3
(non-saturating loss); Gulrajani et al., arXiv:1704.00028 (gradient penalty); Kingma & Welling, arXiv:1312.6114.

| symbol | identifier | shape | meaning |
|---|---|---|---|
| x | x | (n, *shape) | training points, vectors or images (channels, height, width) |
| z | codes | (n, code) | their codes |
| | noise | (m, code) | standard normal source |
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from geodesic import semidiscrete

METHODS: tuple[str, ...] = ("ae-ot", "gan", "wgan-gp", "vae")
MODES: tuple[str, ...] = ("discrete", "extended", "singularity-aware")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a fit but the data and the seed."""

    code: int = 2  # dimension of codes and noise
    width: int = 128  # units of a layer; images: channels of the wider convolution
    steps: int = 3000  # gradient steps of the decoder
    batch: int = 128
    rate: float = 1e-3  # Adam's
    critic_steps: int = 1  # of WGAN-GP, for each step of the generator
    penalty: float = 10.0  # of WGAN-GP
    noise: float = 1.0  # VAE: standard deviation of the decoder's Gaussian
    tol: float = 0.05  # held-out relative error of the semi-discrete map


def encoder(shape: tuple[int, ...], out: int, width: int) -> nn.Sequential:
    """Network from points of this shape to `out` numbers: three layers, convolutional for images."""
    if len(shape) == 1:
        return nn.Sequential(
            nn.Linear(shape[0], width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, out)
        )
    channels, height, breadth = _image(shape)
    return nn.Sequential(
        nn.Conv2d(channels, width // 2, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(width // 2, width, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        nn.Linear(width * (height // 4) * (breadth // 4), out),
    )


def decoder(shape: tuple[int, ...], code: int, width: int) -> nn.Sequential:
    """Network from codes to points of this shape, the mirror of `encoder`."""
    if len(shape) == 1:
        return nn.Sequential(
            nn.Linear(code, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, shape[0])
        )
    channels, height, breadth = _image(shape)
    return nn.Sequential(
        nn.Linear(code, width * (height // 4) * (breadth // 4)),
        nn.ReLU(),
        nn.Unflatten(1, (width, height // 4, breadth // 4)),
        nn.ConvTranspose2d(width, width // 2, 4, 2, 1),
        nn.ReLU(),
        nn.ConvTranspose2d(width // 2, channels, 4, 2, 1),
    )


@dataclass(frozen=True)
class Model:
    """A trained generator.

    Attributes:
        losses: one number for every hundredth step: reconstruction error, generator loss, or minus the ELBO.
        potential: the semi-discrete map onto the codes; None for the rivals.
        angle: fold angle (radians) above which "singularity-aware" sampling sees a boundary of the support.
    """

    method: str
    recipe: Recipe
    encode: nn.Module | None
    decode: nn.Module
    losses: tuple[float, ...]
    potential: semidiscrete.Potential | None = None
    angle: float = math.pi

    @torch.no_grad()
    def sample(
        self, n: int, mode: str = "singularity-aware", generator: torch.Generator | None = None
    ) -> Float[Tensor, "n *shape"]:
        """Draw n new points.

        Args:
            n: how many.
            mode: for AE-OT, the map from noise to codes: "discrete" lands on training codes, "extended" is continuous
                and bridges everything, "singularity-aware" is continuous but for jumps across large folds. The rivals
                have one map and ignore it.
            generator: of the noise.
        """
        noise = semidiscrete.draw(n, self.recipe.code, "normal", generator)
        return torch.cat([self.decode(part) for part in self.codes(noise, mode).split(1000)])

    def codes(self, noise: Float[Tensor, "n code"], mode: str = "singularity-aware") -> Float[Tensor, "n code"]:
        """What the decoder is given for this noise."""
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}; use one of {', '.join(MODES)}")
        if self.potential is None:
            return noise
        if mode == "discrete":
            return self.potential.transport(noise)
        return self.potential.extend(noise, angle=self.angle if mode == "singularity-aware" else None)


def fit(
    x: Float[Tensor, "n *shape"],
    method: str = "ae-ot",
    recipe: Recipe | None = None,
    generator: torch.Generator | None = None,
) -> Model:
    """Train a generator on points x.

    Args:
        x: training points, vectors (n, d) or images (n, channels, height, width) with sides divisible by four.
        method: "ae-ot", "gan", "wgan-gp" or "vae".
        recipe: sizes and steps, the same for all methods; the defaults when None.
        generator: of weights, batches and noise.

    Raises:
        ValueError: an unknown method or an image with other sides.
        RuntimeError: the loss is no longer finite, or the semi-discrete solver spent its budget.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; use one of {', '.join(METHODS)}")
    recipe = recipe or Recipe()
    generator = generator or torch.Generator().manual_seed(0)
    with torch.random.fork_rng():  # layers draw their weights from the global state
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        trained = {"ae-ot": _autoencode, "gan": _adversarial, "wgan-gp": _adversarial, "vae": _variational}[method]
        encode, decode, losses = trained(x, method, recipe, generator)
    model = Model(method, recipe, encode.eval() if encode else None, decode.eval(), tuple(losses))
    return _transported(model, x, generator) if method == "ae-ot" else model


def _transported(model: Model, x: Tensor, generator: torch.Generator) -> Model:
    """The model with its map from noise to the codes of x."""
    with torch.no_grad():
        codes = torch.cat([model.encode(part) for part in x.split(1000)])
    codes = torch.unique(codes, dim=0)
    potential = semidiscrete.solve(codes, source="normal", tol=model.recipe.tol, generator=generator)
    folds = potential.fold_angle(semidiscrete.draw(4096, model.recipe.code, "normal", generator))
    return Model(model.method, model.recipe, model.encode, model.decode, model.losses, potential, split_angle(folds))


def split_angle(folds: Float[Tensor, " n"]) -> float:
    """Threshold between small and large fold angles: the split into two groups with the largest variance between them.

    It maximises w₀w₁(m₀ − m₁)² over the thresholds; Source: Otsu, IEEE Trans. SMC 9 (1979).
    """
    ordered = folds.double().sort().values
    count = torch.arange(1, len(ordered), device=ordered.device)
    below = ordered.cumsum(0)[:-1]
    above = ordered.sum() - below
    share = count / len(ordered)
    between = share * (1 - share) * (below / count - above / (len(ordered) - count)) ** 2
    k = int(between.argmax())
    return float(ordered[k] + ordered[k + 1]) / 2


def _batches(x: Tensor, recipe: Recipe, generator: torch.Generator):
    """Endless random batches of x."""
    while True:
        yield x[torch.randint(len(x), (recipe.batch,), generator=generator)]


def _follow(loss: Tensor, step: int, losses: list[float]) -> None:
    """Note every hundredth loss; a fit that left the numbers ends here."""
    if step % 100 == 0:
        losses.append(float(loss))
        if not math.isfinite(losses[-1]):
            raise RuntimeError(f"the loss is {losses[-1]} at step {step}; lower the rate")


def _schedule(optimiser: torch.optim.Optimizer, recipe: Recipe) -> torch.optim.lr_scheduler.LRScheduler:
    """Half a cosine from the optimiser's step size to a hundredth of it."""
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, recipe.steps, optimiser.param_groups[0]["lr"] / 100)


def _autoencode(x: Tensor, method: str, recipe: Recipe, generator: torch.Generator):
    """Minimise the mean squared reconstruction error."""
    del method
    shape = tuple(x.shape[1:])
    encode, decode = encoder(shape, recipe.code, recipe.width), decoder(shape, recipe.code, recipe.width)
    optimiser = torch.optim.Adam([*encode.parameters(), *decode.parameters()], recipe.rate)
    schedule, losses = _schedule(optimiser, recipe), []
    for step, real in zip(range(recipe.steps), _batches(x, recipe, generator), strict=False):
        loss = F.mse_loss(decode(encode(real)), real)
        _descend(loss, optimiser)
        schedule.step()
        _follow(loss.detach(), step, losses)
    return encode, decode, losses


def _variational(x: Tensor, method: str, recipe: Recipe, generator: torch.Generator):
    """Minimise −ELBO = ‖x − decoded‖²/(2 noise²) + KL(code ‖ standard normal), sums over coordinates."""
    del method
    shape = tuple(x.shape[1:])
    encode, decode = encoder(shape, 2 * recipe.code, recipe.width), decoder(shape, recipe.code, recipe.width)
    optimiser = torch.optim.Adam([*encode.parameters(), *decode.parameters()], recipe.rate)
    schedule, losses = _schedule(optimiser, recipe), []
    for step, real in zip(range(recipe.steps), _batches(x, recipe, generator), strict=False):
        mean, log_variance = encode(real).chunk(2, dim=1)
        z = mean + (log_variance / 2).exp() * torch.randn(mean.shape, generator=generator)
        fidelity = (decode(z) - real).pow(2).flatten(1).sum(1) / (2 * recipe.noise**2)
        divergence = (mean.pow(2) + log_variance.exp() - log_variance - 1).sum(1) / 2
        loss = (fidelity + divergence).mean()
        _descend(loss, optimiser)
        schedule.step()
        _follow(loss.detach(), step, losses)
    return encode, decode, losses


def _adversarial(x: Tensor, method: str, recipe: Recipe, generator: torch.Generator):
    """Alternate critic and generator: log-sigmoid losses ("gan") or Wasserstein-1 with gradient penalty."""
    shape = tuple(x.shape[1:])
    decode, critic = decoder(shape, recipe.code, recipe.width), encoder(shape, 1, recipe.width)
    play = torch.optim.Adam(decode.parameters(), recipe.rate, betas=(0.5, 0.9))
    judge = torch.optim.Adam(critic.parameters(), recipe.rate, betas=(0.5, 0.9))
    schedules = [_schedule(optimiser, recipe) for optimiser in (play, judge)]
    batches, losses = _batches(x, recipe, generator), []
    rounds = recipe.critic_steps if method == "wgan-gp" else 1
    for step in range(recipe.steps):
        for _ in range(rounds):
            real = next(batches)
            with torch.no_grad():
                fake = decode(_noise(len(real), recipe, generator))
            _descend(_critic_loss(critic, real, fake, method, recipe, generator), judge)
        verdict = critic(decode(_noise(recipe.batch, recipe, generator)))
        loss = -verdict.mean() if method == "wgan-gp" else F.softplus(-verdict).mean()
        _descend(loss, play)
        for schedule in schedules:
            schedule.step()
        _follow(loss.detach(), step, losses)
    return None, decode, losses


def _critic_loss(
    critic: nn.Module, real: Tensor, fake: Tensor, method: str, recipe: Recipe, generator: torch.Generator
) -> Tensor:
    if method == "gan":
        return F.softplus(-critic(real)).mean() + F.softplus(critic(fake)).mean()
    t = torch.rand(len(real), *[1] * (real.dim() - 1), generator=generator)
    between = (t * real + (1 - t) * fake).requires_grad_()
    (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    penalty = (slope.flatten(1).norm(dim=1) - 1).pow(2).mean()
    return critic(fake).mean() - critic(real).mean() + recipe.penalty * penalty


def _noise(n: int, recipe: Recipe, generator: torch.Generator) -> Tensor:
    return torch.randn(n, recipe.code, generator=generator)


def _descend(loss: Tensor, optimiser: torch.optim.Optimizer) -> None:
    """One step of the optimiser's own parameters; those of the other player get no gradient, which would be waste."""
    moved = [p for group in optimiser.param_groups for p in group["params"]]
    optimiser.zero_grad(set_to_none=True)
    loss.backward(inputs=moved)
    optimiser.step()


def _image(shape: tuple[int, ...]) -> tuple[int, int, int]:
    if len(shape) != 3 or shape[1] % 4 or shape[2] % 4:
        raise ValueError(f"shape {shape} is no image with sides divisible by four; pad it, or flatten it to a vector")
    return shape[0], shape[1], shape[2]
