"""Converts matplotlib figures to inline SVG with CSS variables as colours, unique ids and reproducible output.

Figures are drawn in placeholder colours, one for each role, which are replaced by the CSS variables of the page.
"""

import io
import re
import warnings
import xml.etree.ElementTree as ET  # parses output of matplotlib only
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

NAMESPACE = "http://www.w3.org/2000/svg"
NOT_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")  # characters that XML forbids
REPLACED = "\N{REPLACEMENT CHARACTER}"
LINK = "{http://www.w3.org/1999/xlink}href"
TEXT = "#010203"
GRID = "#010204"
BACKGROUND = "#010205"
SERIES = tuple(f"#0102{code:02x}" for code in range(16, 23))  # the first one is for the mixture
CSS_VALUES = {TEXT: "currentColor", GRID: "var(--rule)", BACKGROUND: "var(--surface)"} | {
    colour: f"var(--series-{index})" for index, colour in enumerate(SERIES)
}
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",  # keep text as text: searchable and accessible
    "svg.hashsalt": "advmoe",
    "text.parse_math": False,  # a dollar in a name is not mathematics
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": TEXT,
    "axes.edgecolor": GRID,
    "axes.labelcolor": TEXT,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "figure.facecolor": "none",
    "figure.constrained_layout.use": True,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}


def settings() -> AbstractContextManager[None]:
    """Returns the matplotlib context in which figures are drawn."""
    return mpl.rc_context(SETTINGS)


def to_svg(figure: Figure, name: str, title: str, description: str) -> str:
    """Returns the figure as an inline `<svg>`. `name` is the prefix of every id and must be unique in the page."""
    buffer = io.BytesIO()
    with settings(), warnings.catch_warnings():
        # the browser has fonts for characters that matplotlib's font lacks
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Type": None, "Format": None})
    root = ET.fromstring(NOT_XML.sub(REPLACED, buffer.getvalue().decode()))  # noqa: S314  (own output)
    _strip(root)
    _rename(root, name)
    _describe(root, name, title, description)
    ET.register_namespace("", NAMESPACE)
    return ET.tostring(root, encoding="unicode")


def _strip(root: ET.Element) -> None:
    """Removes metadata, and the style sheet, which would apply to the whole page."""
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in {f"{{{NAMESPACE}}}metadata", f"{{{NAMESPACE}}}style"}:
                parent.remove(child)


def _rename(root: ET.Element, name: str) -> None:
    for element, key in _attributes(root):
        value = element.attrib[key]
        if key == "id":
            element.set(key, f"{name}-{value}")
        elif key == LINK:
            # browsers with CSS variables support href without xlink
            del element.attrib[key]
            element.set("href", value.replace("#", f"#{name}-", 1))
        else:
            element.set(key, _themed(value.replace("url(#", f"url(#{name}-")))


def _themed(value: str) -> str:
    for colour, css in CSS_VALUES.items():
        value = value.replace(colour, css)
    return value


def _attributes(root: ET.Element) -> Iterator[tuple[ET.Element, str]]:
    for element in list(root.iter()):
        for key in list(element.attrib):
            yield element, key


def _describe(root: ET.Element, name: str, title: str, description: str) -> None:
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-title {name}-description")
    for position, (tag, text) in enumerate((("title", title), ("desc", description))):
        element = ET.Element(f"{{{NAMESPACE}}}{tag}")
        element.set("id", f"{name}-{'title' if tag == 'title' else 'description'}")
        element.text = NOT_XML.sub(REPLACED, text)
        root.insert(position, element)
    for key in ("width", "height"):  # set by the page; the viewBox holds the aspect ratio
        root.attrib.pop(key, None)
