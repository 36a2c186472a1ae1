"""A grid of runs, executed in parallel so that whatever is killed, what is finished stays.

| module | one job |
|---|---|
| `grid` | read, check and expand a grid; what of it is recorded |
| `dispatch` | find or start workers, hand out the runs |
| `inline` | the same without a cluster or notebooks, within a time budget |
| `worker` | one run under a lock, with a deadline |
| `kernel` | the kernel of a run's notebook |
| `warm` | the parent of which kernels are forks |
| `progress` | what a sweep shows |

The names of `grid` are handed on; the other modules are imported by name: reading a grid needs neither torch, papermill
nor Dask.
"""

from geodesic.sweep.grid import CONTROLS, Grid, check, keep_plan, parameters, read
from geodesic.sweep.worker import Run

__all__ = [
    "CONTROLS",
    "Grid",
    "Run",
    "check",
    "keep_plan",
    "parameters",
    "read",
]
