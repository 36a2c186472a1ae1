"""Sphinx extension: the first words of a page wait for its style sheets and for nothing else.

The theme draws its icons twice, by a web font and by a script of 1.5 MB; every page loads the whole search index, which
the search page alone reads; and scripts that act on the finished page stop the reader's browser in the middle of it.
"""

import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

_ICONS = r"fontawesome"
_SEARCH = r"searchtools|language_data|searchindex"
_SCRIPT = r'\s*<script[^>]* src="[^"]*/(?:{})\.js[^>]*></script>'


def defer(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Run scripts once the page is read, but for those that a line of the page itself needs before.

    All pages share the scripts' objects, so that the search page, which needs them at once, takes the mark off again.
    """
    del app, template, doctree
    for script in context["script_files"]:
        if getattr(script, "filename", None) and "documentation_options" not in str(script.filename):
            if page == "search":
                script.attributes.pop("defer", None)
            else:
                script.attributes["defer"] = "defer"


def drop_unused(app: Sphinx, failure: Exception | None) -> None:
    """Take the icon script out of every page, and the search index out of all but the search page."""
    for path in Path(app.outdir).rglob("*.html") if not failure else ():
        text = path.read_text(encoding="utf-8")
        unused = _ICONS if path.name == "search.html" else f"{_ICONS}|{_SEARCH}"
        lighter = re.sub(_SCRIPT.format(unused), "", text)
        if lighter != text:
            path.write_text(lighter, encoding="utf-8")


def setup(app: Sphinx) -> dict[str, Any]:
    """Other extensions add their scripts before priority 900."""
    app.connect("html-page-context", defer, priority=900)
    app.connect("build-finished", drop_unused)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
