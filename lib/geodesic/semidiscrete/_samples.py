"""Scores, samples and weights shared by the semi-discrete solver and its potential.

A score is ⟨x, yᵢ⟩ + hᵢ. All scores of many samples never fit in memory, so they are made in blocks of rows and reduced
at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

Source = Literal["cube", "normal"]

_TILE = 2**20  # entries of the largest block of scores: it stays in the processor's cache
_DRAW = 2**15  # points drawn from a sequence at a time
_MOST = torch.quasirandom.SobolEngine.MAXDIM  # dimensions of a Sobol sequence


@dataclass(frozen=True)
class Frame:
    """Atoms centred and scaled to the spread of the source: translations change no cell, scalings only units."""

    atoms: Float[Tensor, "n d"]
    scale: float
    source: str

    def __post_init__(self) -> None:
        if self.source not in ("cube", "normal"):
            raise ValueError(f'source is {self.source!r}; use "cube" or "normal"')
        if self.atoms.shape[1] > _MOST:
            raise ValueError(f"dimension {self.atoms.shape[1]} is above {_MOST}, where Sobol sequences end")

    @staticmethod
    def of(points: Tensor, source: str) -> Frame:
        unit = 2.0 ** (math.frexp(float(points.abs().max()))[1] - 1)  # rounds nothing, and squares stay in range
        scaled = points / unit
        centred = scaled - scaled.mean(0)
        spread = math.sqrt(1 / 12) if source == "cube" else 1.0
        scale = float(centred.double().pow(2).mean().sqrt()) / spread or 1.0
        return Frame(centred / scale, scale * unit, source)

    def shrink(self, heights: Tensor) -> Tensor:
        return (heights / self.scale).to(self.atoms)


def real(values: Shaped[Tensor, "*shape"], what: str) -> Float[Tensor, "*shape"]:
    """Finite numbers of at least single precision: integers in float64, half precision in float32.

    Raises:
        TypeError: for complex numbers.
        ValueError: for integers that float64 does not hold, and for what is not finite.
    """
    if values.is_complex():
        raise TypeError(f"{what} are complex; pass real numbers")
    if not values.is_floating_point():
        if values.numel() and (largest := max(-int(values.min()), int(values.max()))) > 2**53:
            raise ValueError(f"{what} reach {largest}, beyond 2**53; float64 does not hold all such integers")
        values = values.double()
    elif values.dtype.itemsize < 4:
        values = values.float()
    if bad := int((~values.isfinite()).flatten(1).any(1).sum() if values.ndim > 1 else (~values.isfinite()).sum()):
        raise ValueError(f"{bad} of {len(values)} {what} are not finite; remove them")
    return values


def check_atoms(points: Float[Tensor, "n d"], weights: Shaped[Tensor, " m"] | None) -> Float[Tensor, " n"]:
    """The masses of distinct atoms, in the type of the points; uniform when None.

    Raises:
        ValueError: for points that are none or repeat, and for masses that are not positive or do not sum to one.
    """
    n = len(points)
    if n == 0:
        raise ValueError("there are no points; give at least one")
    if (distinct := len(torch.unique(points, dim=0))) < n:
        raise ValueError(f"{n - distinct} of {n} points repeat another; merge them and add up their weights")
    weights = points.new_full((n,), 1 / n) if weights is None else real(weights, "weights").to(points)
    if weights.shape != (n,):
        raise ValueError(f"{weights.numel()} weights for {n} points; give one weight to each point")
    if (weights <= 0).any():
        worst = int(weights.argmin())
        raise ValueError(
            f"point {worst} has weight {float(weights[worst]):g}: its cell must be empty; remove the point"
        )
    if abs(float(weights.double().sum()) - 1) > 1e-4:
        raise ValueError(f"the weights sum to {float(weights.double().sum()):.6g}; divide them by their sum")
    return weights


def sequence(count: int, d: int, frame: Frame, generator: torch.Generator | None) -> Iterator[Float[Tensor, "_ d"]]:
    """One scrambled Sobol sequence of the source, in chunks; every point has exactly the law of the source."""
    seed = int(torch.randint(2**31, (), generator=generator))
    engine = torch.quasirandom.SobolEngine(d, scramble=True, seed=seed)
    for start in range(0, count, _DRAW):
        x = engine.draw(min(_DRAW, count - start)).to(frame.atoms)
        if frame.source == "normal":
            x = torch.special.ndtri(x.clamp(2**-25, 1 - 2**-24))
        yield x


def rows(x: Float[Tensor, "m d"], atoms: int) -> tuple[Float[Tensor, "_ d"], ...]:
    """The samples whose scores `tiles` yields at a time."""
    return x.split(max(1, (_TILE if x.device.type == "cpu" else 64 * _TILE) // atoms))


def tiles(
    x: Float[Tensor, "m d"], atoms: Float[Tensor, "n d"], heights: Float[Tensor, " n"]
) -> Iterator[Float[Tensor, "_ n"]]:
    """Scores ⟨x, yᵢ⟩ + hᵢ in blocks of rows; the block is reused, so use it before asking for the next."""
    parts = rows(x, len(atoms))
    block = x.new_empty(len(parts[0]) if parts else 0, len(atoms))
    for part in parts:
        yield torch.addmm(heights, part, atoms.T, out=block[: len(part)])


def best(scores: Float[Tensor, "m n"]) -> tuple[Int[Tensor, " m"], Float[Tensor, " m"]]:
    """Index and value of the largest score of each row; NumPy's argmax is about ten times faster on a processor."""
    if scores.device.type != "cpu":
        value, index = scores.max(1)
        return index, value
    index = torch.from_numpy(scores.numpy().argmax(1))
    return index, scores.gather(1, index[:, None])[:, 0]


def two_best(
    scores: Float[Tensor, "m n"],
) -> tuple[Int[Tensor, " m"], Float[Tensor, " m"], Int[Tensor, " m"], Float[Tensor, " m"]]:
    """Index and value of the largest and of the second-largest score of each row; overwrites the largest."""
    first = best(scores)
    scores.scatter_(1, first[0][:, None], -math.inf)
    return *first, *best(scores)


def project_to_simplex(scores: Float[Tensor, "m k"]) -> Float[Tensor, "m k"]:
    """Nearest convex weights to each row of scores, rows in any order: max over p of ⟨p, s⟩ − ½‖p‖²."""
    ordered = scores.sort(dim=1, descending=True).values
    ranks = torch.arange(1, scores.shape[1] + 1, device=scores.device)
    excess = ordered.clamp(min=-1e9).cumsum(1) - 1
    support = (ranks * ordered > excess).sum(1, keepdim=True)
    return (scores - excess.gather(1, support - 1) / support).clamp(min=0)


def dihedral(a: Float[Tensor, "*b d"], b: Float[Tensor, "*c d"]) -> Float[Tensor, "*e"]:
    """Angle between the normals (a, −1) and (b, −1), from their chord: exact also where the cosine rounds to one."""
    a, b = (torch.cat([v, -torch.ones_like(v[..., :1])], -1) for v in (a, b))
    chord = a / a.norm(dim=-1, keepdim=True) - b / b.norm(dim=-1, keepdim=True)
    return 2 * (chord.norm(dim=-1) / 2).clamp(max=1).asin()
