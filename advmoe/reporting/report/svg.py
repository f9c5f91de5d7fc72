"""From a matplotlib figure to SVG that can stand inside a page: themed, named, without a clash of ids, equal each time.

Figures are drawn in sentinel colours, one for each role; here they become CSS variables, so that a page decides what
they look like in light and dark.
"""

import io
import re
import warnings
import xml.etree.ElementTree as ET  # only what matplotlib has just written is parsed
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure as Drawing

NAMESPACE = "http://www.w3.org/2000/svg"
NOT_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")  # names may hold what no XML may
REPLACED = "\N{REPLACEMENT CHARACTER}"
LINK = "{http://www.w3.org/1999/xlink}href"
INK = "#010203"
RULE = "#010204"
SURFACE = "#010205"
SERIES = tuple(f"#0102{place:02x}" for place in range(16, 23))  # the first one is the mixture's
MEANING = {INK: "currentColor", RULE: "var(--rule)", SURFACE: "var(--surface)"} | {
    colour: f"var(--series-{place})" for place, colour in enumerate(SERIES)
}
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be read aloud, found and copied
    "svg.hashsalt": "advmoe",
    "text.parse_math": False,  # names with a dollar are names
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "figure.facecolor": "none",
    "figure.constrained_layout.use": True,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}


def settings() -> AbstractContextManager[None]:
    """The context in which every figure is drawn."""
    return mpl.rc_context(SETTINGS)


def to_svg(drawing: Drawing, name: str, title: str, description: str) -> str:
    """The drawing as an inline `<svg>`. `name` must be unique in the page: it begins every id."""
    buffer = io.BytesIO()
    with settings(), warnings.catch_warnings():
        # text stays text: whoever shows it has fonts for more alphabets than the one that matplotlib measures with
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        drawing.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Type": None, "Format": None})
    root = ET.fromstring(NOT_XML.sub(REPLACED, buffer.getvalue().decode()))  # noqa: S314  (our own)
    _strip(root)
    _rename(root, name)
    _describe(root, name, title, description)
    ET.register_namespace("", NAMESPACE)
    return ET.tostring(root, encoding="unicode")


def _strip(root: ET.Element) -> None:
    """Without metadata, and without the style sheet that would hold for the whole page."""
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
            # the old spelling is not needed by any browser that knows CSS variables
            del element.attrib[key]
            element.set("href", value.replace("#", f"#{name}-", 1))
        else:
            element.set(key, _themed(value.replace("url(#", f"url(#{name}-")))


def _themed(value: str) -> str:
    for colour, meaning in MEANING.items():
        value = value.replace(colour, meaning)
    return value


def _attributes(root: ET.Element) -> Iterator[tuple[ET.Element, str]]:
    for element in list(root.iter()):
        for key in list(element.attrib):
            yield element, key


def _describe(root: ET.Element, name: str, title: str, description: str) -> None:
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-title {name}-description")
    for place, (tag, text) in enumerate((("title", title), ("desc", description))):
        element = ET.Element(f"{{{NAMESPACE}}}{tag}")
        element.set("id", f"{name}-{'title' if tag == 'title' else 'description'}")
        element.text = NOT_XML.sub(REPLACED, text)
        root.insert(place, element)
    for key in ("width", "height"):  # the page decides; the shape is in the viewBox
        root.attrib.pop(key, None)
