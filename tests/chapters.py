"""Parameters that make the numbered notebooks small, and a way to run one without a kernel of its own."""
import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

SMALL = {"epochs": 1, "frames": 4, "overlap": 0.0, "image_size": 112,
         "scenes": "demo_a,demo_held", "hold_out": "demo_held"}


def parameters(folder: Path, house: str = "") -> dict[str, dict]:
    """Return the parameters of each chapter; what they write goes below `folder`, and 04 reads the run of 03.

    With a smaller `house`, a scene folder, 04 measures it and 05 trains on it, in place of the demo buildings.
    """
    run = str(folder / "run")
    shared = SMALL | {"frames": 2, "image_size": 56}
    if house:
        shared = {name: value for name, value in shared.items() if name not in ("scenes", "hold_out")} | {"data": house}
    words = {name: f'"{value}"' if "," in str(value) else value for name, value in shared.items()}
    settings = "; ".join(f"{name}={word}" for name, word in words.items())
    return {
        "00_data": {},
        "01_depth": {"image_size": 252, "audit_photos": 6},
        "02_lora": {},
        "03_train": {**SMALL, "output": run},
        "04_evaluate": {"run": run, "data": house, "pictures": 1, "protocol": "median"},
        "05_compare": {"output": str(folder / "compare"), "grid": "strategy=a", "jobs": 1, "pictures": 1,
                       "settings": settings},
        "06_predict": {"model": "tiny", "image_size": 112, "output": str(folder / "predict")},
    }


@dataclass(frozen=True)
class Ran:
    """What became of a notebook."""

    fault: str  # class and message of the error that ended it; empty if it ran to its end
    printed: str


def run_here(name: str, **given) -> Ran:
    """Run a notebook with parameters as papermill fills them in, in this process, which has torch loaded already."""
    import matplotlib.pyplot as plt
    from execnb.shell import CaptureShell
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook

    path, printed, fault = ROOT / "nbs" / f"{name}.ipynb", [], None
    notebook = parameterize_notebook(load_notebook_node(str(path)), given)
    main, backend = sys.modules["__main__"], plt.get_backend()
    shell = CaptureShell(path, mpl_format="png")
    try:
        with contextlib.chdir(path.parent), plt.rc_context():
            for cell in notebook.cells:
                if cell.cell_type == "code" and fault is None:
                    found = shell.run_cell(cell.source, store_history=True)  # `In` tells the cell of the parameters
                    printed.append(found.stdout)
                    fault = found.exception
    finally:
        sys.modules["__main__"] = main
        plt.switch_backend(backend)
        type(shell).clear_instance()
    return Ran(f"{type(fault).__name__}: {fault}" if fault else "", "".join(printed))
