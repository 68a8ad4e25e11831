"""The cloud that the mouse turns, in a real JupyterLab and browser; the same notebook where nobody watches."""
import base64
import io
import json
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import browser  # noqa: E402

CELLS = ("""\
import numpy as np
from vggt_lora.views.clouds.cloud_viewer import ViewedCameras, ViewedCloud
from vggt_lora.views.clouds.cloud_views import show_clouds
""", """\
side = np.linspace(-1, 1, 60)
x, y = np.meshgrid(side, side)
wall = np.c_[x.ravel(), y.ravel(), np.full(x.size, 4.0)]
floor = np.c_[x.ravel(), np.ones(x.size), 3.0 + y.ravel()]
red, blue = np.tile(np.uint8([200, 60, 40]), (x.size, 1)), np.tile(np.uint8([40, 90, 200]), (x.size, 1))
room = ViewedCloud("room", np.r_[wall, floor], {"colour": np.r_[red, blue]})
clouds = [room, ViewedCloud("wall", wall, {"colour": red})]
pose = np.eye(4)
pose[2, 3] = -2.5
cameras = ViewedCameras(("front.jpg",), pose[None], np.array([[[80.0, 0, 40], [0, 80, 30], [0, 0, 1]]]), (60, 80))
view = show_clouds(clouds, cameras, (0, -1, 0))
view
""", "print('after the view')")
CHOSEN = "print('chosen', view.chosen)"


def write_notebook(path: Path) -> Path:
    """Write the small notebook that shows a synthetic cloud."""
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in CELLS], metadata=kernel)
    nbformat.write(notebook, path)
    return path


def test_the_mouse_turns_the_cloud_in_jupyterlab(tmp_path):
    missing = browser.what_is_missing()
    if missing:
        pytest.skip(missing)
    from selenium.webdriver.support.ui import Select
    folder = tmp_path / "served"
    folder.mkdir()
    write_notebook(folder / "cloud.ipynb")
    with browser.jupyterlab(folder) as url, browser.chromium(tmp_path / "profile") as driver:
        browser.open_notebook(driver, url, "cloud.ipynb")
        browser.run_all(driver)
        assert browser.cell_errors(driver) == []
        canvas, = browser.wait_for(driver, lambda d: d.find_elements("css selector", ".cloud-view canvas"), "the view")
        assert browser.image_sources(driver) == []  # no still beside it
        assert browser.drag_changes(driver, canvas, (0, 0)) == 0  # a press alone turns nothing
        assert browser.drag_changes(driver, canvas, (150, 60)) > 0.05
        before = browser.photographed(driver, canvas)
        Select(driver.find_element("css selector", "select[aria-label='cloud']")).select_by_visible_text("wall")
        assert browser.share_changed(before, browser.photographed(driver, canvas)) > 0.02  # the floor is gone

        driver.find_element("xpath", "//button[text()='from the start']").click()
        browser.click_on_camera(driver, canvas)
        line = driver.find_element("css selector", ".cloud-line")
        browser.wait_for(driver, lambda d: line.text == "front.jpg", "the clicked camera's name")
        browser.edit_and_run_on(driver, len(CELLS) - 1, CHOSEN)
        page = driver.find_element("css selector", ".jp-Notebook")
        browser.wait_for(driver, lambda d: "chosen 0" in page.text, "the kernel to hear of the click")
        driver.save_screenshot(str(tmp_path / "cloud.png"))
        print(f"screenshot: {tmp_path / 'cloud.png'}")
        assert browser.severe_log_lines(driver) == []


def test_papermill_gets_a_picture_and_does_not_wait(tmp_path):
    source, result = write_notebook(tmp_path / "cloud.ipynb"), tmp_path / "out.ipynb"
    done = subprocess.run(
        [sys.executable, "-m", "papermill", str(source), str(result), "--no-progress-bar"], stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    cells = json.loads(result.read_text())["cells"]
    data = [output["data"] for cell in cells for output in cell.get("outputs", []) if "data" in output]
    # no widget that a reader could not see
    assert len(data) == 1 and {"image/png"} <= set(data[0]) <= {"image/png", "image/jpeg", "text/plain"}
    from PIL import Image
    text = data[0]["image/png"]
    picture = Image.open(io.BytesIO(base64.b64decode(text if isinstance(text, str) else "".join(text))))
    assert picture.size == (560, 420) and len(picture.convert("RGB").getcolors(420 * 560)) > 2
    assert "after the view" in json.dumps(cells[-1]["outputs"])
    # nor a greeting of Open3D
    assert not any("WebRTC" in json.dumps(cell) or "FEngine" in json.dumps(cell) for cell in cells)
