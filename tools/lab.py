"""Open the numbered notebooks in JupyterLab as a working copy below outputs/lab; nbs/ stays unchanged.

    python tools/lab.py [OPTION OF JUPYTER LAB ...]
    python tools/lab.py --settings       only write JupyterLab's settings into this environment, as `make env` does

An edited copy stays. If the notebook in nbs/ has changed since, the copy is renamed after the time of its last change.
"""
import hashlib
import json
import os
import re
import sys
import time
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
LAB = ROOT / "outputs" / "lab"
PAGE_CONFIG = {  # open3d brings dash, whose extension makes JupyterLab ask for a build at every start
    "buildCheck": False,
    "buildAvailable": False,
    "disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True},  # the question about news
}
MACHINERY = re.compile(r"#\|\s*(default_exp|export|exporti|hide)\b")  # first line of a cell that a reader need not see


def write_settings(
    config: Path | None = None,  # folder of Jupyter's settings; default: this environment's
) -> Path:
    """Switch off JupyterLab's dialogs at its start; other settings in the file stay."""
    path = Path(config or Path(sys.prefix) / "etc" / "jupyter") / "labconfig" / "page_config.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    disabled = found.get("disabledExtensions", {})
    if isinstance(disabled, list):  # an older form
        disabled = dict.fromkeys(disabled, True)
    found |= PAGE_CONFIG | {"disabledExtensions": disabled | PAGE_CONFIG["disabledExtensions"]}
    path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return path


def notebooks() -> list[Path]:
    """List the numbered notebooks, the guide, and the chapters that they link to."""
    found = [*sorted((ROOT / "nbs").glob("0*.ipynb")), *sorted((ROOT / "nbs" / "guide").glob("*.ipynb"))]
    linked = [(path.parent / target).resolve() for path in found
              for target in re.findall(r"\]\(([^):#]+\.ipynb)", path.read_text(encoding="utf-8"))]
    return list(dict.fromkeys([*found, *(path for path in linked if path.is_file())]))


def fold_machinery(notebook) -> None:
    """Fold the cells that only export or import; a click on the bar opens one."""
    for cell in notebook.cells:
        if cell.cell_type == "code" and MACHINERY.match(cell.source):
            cell.metadata.setdefault("jupyter", {})["source_hidden"] = True


def working_copy(path: Path):
    """Read a notebook as `make lab` shows it: machinery folded if it is a numbered one, and the digest of its sources
    kept.
    """
    notebook = nbformat.read(path, as_version=4)
    sources = json.dumps([cell.source for cell in notebook.cells])
    if path.name.startswith("0"):
        fold_machinery(notebook)
    notebook.metadata["vggt_lora"] = {"copy_of": hashlib.sha256(sources.encode()).hexdigest()}
    return notebook


def refresh(folder: Path = LAB) -> list[Path]:
    """Bring the working copies up to date; returns those that were set aside."""
    aside = []
    for path in notebooks():
        copy, target = working_copy(path), folder / path.relative_to(ROOT / "nbs")
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_file():
            if nbformat.read(target, as_version=4).metadata.get("vggt_lora") == copy.metadata["vggt_lora"]:
                continue
            stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(target.stat().st_mtime))
            aside.append(target.rename(target.with_name(f"{target.stem}.{stamp}.ipynb")))
        nbformat.write(copy, target)
    return aside


def main(options: list[str]) -> None:
    """Write the settings, refresh the copies, and become JupyterLab."""
    write_settings()
    if options == ["--settings"]:
        return
    for old in refresh():
        print(f"the notebook has changed: your copy is now {old.relative_to(ROOT)}", flush=True)
    root = ["--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    command = [
        sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={LAB.parent}",
        "--LabApp.default_url=/lab/tree/lab/00_data.ipynb", *root, *options,
    ]
    # torch's threads spin while they wait; on a busy machine that costs a factor of ten
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.execv(sys.executable, command)


if __name__ == "__main__":
    main(sys.argv[1:])
