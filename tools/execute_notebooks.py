"""Execute the notebooks and keep their outputs: text and small pictures, without paths and times.

    python tools/execute_notebooks.py                      every notebook, in place; 04 shows the run of 03
    python tools/execute_notebooks.py 03_train nbs/model   those named, or all below a folder
    python tools/execute_notebooks.py --jobs 2 --to FOLDER write copies to FOLDER and change nothing here
    python tools/execute_notebooks.py --check settings     execute, and compare with the kept outputs

A numbered notebook may keep 250 kB of outputs, any other 100 kB, all together 15 MB. Each picture becomes a palette
PNG or a JPEG, whichever is smaller; the largest pictures shrink first until the notebook fits.

Bars, warnings, widgets, the start-up lines of libraries, paths of this machine and times are left out. `--check`
compares texts without seconds and bytes, numbers within a tenth, and the number of pictures. It skips a cell with the
tag `volatile`. Cells that nbdev does not run either (`#| eval: false`, `#| slow`, `#| gpu`) keep what they have.
"""
import argparse
import base64
import difflib
import io
import math
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
LIMIT = 250_000  # bytes of the outputs of a numbered notebook
LIMIT_OF_A_BLOCK = 100_000  # and of any other
LIMIT_OF_ALL = 15_000_000
LONGEST = 20_000  # characters of a text that is kept; the rest is counted
NOT_RUN = re.compile(r"#\|\s*(eval:\s*false|slow|gpu)\b")
SKIP = "skip-execution"  # nbclient's own tag, for the time of the execution


STEPS = (  # width, colours of a PNG (fewer would change a line's colour), quality of a JPEG
    (1000, 128, 75),
    (1000, 64, 60),
    (900, 48, 50),
    (900, 32, 42),
    (800, 32, 36),
    (700, 32, 34),
    (600, 32, 34),
    (500, 32, 34),
    (420, 32, 34),
)


def smaller(png: str, width: int, colours: int, quality: int) -> tuple[str, str]:
    """A base64 PNG of at most `width` pixels as (mime type, base64), palette PNG or JPEG: noise in photos swells the
    first, fine lines the second.
    """
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if image.width > width:
        image = image.resize((width, round(image.height * width / image.width)), Image.LANCZOS)
    as_png, as_jpeg = io.BytesIO(), io.BytesIO()
    image.quantize(colours, dither=Image.Dither.NONE).save(as_png, "PNG", optimize=True)
    image.save(as_jpeg, "JPEG", quality=quality, optimize=True)
    kind, found = min((("image/png", as_png), ("image/jpeg", as_jpeg)), key=lambda pair: pair[1].tell())
    return kind, base64.b64encode(found.getvalue()).decode() + "\n"


def outputs_of(notebook) -> list:
    """Return all outputs of a notebook."""
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def weight(notebook) -> int:
    """Return the bytes of a notebook's outputs as they are written."""
    return sum(
        len(nbformat.v4.writes(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("", outputs=[o])])))
        for o in outputs_of(notebook)
    )


def shrink(notebook, path: Path, limit: int = LIMIT) -> None:
    """Shrink the pictures of a notebook, the largest first, until its outputs fit; raises SystemExit if they cannot."""
    pictures = [[o, o.data["image/png"], 0] for o in outputs_of(notebook) if "image/png" in o.get("data", {})]

    def draw(picture) -> None:
        output, png, step = picture
        for kind in ("image/png", "image/jpeg"):
            output.data.pop(kind, None)
        kind, output.data[kind] = smaller(png, *STEPS[step])

    def size(picture) -> int:
        return max(len(value) for kind, value in picture[0].data.items() if kind.startswith("image/"))

    for picture in pictures:
        draw(picture)
    while weight(notebook) > limit:
        largest = max((p for p in pictures if p[2] + 1 < len(STEPS)), key=size, default=None)
        if largest is None:
            text = weight(notebook) - sum(map(size, pictures))
            found = f"{weight(notebook)} bytes of outputs, {text} of them text"
            raise SystemExit(f"{path}: {found}, over {limit} with the smallest pictures ({len(pictures)} pictures)")
        largest[2] += 1
        draw(largest)


CHATTER = re.compile(r"^(?:\[Open3D INFO\]|Jupyter environment detected).*\n", re.M)  # at the first import only


def neutral(text: str) -> str:
    """What a cell printed, as it would read on another machine at another time."""
    places = [(f"{ROOT}/", ""), (str(ROOT), "."), (f"{Path.home()}/", "~/"), (f"{tempfile.gettempdir()}/", "$TMPDIR/")]
    if os.environ.get("VGGT_LORA_CACHE"):
        places.insert(0, (os.environ["VGGT_LORA_CACHE"].rstrip("/"), "~/.cache/vggt_lora"))
    for place, name in places:
        text = text.replace(place, name)
    text = re.sub(r"\$TMPDIR/tmp\w+", "$TMPDIR", text)
    text = CHATTER.sub("", text)
    text = re.sub(r"\b20\d{6}-\d{6}\b", "<date>-<time>", text)
    return re.sub(r" \(\d+\.\d+ s\)", "", text)


def clean_outputs(notebook) -> None:
    """Leave out bars, warnings and widgets, make every text neutral, and cut what is far too long."""
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        joined = []
        for output in cell.outputs:  # where a kernel cuts what is printed is chance
            if output.get("name") == "stderr" or output.get("metadata", {}).get("vggt_lora") == "progress":
                continue
            if joined and output.output_type == "stream" == joined[-1].output_type:
                joined[-1].text += output.text
            else:
                joined.append(output)
        for output in joined:
            _clean(output)
        cell.outputs = [output for output in joined if output.get("text") or output.get("data")]
    notebook.metadata.pop("widgets", None)


def _clean(output) -> None:
    """Clean one output: a widget and its representation go, a page that is too long goes, a text that is too long is
    cut.
    """
    if output.output_type == "stream":
        output.text = _cut(neutral(output.text))
    data = output.get("data", {})
    widget = [kind for kind in data if "widget" in kind]
    for kind in widget:
        del data[kind]
    if widget:
        data.pop("text/plain", None)
    for kind, value in list(data.items()):
        if kind == "text/plain":
            data[kind] = _cut(neutral(value))
        elif kind.startswith("text/") and len(value) <= LONGEST:
            data[kind] = neutral(value)
        elif not kind.startswith("image/") or kind == "image/svg+xml" and len(value) > LONGEST:
            del data[kind]  # half a page would be none


def _cut(text: str) -> str:
    """Cut a text at LONGEST characters, at the end of a line."""
    if len(text) <= LONGEST:
        return text
    kept = text[: text.rindex("\n", 0, LONGEST) + 1] if "\n" in text[:LONGEST] else text[:LONGEST]
    return f"{kept}... ({len(text) - len(kept):,} more characters)\n"


def run(path: Path):
    """Execute, clean and shrink one notebook, and return it; raises nbclient's error if a cell fails."""
    notebook = nbformat.read(path, as_version=4)
    kept = {}
    for cell in notebook.cells:
        if cell.cell_type == "code" and NOT_RUN.search(cell.source):
            kept[cell.id] = cell.outputs
            cell.metadata["tags"] = [*cell.metadata.get("tags", []), SKIP]
    resources = {"metadata": {"path": str(path.parent)}}
    NotebookClient(
        notebook, timeout=7200, kernel_name="python3", resources=resources, skip_cells_with_tag=SKIP
    ).execute()
    for cell in notebook.cells:
        if cell.get("id") in kept:
            cell.outputs = kept[cell.id]
            cell.metadata["tags"].remove(SKIP)
            if not cell.metadata["tags"]:
                del cell.metadata["tags"]
    clean_outputs(notebook)
    shrink(notebook, path, LIMIT if path.parent == NBS and path.name[0].isdigit() else LIMIT_OF_A_BLOCK)
    return notebook


def execute(path: Path, folder: Path) -> None:
    """Execute one notebook and write it, cleaned by nbdev, at its place below a folder."""
    notebook = run(path)
    place = folder / path.relative_to(NBS)
    place.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, place)
    clean = [str(Path(sys.executable).parent / "nbdev_clean"), "--fname", str(place)]
    subprocess.run(clean, cwd=ROOT, check=True, stdin=subprocess.DEVNULL)
    print(f"{path.relative_to(NBS)}: {len(outputs_of(notebook))} outputs, {weight(notebook) // 1000} kB", flush=True)


VOLATILE = re.compile(
    r"[-+\d][\d.,]*\s?(?:s|ms|µs|min|h|GB|MB|kB|B|it/s|steps?/s|windows?/s)\b|0x[0-9a-f]+|\b[0-9a-f]{12,}\b"
)


def deterministic(cell) -> list[str]:
    """Return the lines of a cell's outputs that are the same whenever it runs; a picture is one line."""
    lines = []
    for output in cell.outputs if "volatile" not in cell.metadata.get("tags", []) else ():
        data = output.get("data", {})
        text = output.get("text") or data.get("text/plain") or ""
        lines += [VOLATILE.sub("#", line).rstrip() for line in text.splitlines()]
        lines += ["<picture>" for kind in data if kind.startswith("image/")]
    return lines


NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*\.?\d*(?:e[-+]?\d+)?")


def same(kept: str, made: str) -> bool:
    """Tell whether two lines have the same words, and numbers within a tenth or 0.02 of each other.

    Processors round differently, so a rendered photo has a few points more on one than on another.
    """
    words = [" ".join(NUMBER.sub("#", line).split()) for line in (kept, made)]
    pairs = zip(NUMBER.findall(kept), NUMBER.findall(made))
    numbers = [[float(number.replace(",", "") or "nan") for number in pair] for pair in pairs]
    return words[0] == words[1] and all(math.isclose(*pair, rel_tol=0.1, abs_tol=0.02) for pair in numbers)


def differences(kept, made) -> list[str]:
    """Return the lines in which the outputs of two executions of a cell differ, in the form of a diff."""
    before, after = deterministic(kept), deterministic(made)
    if len(before) == len(after):
        pairs = [pair for pair in zip(before, after) if not same(*pair)]
        return [line for old, new in pairs for line in (f"-{old}", f"+{new}")]
    return list(difflib.unified_diff(before, after, "kept", "made", n=0, lineterm=""))


def check(path: Path) -> None:
    """Execute a notebook and compare it with what it keeps; raises SystemExit with the differing lines."""
    before, after = nbformat.read(path, as_version=4), run(path)
    wrong = []
    for kept, made in zip(before.cells, after.cells, strict=True):
        if kept.cell_type == "code":
            wrong += differences(kept, made)
    if wrong:
        raise SystemExit(
            f"{path.relative_to(ROOT)} keeps outputs that its cells no longer make; run `make notebooks`:\n"
            + "\n".join(wrong[:40])
        )
    print(f"{path.relative_to(NBS)}: as it was kept", flush=True)


def named(names: list[str]) -> list[Path]:
    """Return the notebooks of names, paths and folders; all of them for no name. The numbered ones come first, in their
    order.
    """
    every = [
        p for p in NBS.rglob("*.ipynb") if not any(part.startswith((".", "_")) for part in p.relative_to(NBS).parts)
    ]
    every.sort(key=lambda p: (p.parent != NBS or not p.name[0].isdigit(), p.as_posix()))
    if not names:
        return every
    found = []
    for name in names:
        path = Path(name).resolve()
        hits = [
            p
            for p in every
            if p == path or path in p.parents or name in (p.stem, p.relative_to(NBS).with_suffix("").as_posix())
        ]
        if not hits:
            raise SystemExit(
                f"no notebook is called {name}; give a name such as 03_train or training/loop, a path, or a folder"
            )
        found += hits
    return list(dict.fromkeys(found))


def main(arguments: list[str] | None = None) -> int:
    """Execute or check the named notebooks; returns 1 if any failed, after all have been tried."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--to", type=Path, default=NBS, help="folder for copies (default: in place)")
    parser.add_argument("--check", action="store_true", help="write nothing; compare with the kept outputs")
    parser.add_argument(
        "--jobs", type=int, default=1,
        help="notebooks at a time; the numbered ones run one after the other (default: 1)",
    )
    parser.add_argument("names", nargs="*", metavar="NOTEBOOK")
    given = parser.parse_args(arguments)
    failed = []

    def one(path: Path) -> None:
        try:
            check(path) if given.check else execute(path, given.to.resolve())
        except (Exception, SystemExit) as fault:
            failed.append(path.relative_to(NBS).as_posix())
            print(f"{path.relative_to(NBS)}: {fault}", file=sys.stderr, flush=True)

    paths = named(given.names)
    chapters = [path for path in paths if path.parent == NBS and path.name[0].isdigit()]  # 04 shows what 03 leaves
    for path in chapters:
        one(path)
    with ThreadPoolExecutor(max(1, given.jobs)) as pool:
        list(pool.map(one, [path for path in paths if path not in chapters]))
    total = sum(weight(nbformat.read(path, as_version=4)) for path in named([]))
    print(
        f"{len(paths) - len(failed)} of {len(paths)} notebooks; all outputs that are kept: {total / 1e6:.1f} MB of "
        f"{LIMIT_OF_ALL / 1e6:.0f}"
    )
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed or total > LIMIT_OF_ALL else 0


if __name__ == "__main__":
    sys.exit(main())
