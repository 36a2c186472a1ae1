"""How good are generated points? Modes, quality, distance of distributions, and whether they were memorised.

On images the distances are taken in the features of a classifier of our own: the number is called a Fréchet distance,
never FID, whose features are another network's.

Source: Srivastava et al., arXiv:1705.07761 (modes, high-quality share, reverse KL); Kynkäänniemi et al.,
arXiv:1904.06991 (precision and recall); Heusel et al., arXiv:1706.08500 (Fréchet distance of Gaussians).

| symbol | identifier | shape | meaning |
|---|---|---|---|
| | centres | (k, d) | modes of a synthetic law |
| | features | (n, f) | penultimate layer of the classifier |
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Real
from torch import Tensor, nn
from torch.nn import functional as F

_TILE = 1000  # rows of a block of distances


@dataclass(frozen=True)
class Coverage:
    """Modes found, share of samples within three deviations of a mode, and KL(samples over modes ‖ uniform)."""

    modes: int
    quality: float
    reverse_kl: float


def ring(n: int, generator: torch.Generator, modes: int = 8, deviation: float = 0.01) -> tuple[Tensor, Tensor, float]:
    """Points of equal Gaussians on the unit circle, their centres and deviation: the 2D-ring of the field."""
    angle = torch.arange(modes) * (2 * torch.pi / modes)
    return _mixture(torch.stack([angle.cos(), angle.sin()], 1), n, deviation, generator)


def grid(n: int, generator: torch.Generator, side: int = 5, deviation: float = 0.05) -> tuple[Tensor, Tensor, float]:
    """Points of equal Gaussians on a square lattice of spacing 2, their centres and deviation: the 2D-grid."""
    ticks = 2.0 * torch.arange(side) - (side - 1)
    return _mixture(torch.cartesian_prod(ticks, ticks), n, deviation, generator)


def _mixture(centres: Tensor, n: int, deviation: float, generator: torch.Generator) -> tuple[Tensor, Tensor, float]:
    which = torch.randint(len(centres), (n,), generator=generator)
    return centres[which] + deviation * torch.randn(n, centres.shape[1], generator=generator), centres, deviation


def coverage(samples: Float[Tensor, "n d"], centres: Float[Tensor, "k d"], deviation: float) -> Coverage:
    """Modes, high-quality share and reverse KL of samples against equal Gaussians.

    A sample belongs to its nearest centre; it is of high quality within three deviations of it; a mode is found when
    it has a high-quality sample. The reverse KL is Σ p log(k p) with p the share of all samples in each mode.
    """
    distance, nearest = torch.cdist(samples, centres).min(1)
    good = distance <= 3 * deviation
    share = torch.bincount(nearest, minlength=len(centres)).double() / len(samples)
    return Coverage(
        int(nearest[good].unique().numel()), float(good.double().mean()), reverse_kl(share, torch.ones_like(share))
    )


def reverse_kl(samples: Real[Tensor, " k"], data: Real[Tensor, " k"]) -> float:
    """KL(p ‖ q) of two vectors of counts, p of the samples, q of the data, 0 log 0 = 0."""
    p, q = samples.double() / samples.sum(), data.double() / data.sum()
    seen = p > 0
    return float((p[seen] * (p[seen] / q[seen]).log()).sum())


def frechet_distance(a: Float[Tensor, "n f"], b: Float[Tensor, "m f"]) -> float:
    """Squared W₂ between the Gaussians with the means and covariances of two samples: ≥ 0, biased up in n and m.

    ‖m_a − m_b‖² + tr(C_a + C_b − 2 (C_a^½ C_b C_a^½)^½).
    """
    a, b = a.double(), b.double()
    left, right = torch.cov(a.T), torch.cov(b.T)
    root = _square_root(left)
    cross = torch.linalg.eigvalsh(root @ right @ root).clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).pow(2).sum() + left.trace() + right.trace() - 2 * cross)


def _square_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def precision_recall(
    real: Float[Tensor, "n f"], fake: Float[Tensor, "m f"], neighbours: int = 3
) -> tuple[float, float]:
    """Share of fakes inside the union of balls around real points, and of real points inside the fakes' balls.

    The ball of a point reaches to its k-th nearest neighbour in its own sample.
    """
    return _inside(fake, real, neighbours), _inside(real, fake, neighbours)


def _inside(points: Tensor, centres: Tensor, neighbours: int) -> float:
    radius = torch.cat([torch.cdist(p, centres).kthvalue(neighbours + 1, dim=1).values for p in centres.split(_TILE)])
    return float(torch.cat([(torch.cdist(p, centres) <= radius).any(1) for p in points.split(_TILE)]).double().mean())


def memorisation_ratio(fake: Tensor, train: Tensor, test: Tensor) -> float:
    """Median distance of a fake to its nearest training point, over that of a test point; 0 copies, 1 does not.

    Distances between flattened points; a value well below one means that samples sit closer to the training set than
    new data do.
    """
    return float(_nearest(fake, train).median() / _nearest(test, train).median())


def nearness_ratio(fake: Tensor, train: Tensor, test: Tensor) -> float:
    """Median distance of a fake to its nearest training point, over that to its nearest test point.

    Both sets are cut to the size of the smaller. One when fakes are no closer to the training set than to new data,
    below one when they lean on it; blur, which brings a fake closer to everything, cancels.
    """
    size = min(len(train), len(test))
    return float(_nearest(fake, train[:size]).median() / _nearest(fake, test[:size]).median())


def _nearest(points: Tensor, others: Tensor) -> Float[Tensor, " n"]:
    others = others.flatten(1)
    return torch.cat([torch.cdist(part, others).amin(1) for part in points.flatten(1).split(_TILE)])


class Classifier(nn.Module):
    """A small convolutional classifier; `features` are what it computes before its last layer."""

    def __init__(self, shape: tuple[int, int, int], classes: int, width: int = 64):
        super().__init__()
        channels, height, breadth = shape
        self.body = nn.Sequential(
            nn.Conv2d(channels, 16, 5, 2, 2),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, 2, 1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * ((height + 3) // 4) * ((breadth + 3) // 4), width),
        )
        self.head = nn.Linear(width, classes)

    def features(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n f"]:
        """Penultimate layer, in pieces."""
        return torch.cat([F.relu(self.body(part)) for part in x.split(_TILE)])

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n classes"]:
        """Class scores."""
        return self.head(self.features(x))


def train_classifier(
    x: Float[Tensor, "n c h w"], y: Int[Tensor, " n"], classes: int, generator: torch.Generator, steps: int = 1000
) -> Classifier:
    """Fit `Classifier` by Adam on random batches of 100 with cross-entropy."""
    with torch.random.fork_rng():
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        model = Classifier((x.shape[1], x.shape[2], x.shape[3]), classes)
    optimiser = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(steps):
        pick = torch.randint(len(x), (100,), generator=generator)
        optimiser.zero_grad(set_to_none=True)
        F.cross_entropy(model(x[pick]), y[pick]).backward()
        optimiser.step()
    return model.eval()
