"""The continuity equation ∂_t ρ + ∇·(ρv) = 0, and curves of densities of least energy.

| module | one job |
|---|---|
| `_continuity` | particles, finite volumes, Helmholtz |
| `_staggered` | densities and momenta on a staggered grid, and their energy |
| `_benamou_brenier` | the geodesic between two densities |
"""

from geodesic.fluid._benamou_brenier import Solution, benamou_brenier
from geodesic.fluid._continuity import Split, Velocity, advect, helmholtz, push
from geodesic.fluid._staggered import Momentum, continuity_residual, kinetic_energy, least_momentum, swirl

__all__ = [
    "Momentum",
    "Solution",
    "Split",
    "Velocity",
    "advect",
    "benamou_brenier",
    "continuity_residual",
    "helmholtz",
    "kinetic_energy",
    "least_momentum",
    "push",
    "swirl",
]
