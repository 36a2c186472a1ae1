"""Optimal transport from a continuous source onto n atoms, with a held-out certificate.

| module | one job |
|---|---|
| `_potential` | the Brenier potential, its maps and its certificate; draws of the source |
| `_solver` | the stochastic Newton method that finds it |
| `_newton` | a Newton step on the graph of neighbouring cells |
| `_starts` | heights to begin with |
| `_samples` | samples of the source, and the scores of atoms at them |
| `plane` | exact cells in the unit square, the oracle; imported by name |
"""

from geodesic.semidiscrete._potential import Potential, Progress, draw
from geodesic.semidiscrete._samples import Source
from geodesic.semidiscrete._solver import solve

__all__ = [
    "Potential",
    "Progress",
    "Source",
    "draw",
    "solve",
]
