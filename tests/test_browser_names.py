"""Names that try to be more than names, in every widget and report, in a real browser: they are shown as they are
written, and nothing comes of them.
"""
import json
import sys
from pathlib import Path

import nbformat
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import browser  # noqa: E402

NAME = """a<img src=x onerror="window.hacked=1">$\\frac{$ '"'<b>b</b> **c** |`d`.jpg"""
CELLS = (
    """\
import numpy as np
from pathlib import Path
from types import SimpleNamespace
from IPython.display import Markdown, display
from vggt_lora.scenes.scene import Frame, Points, Scene
from vggt_lora.views.clouds.cloud_viewer import ViewedCameras, ViewedCloud
from vggt_lora.views.clouds.cloud_views import show_clouds
from vggt_lora.views.widgets.base import photo_slider
from vggt_lora.views.widgets.depth import depth_browser
from vggt_lora.views.widgets.evaluation import evaluation_viewer
from vggt_lora.views.widgets.run import LiveView
from vggt_lora.views.widgets.scene import scene_browser

grey = np.full((40, 60, 3), 90, np.uint8)
truth, everywhere = np.full((40, 60), 2.0), np.ones((40, 60), bool)
x, y = (side.ravel() for side in np.meshgrid(np.linspace(-2, 4, 12), np.linspace(-1, 1, 6)))
xyz, colours = np.stack([x, y, np.full(72, 4.0)], 1), np.full((72, 3), 90, np.uint8)
points = Points(xyz, colours, np.full(72, 0.5), np.full(72, 3, np.int32), np.arange(72))
K = np.array([[40.0, 0, 30], [0, 40, 20], [0, 0, 1]])
poses = [np.eye(4) for _ in range(3)]
for k, pose in enumerate(poses):
    pose[0, 3] = -0.5 * k
frames = tuple(
    Frame(f"{k}{NAME}", Path("photo.jpg"), (40, 60), K, pose, 1, k, np.arange(72), np.zeros((72, 2)))
    for k, pose in enumerate(poses)
)
""",
    "scene_browser(Scene(NAME, Path(NAME), frames, points, True), lambda index: grey, interactive=True)",
    "depth_browser([NAME, NAME], lambda index: grey, lambda source, index: SimpleNamespace(depth=truth, "
    "valid=everywhere, weight=truth), ('laser',), NAME, interactive=True)",
    "evaluation_viewer([SimpleNamespace(photo=grey, truth=truth, valid=everywhere, name=NAME, depth={NAME: truth})], "
    "(NAME,), regions=lambda frame: {NAME: everywhere}, interactive=True)",
    """\
clouds = [ViewedCloud(name, points.xyz, {NAME: points.rgb}) for name in (NAME, "other")]
show_clouds(clouds, ViewedCameras((NAME,), poses[0][None], K[None], (40, 60)), (0, -1, 0), interactive=True)""",
    "photo_slider([NAME, NAME], lambda index: grey, interactive=True)",
    """\
live = LiveView(interactive=True)
live.note = NAME
live.draw()
live""",
    """\
from vggt_lora.train import TrainConfig, report
none = {"held_out_loss": {"before": 1.0, "after": 1.0, "best": 1.0}, "effects": [], "table": [],
        "protocol": {"truth": "laser"}, "cameras": [], "claims": [], "warnings": [NAME],
        "drift": {"alarms": []}, "frames_left_out": [], "pixels_left_out": 0}
display(Markdown(report(TrainConfig(data=NAME), none, Path("run"))))""",
)
HARM = """return {hacked: window.hacked !== undefined,
    images: [...document.querySelectorAll('img')]
        .filter(i => i.getAttribute('src') === 'x' || i.hasAttribute('onerror')).length,
    bold: [...document.querySelectorAll('b, strong, em')].filter(e => ['b', 'c'].includes(e.innerText)).length,
    formulas: document.querySelectorAll('.jp-OutputArea mjx-container, .jp-OutputArea .MathJax').length}"""
NO_HARM = {"hacked": False, "images": 0, "bold": 0, "formulas": 0}


def write_run(folder: Path) -> None:
    """A run folder that holds what a report needs, and the name wherever there is one."""
    row = {"alignment": NAME, "frames": 3, "absrel": 0.21, "mae": 1.0, "rmse": None, "d1": 0.7}
    for name, value in {
        "config.json": {
            "config": {
                "strategy": "b", "model": NAME, "data": NAME, "rank": 4, "supervision": "sparse", "epochs": 1,
                "frames": 4, "seed": 0,
            },
            "environment": {"python": NAME},
            "split": {"scenes": {NAME: {"photos": 9, "train": 6, "val": 3}}, "shared": 0},
            "scenes": [{"name": NAME, "notes": [NAME]}],
        },
        "results.json": {
            "protocol": {"truth": NAME, "alignment": "fitted"}, "table": [{"model": NAME, **row}],
            "effects": [{"sentence": NAME, "verdict": "worse"}], "frames_left_out": [], "pixels_left_out": 12,
            "held_out_loss": {"before": 1.0, "after": 0.9, "best": 0.9},
        },
        "coverage.json": [
            {
                "scene": NAME, "frames": 6, "frames_without_depth": 1, "share": 0.03, "least": 0.0,
                "by_source": {NAME: 0.02},
            }
        ],
    }.items():
        (folder / name).write_text(json.dumps(value), encoding="utf-8")
    (folder / "base_check.txt").write_text(NAME, encoding="utf-8")


@pytest.mark.slow
def test_a_name_stays_a_name(tmp_path):
    missing = browser.what_is_missing()
    if missing:
        pytest.skip(missing)
    from vggt_lora.views.report import write_report
    folder, run = tmp_path / "served", tmp_path / "run"
    folder.mkdir()
    run.mkdir()
    write_run(run)
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    cells = [nbformat.v4.new_code_cell(f"NAME = {NAME!r}"), *map(nbformat.v4.new_code_cell, CELLS)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), folder / "names.ipynb")
    with browser.jupyterlab(folder) as url, browser.chromium(tmp_path / "profile") as driver:
        browser.open_notebook(driver, url, "names.ipynb")
        browser.run_all(driver)
        assert browser.cell_errors(driver) == []

        def all_said(d):
            shown = d.execute_script(
                "return [...document.querySelectorAll('.jp-CodeCell')].slice(2).map(cell => "
                "[...cell.querySelectorAll('.jp-OutputArea')].map(o => o.innerText).join(' '))"
            )
            return len(shown) == len(CELLS) - 1 and all(NAME in text for text in shown) and shown

        browser.wait_for(driver, all_said, "the name in every output, as it is written", 30)
        browser.tall_screenshot(driver, tmp_path / "names.png")
        print(f"screenshot: {tmp_path / 'names.png'}")
        assert driver.execute_script(HARM) == NO_HARM
        driver.execute_script(
            "document.querySelectorAll('.jp-OutputArea')[3].insertAdjacentHTML('beforeend', arguments[0])", NAME
        )
        # so the question can see it
        browser.wait_for(
            driver,
            lambda d: d.execute_script(HARM) == NO_HARM | {"hacked": True, "images": 1, "bold": 1},
            "the name to do its harm where it is let in",
        )
        browser.save(driver)

        driver.get(write_report(run).as_uri())
        assert driver.execute_script("return document.body.innerText").count(NAME) > 8
        assert driver.execute_script(HARM) == NO_HARM
