"""The cloud with sliders, in a real JupyterLab and a real browser; and the same notebook where nobody watches."""
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
from vggt_lora.views.clouds.clouds3d import cloud_widget
""", """\
side = np.linspace(-1, 1, 60)
x, y = np.meshgrid(side, side)
wall = np.c_[x.ravel(), y.ravel(), np.full(x.size, 4.0)]
floor = np.c_[x.ravel(), np.ones(x.size), 3.0 + y.ravel()]
colours = np.r_[np.tile([[200, 60, 40]], (x.size, 1)), np.tile([[40, 90, 200]], (x.size, 1))].astype(np.uint8)
view = cloud_widget({"room": (np.r_[wall, floor], colours), "wall": (wall, None)}, size=(300, 400))
view
""", "print('after the view')")


def write_notebook(path: Path) -> Path:
    """Write the small notebook that shows a synthetic cloud."""
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in CELLS], metadata=kernel)
    nbformat.write(notebook, path)
    return path


def caption(driver) -> str:
    """Return the line under the picture that says what it shows."""
    from selenium.webdriver.common.by import By
    texts = [label.text for label in driver.find_elements(By.CSS_SELECTOR, ".jp-OutputArea .widget-html")]
    return next((text for text in texts if "azimuth" in text and "points" in text), "")


def test_slider_turns_the_cloud_in_jupyterlab(tmp_path):
    missing = browser.what_is_missing()
    if missing:
        pytest.skip(missing)
    from selenium.webdriver.common.keys import Keys
    folder = tmp_path / "served"
    folder.mkdir()
    write_notebook(folder / "cloud.ipynb")
    with browser.jupyterlab(folder) as url, browser.chromium(tmp_path / "profile") as driver:
        browser.open_notebook(driver, url, "cloud.ipynb")
        browser.run_all(driver)
        assert browser.cell_errors(driver) == []
        browser.wait_for(driver, lambda d: "azimuth 30°" in caption(d), "the caption of the view")
        before = browser.wait_for(driver, lambda d: (seen := browser.image_pixels(d))[0] and seen, "the picture")
        assert before[:2] == (400, 300) and before[2] > 2, before  # the right size, and not blank
        assert len(browser.image_sources(driver)) == 1  # one picture: the static form is not shown beside the sliders

        browser.press_slider(driver, "azimuth", Keys.ARROW_RIGHT)
        browser.wait_for(
            driver, lambda d: "azimuth 35°" in caption(d), "the answer of the kernel to the azimuth slider"
        )
        after = browser.wait_for(
            driver, lambda d: (seen := browser.image_pixels(d))[0] and seen != before and seen, "another picture"
        )
        assert after[:2] == before[:2]

        browser.press_slider(driver, "elevation", Keys.ARROW_LEFT * 3)
        browser.wait_for(
            driver, lambda d: "elevation 5°" in caption(d), "the answer of the kernel to the elevation slider"
        )
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
    assert len(data) == 1 and set(data[0]) == {"image/png", "text/plain"}  # no widget that a reader could not see
    from PIL import Image
    text = data[0]["image/png"]
    picture = Image.open(io.BytesIO(base64.b64decode(text if isinstance(text, str) else "".join(text))))
    assert picture.size == (400, 300) and len(picture.getcolors(400 * 300)) > 2
    assert "after the view" in json.dumps(cells[-1]["outputs"])
    # nor a greeting of Open3D
    assert not any("WebRTC" in json.dumps(cell) or "FEngine" in json.dumps(cell) for cell in cells)
