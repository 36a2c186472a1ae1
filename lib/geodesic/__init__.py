"""Do deep networks with weight decay follow geodesics in Wasserstein space?

The street of the library runs one way: data → networks → training → tracks, transport → experiment → records. Each
module is imported by name, `from geodesic import data, networks, tracks, transport, experiment`.
"""

__version__ = "0.1.0"


def computes(version: str) -> str:
    """What of a version decides numbers: those that agree in this compute the same."""
    return ".".join(version.split(".")[:2])
