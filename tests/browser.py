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
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import lab  # noqa: E402

NOTEBOOK_SETTINGS = {"windowingMode": "none"}  # every cell is in the page, also what lies below the window's edge
CHROMIUM_OPTIONS = (
    "--headless=new",
    "--disable-dev-shm-usage",
    "--window-size=1400,1000",
    "--enable-unsafe-swiftshader",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--disable-quic",
)


class Address(str):
    """The address of a server, with the secret that opens it."""

    token = ""
    log: Path | None = None  # what the server and its kernels write


def _is_root() -> bool:
    return hasattr(os, "geteuid") and os.geteuid() == 0


def what_is_missing() -> str | None:
    """Say in plain words why a browser check cannot run here, or return None where it can."""
    if os.environ.get("VGGT_LORA_SKIP_BROWSER"):
        return "browser checks are switched off by VGGT_LORA_SKIP_BROWSER"
    for module, remedy in (
        ("selenium", "pip install 'vggt_lora[dev]'"),
        ("jupyterlab", "pip install 'vggt_lora[notebooks]'"),
        ("ipywidgets", "pip install 'vggt_lora[views]'"),
    ):
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
    """Run JupyterLab on a free port of this machine and yield its `Address`; its settings and log lie beside `folder`.
    """
    folder = Path(folder).resolve()
    settings = folder.parent / f"{folder.name}_jupyter"
    lab.write_settings(settings)  # as `make env` does
    of_notebooks = settings / "settings" / "@jupyterlab" / "notebook-extension" / "tracker.jupyterlab-settings"
    of_notebooks.parent.mkdir(parents=True, exist_ok=True)
    of_notebooks.write_text(json.dumps(NOTEBOOK_SETTINGS))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}",
        "--ServerApp.port_retries=0", "--expose-app-in-browser", f"--ServerApp.root_dir={folder}",
    ]
    command += ["--allow-root"] if _is_root() else []
    address = Address(f"http://127.0.0.1:{port}")
    address.token = secrets.token_hex(16)  # a server without one would run code for every user of this machine
    own = {
        "JUPYTER_TOKEN": address.token, "JUPYTER_CONFIG_DIR": settings,
        "JUPYTERLAB_SETTINGS_DIR": settings / "settings", "JUPYTERLAB_WORKSPACES_DIR": settings / "workspaces",
        "IPYTHONDIR": settings / "ipython",
    }
    log = address.log = settings / "server.log"
    with open(log, "wb") as output:
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=folder,
                                  env={**os.environ, **{name: str(path) for name, path in own.items()}})
    try:
        end = time.monotonic() + timeout
        while True:
            try:
                with urllib.request.urlopen(
                    urllib.request.Request(
                        f"{address}/api/status", headers={"Authorization": f"token {address.token}"}
                    ),
                    timeout=2,
                ):
                    break
            except OSError:
                if server.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(
                        f"JupyterLab did not answer; its log ends with:\n{log.read_text(errors='replace')[-2000:]}"
                    ) from None
                time.sleep(0.2)
        yield address
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
    for option in (
        *CHROMIUM_OPTIONS,
        f"--user-data-dir={Path(profile).resolve()}",
        *(["--no-sandbox"] if _is_root() else []),
    ):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    # named, so that selenium downloads none
    service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
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
    url: Address,  # of the server
    name: str,  # path of the notebook below the served folder
) -> None:
    """Open a notebook and wait until the application holds it."""
    driver.get(f"{url}/lab/tree/{name}?reset&token={url.token}")
    wait_for(
        driver,
        lambda d: d.execute_script(
            "return !!(window.jupyterapp && jupyterapp.shell.currentWidget && jupyterapp.shell.currentWidget.context)"
        ),
        f"{name} to open",
        180,
    )


def start(
    driver,
    command: str = "notebook:run-all-cells",  # of JupyterLab
) -> None:
    """Begin to run cells through the application, after the kernel is ready; `wait_until_run` waits for the last.

    Not through the menu: that races with the start of the kernel. The promise resolves when all cells are done; the
    page is asked for it again and again, since one long call would run into the limits of the driver and of selenium's
    connection. Meanwhile `phases` collects what progress lines say.
    """
    driver.execute_script(
        """
        window.allCells = {done: false, fault: null};
        window.phases = new Set();
        const line = /^[\\w ]+: +(\\d\\d:\\d\\d|\\d+%)/;
        const watching = setInterval(() => document.querySelectorAll('.jp-OutputArea-output pre').forEach(shown => {
            if (line.test(shown.innerText)) phases.add(shown.innerText.trim());
        }), 300);
        (async () => {
            const context = jupyterapp.shell.currentWidget.context;
            await context.ready;
            await context.sessionContext.ready;
            await context.sessionContext.session.kernel.info;
            await jupyterapp.commands.execute(arguments[0]);
        })().then(() => { allCells.done = true; }, error => { allCells = {done: true, fault: String(error)}; })
            .finally(() => clearInterval(watching));
    """,
        command,
    )


def wait_until_run(
    driver,
    timeout: float = 1200.0,  # seconds; generous, since it only ends what hangs
) -> list[str]:
    """Wait for the cells that `start` runs; returns the progress lines that were seen. RuntimeError says what went
    wrong.
    """
    wait_for(driver, lambda d: d.execute_script("return allCells.done"), "all cells to run", timeout)
    fault = driver.execute_script("return allCells.fault")
    if fault:
        raise RuntimeError(f"running all cells failed: {fault}")
    return driver.execute_script("return [...phases]")


def run_all(
    driver,
    timeout: float = 1200.0,  # seconds
) -> list[str]:
    """Run all cells and wait for the last; returns the progress lines that were seen."""
    start(driver)
    return wait_until_run(driver, timeout)


def edit_and_run_on(
    driver,
    cell: int,  # number of the cell
    source: str,  # its new text
) -> None:
    """Replace a cell's text and choose Run Selected Cell and All Below, as a person would."""
    driver.execute_script("""
        const notebook = jupyterapp.shell.currentWidget.content;
        notebook.activeCellIndex = arguments[0];
        notebook.deselectAll();
        notebook.model.sharedModel.cells[arguments[0]].setSource(arguments[1]);
    """, cell, source)
    start(driver, "notebook:run-all-below")
    wait_until_run(driver)


def dialogs(
    driver,
) -> list[str]:
    """Return the text of every dialog and notification on the page."""
    return driver.execute_script(
        "return [...document.querySelectorAll('.jp-Dialog, .Toastify__toast')].map(shown => shown.innerText)"
    )


def first_screen(
    driver,
) -> dict:
    """Return what the notebook shows without scrolling: {"pictures": decoded images, "parameters": from 0 (not there)
    to 1 (the whole cell)}; {} before it is open.
    """
    return driver.execute_script("""
        const current = jupyterapp.shell.currentWidget;
        const outer = current && current.node.querySelector('.jp-WindowedPanel-outer');
        const tagged = cell => (cell.model.getMetadata('tags') || []).includes('parameters');
        const cell = outer && current.content && current.content.widgets.find(tagged);
        if (!cell) return {};
        const panel = outer.getBoundingClientRect();
        const share = element => {
            const box = element.getBoundingClientRect();
            const inside = Math.min(box.bottom, panel.bottom) - Math.max(box.top, panel.top);
            return box.height && Math.max(0, inside) / box.height;
        };
        const pictures = [...current.node.querySelectorAll('.jp-MarkdownCell img')]
            .filter(image => image.naturalWidth && share(image) > 0.99);
        return {pictures: pictures.length, parameters: share(cell.node)};
    """)


def cell_errors(
    driver,
) -> list[str]:
    """Return the text of every error shown in the notebook; JupyterLab draws it as it draws what goes to stderr."""
    from selenium.webdriver.common.by import By

    texts = [
        shown.text
        for shown in driver.find_elements(By.CSS_SELECTOR, '[data-mime-type="application/vnd.jupyter.stderr"]')
    ]
    return [text for text in texts if re.match(r"-{20}|\w+(Error|Exception|Interrupt)\b", text)]


def severe_log_lines(
    driver,
) -> list[str]:
    """Return the severe lines of the browser's own log, less the one that importing open3d causes.

    open3d imports dash, which opens a channel of its own in the kernel; JupyterLab knows no such channel and says so,
    once. JupyterLab lets the browser ask for a picture attached to a cell before it puts the picture there; that it is
    shown is checked elsewhere.
    """
    lines = [line["message"] for line in driver.get_log("browser") if line["level"] == "SEVERE"]
    # a reload without a click
    lines = [line for line in lines if not line.startswith("attachment:") and "beforeunload" not in line]
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


def photographed(
    driver,
    element,  # e.g. a canvas, whose pixels a script cannot read between two frames
):
    """Return the pixels of an element as a person sees it: (height, width, 3) int."""
    import io

    import numpy as np
    from PIL import Image
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    # two frames later, what was asked for is drawn
    driver.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
    return np.asarray(Image.open(io.BytesIO(element.screenshot_as_png)).convert("RGB")).astype(int)


def share_changed(
    one,
    other,  # of photographed
) -> float:
    """Return the share of the pixels that differ clearly."""
    return float((abs(one - other).sum(-1) > 30).mean())


def drag_changes(
    driver,
    canvas,
    way: tuple[int, int],  # pixels to the right and down
) -> float:
    """Drag the view that the mouse turns; return the share of its pixels that change."""
    from selenium.webdriver.common.action_chains import ActionChains
    before = photographed(driver, canvas)
    ActionChains(driver).move_to_element(canvas).click_and_hold().move_by_offset(*way).release().perform()
    return share_changed(before, photographed(driver, canvas))


def click_on_camera(
    driver,
    canvas,
    number: int = 0,
) -> None:
    """Click a camera of the view that the mouse turns."""
    from selenium.webdriver.common.action_chains import ActionChains
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    spot = driver.execute_script("""
        const canvas = arguments[0], at = canvas.parentNode.cloud.centreOf(arguments[1]);
        return [at[0] - canvas.clientWidth / 2, at[1] - canvas.clientHeight / 2];
    """, canvas, number)
    ActionChains(driver).move_to_element_with_offset(canvas, round(spot[0]), round(spot[1])).click().perform()


def restarts(
    url: Address,
) -> list[str]:
    """Return the lines of the server's log that speak of a kernel that died; JupyterLab shows no error then, and runs
    no further cell.
    """
    return [
        line
        for line in url.log.read_text(errors="replace").splitlines()
        if "KernelRestarter: restarting kernel" in line
    ]


def save(
    driver,
) -> None:
    """Save the open notebook and wait until it is saved."""
    driver.execute_script(
        "window.saved = false; jupyterapp.shell.currentWidget.context.save().finally(() => { saved = true; })"
    )
    wait_for(driver, lambda d: d.execute_script("return saved"), "the notebook to be saved")


def code_cells(
    driver,
) -> list[dict]:
    """Return the code cells of the open notebook as the application holds them: {"source", "count" (None: never run),
    "errors" [texts]}.
    """
    return driver.execute_script("""
        const text = value => Array.isArray(value) ? value.join('') : String(value);
        const cells = jupyterapp.shell.currentWidget.content.model.sharedModel.cells;
        return cells.filter(cell => cell.cell_type === 'code').map(cell => cell.toJSON()).map(cell => ({
            source: text(cell.source), count: cell.execution_count,
            errors: cell.outputs.filter(output => output.output_type === 'error')
                .map(output => output.ename + ': ' + output.evalue)}));
    """)


CONTROLS = {  # what a person can move, and where its own read-out stands
    "slider": ".widget-slider",
    "choice": ".widget-dropdown",
    "radio": ".widget-radio",
    "toggle": ".widget-toggle-buttons, .widget-toggle-button",
    "tick": ".widget-checkbox",
    "button": ".widget-button",
}


def controls(
    driver,
) -> list[tuple[int, str, str]]:
    """Return (number of its output on the page, kind, description) of every control that is shown."""
    return [
        tuple(found)
        for found in driver.execute_script(
            """
        const found = [];
        document.querySelectorAll('.jp-Cell-outputArea').forEach((area, number) => {
            for (const [kind, selector] of Object.entries(arguments[0]))
                for (const element of area.querySelectorAll(selector)) {
                    const label = element.querySelector('.widget-label');
                    if (element.offsetParent && !(kind === 'button' && element.closest('.widget-toggle-buttons')))
                        found.push([number, kind,
                                    (label && label.offsetParent ? label.innerText : element.innerText).trim()]);
                }
        });
        return found;
    """,
            CONTROLS,
        )
    ]


def shown_in(
    driver,
    area: int,  # number of the output on the page
) -> dict:
    """Return what an output shows: {"text": all of it, less what the controls themselves say, "images": checksums of
    the decoded pictures}.
    """
    return driver.execute_script(
        """
        const area = document.querySelectorAll('.jp-Cell-outputArea')[arguments[0]];
        const own = [...area.querySelectorAll(arguments[1])];
        const written = '.widget-label, .widget-html, .widget-htmlmath, .jp-OutputArea-output pre, '
            + '.jp-RenderedHTMLCommon';
        const texts = [...area.querySelectorAll(written)]
            .filter(element => !own.some(control => control.contains(element))).map(element => element.innerText);
        const sum = drawn => {
            const width = drawn.naturalWidth || drawn.width, height = drawn.naturalHeight || drawn.height;
            if (!width || !height || drawn.complete === false) return [0, 0, 0];
            const canvas = document.createElement('canvas');
            canvas.width = width; canvas.height = height;
            const context = canvas.getContext('2d');
            context.drawImage(drawn, 0, 0);
            let total = 0;
            for (const pixel of new Uint32Array(context.getImageData(0, 0, width, height).data.buffer))
                total = (Math.imul(total, 31) + pixel) | 0;
            return [width, height, total];
        };
        return {text: texts.join('\\n'), images: [...area.querySelectorAll('img, canvas')].map(sum)};
    """,
        area,
        ", ".join(CONTROLS.values()),
    )


def control_in(
    driver,
    area: int,  # number of the output on the page
    kind: str,  # of CONTROLS
    label: str,  # its description
):
    """Return a control's element, scrolled to the middle of the window."""
    element = driver.execute_script(
        """
        const name = element => {
            const label = element.querySelector('.widget-label');
            return (label && label.offsetParent ? label.innerText : element.innerText).trim();
        };
        const area = document.querySelectorAll('.jp-Cell-outputArea')[arguments[0]];
        const found = [...area.querySelectorAll(arguments[1])].find(element => name(element) === arguments[2]);
        if (found) found.scrollIntoView({block: 'center'});
        return found;
    """,
        area,
        CONTROLS[kind],
        label,
    )
    if element is None:
        raise LookupError(f"no {kind} {label!r} in output {area}")
    return element


def move(
    driver,
    area: int,
    kind: str,
    label: str,
) -> None:
    """Move a control by one step, as a person would: keys on a slider's handle, a click on what can be clicked."""
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import Select
    element = control_in(driver, area, kind, label)
    if kind == "slider":
        handle = element.find_element(By.CSS_SELECTOR, ".noUi-handle")
        at_end = handle.get_attribute("aria-valuenow") == handle.get_attribute("aria-valuemax")
        # as the tab key would; a click may meet a page that still moves
        driver.execute_script("arguments[0].focus()", handle)
        ActionChains(driver).send_keys(Keys.ARROW_LEFT if at_end else Keys.ARROW_RIGHT).perform()
    elif kind == "choice":
        chosen = Select(element.find_element(By.TAG_NAME, "select"))
        now = chosen.options.index(chosen.first_selected_option)
        chosen.select_by_index((now + 1) % len(chosen.options))
    elif kind in ("radio", "toggle"):
        others = [button for button in element.find_elements(By.CSS_SELECTOR, "input[type=radio], button")
                  if not button.is_selected() and "mod-active" not in button.get_attribute("class")]
        (others[0] if others else element).click()
    elif kind == "tick":
        element.find_element(By.CSS_SELECTOR, "input").click()
    else:
        element.click()


def tall_screenshot(
    driver,
    path: Path,
    most: int = 12_000,  # pixels in height
) -> None:
    """Photograph the open notebook from top to bottom."""
    size = driver.get_window_size()
    height = driver.execute_script("""
        const cells = document.querySelectorAll('.jp-NotebookPanel:not(.lm-mod-hidden) .jp-Notebook-cell');
        if (!cells.length) return 0;
        return cells[cells.length - 1].getBoundingClientRect().bottom - cells[0].getBoundingClientRect().top;
    """)
    driver.set_window_size(size["width"], min(most, max(size["height"], int(height) + 250)))
    driver.execute_script("document.querySelector('.jp-WindowedPanel-outer').scrollTop = 0")
    driver.save_screenshot(str(path))
    driver.set_window_size(size["width"], size["height"])
