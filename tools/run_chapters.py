"""Execute the notebooks as nbdev_test does, and count the lines of the package that their checks run.

    python -m coverage run tools/run_chapters.py              all, two at a time; `make coverage` calls this
    python tools/run_chapters.py nbs/preflight/memory_estimate.ipynb  those named

nbdev_test runs the source of a module inside its notebook, where coverage does not see the lines of the module. Here
every exported cell is compiled at its place in the module. The exit status is the number of notebooks that failed.
"""
import json
import linecache
import os
import re
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def places(cells: list[dict]) -> tuple[str, dict[str, int]]:
    """The module that cells are exported to, and the number of the line there before each: by its id. A page of the
    guide has none.
    """
    name = next(
        (found[1] for cell in cells if (found := re.match(r"#\|\s*default_exp (\S+)", "".join(cell["source"])))), None
    )
    if name is None:
        return "", {}
    module = ROOT / "vggt_lora" / f"{name.replace('.', '/')}.py"
    marks = (re.match(r"# %% \S+\.ipynb #(\w+)$", line) for line in module.read_text(encoding="utf-8").splitlines())
    return str(module), {mark[1]: number for number, mark in enumerate(marks, 1) if mark}


def execute(notebook: Path) -> None:
    """Execute the code cells of a notebook in `__main__`, in its folder."""
    from IPython.display import display

    # of its own: a parameter of a notebook may be called like something here
    page = sys.modules["__main__"] = types.ModuleType("__main__")
    cells = [cell for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    module, before_cell = places(cells)
    os.chdir(notebook.parent)
    sys.argv = [str(notebook)]
    page.display = display
    for cell in cells:
        lines = "".join(cell["source"]).splitlines()
        if any(re.match(r"#\|\s*eval:\s*false", line) for line in lines):
            continue
        before = before_cell.get(cell["id"], 0)
        file = module if before else f"{notebook}#{cell['id']}"
        while before and lines and re.match(r"#\|", lines[0]):
            del lines[0]
        if not before:
            # for those who ask for a function's source
            linecache.cache[file] = (0, None, [f"{line}\n" for line in lines], file)
        exec(compile("\n" * before + "\n".join(lines) + "\n", file, "exec"), vars(page))


def main(names: list[str]) -> int:
    """Execute notebooks, each in a process of its own; returns how many failed."""
    from nbdev.doclinks import nbglob

    found = [Path(name).resolve() for name in names or nbglob(str(ROOT / "nbs"))]
    environment = os.environ | {"IN_TEST": "1", "MPLBACKEND": "agg", "OMP_NUM_THREADS": "1"}

    def run(notebook: Path) -> int:
        done = subprocess.run(
            [sys.executable, __file__, "--one", str(notebook)], env=environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        print(
            f"{'FAILED' if done.returncode else 'done':6} {notebook.relative_to(ROOT)}"
            + (f"\n{done.stderr[-1500:]}" if done.returncode else ""),
            flush=True,
        )
        return done.returncode != 0

    with ThreadPoolExecutor(2) as pool:
        return sum(pool.map(run, found))


if __name__ == "__main__":
    sys.exit(execute(Path(sys.argv[2]).resolve()) if sys.argv[1:2] == ["--one"] else main(sys.argv[1:]))
