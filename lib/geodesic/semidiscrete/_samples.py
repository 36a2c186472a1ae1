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
from jaxtyping import Float, Int
from torch import Tensor

Source = Literal["cube", "normal"]

_TILE = 2**20  # entries of the largest block of scores: it stays in the processor's cache
_DRAW = 2**15  # points drawn from a sequence at a time


@dataclass(frozen=True)
class Frame:
    """Atoms centred and scaled to the spread of the source: translations change no cell, scalings only units."""

    atoms: Float[Tensor, "n d"]
    scale: float
    source: Source

    @staticmethod
    def of(points: Tensor, source: Source) -> Frame:
        centred = points - points.mean(0)
        spread = math.sqrt(1 / 12) if source == "cube" else 1.0
        scale = float(centred.double().pow(2).mean().sqrt()) / spread or 1.0
        return Frame(centred / scale, scale, source)

    def shrink(self, heights: Tensor) -> Tensor:
        return (heights / self.scale).to(self.atoms)


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
