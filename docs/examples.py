"""Show the examples of docstrings as code: an extension of Griffe, which reads the docstrings for mkdocstrings.

Markdown would make quotations of lines that start with `>>>`. Arrows become one character, which no line break parts.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"^(>>> (?:.+(?:\n|\Z))+)", re.MULTILINE)  # up to an empty line


class Examples(griffe.Extension):
    """Put the examples of every docstring into fences."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring of a module, class, function or attribute."""
        if obj.docstring:
            text = obj.docstring.value.replace(" <-> ", " ↔ ").replace(" -> ", " → ")
            obj.docstring.value = EXAMPLE.sub(r"```pycon\n\1\n```\n", text).replace("\n\n```\n", "\n```\n")
