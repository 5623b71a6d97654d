"""What MkDocs does beside its plugins: equations as MathML, and the bundled network's model card as a page."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

CARD = Path(__file__).parents[1] / "src" / "mghf_loss" / "weights" / "README.md"
EQUATION = re.compile(r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<latex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the model card, whose pictures lie in docs/."""
    _, _, card = CARD.read_text(encoding="utf-8").split("---\n", 2)  # the Hub's metadata stand before it
    files.append(File.generated(config, "network.md", content=card.replace("../../../docs/", "")))


def on_page_content(content: str, **_: Any) -> str:
    """Replace equations by MathML when the site is built: the reader needs no script and no network for them."""
    return EQUATION.sub(_mathml, content)


def _mathml(match: re.Match[str]) -> str:
    latex = html.unescape(match["latex"])
    if match["tag"] == "span":
        return convert(latex)
    return f'<div class="arithmatex-block">{convert(latex, display="block")}</div>'
