"""Sphinx extension: the whole book as one page, for printing.

Sphinx falls back on an extension's handlers for "html" only while nobody has registered any for "singlehtml"; one of
Jupyter Book's own extensions does, and thereby hides all the others.
"""

from typing import Any

from sphinx.application import Sphinx


def share_handlers(app: Sphinx) -> None:
    """Let the one-page builder render every node that the page builder can render."""
    handlers = app.registry.translation_handlers
    handlers["singlehtml"] = handlers["html"] | handlers.get("singlehtml", {})


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension."""
    app.connect("builder-inited", share_handlers)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
