"""What MkDocs does beside its plugins: equations as MathML, model card, table of presets, pictures, whole links."""

from __future__ import annotations

import html
import re
from pathlib import Path
from posixpath import join, normpath
from urllib.parse import unquote

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from PIL import Image

from mghf_loss.mghf import OFF, PRESETS

CARD = Path(__file__).parents[1] / "src" / "mghf_loss" / "weights" / "README.md"
LINK = re.compile(r'(?:href|src)="(?!\w+:|//|#)([^"#?]+)')
PICTURE = re.compile(r'(?:<a [^>]*>)?(<img [^>]*src="((?!\w+:)[^"]+\.png)"[^>]*>)(?:</a>)?')
WIDE = 1000  # pixels: a picture with small print
EQUATION = re.compile(r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<latex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the model card, whose pictures lie in docs/."""
    _, _, card = CARD.read_text(encoding="utf-8").split("---\n", 2)  # the Hub's metadata stand before it
    files.append(File.generated(config, "network.md", content=card.replace("../../../docs/", "")))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Write the presets as a table where a page has `<!-- presets -->`."""
    return markdown.replace("<!-- presets -->", _presets())


def _presets() -> str:
    names = [name for name in OFF if any(settings.coefficients[name] for settings in PRESETS.values())]
    rows = [["preset", *(f"`{name}`" for name in names), "conditioning", "shift", "channel weights"]]
    rows.append(["---"] * len(rows[0]))
    for preset, settings in PRESETS.items():
        weighting = settings.weighting + (f", prune {settings.prune:g}" if settings.prune else "")
        factors = [f"{settings.coefficients[name]:g}" for name in names]
        rows.append([f"`{preset}`", *factors, settings.conditioning, settings.shift, weighting])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replace equations by MathML when the site is built: the reader needs no script and no network for them.

    A picture becomes a link to its file. MkDocs turns links to Markdown files into links to their pages, but not in a
    notebook, nor the README's whole links.
    """

    def to_page(link: re.Match[str]) -> str:
        target = files.get_file_from_path(link[1])
        return f'href="{target.url_relative_to(page.file)}"' if target else link[0]

    def to_link(picture: re.Match[str]) -> str:
        with Image.open(Path(config.docs_dir, normpath(join(page.url, picture[2])))) as image:
            kind = "picture wide" if image.width > WIDE else "picture"
        return f'<a class="{kind}" href="{picture[2]}">{picture[1]}</a>'

    if page.file.src_path.endswith(".ipynb"):
        content = re.sub(r'href="([\w./-]+\.md)"', to_page, content)
        content = content.replace('class="anchor-link"', 'class="headerlink"')  # which the search leaves out
    content = re.sub(rf'href="{config.repo_url}/blob/main/docs/([\w./-]+\.md)"', to_page, content)
    return EQUATION.sub(_mathml, PICTURE.sub(to_link, content))


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Leave out the script that asks GitHub for the repository's stars: nothing is fetched from elsewhere."""
    return output.replace(' data-md-component="source"', "")


def on_post_build(config: MkDocsConfig) -> None:
    """Raise where a link within the site leads nowhere; MkDocs looks at those in Markdown alone."""
    site = Path(config.site_dir)
    broken = []
    for page in sorted(site.rglob("*.html")):
        if page.name == "404.html":  # has absolute links, for any place
            continue
        for link in LINK.findall(page.read_text(encoding="utf-8")):
            target = page.parent / unquote(html.unescape(link))
            if not (target / "index.html" if target.is_dir() else target).exists():
                broken.append(f"{page.relative_to(site)}: {link}")
    if broken:
        raise PluginError("links that lead nowhere:\n" + "\n".join(broken))


def _mathml(match: re.Match[str]) -> str:
    latex = html.unescape(match["latex"])
    if match["tag"] == "span":
        return convert(latex)
    parts = "".join(convert(part, display="block") for part in latex.split(r"\qquad"))
    return f'<div class="equation">{parts}</div>'
