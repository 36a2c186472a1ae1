"""Shapes in signatures are checked while the tests run; every test starts from the same random state."""

import pytest
import torch
from jaxtyping import install_import_hook

install_import_hook("geodesic", "beartype.beartype")


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
