"""Render the guide and the numbered notebooks to static HTML, with links between the pages and an index.

    python tools/render_guide.py [FOLDER]

FOLDER defaults to _docs/, which git ignores. Nothing is executed: a page shows the outputs that its notebook holds.
"""
import html
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import HTMLExporter

ROOT = Path(__file__).resolve().parent.parent
GUIDE = (  # in reading order
    "quickstart", "data", "strategies", "running", "settings", "tensorboard", "troubleshooting", "recipes", "measurements",
)
LOCAL = re.compile(r'href="(?!https?:|mailto:|#|data:)([^"#]+)\.ipynb(#[^"]*)?"')
STYLE = "body{font:16px/1.6 sans-serif;max-width:46em;margin:3em auto;padding:0 1em}li{margin:.4em 0}"


def chapters() -> list[Path]:
    """The notebooks to render: the guide, then the numbered ones; raises SystemExit where the guide has a chapter that is not in GUIDE."""
    found = {path.stem for path in (ROOT / "nbs" / "guide").glob("*.ipynb")}
    if found != set(GUIDE):
        raise SystemExit(f"GUIDE in {Path(__file__).name} and nbs/guide differ: {', '.join(sorted(found ^ set(GUIDE)))}")
    return [*(ROOT / "nbs" / "guide" / f"{name}.ipynb" for name in GUIDE), *sorted((ROOT / "nbs").glob("0*.ipynb"))]


def with_page_links(body: str, folder: Path) -> str:
    """Point links between rendered notebooks at their pages; a link to a notebook without a page keeps only its text."""
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


def render(folder: Path) -> list[Path]:
    """Write one page per notebook, at the notebook's own place below nbs/, and index.html; returns the pages."""
    exporter = HTMLExporter()
    exporter.exclude_input_prompt = exporter.exclude_output_prompt = True
    exporter.mathjax_url = exporter.require_js_url = exporter.jquery_url = ""  # a page asks nobody for anything
    pages, entries = [], []
    for path in chapters():
        notebook = nbformat.read(path, as_version=4)
        title, line = heading(notebook)
        body, _ = exporter.from_notebook_node(notebook, resources={"metadata": {"name": title}})
        page = folder / path.relative_to(ROOT / "nbs").with_suffix(".html")
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(with_page_links(body, path.parent), encoding="utf-8")
        pages.append(page)
        entries.append((page.relative_to(folder).as_posix(), title, line))
    lists = ["".join(f'<li><a href="{place}">{html.escape(title)}</a> {html.escape(line)}</li>' for place, title, line in entries if place.startswith("guide/") is inside)
             for inside in (True, False)]
    index = folder / "index.html"
    index.write_text(f'<!doctype html><html lang="en"><meta charset="utf-8"><title>vggt_lora</title><style>{STYLE}</style><h1>vggt_lora</h1>'
                     f"<h2>Guide</h2><ol>{lists[0]}</ol><h2>The steps</h2><ul>{lists[1]}</ul></html>\n", encoding="utf-8")
    return [index, *pages]


if __name__ == "__main__":
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "_docs"
    print(f"{len(render(out))} pages; open {out / 'index.html'}")
