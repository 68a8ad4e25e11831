"""Execute the notebooks whose outputs are kept in git (00, 01, 02, 04), shrink their pictures, and clean their metadata.

    python tools/execute_notebooks.py [--to FOLDER] [NOTEBOOK ...]

With --to, copies go to FOLDER, to be looked at, and nothing here is touched. 04 shows the newest run under outputs/, so run `make train` first. A notebook may not grow
past 290 kB: drawings become palette images and photos JPEG, whichever is smaller, the largest first, until they fit. What is kept is the argument and not the occasion: no bar, no chatter of
a library, no widget, no path of this machine, no moment of time.
"""
import argparse
import base64
import io
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
KEPT = ["00_data", "01_depth", "02_lora", "04_evaluate"]
LIMIT = 290_000  # bytes of a notebook


STEPS = ((1000, 128, 75), (1000, 64, 60), (900, 48, 50), (900, 32, 42), (800, 32, 36), (700, 32, 34), (600, 32, 34), (500, 32, 34), (420, 32, 34))  # width, colours of a PNG (fewer would change a line's colour), quality of a JPEG


def smaller(png: str, width: int, colours: int, quality: int) -> tuple[str, str]:
    """A base64 PNG of at most `width` pixels as (mime type, base64), palette PNG or JPEG: noise in photos swells the first, fine lines the second."""
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if image.width > width:
        image = image.resize((width, round(image.height * width / image.width)), Image.LANCZOS)
    as_png, as_jpeg = io.BytesIO(), io.BytesIO()
    image.quantize(colours, dither=Image.Dither.NONE).save(as_png, "PNG", optimize=True)
    image.save(as_jpeg, "JPEG", quality=quality, optimize=True)
    kind, found = min((("image/png", as_png), ("image/jpeg", as_jpeg)), key=lambda pair: pair[1].tell())
    return kind, base64.b64encode(found.getvalue()).decode() + "\n"


def shrink(notebook, path: Path) -> None:
    """Shrink the pictures of a notebook, the largest first, until it fits; raises SystemExit if it cannot."""
    pictures = [[o, o.data["image/png"], 0] for c in notebook.cells if c.cell_type == "code" for o in c.outputs if "image/png" in o.get("data", {})]

    def draw(picture) -> None:
        output, png, step = picture
        for kind in ("image/png", "image/jpeg"):
            output.data.pop(kind, None)
        kind, output.data[kind] = smaller(png, *STEPS[step])

    def weight(picture) -> int:
        return max(len(value) for kind, value in picture[0].data.items() if kind.startswith("image/"))

    for picture in pictures:
        draw(picture)
    while len(nbformat.writes(notebook)) > LIMIT:
        largest = max((p for p in pictures if p[2] + 1 < len(STEPS)), key=weight, default=None)
        if largest is None:
            text = len(nbformat.writes(notebook)) - sum(map(weight, pictures))
            raise SystemExit(f"{path}: {len(nbformat.writes(notebook))} bytes, over {LIMIT} with the smallest pictures ({len(pictures)} pictures, {text} bytes of text)")
        largest[2] += 1
        draw(largest)


def neutral(text: str) -> str:
    """What a cell printed, as it would read on another machine at another time."""
    for place, name in ((f"{ROOT}/", ""), (str(ROOT), "."), (f"{Path.home()}/", "~/"), (f"{tempfile.gettempdir()}/", "$TMPDIR/")):
        text = text.replace(place, name)
    text = re.sub(r"\$TMPDIR/tmp\w+", "$TMPDIR", text)
    text = re.sub(r"\b20\d{6}-\d{6}\b", "<date>-<time>", text)
    return re.sub(r" \(\d+\.\d+ s\)", "", text)


def clean_outputs(notebook) -> None:
    """Leave out bars, warnings and widgets, and make every text neutral."""
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr" and o.get("metadata", {}).get("vggt_lora") != "progress"]
        joined = []
        for output in cell.outputs:  # where a kernel cuts what is printed is chance
            if joined and output.output_type == "stream" == joined[-1].output_type and output.name == joined[-1].name:
                joined[-1].text += output.text
            else:
                joined.append(output)
        cell.outputs = joined
        for output in cell.outputs:
            if output.output_type == "stream":
                output.text = neutral(output.text)
            for kind in [kind for kind in output.get("data", {}) if "widget" in kind]:
                del output.data[kind]
            for kind, value in output.get("data", {}).items():
                if kind.startswith("text/"):
                    output.data[kind] = neutral(value)
    notebook.metadata.pop("widgets", None)


def execute(name: str, folder: Path) -> Path:
    """Execute, clean and shrink one numbered notebook into a folder."""
    notebook = nbformat.read(ROOT / "nbs" / f"{name}.ipynb", as_version=4)
    NotebookClient(notebook, timeout=1800, kernel_name="python3", resources={"metadata": {"path": str(ROOT / "nbs")}}).execute()
    clean_outputs(notebook)
    path = folder / f"{name}.ipynb"
    shrink(notebook, path)
    nbformat.write(notebook, path)
    subprocess.run([str(Path(sys.executable).parent / "nbdev_clean"), "--fname", str(path)], cwd=ROOT, check=True, stdin=subprocess.DEVNULL)
    print(f"{path.name}: {path.stat().st_size // 1000} kB", flush=True)
    return path


def main(arguments: list[str] | None = None) -> None:
    """Execute the named notebooks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--to", type=Path, default=ROOT / "nbs", help="folder for copies (default: in place)")
    parser.add_argument("names", nargs="*", metavar="NOTEBOOK")
    given = parser.parse_args(arguments)
    given.to.mkdir(parents=True, exist_ok=True)
    for name in given.names or KEPT:
        execute(Path(name).stem, given.to.resolve())


if __name__ == "__main__":
    main()
