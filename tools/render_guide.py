"""Render the guide and the numbered notebooks to static HTML, with links between the pages and an index.

    python tools/render_guide.py [FOLDER]

FOLDER defaults to _docs/, which git ignores. Nothing is executed: a page shows the outputs that its notebook holds.
"""
import base64
import html
import io
import re
import sys
from pathlib import Path

import lab
import nbformat
from matplotlib.font_manager import FontProperties
from matplotlib.mathtext import math_to_image
from nbconvert import HTMLExporter

ROOT = Path(__file__).resolve().parent.parent
GUIDE = (  # in reading order
    "quickstart",
    "data",
    "strategies",
    "running",
    "settings",
    "tensorboard",
    "troubleshooting",
    "recipes",
    "measurements",
)
LOCAL = re.compile(r'href="(?!https?:|mailto:|#|data:)([^"#]+)\.ipynb(#[^"]*)?"')
FORMULA = re.compile(r"(\${1,2})([^$\n]+)\1")
STYLE = "body{font:16px/1.6 sans-serif;max-width:46em;margin:3em auto;padding:0 1em}li{margin:.4em 0}"
PAGE_STYLE = """<style>
body{max-width:60em;margin:0 auto!important;padding:0 1em}
.jp-MarkdownOutput pre{background:#f5f5f5;padding:.6em .8em;margin:.6em 0}
.jp-OutputArea-output img.formula{vertical-align:middle;max-width:100%}
.highlight pre,.jp-OutputArea-output pre{white-space:pre-wrap;overflow-wrap:anywhere}
img{max-width:100%}
nav{display:flex;justify-content:space-between;gap:1em;padding:.6em 0;font:15px/1.5 sans-serif}
</style>"""


def chapters() -> list[Path]:
    """The notebooks to render: the guide, then the numbered ones; raises SystemExit where the guide has a chapter that
    is not in GUIDE.
    """
    found = {path.stem for path in (ROOT / "nbs" / "guide").glob("*.ipynb")}
    if found != set(GUIDE):
        raise SystemExit(
            f"GUIDE in {Path(__file__).name} and nbs/guide differ: {', '.join(sorted(found ^ set(GUIDE)))}"
        )
    return [*(ROOT / "nbs" / "guide" / f"{name}.ipynb" for name in GUIDE), *sorted((ROOT / "nbs").glob("0*.ipynb"))]


def with_page_links(body: str, folder: Path) -> str:
    """Point links between rendered notebooks at their pages; a link to a notebook without a page keeps only its text.
    """
    rendered = {path.resolve() for path in chapters()}

    def link(found: re.Match) -> str:
        if (folder / f"{found[1]}.ipynb").resolve() in rendered:
            return f'href="{found[1]}.html{found[2] or ""}"'
        return f'title="nbs: {found[1]}.ipynb"'

    return LOCAL.sub(link, body)


def heading(notebook) -> tuple[str, str]:
    """Title and the line below it, of a notebook's first cell."""
    lines = notebook.cells[0].source.splitlines()
    return lines[0].lstrip("# "), next((line.lstrip("> ") for line in lines if line.startswith(">")), "")


def without_machinery(notebook):
    """Leave out the cells that only export or import, which `make lab` folds."""
    notebook.cells = [
        cell for cell in notebook.cells if cell.cell_type != "code" or not lab.MACHINERY.match(cell.source)
    ]
    return notebook


def with_formulas(notebook):
    """Draw the formulas of the text, which a browser without a program from elsewhere would show as TeX."""
    def drawn(found: re.Match) -> str:
        image = io.BytesIO()
        math_to_image(f"${found[2]}$", image, prop=FontProperties(size=13), format="svg")
        address = f"data:image/svg+xml;base64,{base64.b64encode(image.getvalue()).decode()}"
        return f'<img class="formula" alt="{html.escape(found[2])}" src="{address}">'

    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = FORMULA.sub(drawn, cell.source)
    return notebook


def with_navigation(body: str, number: int, titles: list[tuple[str, str]], up: str) -> str:
    """Put a bar with the neighbouring pages and the index on top and at the end of a page."""
    def link(at: int, words: str) -> str:
        if not 0 <= at < len(titles):
            return "<span></span>"
        place, title = titles[at]
        return f'<a href="{up}{place}">{html.escape(words.format(title))}</a>'

    bar = f'<nav>{link(number - 1, "← {}")}<a href="{up}index.html">all pages</a>{link(number + 1, "{} →")}</nav>'
    head = body.replace("</head>", f"{PAGE_STYLE}</head>", 1)
    return re.sub(r"(<body[^>]*>)", lambda found: found[1] + bar, head, count=1).replace("</body>", f"{bar}</body>", 1)


def render(folder: Path) -> list[Path]:
    """Write one page per notebook, at the notebook's own place below nbs/, and index.html; returns the pages."""
    exporter = HTMLExporter()
    exporter.exclude_input_prompt = exporter.exclude_output_prompt = True
    exporter.mathjax_url = exporter.require_js_url = exporter.jquery_url = ""  # a page asks nobody for anything
    notebooks = {path: nbformat.read(path, as_version=4) for path in chapters()}
    places = [path.relative_to(ROOT / "nbs").with_suffix(".html").as_posix() for path in notebooks]
    entries = [(place, *heading(notebook)) for place, notebook in zip(places, notebooks.values())]
    pages = []
    for number, (path, notebook) in enumerate(notebooks.items()):
        place, title, _ = entries[number]
        shown = with_formulas(without_machinery(notebook))
        body, _ = exporter.from_notebook_node(shown, resources={"metadata": {"name": title}})
        body = with_navigation(
            with_page_links(body, path.parent), number, [entry[:2] for entry in entries], "../" * place.count("/")
        )
        page = folder / place
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(body, encoding="utf-8")
        pages.append(page)
    lists = [
        "".join(
            f'<li><a href="{place}">{html.escape(title)}</a> {html.escape(line)}</li>'
            for place, title, line in entries
            if place.startswith("guide/") is inside
        )
        for inside in (True, False)
    ]
    index = folder / "index.html"
    index.write_text(
        '<!doctype html><html lang="en"><meta '
        f'charset="utf-8"><title>vggt_lora</title><style>{STYLE}</style><h1>vggt_lora</h1>'
        f"<h2>Guide</h2><ol>{lists[0]}</ol><h2>The steps</h2><ul>{lists[1]}</ul></html>\n",
        encoding="utf-8",
    )
    return [index, *pages]


if __name__ == "__main__":
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "_docs"
    print(f"{len(render(out))} pages; open {out / 'index.html'}")
