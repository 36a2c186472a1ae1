"""Sphinx extension: an equation labelled eq-paper-N carries the paper's number (N); the rest count per chapter."""

import re
from typing import Any

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

_PAPER = re.compile(r"equation-eq-paper-(\d+)([a-z]?)$")


def number(app: Sphinx, env: BuildEnvironment) -> list[str]:
    """Rewrite the numbers that Sphinx gave to displayed equations; no further page needs a rebuild."""
    del app
    for figures in env.toc_fignumbers.values():
        equations = figures.get("displaymath", {})
        count = 0
        for node, section in equations.items():
            if paper := _PAPER.match(node):
                equations[node] = (paper[1] + paper[2],)
            else:
                count += 1
                equations[node] = (*section[:-1], count)
    return []


def setup(app: Sphinx) -> dict[str, Any]:
    """Sphinx numbers in the same event at the default priority, 500; this runs after it."""
    app.connect("env-get-updated", number, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
