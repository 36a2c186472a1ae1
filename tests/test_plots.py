"""Figures: one SVG for light and dark, alternative text, sliders that swap only what moves."""

import json
import re
from xml.etree import ElementTree

import pytest
from geodesic import plots


def figure():
    fig, ax = plots.subplots()
    ax.plot([0, 1], [0, 1], color=plots.COLOURS["resnet"])
    (dot,) = ax.plot([0], [0], "o")
    dot.set_gid("dot")
    return fig, dot


def test_ink_follows_the_page():
    """No text or axis colour is left in the markup; the stand-in is gone."""
    markup = plots.show(figure()[0], "A line.")._repr_mimebundle_()["text/html"]
    assert "currentColor" in markup
    assert plots._INK not in markup
    assert "#000000" not in markup


def test_markup_is_well_formed_and_described():
    markup = plots.show(figure()[0], 'Rises from 0 to "1" <slowly>.')._repr_mimebundle_()["text/html"]
    svg = ElementTree.fromstring(markup)[0]
    assert svg.get("aria-label") == 'Rises from 0 to "1" <slowly>.'
    assert svg.get("role") == "img"
    assert svg.get("width") is None  # as wide as the column


def test_same_figure_same_bytes():
    a, b = (plots.show(figure()[0], "A line.")._repr_mimebundle_() for _ in range(2))
    assert a == b


def test_paper_gets_a_png():
    bundle = plots.show(figure()[0], "A line.")._repr_mimebundle_()
    assert bundle["image/png"].startswith("iVBOR")  # base64 of the PNG signature
    assert bundle["text/plain"] == "A line."


def payload_of(markup):
    return json.loads(re.search(r'<script type="application/json">(.*?)</script>', markup, re.DOTALL)[1])


def test_slider_carries_only_what_moves():
    fig, dot = figure()
    dot.axes.lines[0].set_gid("still")

    def update(value):
        dot.set_data([value], [value])
        return f"The dot is at {value}."

    markup = plots.interactive(fig, update, {"place": [0.0, 0.5, 1.0]}, start=(1,))._repr_mimebundle_()["text/html"]
    payload = payload_of(markup)
    assert {(gid, attribute) for gid, _, attribute in payload["parts"]} == {("dot", "x"), ("dot", "y")}
    assert len({tuple(frame) for frame in payload["frames"]}) == len(payload["frames"]) == 3
    assert payload["texts"][2] == "The dot is at 1.0."
    assert 'aria-valuetext="The dot is at 0.5."' in markup
    assert 'max="2" value="1"' in markup


def test_the_last_of_two_sliders_turns_fastest():
    fig, dot = figure()

    def update(x, y):
        dot.set_data([x], [y])
        return f"The dot is at {x}, {y}."

    markup = plots.interactive(fig, update, {"x": [0, 1], "y": [0, 0.5, 1]})._repr_mimebundle_()["text/html"]
    assert payload_of(markup)["texts"][:4] == [
        f"The dot is at {x}, {y}." for x, y in ((0, 0), (0, 0.5), (0, 1), (1, 0))
    ]
    assert markup.count('type="range"') == 2


def test_a_group_whose_elements_change_is_swapped_whole():
    fig, dot = figure()

    def update(count):
        dot.set_data(range(count), range(count))
        return f"{count} dots."

    payload = payload_of(plots.interactive(fig, update, {"dots": [1, 2]})._repr_mimebundle_()["text/html"])
    assert payload["parts"] == [["dot", 0, ""]]
    assert [frame[0].count("<use") for frame in payload["frames"]] == [1, 2]


def test_refuses_a_figure_without_words():
    with pytest.raises(ValueError, match="needs an alternative text"):
        plots.show(figure()[0], " ")


def test_refuses_a_slider_with_nothing_to_move():
    fig, dot = figure()
    dot.set_gid(None)
    with pytest.raises(ValueError, match="0 artists with a gid"):
        plots.interactive(fig, str, {"x": [1, 2, 3]})


def test_tracks_of_the_first_points_only():
    tracks = [[[[float(step), float(point)] for point in range(4)] for step in range(3)]]  # (epochs, steps, points, 2)
    record = {"plane": {"labels": [0, 1, 2, 3], "stages": [{"tracks": tracks, "variance_share": 0.5}]}}
    for points, drawn in ((None, 4), (2, 2)):
        _, ax = plots.subplots()
        assert plots.plane_tracks(ax, record, points=points) == 0.5
        assert {line.get_ydata()[-1] for line in ax.lines} == set(range(drawn))
        plots.plt.close("all")
