"""Drive a real JupyterLab in a real browser: for tests that must see what a person sees.

Everything stays on this machine: the server listens on 127.0.0.1, and the browser's own traffic is switched off.
Use:

    with jupyterlab(folder) as url, chromium(tmp_path / "profile") as driver:
        open_notebook(driver, url, "demo.ipynb")
        run_all(driver)
        assert not cell_errors(driver)
"""
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

PAGE_CONFIG = {  # open3d brings dash, whose extension makes JupyterLab ask for a build in a dialog that blocks everything
    "buildCheck": False,
    "buildAvailable": False,
    "disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True},
}
CHROMIUM_OPTIONS = (
    "--headless=new", "--disable-dev-shm-usage", "--window-size=1400,1000", "--enable-unsafe-swiftshader",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run", "--disable-quic",
)


def _is_root() -> bool:
    return hasattr(os, "geteuid") and os.geteuid() == 0


def what_is_missing() -> str | None:
    """Say in plain words why a browser check cannot run here, or return None where it can."""
    if os.environ.get("VGGT_LORA_SKIP_BROWSER"):
        return "browser checks are switched off by VGGT_LORA_SKIP_BROWSER"
    for module, remedy in (("selenium", "pip install 'vggt_lora[dev]'"), ("jupyterlab", "pip install 'vggt_lora[views]'"),
                           ("ipywidgets", "pip install 'vggt_lora[views]'")):
        try:
            __import__(module)
        except ImportError:
            return f"{module} is not installed ({remedy})"
    for program in ("chromium", "chromedriver"):
        if shutil.which(program) is None:
            return f"{program} is not installed (apt-get install chromium chromium-driver)"
    return None


@contextlib.contextmanager
def jupyterlab(
    folder: Path,  # served as root; JupyterLab saves what it runs, so give it copies
    timeout: float = 60.0,  # seconds until the server must answer
):
    """Run JupyterLab on a free port of this machine and yield its address; its settings and log lie beside `folder`."""
    folder = Path(folder).resolve()
    settings = folder.parent / f"{folder.name}_jupyter"
    (settings / "labconfig").mkdir(parents=True, exist_ok=True)
    (settings / "labconfig" / "page_config.json").write_text(json.dumps(PAGE_CONFIG))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0",
               "--IdentityProvider.token=", "--expose-app-in-browser", f"--ServerApp.root_dir={folder}"]
    command += ["--allow-root"] if _is_root() else []
    own = {"JUPYTER_CONFIG_DIR": settings, "JUPYTERLAB_SETTINGS_DIR": settings / "settings", "JUPYTERLAB_WORKSPACES_DIR": settings / "workspaces",
           "IPYTHONDIR": settings / "ipython"}
    log = settings / "server.log"
    with open(log, "wb") as output:
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=folder,
                                  env={**os.environ, **{name: str(path) for name, path in own.items()}})
    try:
        end = time.monotonic() + timeout
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/status", timeout=2):
                    break
            except OSError:
                if server.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"JupyterLab did not answer; its log ends with:\n{log.read_text(errors='replace')[-2000:]}") from None
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


@contextlib.contextmanager
def chromium(
    profile: Path,  # new folder for the browser's own files
):
    """Start a headless Chromium with a profile of its own and yield the selenium driver."""
    from selenium import webdriver
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for option in (*CHROMIUM_OPTIONS, f"--user-data-dir={Path(profile).resolve()}", *(["--no-sandbox"] if _is_root() else [])):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))  # named, so that selenium downloads none
    driver = webdriver.Chrome(options=options, service=service)
    driver.set_script_timeout(300)
    try:
        yield driver
    finally:
        driver.quit()


def wait_for(
    driver,
    question,  # function of the driver; a true answer ends the wait and is returned
    what: str,  # named in the error
    timeout: float = 60.0,  # seconds
):
    """Ask until the answer is true; widgets redraw, so an element that has gone stale is looked up anew."""
    from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException
    from selenium.webdriver.support.ui import WebDriverWait
    wait = WebDriverWait(driver, timeout, ignored_exceptions=(StaleElementReferenceException, NoSuchElementException))
    return wait.until(question, message=f"waited {timeout:.0f} s for {what}")


def open_notebook(
    driver,
    url: str,  # of the server
    name: str,  # path of the notebook below the served folder
) -> None:
    """Open a notebook and wait until the application holds it."""
    driver.get(f"{url}/lab/tree/{name}?reset")
    wait_for(driver, lambda d: d.execute_script(
        "return !!(window.jupyterapp && jupyterapp.shell.currentWidget && jupyterapp.shell.currentWidget.context)"), f"{name} to open")


def run_all(
    driver,
) -> None:
    """Run all cells through the application, after the kernel is ready, and wait for the last; RuntimeError says what went wrong.

    Not through the menu: that races with the start of the kernel. The promise resolves when all cells are done.
    """
    fault = driver.execute_async_script("""
        const done = arguments[arguments.length - 1];
        (async () => {
            const context = jupyterapp.shell.currentWidget.context;
            await context.ready;
            await context.sessionContext.ready;
            await context.sessionContext.session.kernel.info;
            await jupyterapp.commands.execute('notebook:run-all-cells');
        })().then(() => done(null), error => done(String(error)));
    """)
    if fault:
        raise RuntimeError(f"running all cells failed: {fault}")


def cell_errors(
    driver,
) -> list[str]:
    """Return the text of every error shown in the notebook."""
    from selenium.webdriver.common.by import By
    return [shown.text for shown in driver.find_elements(By.CSS_SELECTOR, '[data-mime-type="application/vnd.jupyter.error"]')]


def severe_log_lines(
    driver,
) -> list[str]:
    """Return the severe lines of the browser's own log, less the one that importing open3d causes.

    open3d imports dash, which opens a channel of its own in the kernel; JupyterLab knows no such channel and says so, once.
    """
    lines = [line["message"] for line in driver.get_log("browser") if line["level"] == "SEVERE"]
    greeting = next((line for line in lines if "Exception opening new comm" in line), None)
    if greeting is not None:
        lines.remove(greeting)
    return lines


def image_sources(
    driver,
    selector: str = ".jp-OutputArea img",
) -> list[str]:
    """Return the addresses of the images on the page; a widget's image gets a new one with each new picture."""
    from selenium.webdriver.common.by import By
    return [image.get_attribute("src") for image in driver.find_elements(By.CSS_SELECTOR, selector)]


def image_pixels(
    driver,
    selector: str = ".jp-OutputArea img",
):
    """Return the first image as the browser has decoded it: (width, height, number of different colours, checksum)."""
    return tuple(driver.execute_script("""
        const image = document.querySelector(arguments[0]);
        if (!image || !image.complete || !image.naturalWidth) return [0, 0, 0, 0];
        const canvas = document.createElement('canvas');
        canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
        const context = canvas.getContext('2d');
        context.drawImage(image, 0, 0);
        const pixels = new Uint32Array(context.getImageData(0, 0, canvas.width, canvas.height).data.buffer);
        let sum = 0;
        for (const pixel of pixels) sum = (Math.imul(sum, 31) + pixel) | 0;
        return [canvas.width, canvas.height, new Set(pixels).size, sum];
    """, selector))


def press_slider(
    driver,
    label: str,  # the slider's description
    keys: str,  # e.g. Keys.ARROW_RIGHT
) -> None:
    """Click the handle of the slider with this description and press keys, as a person would."""
    from selenium.webdriver.common.by import By

    def handle(_):
        for slider in driver.find_elements(By.CSS_SELECTOR, ".widget-slider"):
            if slider.find_element(By.CSS_SELECTOR, ".widget-label").text == label:
                return slider.find_element(By.CSS_SELECTOR, ".noUi-handle")
        return None

    found = wait_for(driver, handle, f"the slider {label!r}")
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", found)
    found.click()
    found.send_keys(keys)
