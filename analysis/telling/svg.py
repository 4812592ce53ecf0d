"""Figures as SVG text: the same bytes on every run."""

from __future__ import annotations

import html
import io
import re
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

GREY, INK, FAINT = "#c9c9c9", "#1f2328", "#666666"
WIDTH = 10.5  # inches
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "strata",
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlesize": 9.5,
    "hatch.linewidth": 0.6,
    "text.color": INK,
}
Tips = dict[str, str]


def layer_grid(axes: Axes, rows: list[str], layers: int) -> None:
    """Prepare a grid of rows by layers, hatched all over; cells that have a value are drawn on top."""
    axes.set(xlim=(-0.5, layers - 0.5), ylim=(max(len(rows), 1) - 0.5, -0.5))
    ground = Rectangle((-0.5, -0.5), layers, max(len(rows), 1), fc="#f2f2f2", ec="#c4c4c4", hatch="////", lw=0.1)
    axes.add_patch(ground)
    axes.set_yticks(range(len(rows)), rows, fontsize=7.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
    bare(axes)


def bare(axes: Axes) -> None:
    """Take ticks and frame away."""
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def draw_cell(axes: Axes, x: float, y: float, colour: Any, gid: str, edge: str = "white") -> None:
    """Draw one cell of a grid, whose tip is found by `gid`."""
    axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fc=colour, ec=edge, lw=0.6, gid=gid, clip_on=False))


def to_svg(figure: Figure, tips: Tips, label: str) -> str:
    """Draw `figure`; elements named in `tips` get a title, and no byte depends on the time or the machine's."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, facecolor="white")
    text = buffer.getvalue()
    text = text[text.index("<svg") :]

    def titled(match: re.Match[str]) -> str:
        # An id would stand in the page once for every picture, and nothing refers to it.
        return f"<g><title>{html.escape(tips[match[1]])}</title>" if match[1] in tips else "<g>"

    text = re.sub(r'<g id="(\w+)">', titled, text)
    text = re.sub(r'(?<= d=")[^"]*', lambda path: _tenths(path[0]), text)
    text = re.sub(r"\n *", "\n", text).replace("; stroke-linejoin: miter", "")  # the default
    return text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(label)}" ', 1)


def _tenths(path: str) -> str:
    """Path data with coordinates rounded to 0.1 pt: nobody can see it, and the page is half the size."""
    short = re.sub(r"\d+\.\d+", lambda number: f"{float(number[0]):.1f}".removesuffix(".0"), path)
    return re.sub(r"\s*([A-Za-z])\s*", r"\1", short)
