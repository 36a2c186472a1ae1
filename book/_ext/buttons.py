"""Sphinx extension: each chapter's notebook to download, and launch buttons where the repository has an address.

The theme stops with an error when it should launch from a repository without an address, and offers a notebook to
download only beside a launch button.
"""

import shutil
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.config import Config


def need_an_address(app: Sphinx, config: Config) -> None:
    """Drop the launch buttons while `repository: url` is empty."""
    del app
    if not config.html_theme_options.get("repository_url"):
        config.html_theme_options["launch_buttons"] = {}


def offer_notebook(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Lay the chapter's notebook beside its text, where the theme's download button looks for it."""
    del template
    notebook = Path(app.srcdir) / "notebooks" / f"{Path(page).name}.ipynb"
    if doctree is not None and notebook.exists():
        copy = Path(app.outdir) / "_sources" / f"{page}.ipynb"
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(notebook, copy)
        context["ipynb_source"] = f"{page}.ipynb"


def setup(app: Sphinx) -> dict[str, Any]:
    """The theme draws the header's buttons in the same event at priority 501; the notebook must be there before."""
    app.connect("config-inited", need_an_address)
    app.connect("html-page-context", offer_notebook, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
