"""Do deep networks with weight decay follow geodesics in Wasserstein space?

The street of the library runs one way: data → networks → training → tracks, transport → experiment → records. Each
module is imported by name, `from geodesic import data, networks, tracks, transport, experiment`; after `import
geodesic` alone, `geodesic.tracks` is imported when it is first asked for (PEP 562), and torch with it.
"""

import importlib
import pkgutil
from types import ModuleType

__version__ = "0.1.0"


def computes(version: str) -> str:
    """What of a version decides numbers: those that agree in this compute the same."""
    return ".".join(version.split(".")[:2])


def _modules() -> set[str]:
    """The public modules, as the folder has them."""
    return {module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")}


def __getattr__(name: str) -> ModuleType:
    if name in _modules():
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(globals().keys() | _modules())
