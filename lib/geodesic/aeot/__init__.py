"""AE-OT, its rivals, and how good what they generate is.

| module | one job |
|---|---|
| `_fit` | the four methods, their networks and their training |
| `metrics` | scores of generated points; imported by name |
| `runs` | the recorded runs; imported by name |
"""

from geodesic.aeot._fit import METHODS, MODES, Model, Recipe, decoder, encoder, fit, split_angle

__all__ = [
    "METHODS",
    "MODES",
    "Model",
    "Recipe",
    "decoder",
    "encoder",
    "fit",
    "split_angle",
]
