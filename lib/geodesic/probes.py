"""What a trained network's tracks say beyond the scores: Theorem 1 on pairs, early exits, collapse, weight norms.

Used by the chapters on Theorem 1, on weight decay and on the experiments.

| symbol | identifier | meaning |
|---|---|---|
| a, b | a, b | distance of a pair at the stage's input and output |
| Σ_W, Σ_B | within, between | covariance of the states within classes and of the class means |
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from geodesic import tracks
from geodesic.networks import Network

_SKETCH = 512  # dimensions of a sketch
_LARGEST_PLAIN = 2048  # states up to this dimension are kept as they are


def theorem1_violations(
    track: Float[Tensor, "steps n *state"], labels: Int64[Tensor, "n"], classes: int
) -> dict[str, int | float | list[float] | list[list[float | None]] | None]:
    """Share of pairs of tracks that come closer than Theorem 1 allows a pair of geodesics.

    The bound is a·b / √(a² + b²) on the minimum over t of the distance; the minimum over the L + 1 recorded states can
    only be larger than that over all t, so a violation found here is one. All n(n−1)/2 pairs are taken, O(L n² d).

    Returns:
        violated: share of all pairs; within, between: the same for pairs of one class and of two;
        by_class: symmetric (classes, classes) table (None where no pair exists); margin: quantiles 1, 10, 50 % of
        (minimum distance)/bound; pairs: their number.
    Source: paper Theorem 1, eqs (35)–(41).
    """
    states = track.reshape(*track.shape[:2], -1)
    first, second = torch.triu_indices(len(labels), len(labels), 1, device=track.device)
    distances = torch.stack([torch.cdist(state, state)[first, second] for state in states])
    a, b = distances[0], distances[-1]
    bound = tracks.theorem1_bound(a, b)
    violated = distances.amin(0) < bound * (1 - 1e-5)  # float32 distances
    pair = labels[first] * classes + labels[second]
    counts = torch.bincount(pair, minlength=classes**2).view(classes, classes).double()
    hits = torch.bincount(pair, violated.double(), minlength=classes**2).view(classes, classes)
    counts, hits = counts + counts.T, hits + hits.T  # the diagonal is doubled in both: the shares stand
    same = labels[first] == labels[second]
    margin = (distances.amin(0) / bound.clamp_min(torch.finfo(a.dtype).tiny)).double()
    quantiles = torch.tensor([0.01, 0.1, 0.5], dtype=torch.float64, device=margin.device)
    return {
        "violated": violated.double().mean().item(),
        "within": violated[same].double().mean().item() if same.any() else None,
        "between": violated[~same].double().mean().item() if (~same).any() else None,
        "by_class": [
            [h / c if c else None for h, c in zip(*rows, strict=True)]
            for rows in zip(hits.tolist(), counts.tolist(), strict=True)
        ],
        "margin": [margin.sort().values[int(q * (len(margin) - 1))].item() for q in quantiles.tolist()],
        "pairs": len(first),
    }


def collapse(states: Float[Tensor, "n *state"], labels: Int64[Tensor, "n"], classes: int) -> float | None:
    """Spread within classes over spread between them, tr Σ_W / tr Σ_B: 0 at neural collapse; None if no spread between.

    A trace form of NC1 (Papyan, Han & Donoho 2020) that needs no inverse; what it says of OTS: where a class is one
    point, which of its members is matched to which is arbitrary.
    """
    x = states.flatten(1).double()
    onehot = nn.functional.one_hot(labels, classes).double()
    counts = onehot.sum(0).clamp_min(1)
    means = (onehot.T @ x) / counts[:, None]
    within = (x - means[labels]).square().sum() / len(x)
    between = (counts[:, None] * (means - x.mean(0)).square()).sum() / len(x)
    return (within / between).item() if between > 0 else None


def weight_norms(network: Network) -> list[dict[str, float | str | list[int] | None]]:
    """Name, shape, Frobenius norm and (for matrices) spectral norm of every decayed weight.

    Source: the norms of paper eqs (10)–(12).
    """
    named = [(name, p.detach().float()) for name, p in network.named_parameters() if p.ndim > 1]
    return [
        {
            "name": name,
            "shape": list(p.shape),
            "frobenius": p.norm().item(),
            "spectral": torch.linalg.matrix_norm(p, 2).item() if p.ndim == 2 else None,
        }
        for name, p in named
    ]


def sketch(track: Float[Tensor, "steps n *state"]) -> Float[Tensor, "steps n k"]:
    """States in at most 2048 dimensions: larger ones under a fixed Gaussian projection to 512, true to some 4 %.

    Cheap enough to keep at every epoch; the plane of a figure needs no more (Johnson & Lindenstrauss).
    """
    states = track.reshape(*track.shape[:2], -1)
    if states.shape[-1] <= _LARGEST_PLAIN:
        return states
    generator = torch.Generator().manual_seed(states.shape[-1])
    projection = torch.randn(states.shape[-1], _SKETCH, generator=generator).to(states) / _SKETCH**0.5
    return states @ projection


def plane(states: Float[Tensor, "m *state"]) -> tuple[Float[Tensor, "1 d"], Float[Tensor, "d 2"], float]:
    """Centre and two principal axes of all states, and the share of their variance that the plane shows.

    Source: paper, Figs 9–16 (which plane the paper used is not known).
    """
    x = states.flatten(1).float()
    centre = x.mean(0, keepdim=True)
    _, values, axes = torch.linalg.svd(x - centre, full_matrices=False)
    total = values.square().sum().clamp_min(torch.finfo(values.dtype).tiny)
    axes = axes[:2].T
    # An axis has no sign of its own: make its largest entry positive, so that figures repeat.
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    return centre, axes, (values[:2].square().sum() / total).item()
