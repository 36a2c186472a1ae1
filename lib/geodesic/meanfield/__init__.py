"""Wasserstein gradient flows of functionals of a measure: wide two-layer networks.

| module | one job |
|---|---|
| `_functional` | the functional, its energy, first variation and gradient |
| `_flow` | its gradient flow, followed by particles |
| `models` | neurons, losses and teachers; imported by name |
| `pde` | the same flow as a density on a grid; imported by name |
| `runs` | the recorded runs; imported by name |
"""

from geodesic.meanfield._flow import METHODS, Trajectory, flow, minimising_movement
from geodesic.meanfield._functional import (
    Functional,
    Interaction,
    Problem,
    energy,
    first_variation,
    uniform_weights,
    wasserstein_gradient,
)

__all__ = [
    "METHODS",
    "Functional",
    "Interaction",
    "Problem",
    "Trajectory",
    "energy",
    "first_variation",
    "flow",
    "minimising_movement",
    "uniform_weights",
    "wasserstein_gradient",
]
