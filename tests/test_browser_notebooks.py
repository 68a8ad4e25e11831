"""The numbered notebooks as a newcomer meets them: a real JupyterLab, a real browser, every cell, and a control moved
in each that has one.

One server and one browser for all of them. Copies are run, made small by injected parameters. Screenshots, at rest and
after the interaction, stay in outputs/browser/ to be looked at.
"""
import dataclasses
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from vggt_lora.training.config import TrainConfig

sys.path.insert(0, str(Path(__file__).parent))
import browser  # noqa: E402
from chapters import SMALL, parameters  # noqa: E402
import lab  # noqa: E402  found by way of browser

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "outputs" / "browser"  # ignored by git
RUN = FOLDER / "run"
PARAMETERS = parameters(FOLDER)
# (kind, description of the control, words that stand in its output afterwards, or None), in this order, for what is
# known by name. Words or not, something beside
# the control's own read-out has to change, and a picture with it. Any other control is moved as well, one in each
# output that has none here.
EXPECTED = {
    "00_data": [("slider", "photo", "1: dslr_images_undistorted/"), ("tick", "points", None)],
    "01_depth": [("slider", "photo", None)],
    "04_evaluate": [
        ("slider", "wipe", None), ("slider", "photo", "1: dslr_images_undistorted/"),
        ("choice", "show", "dark near and bright far"), ("choice", "region", "wall, "),
    ],
}
TURNED = {"00_data": 1, "04_evaluate": 2, "06_predict": 1}  # views that the mouse turns
PHOTOGRAPHED = {("00_data", "points"): "plain", ("04_evaluate", "region"): "wipe"}
MOST_MOVES = 6  # for each notebook
PHASES = {  # long work that has no bar of its own
    "01_depth": "dense depth of one photo", "02_lora": "preflight of strategy a",
    "03_train": "measuring base and saved adapter", "04_evaluate": "measuring what was forgotten",
    "05_compare": "running",
}


@pytest.fixture(scope="module")
def page():
    """JupyterLab and Chromium for all notebooks: (address, driver)."""
    missing = browser.what_is_missing()
    if missing:
        pytest.skip(missing)
    shutil.rmtree(FOLDER, ignore_errors=True)
    shutil.rmtree(FOLDER.parent / "browser_profile", ignore_errors=True)
    served = FOLDER / "served"
    before = tracked_changes()
    lab.refresh(served)
    with browser.jupyterlab(served) as url, browser.chromium(FOLDER / "profile") as driver:
        yield url, driver
    assert tracked_changes() == before, "running the working copies has changed the repository"
    shutil.rmtree(FOLDER / "profile", ignore_errors=True)


def tracked_changes() -> str:
    """What git says about the files that it knows."""
    return subprocess.run(
        ["git", "status", "--porcelain", "--untracked-files=no"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout


def small_copy(name: str) -> str:
    """Write the working copy of a notebook with this test's parameters into the served folder; returns its file name.
    """
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook
    path = FOLDER / "served" / f"{name}.ipynb"
    nbformat.write(lab.working_copy(ROOT / "nbs" / f"{name}.ipynb"), path)
    notebook = parameterize_notebook(load_notebook_node(str(path)), PARAMETERS[name])
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(notebook, path)
    return path.name


def something_changes(driver, area: int, kind: str, label: str, words: str | None, pictured: bool = True) -> None:
    """Move a control and wait until its output shows something else, beside the control's own read-out."""
    before = browser.shown_in(driver, area)
    browser.move(driver, area, kind, label)

    def changed(d):
        now = browser.shown_in(d, area)
        there = all(width for width, _, _ in now["images"]) and (words is None or words in now["text"])
        return there and (now["images"] != before["images"] if pictured and before["images"] else now != before)

    browser.wait_for(
        driver,
        changed,
        f"the page to answer to the {kind} {label!r}"
        + (f" with {words!r}" if words else "")
        + (" by another picture" if pictured else ""),
    )
    after = browser.shown_in(driver, area)
    assert "could not draw" not in after["text"] and "Error" not in after["text"], after["text"]


@pytest.mark.parametrize("name", list(PARAMETERS))
def test_the_first_screen(page, name):
    """No dialog; what it is, a picture and the parameters without scrolling: all of them in the large window, the first
    in the small one. The photographs are for looking at.
    """
    url, driver = page
    # without a reset, as a reload: JupyterLab asks about its build then
    driver.get(f"{url}/lab/tree/{name}.ipynb?token={url.token}")
    browser.wait_for(
        driver, lambda d: d.execute_script("return !!window.jupyterapp") and browser.first_screen(d), f"{name} to open"
    )
    for (width, height), least in (((1600, 1000), 0.99), ((1280, 800), 0.15)):
        driver.set_window_size(width, height)

        def is_there(d):
            seen = browser.first_screen(d)
            return seen and seen["pictures"] and seen["parameters"] >= least

        browser.wait_for(driver, is_there, f"a picture and the parameters of {name} at {width}x{height}")
        driver.save_screenshot(str(FOLDER / f"{name}_first_{width}.png"))
    if name == "00_data":
        time.sleep(8)  # the question about a build comes some seconds after the page
    assert browser.dialogs(driver) == []


def edit_run_edit_run(driver) -> None:
    """A wrong folder is said in one sentence by the cell below the parameters; the right one then runs to the end."""
    from vggt_lora.demo.demo_scenes import demo_scenes
    browser.edit_and_run_on(driver, 1, 'import os\nhome = os.sep\ndata: str = home + "no/such/folder"')
    errors = [cell["errors"] for cell in browser.code_cells(driver) if cell["errors"]]
    assert len(errors) == 1 and errors[0][0].startswith("ConfigError: data: /no/such/folder"), errors
    shown, = browser.wait_for(driver, browser.cell_errors, "the error to be drawn")
    assert len(shown.splitlines()) <= 3 and "%tb verbose" in shown and "Traceback" not in shown, shown
    browser.edit_and_run_on(driver, 1, f"data: str = {str(demo_scenes(progress=False)[0])!r}")
    assert browser.cell_errors(driver) == []


def train_small(folder: Path) -> list[str]:
    """The command of a small training."""
    small = [word for key, value in SMALL.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    return [sys.executable, "-m", "vggt_lora.train", *small, "--output", str(folder)]


@pytest.mark.slow
def test_a_training_is_found_again(page):
    """In a page that knows nothing of the training, as after a reload, `watch_run()` finds it and follows it."""
    url, driver = page
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    cell = nbformat.v4.new_code_cell("from vggt_lora.views.widgets.run import watch_run\nwatch_run()")
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata=kernel), FOLDER / "served" / "watch.ipynb")
    text = (
        "return [...document.querySelectorAll('.jp-OutputArea .widget-html-content')].map(shown => "
        "shown.innerText).join(' ')"
    )
    training = subprocess.Popen(
        train_small(FOLDER / "watched"), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        browser.wait_for(driver, lambda d: (FOLDER / "watched" / ".run.lock").exists(), "the training to begin", 300)
        browser.open_notebook(driver, url, "watch.ipynb")
        browser.run_all(driver)
        assert browser.cell_errors(driver) == []
        said = browser.wait_for(
            driver, lambda d: "step" in (now := d.execute_script(text)) and now, "the run to be shown"
        )
        browser.wait_for(driver, lambda d: d.execute_script(text) not in ("", said), "the run to move", 300)
        assert training.wait(600) == 0
    finally:
        training.kill()
    browser.save(driver)
    driver.execute_script("jupyterapp.shell.currentWidget.context.sessionContext.shutdown()")


@pytest.mark.slow
@pytest.mark.parametrize("name", list(PARAMETERS))
def test_a_notebook_runs_and_answers_in_jupyterlab(page, name):
    url, driver = page
    if name == "04_evaluate" and not (RUN / "results.json").is_file():  # 03 was not asked for, or failed
        subprocess.run(train_small(RUN), cwd=ROOT, check=True, capture_output=True)
    browser.open_notebook(driver, url, small_copy(name))
    phases = browser.run_all(driver)
    assert not browser.restarts(url), "the kernel died on the way"
    assert name not in PHASES or len([line for line in phases if line.startswith(PHASES[name])]) > 1, phases
    cells = browser.code_cells(driver)
    assert [cell["errors"] for cell in cells if cell["errors"]] == []
    assert [cell["source"] for cell in cells if cell["source"].strip() and cell["count"] is None] == [], (
        "cells that were not run"
    )
    assert browser.cell_errors(driver) == []
    browser.wait_for(
        driver,
        lambda d: d.execute_script(
            "return [...document.querySelectorAll('.jp-OutputArea img')].every(i => i.complete && i.naturalWidth)"
        ),
        "pictures",
    )
    browser.tall_screenshot(driver, FOLDER / f"{name}.png")

    found, moved = browser.controls(driver), []
    for kind, label, words in EXPECTED.get(name, []):
        target = next((c for c in found if c[1:] == (kind, label) and c not in moved), None)
        assert target, f"{name} has no {kind} {label!r} (any more); it has {found}"
        something_changes(driver, *target, words)
        moved.append(target)
        if (name, label) in PHOTOGRAPHED:
            driver.save_screenshot(str(FOLDER / f"{name}_{PHOTOGRAPHED[name, label]}.png"))
    areas = {area for area, _, _ in moved}
    for target in found:  # one more in every output that has not been touched
        if target[0] not in areas and target[1] != "button" and len(moved) < MOST_MOVES:
            something_changes(driver, *target, None, pictured=False)
            moved.append(target)
            areas.add(target[0])
    if moved:
        driver.save_screenshot(str(FOLDER / f"{name}_moved.png"))
    canvases = driver.find_elements("css selector", ".cloud-view canvas")
    assert len(canvases) == TURNED.get(name, 0)
    for number, canvas in enumerate(canvases):
        assert browser.drag_changes(driver, canvas, (150, 60)) > 0.02, f"view {number} of {name} does not turn"
        driver.save_screenshot(str(FOLDER / f"{name}_turned_{number}.png"))
    print(f"{name}: {len(cells)} cells, controls {found}, moved {moved}")
    assert browser.severe_log_lines(driver) == []
    if name == "00_data":
        edit_run_edit_run(driver)
    browser.save(driver)  # or the browser asks whether to leave the page
    # its memory is free for the next
    driver.execute_script("jupyterapp.shell.currentWidget.context.sessionContext.shutdown()")


def test_the_small_copies_are_the_notebooks():
    """Every numbered notebook is in the list, and each parameter that is set here exists."""
    assert sorted(PARAMETERS) == sorted(path.stem for path in (ROOT / "nbs").glob("0*.ipynb"))
    for name, given in PARAMETERS.items():
        cells = json.loads((ROOT / "nbs" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
        text = "".join("".join(cell["source"]) for cell in cells if "parameters" in cell["metadata"].get("tags", []))
        # all are legal there
        settings = {field.name for field in dataclasses.fields(TrainConfig)} if name == "03_train" else set()
        assert all(f"\n{key}: " in f"\n{text}" or key in settings for key in given), name
