"""What a trained network's tracks say beyond the scores: Theorem 1 on pairs, pace, one big step, Jacobians, collapse.

The curl share of a map (`curl_share`, `curl_of_stage`, `curl_of_stages`) is handed on from `_curl`.

Used by the chapters on Theorem 1, on weight decay and on the experiments.

| symbol | identifier | meaning |
|---|---|---|
| a, b | a, b | distance of a pair at the stage's input and output |
| Σ_W, Σ_B | within, between | covariance of the states within classes and of the class means |
| s_l | lengths[l] | length of segment l of a track; ℓ = Σ s_l |
| f_l | branch | what block l adds to the state; J_l its Jacobian at the state, with singular vectors U_l, V_l |
"""

from itertools import combinations
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from geodesic import tracks
from geodesic._curl import Curl, curl_of_stage, curl_of_stages, curl_share
from geodesic.networks import Block, Network

__all__ = [
    "Curl",
    "collapse",
    "curl_of_stage",
    "curl_of_stages",
    "curl_share",
    "one_step",
    "pace",
    "plane",
    "residual_alignment",
    "sketch",
    "theorem1_violations",
    "weight_norms",
]

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


def pace(track: Float[Tensor, "steps n *state"]) -> dict[str, float | None]:
    """How the first gap of the action splits into bends and uneven steps; None where no point moves.

    With s_l the segment lengths of a point and ℓ their sum, E‖x_L − x_0‖² / A = straight · even, where

        straight = E‖x_L − x_0‖² / E ℓ² is 1 iff every track is straight,
        even = E ℓ² / (L E Σ s_l²) is 1 iff every point takes equal steps: the constant-speed ratio.

    Returns:
        straight, even in (0, 1]; step_spread: mean over points of (standard deviation of s_l) / (mean of s_l).
    Source: the chain after paper eq. (9).
    """
    states = track.reshape(*track.shape[:2], -1)
    lengths = states.diff(dim=0).norm(dim=-1).double()
    length, chord = lengths.sum(0), (states[-1] - states[0]).norm(dim=-1).double()
    moving = length > 0
    if not moving.any():
        return {"straight": None, "even": None, "step_spread": None}
    spread = lengths.std(0, correction=0)[moving] / lengths.mean(0)[moving]
    return {
        "straight": (chord.square().mean() / length.square().mean()).item(),
        "even": (length.square().mean() / (len(lengths) * lengths.square().sum(0).mean())).item(),
        "step_spread": spread.mean().item(),
    }


@torch.no_grad()
def one_step(network: Network, x: Float[Tensor, "n *shape"], y: Int64[Tensor, "n"]) -> tuple[list[float | None], float]:
    """Replace each stage by one big Euler step with its mean velocity at the stage's input.

    The step is x̂_L = x_0 + Σ_l v_l(x_0), v_l(x) = (block l)(x) − x. If the velocity that a point meets does not change
    along its way, as on a geodesic that every block follows, x̂_L = x_L.

    Returns:
        per stage, √(E‖x̂_L − x_L‖² / E‖x_L − x_0‖²), None where no point moves; and the accuracy when the head reads
        x̂_L of the last stage, the stages before it being left as they are.
    Source: paper eqs (2) and (6)–(7), applied to all blocks at once.
    """
    errors: list[float | None] = []
    jump = x
    for stage in network.stages:
        start = end = stage.entry(x)
        jump = start
        for block in stage.blocks:
            jump = jump + block(start) - start
            end = block(end)
        way = (end - start).double().square().sum()
        errors.append(((jump - end).double().square().sum() / way).sqrt().item() if way > 0 else None)
        x = end
    return errors, (network.head(jump).argmax(1) == y).double().mean().item()


def residual_alignment(
    network: Network, x: Float[Tensor, "n *shape"], *, rank: int = 10, sweeps: int = 6
) -> list[dict[str, Any] | None]:
    """Whether the blocks of a stage act along common directions: top singular vectors of the Jacobians of f_l.

    f_l is a block without its identity map, J_l its Jacobian at the state that it meets, U_l and V_l its top left and
    right singular vectors, `rank` of them, found by subspace iteration without forming J_l. Two subspaces overlap by
    ‖U_lᵀ U_m‖_F² / rank: 1 if equal, rank/d on average by chance. Cost: O(n · rank · sweeps) passes.

    Returns:
        per stage (None where the blocks have no weights): across: mean overlap of U_l and U_m over pairs of blocks
        (None for one block), sides: mean overlap of U_l and V_l, chance: rank/d, singular: the largest singular value
        of every block; all of them means over points.
    Source: Li & Papyan 2023, RA2 and RA4.
    """
    generator = torch.Generator().manual_seed(0)
    found: list[dict[str, Any] | None] = []
    for stage in network.stages:
        with torch.no_grad():
            x = stage.entry(x)
        if not isinstance(stage.blocks[0], Block):
            found.append(None)
            continue
        k = min(rank, x[0].numel())
        left, right, top = [], [], []
        for block in stage.blocks:
            u, values, v = _top_singular(block, x, k, sweeps, generator)
            left.append(u)
            right.append(v)
            top.append(values[:, 0].mean().item())
            with torch.no_grad():
                x = block(x)
        across = [_overlap(a, b) for a, b in combinations(left, 2)]
        sides = [_overlap(u, v) for u, v in zip(left, right, strict=True)]
        found.append(
            {
                "across": sum(across) / len(across) if across else None,
                "sides": sum(sides) / len(sides),
                "chance": k / x[0].numel(),
                "singular": top,
            }
        )
    return found


def _top_singular(
    block: Block, x: Float[Tensor, "n *state"], k: int, sweeps: int, generator: torch.Generator
) -> tuple[Float[Tensor, "n d k"], Float[Tensor, "n k"], Float[Tensor, "n d k"]]:
    """U, singular values and V of the Jacobian of f at n points, the k largest."""
    copies = x.repeat_interleave(k, 0)  # one copy of the point for each column

    def f(z: Tensor) -> Tensor:
        return Block.forward(block, z)

    def columns(flat: Tensor) -> Tensor:
        return flat.reshape(len(x), k, -1).mT  # (n, d, k)

    def rows(q: Tensor) -> Tensor:
        return q.mT.reshape(copies.shape)

    with torch.no_grad():
        q = torch.randn(len(x), x[0].numel(), k, generator=generator).to(x)
        q = torch.linalg.qr(q).Q
        _, transpose = torch.func.vjp(f, copies)
        for _ in range(sweeps):
            image = torch.linalg.qr(columns(torch.func.jvp(f, (copies,), (rows(q),))[1])).Q
            q = torch.linalg.qr(columns(transpose(rows(image))[0])).Q
        u, values, w = torch.linalg.svd(columns(torch.func.jvp(f, (copies,), (rows(q),))[1]), full_matrices=False)
        return u, values, q @ w.mT


def _overlap(a: Float[Tensor, "n d k"], b: Float[Tensor, "n d k"]) -> float:
    """‖AᵀB‖_F² / k, mean over points."""
    return ((a.mT @ b).square().sum((1, 2)) / a.shape[-1]).mean().item()


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
