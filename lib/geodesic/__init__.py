"""Do deep networks with weight decay follow geodesics in Wasserstein space?

The street of the library runs one way: data → networks → training → tracks, transport → experiment → records. Each
module is imported by name, `from geodesic import data, networks, tracks, transport, experiment`.
"""

__version__ = "0.1.0"
