"""Figures of the book: one style, one inline SVG for light and dark pages, alternative text, and a slider.

A figure is drawn by matplotlib with a stand-in for the text colour; `show` replaces it by the page's own, so that one
vector picture serves both themes and stays sharp at any size. `interactive` adds range inputs that change only the
artists that move. Neither needs anything from the network.
"""

import base64
import html
import io
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler

from geodesic import records

# Stands for the page's text colour. Nothing else may be drawn in it.
_INK = "#010203"

# Okabe & Ito's colour-blind safe palette, the members that keep 3:1 contrast on white and on black.
COLOURS = {
    "resnet": "#0072b2",
    "plain": "#d55e00",
    "radial": "#009e73",
    "accent": "#b5569a",
    "neutral": "#7f7f7f",
}
MARKERS = {"resnet": "o", "plain": "s", "radial": "^"}

_STYLE = {
    "figure.constrained_layout.use": True,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.prop_cycle": cycler(color=list(COLOURS.values())),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.2,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "font.size": 11,
    "axes.titlesize": 11,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
    "grid.color": _INK,
}


def subplots(rows: int = 1, columns: int = 1, *, height: float = 3.0, **options: Any) -> tuple[Figure, Any]:
    """`matplotlib.pyplot.subplots` in the book's style, 8 inches wide and `height` inches a row.

    The style stays on: a legend or an axis added later must look like the rest.
    """
    mpl.rcParams.update(_STYLE)
    return plt.subplots(rows, columns, figsize=(8, height * rows), **options)


def shades(n: int) -> list[tuple[float, ...]]:
    """Ordered colours, n of them, from blue to vermilion, each legible on white and on black."""
    ramp = LinearSegmentedColormap.from_list("", [COLOURS["resnet"], "#857a70", COLOURS["plain"]])
    return [ramp(k / max(1, n - 1)) for k in range(n)]


def against_weight_decay(
    ax: Axes, rows: Sequence[dict[str, Any]], value: str, *, by: str = "network", log: bool = False
) -> None:
    """Draw the mean of a score over seeds, ± one standard deviation, against λ, one line per value of `by`.

    λ = 0 has no place on a logarithmic axis: it stands alone at the left, under its own tick.
    """
    decays = sorted({row["weight_decay"] for row in rows})
    place = {decay: k for k, decay in enumerate(decays)}
    for kind in sorted({row[by] for row in rows}, reverse=True):
        groups = records.summarise([row for row in rows if row[by] == kind], ["weight_decay"], value)
        at = [place[key[0]] for key in groups]
        mean, sd = [group.mean for group in groups.values()], [group.sd for group in groups.values()]
        colour = COLOURS.get(str(kind))
        ax.errorbar(at, mean, sd, label=str(kind), color=colour, marker=MARKERS.get(str(kind), "o"), capsize=2)
    ax.set_xticks(range(len(decays)), [f"{decay:g}" for decay in decays], rotation=45)
    ax.set_xlabel("weight decay λ")
    if log:
        ax.set_yscale("log")


def plane_tracks(
    ax: Axes, record: records.Record, *, stage: int = 0, epoch: int = -1, points: int | None = None
) -> float:
    """Draw the recorded tracks of a run in their plane; returns the share of variance that the plane shows.

    `points` of them, the first ones, or all.
    """
    plane = record["plane"]
    tracks = np.array(plane["stages"][stage]["tracks"][epoch])  # (steps, points, 2)
    colours = plt.colormaps["tab10"]
    for point, label in enumerate(plane["labels"][:points]):
        ax.plot(*tracks[:, point].T, color=colours(label % 10), linewidth=1, marker=".", markersize=3)
        ax.plot(*tracks[-1, point], color=colours(label % 10), marker="o", markersize=6)
    ax.set_aspect("equal", "datalim")
    ax.set(xlabel="first axis", ylabel="second axis")
    return plane["stages"][stage]["variance_share"]


class Picture:
    """What a notebook shows for a figure: SVG that follows the page's theme, with a PNG for paper."""

    def __init__(self, markup: str, png: bytes, text: str):
        self._markup, self._png, self._text = markup, png, text

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        del include, exclude
        return {
            "text/html": self._markup,
            "image/png": base64.b64encode(self._png).decode("ascii"),
            "text/plain": self._text,
        }


def show(fig: Figure, alt: str) -> Picture:
    """Close the figure and show it; `alt` is one sentence that says what the picture says, written from its numbers.

    Raises:
        ValueError: for an empty alternative text.
    """
    svg, png = _render(fig, alt), _png(fig)
    plt.close(fig)
    return Picture(f'<div class="picture">{svg}</div>', png, alt)


def interactive(
    fig: Figure,
    update: Callable[..., str],
    sliders: Mapping[str, Sequence[Any]],
    *,
    start: Sequence[int] | None = None,
) -> Picture:
    """A figure with sliders.

    Args:
        fig: drawn once, with a gid on every artist that changes (`artist.set_gid("name")`); no text may carry one.
        update: called with one value of each slider; moves the artists and returns the sentence that is shown under
            the figure.
        sliders: the stops of each slider, under what it sets.
        start: index of each slider's stop that is shown first, and on paper; None takes the first of each.

    Raises:
        ValueError: if no artist carries a gid, or a slider has fewer than two stops.
    """
    gids = sorted({gid for artist in fig.findobj() if (gid := artist.get_gid())})
    if not gids or not sliders or min(map(len, sliders.values())) < 2:
        raise ValueError(f"{len(gids)} artists with a gid, stops {sliders}; a slider needs at least one and two")
    start = [0] * len(sliders) if start is None else list(start)
    texts, frames = [], []
    for stops in itertools.product(*sliders.values()):
        texts.append(update(*stops))
        frames.append(_groups(_render(fig, texts[-1]), gids))
    first = update(*(stops[k] for stops, k in zip(sliders.values(), start, strict=True)))
    svg, png = _render(fig, first), _png(fig)
    plt.close(fig)
    parts, values = _moving(frames, gids)
    script = {"parts": parts, "frames": values, "texts": texts}
    payload = json.dumps(script, separators=(",", ":")).replace("</", r"<\/")  # "</script>" would end the element
    inputs = "".join(
        f'<label class="picture-slider"><span>{html.escape(label)}</span>'
        f'<input type="range" min="0" max="{len(stops) - 1}" value="{k}" step="1" '
        f'aria-valuetext="{html.escape(first, quote=True)}" title="{stops[0]}, …, {stops[-1]}"></label>'
        for (label, stops), k in zip(sliders.items(), start, strict=True)
    )
    markup = (
        f'<div class="picture" data-interactive>{svg}{inputs}'
        f'<output class="picture-text" aria-live="polite">{html.escape(first)}</output>'
        f'<script type="application/json">{payload}</script></div>'
    )
    return Picture(markup, png, first)


def _render(fig: Figure, alt: str) -> str:
    """The figure as inline SVG that takes its ink from the page and its width from the column."""
    if not alt.strip():
        raise ValueError("a figure needs an alternative text: one sentence that says what it shows")
    buffer = io.StringIO()
    # A fixed salt and no date: the same figure gives the same bytes.
    with mpl.rc_context({"svg.hashsalt": "geodesic", "svg.fonttype": "path"}):
        fig.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"\s*\n\s*", "\n", svg)
    svg = re.sub(r'(?<= )(?:d|x|y)="[^"]*"', _rounded, svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(alt, quote=True)}"', 1)


def _rounded(attribute: re.Match[str]) -> str:
    """Coordinates to a tenth of a point: nobody sees more, and a page carries thousands."""
    return re.sub(r"-?\d+\.\d+", lambda number: f"{float(number[0]):.1f}".removesuffix(".0"), attribute[0])


def _png(fig: Figure) -> bytes:
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=150, facecolor="white")
    return buffer.getvalue()


def _groups(svg: str, gids: Sequence[str]) -> dict[str, ElementTree.Element]:
    """The group <g id=gid> of each gid; an artist that draws nothing has an empty one."""
    for prefix, uri in (("", "http://www.w3.org/2000/svg"), ("xlink", "http://www.w3.org/1999/xlink")):
        ElementTree.register_namespace(prefix, uri)
    groups = {group.get("id"): group for group in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}g")}
    return {gid: groups.get(gid, ElementTree.Element("g")) for gid in gids}


def _moving(
    frames: Sequence[dict[str, ElementTree.Element]], gids: Sequence[str]
) -> tuple[list[list[Any]], list[list[str]]]:
    """What differs between frames: parts, each (gid, element's place in its group, attribute), and a frame's values.

    A group whose elements are not the same ones in every frame is one part, (gid, 0, ""), with its inner markup.
    """
    parts, columns = [], []
    for gid in gids:
        groups = [list(frame[gid].iter())[1:] for frame in frames]
        kinds = {tuple((element.tag, *element.attrib) for element in elements) for elements in groups}
        if len(kinds) == 1:
            for place, elements in enumerate(zip(*groups, strict=True)):
                for name in elements[0].attrib:
                    column = [element.get(name) for element in elements]
                    if len(set(column)) > 1:
                        parts.append([gid, place, name.rpartition("}")[2]])  # SVG 2 calls xlink:href href
                        columns.append(column)
        else:
            parts.append([gid, 0, ""])
            columns.append([_inner(frame[gid]) for frame in frames])
    return parts, [list(values) for values in zip(*columns, strict=True)]


def _inner(group: ElementTree.Element) -> str:
    markup = "".join(ElementTree.tostring(child, encoding="unicode") for child in group)
    return re.sub(r' xmlns(:xlink)?="[^"]*"', "", markup).replace("\n", " ")
