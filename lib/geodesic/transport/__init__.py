"""Optimal transport between two clouds of equally many points: exact, with a proof, and the scores read off it.

| module | one job |
|---|---|
| `_assign` | `assign`: checks, scaling, the choice of a solver; `Assignment` and its proof; what follows from it |
| `_score` | the optimal transport score |
| `_assignment` | the road from a matrix to a certified assignment |
| `_certificate` | the proof, and which other assignments are optimal |
| `_exact` | distances with a proved bound of their error |
| `_annealing` | potentials to begin with |
| `_arcs` | the few pairs that matter |
| `_cost` | all squared distances from one matrix product |
"""

from geodesic.transport._assign import (
    Assignment,
    Proof,
    assign,
    displacement_interpolation,
    w2_squared,
)
from geodesic.transport._score import Score, optimal_transport_score

__all__ = [
    "Assignment",
    "Proof",
    "Score",
    "assign",
    "displacement_interpolation",
    "optimal_transport_score",
    "w2_squared",
]
