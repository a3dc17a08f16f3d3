"""A report to look at: one HTML file that opens from disk and loads nothing.

The files of `assets` are its source. What they show is one JSON value; nothing of it becomes
markup, and a content security policy allows only the page's own style and script, by their digests.
"""

import base64
import hashlib
import html
import importlib.resources
import json
from collections.abc import Sequence

from memsched.report.chapter import Chapter, Cover
from memsched.report.page_data import page_data

# In the order in which they build on each other.
SCRIPTS = ("words.js", "theme.js", "plots.js", "timeline.js", "map.js", "tables.js", "page.js")


def page(chapters: Sequence[Chapter], cover: Cover) -> str:
    """The text of an HTML file.

    Raises:
        ProgramError: no chapter, or spans that belong to another plan.
    """
    style = _asset("page.css")
    script = "(() => {\n'use strict';\n" + "\n".join(_asset(name) for name in SCRIPTS) + "})();\n"
    filled = {
        "POLICY": f"default-src 'none'; style-src {_digest(style)}; script-src {_digest(script)}",
        "TITLE": html.escape(cover.title),
        "STYLE": style,
        "DATA": embedded(page_data(chapters, cover)),
        "SCRIPT": script,
    }
    # Cut before anything is filled in: what is filled in is never searched for places.
    first, *others = _asset("page.html").split("{{")
    places = [other.partition("}}") for other in others]
    return first + "".join(filled[name] + rest for name, _, rest in places)


def embedded(value: object) -> str:
    """JSON that can stand inside a script element: without <, > and &."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _asset(name: str) -> str:
    return (importlib.resources.files("memsched.report") / "assets" / name).read_text("utf-8")


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
