"""Names and texts that want to be markup, files that want to be elsewhere; pages and notebooks that load nothing from
the network.
"""
import html.parser
import json
import os
import pickle
import re
from pathlib import Path

import pytest

from vggt_lora.core import SceneError, VggtLoraError

ROOT = Path(__file__).resolve().parent.parent
EVIL = "<img src=http://evil.example/x onerror=alert(1)>\"'&</script><script>alert(2)</script>"


class Asks(html.parser.HTMLParser):
    """What a page would load or run."""

    LOADS = {"src", "href", "srcset", "data", "action", "formaction", "poster", "background", "cite", "xlink:href"}

    def __init__(self):
        super().__init__()
        self.found, self.style = [], False

    def handle_starttag(self, tag, attributes):
        self.style = tag == "style"
        if tag in ("script", "iframe", "object", "embed", "base", "link"):
            self.found.append(f"<{tag}>")
        for name, value in attributes:
            value = (value or "").strip().lower()
            if (
                name in self.LOADS
                and not value.startswith(("data:image/", "#"))
                and (tag != "a" or value.startswith("javascript:"))
            ):
                self.found.append(f"{tag} {name}={value[:60]}")
            if name.startswith("on"):
                self.found.append(f"{tag} {name}")
            if name == "style" and "url(" in value and "url(data:" not in value:
                self.found.append(f"{tag} {name}={value[:60]}")

    def handle_endtag(self, tag):
        self.style = self.style and tag != "style"

    def handle_data(self, data):
        if self.style and ("@import" in data or re.search(r"url\((?!['\"]?data:)", data)):
            self.found.append(f"style {data[:60]}")


def asks(text: str) -> list[str]:
    """Everything outside that a page refers to, and every script in it."""
    parser = Asks()
    parser.feed(text)
    parser.close()
    return parser.found


def test_the_reader_finds_what_it_looks_for():
    for text in (
        "<script src=a></script>", "<img src='http://a/b'>", "<p onclick=x()>", "<style>@import 'x'</style>",
        "<div style='background:url(http://a)'>", "<link rel=x href=y>", "<a href='javascript:x()'>",
    ):
        assert asks(text), text
    assert (
        asks(
            "<img src='data:image/png;base64,AA'><a href='http://a'>a link that waits for a click</a><style>p { "
            "color: red }</style>"
        )
        == []
    )


# --- pages ----------------------------------------------------------------------------------------------------------

def hostile_run(folder: Path) -> Path:
    """A run whose names, notes, warnings and errors all are markup."""
    import sys

    sys.path.insert(0, str(Path(__file__).parent))
    from test_compare import invented_run

    invented_run(folder, "a", 0, 0.7)
    for name in ("config.json", "results.json", "resource_usage.json"):
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace("<hall>", json.dumps(EVIL)[1:-1]).replace('"laser"', json.dumps(EVIL)))
    config = json.loads((folder / "config.json").read_text())
    config["config"]["model"] = EVIL
    config["scenes"] = [{"name": EVIL, "frames": 12, "metric": True, "notes": [EVIL]}]
    config["environment"] = {"code": EVIL, "device": EVIL, "packages": {EVIL: EVIL}}
    (folder / "config.json").write_text(json.dumps(config))
    results = json.loads((folder / "results.json").read_text())
    results |= {"warnings": [EVIL], "claims": [{"sentence": EVIL}], "frames_left_out": [EVIL]}
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "resource_usage.json").unlink()
    (folder / "train.log").write_text(EVIL + "\n")
    return folder


def test_a_run_full_of_markup_gives_a_page_of_text(tmp_path):
    from vggt_lora.views.report import run_report

    page = run_report(hostile_run(tmp_path / "run"))
    assert asks(page) == []
    assert "&lt;img src=http://evil.example" in page and "<script" not in page


def test_a_comparison_of_such_runs_too(tmp_path):
    from vggt_lora.compare import compare_runs, read_record
    from vggt_lora.comparison.page import comparison_page

    hostile_run(tmp_path / "run")
    (tmp_path / "run" / "resource_usage.json").write_text('{"trainable": 100, "seconds": 10.0}')
    page = comparison_page(
        compare_runs([read_record(tmp_path / "run")]), EVIL, {EVIL: {"state": "failed", "error": EVIL}}, notes=(EVIL,)
    )
    assert asks(page) == [] and "<script" not in page


def test_pages_forbid_what_they_do_not_need():
    from vggt_lora.views.page import page, tag

    made = page(EVIL, EVIL, tag("p", EVIL, title=EVIL))
    assert asks(made) == [] and "default-src 'none'" in made
    assert made.index("Content-Security-Policy") < made.index("<title>")


def test_figures_draw_names_as_they_are(tmp_path):
    """Dollar signs and braces in a name are no formula, and markup is no markup."""
    import matplotlib

    matplotlib.use("agg")
    import numpy as np

    from vggt_lora.views.plots import depth_comparison

    from vggt_lora.views.charts import loss_curves
    from vggt_lora.views.figures import new_figure

    one = np.ones((8, 12))
    frame = {
        "photo": np.full((8, 12, 3), 0.5), "truth": one, "valid": one > 0, "predictions": {"base": one, EVIL: one},
        "name": "$\\frac{1$ " + EVIL,
    }
    for figure in (
        depth_comparison([frame], "m"),
        loss_curves([{"step": i, "split": s, "loss": 1.0 / (i + 1)} for i in range(3) for s in ("train", "val")]),
    ):
        getattr(figure, "figure", figure).savefig(tmp_path / "figure.png", bbox_inches="tight")
        assert (tmp_path / "figure.png").stat().st_size > 1000
    figure = new_figure(3, 2)
    ax = figure.subplots()
    ax.set_yticks([0, 1], ["$\\frac{a$", "b"])
    ax.set(xscale="log", xlim=(1, 1000), title="$\\nothing{$")
    figure.savefig(tmp_path / "ticks.png")
    # powers on a logarithmic axis are still set as such
    assert any(label.get_parse_math() and "10^" in label.get_text() for label in ax.get_xticklabels())


# --- notebooks ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("path", sorted((ROOT / "nbs").rglob("*.ipynb")), ids=lambda p: p.stem)
def test_notebooks_load_nothing_from_the_network(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            assert not any("javascript" in kind for kind in data), f"{path.name}: a script among its outputs"
            found = asks("".join(data.get("text/html", "")))
            assert not found, f"{path.name}: {found}"
        if cell["cell_type"] == "markdown":
            text = "".join(cell["source"])
            assert not re.search(r"!\[[^\]]*\]\(\s*https?:", text) and not re.search(
                r"<(script|iframe|img|link)\b[^>]*https?:", text, re.I
            ), path.name
        else:
            assert not re.search(r"^\s*[!%](?!matplotlib)", "".join(cell["source"]), re.M), (
                f"{path.name}: a command of the shell"
            )


def test_no_module_opens_connections_but_the_downloads():
    """Who may ask the network is named: the dataset's download and the hub's library, both on the user's word."""
    allowed = {
        "files/http.py", "scenes/eth3d_server.py", "download.py", "model/weights.py", "prediction/network.py",
        "adapters/hub.py", "doctor.py",
    }
    for path in sorted((ROOT / "vggt_lora").rglob("*.py")):
        name = path.relative_to(ROOT / "vggt_lora").as_posix()
        if re.search(
            r"^\s*(import|from) "
            r"(requests|urllib\.request|http\.client|http\.server|socket|ftplib|aiohttp|huggingface_hub)\b",
            path.read_text(encoding="utf-8"),
            re.M,
        ):
            assert name in allowed, name
        assert not re.search(
            r"trust_remote_code\s*=\s*True|weights_only\s*=\s*False|allow_pickle\s*=\s*True|(?<![.\w] "
            r")(?<![.\w])eval\(|(?<![.\w])exec\(|os\.system\(|shell\s*=\s*True|pickle\.loads?\(",
            code_of(path),
        ), name


def code_of(path: Path) -> str:
    """A module without its texts and comments."""
    import io
    import tokenize

    kept = [
        t.string
        for t in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
        if t.type not in (tokenize.STRING, tokenize.COMMENT)
    ]
    return re.sub(r" ?([.(=]) ?", r"\1", " ".join(kept))


# --- files that want to be elsewhere --------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["../outside.JPG", "/etc/hostname", "a/../../outside.JPG", "..\\outside.JPG"])
def test_a_photo_may_not_be_named_outside_of_its_scene(name, tmp_path):
    """Photos named by a model lie in the scene's folder, whatever the model says."""
    from tests.torture.jobs import scene_of
    from vggt_lora.scenes.opening import open_scene

    scene = scene_of(tmp_path / "base")
    (tmp_path / "base" / "outside.JPG").write_bytes(next((scene / "images").rglob("*.JPG")).read_bytes())
    path = scene / "dslr_calibration_undistorted" / "images.txt"
    text = path.read_text()
    first = re.search(r"\S+\.JPG", text).group()
    path.write_text(text.replace(first, name, 1))
    with pytest.raises(SceneError, match="leads out|" + re.escape(name)):
        frames = open_scene(scene).frames
        outside = [f for f in frames if not Path(os.path.realpath(f.image_path)).is_relative_to(scene)]
        assert not outside, outside


def test_a_checkpoint_with_code_is_not_run(tmp_path):
    from vggt_lora.training.checkpoint import CheckpointError, read_checkpoint

    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "sprung",)

    import torch

    for name, write in {
        "plain.pt": lambda p: p.write_bytes(pickle.dumps(Trap())),
        "torch.pt": lambda p: torch.save({"weights": Trap(), "counters": {"step": 1}}, p),
    }.items():
        write(tmp_path / name)
        with pytest.raises(CheckpointError, match=name):
            read_checkpoint(tmp_path / name)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/b", "..", ".hidden", ""])
def test_a_comparison_stays_in_its_folder(name):
    from vggt_lora.compare import CompareConfig

    with pytest.raises(VggtLoraError):
        CompareConfig(name=name)


def test_a_point_of_a_grid_stays_in_its_folder():
    from vggt_lora.comparison.grid import grid_points

    names = [p.name for p in grid_points("model=../../x,/etc/passwd,..")]
    assert all("/" not in n and n not in (".", "..") and not n.startswith(".") for n in names) and len(set(names)) == 3


# --- links, archives, devices ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["S_IFLNK", "S_IFCHR", "S_IFBLK", "S_IFIFO", "S_IFSOCK"])
def test_an_archive_makes_plain_files_only(kind, tmp_path):
    """An entry that says it is a link or a device is refused, or its contents come out as a plain file."""
    import stat

    py7zr = pytest.importorskip("py7zr")
    from vggt_lora.files.archive import unpack

    with py7zr.SevenZipFile(tmp_path / "bad.7z", "w") as packed:
        packed.writestr(b"/etc/passwd", "pipes/a")
        for entry in packed.header.files_info.files:
            entry["attributes"] = (getattr(stat, kind) | 0o777) << 16 | 0x8000
    try:
        unpack(tmp_path / "bad.7z", tmp_path / "data", progress=False)
    except SceneError as error:
        assert "bad.7z" in str(error) and not list((tmp_path / "data").iterdir())
    else:
        assert stat.S_ISREG(os.lstat(tmp_path / "data" / "pipes" / "a").st_mode)


def test_a_zip_is_no_archive_of_a_scene(tmp_path):
    import zipfile

    from vggt_lora.files.archive import unpack

    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as packed:
        packed.writestr("../../evil", "x")
    with pytest.raises(SceneError, match="bad.zip: not a complete 7-Zip archive"):
        unpack(tmp_path / "bad.zip", tmp_path / "data", progress=False)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["bad.zip", "data"]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_link_out_of_the_hubs_cache_is_refused(name, tmp_path, monkeypatch):
    """The hub's cache consists of links to its own blobs; one to anything else is none of its making."""
    import huggingface_hub

    from vggt_lora.core import WeightsError
    from vggt_lora.model.weights import find_weights

    home = tmp_path / "models--some--model"
    (home / "snapshots" / "abc").mkdir(parents=True)
    (home / "blobs").mkdir()
    (tmp_path / "secret").write_text("{}")
    for file in ("model.safetensors", "config.json"):
        (home / "blobs" / file).write_text("{}")
        (home / "snapshots" / "abc" / file).symlink_to(home / "blobs" / file)
    asked = []
    monkeypatch.setattr(
        huggingface_hub,
        "hf_hub_download",
        lambda repo, file, revision=None, **rest: asked.append(file) or str(home / "snapshots" / "abc" / file),
    )
    assert find_weights("some/model").path.name == "model.safetensors"
    (home / "snapshots" / "abc" / name).unlink()
    (home / "snapshots" / "abc" / name).symlink_to(tmp_path / "secret")
    with pytest.raises(WeightsError, match=f"{name}: links to a place outside the hub's cache"):
        find_weights("some/model")
    # names of our own: what a repository lists is never asked for
    assert set(asked) == {"config.json", "model.safetensors"}


# --- widgets and the network ----------------------------------------------------------------------------------------

def everything_in(widget) -> list:
    """A widget and all below it."""
    return [widget, *(w for child in getattr(widget, "children", ()) for w in everything_in(child))]


def test_widgets_show_names_as_text():
    """Names of photos, sources, models and errors, in panels, sliders and the monitor of a run."""
    ipywidgets = pytest.importorskip("ipywidgets")
    import numpy as np

    from vggt_lora.views.widgets.base import Choice, Panel, PhotoSlider, Tick
    from vggt_lora.views.widgets.model import TreePage
    from vggt_lora.views.widgets.run import MonitorPage

    class Evil(Panel):
        def picture(self):
            return np.zeros((2, 2, 3))

        def caption(self):
            return EVIL

    class Broken(Evil):
        def picture(self):
            raise ValueError(EVIL)

    monitor = MonitorPage(lambda: None)
    monitor.show(EVIL, 1, 2, None, False, False)
    tree = TreePage.__new__(TreePage)
    tree.parts, tree.parameters, tree.python = [f"{EVIL}.a"], lambda: EVIL, lambda: EVIL
    inputs = {name: ipywidgets.Checkbox(description=name) for name in ("strategy", "rank", f"{EVIL}.a")}
    pages = [
        Evil({EVIL: Choice((EVIL, "b")), "tick": Tick()}).page(),
        Broken({"a": Tick()}).page(),
        PhotoSlider([EVIL], lambda i: np.zeros((2, 2, 3))).page(),
        monitor.page,
        tree.arrange(inputs, ipywidgets.Image(), ipywidgets.HTML()),
    ]
    widgets = [w for page in pages for w in everything_in(page)]
    texts = [w.value for w in widgets if isinstance(w, (ipywidgets.HTML, ipywidgets.HTMLMath))]
    assert sum("&lt;img" in text for text in texts) >= 4 and not [
        text for text in texts if asks(text) or "<img" in text
    ]
    assert not [w for w in widgets if getattr(w, "description_allow_html", False)]  # descriptions are text


def watched(tmp_path: Path, command: list[str]):
    """Run a command under the watch of tests/watch: (its result, what it asked of other machines)."""
    import subprocess
    import sys

    sys.path.insert(0, str(Path(__file__).parent))
    from run_all import watched as environment

    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg", **environment(tmp_path / "asked")},
    )
    return done, (tmp_path / "asked").read_text() if (tmp_path / "asked").exists() else ""


def test_pages_and_a_notebook_ask_no_other_machine(tmp_path):
    """All notebooks run under this watch in `make test`; here it is one of them, with the pages of a run and of a
    comparison.
    """
    hostile_run(tmp_path / "run")
    code = (
        "import sys; from pathlib import Path; from vggt_lora.views.report import write_report; from "
        "vggt_lora.views.page import page, tag\n"
        "write_report(Path(sys.argv[1])); page('a', tag('p', 'b'))\n"
        "import subprocess; subprocess.run([Path(sys.executable).with_name('nbdev_test'), '--path', "
        "'nbs/views/page.ipynb'], check=True)"
    )
    done, asked = watched(tmp_path, ["-c", code, str(tmp_path / "run")])
    assert done.returncode == 0, done.stderr[-2000:]
    assert asked == ""


def test_the_watch_hears_questions_to_others_and_no_others(tmp_path):
    code = (
        "import socket, subprocess, sys\n"
        "a = socket.create_server(('127.0.0.1', 0)); socket.create_connection(a.getsockname()).close()\n"
        "subprocess.run([sys.executable, '-c', 'import socket; s = socket.socket(); s.setblocking(False); "
        "s.connect_ex((\"192.0.2.1\", 9))'])\n"
        "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.connect(('192.0.2.7', 9))\n"
    )
    _, asked = watched(tmp_path, ["-c", code])
    assert [line.split()[:2] for line in asked.splitlines()] == [
        ["socket.connect", "192.0.2.1"],
        ["socket.connect", "192.0.2.7"],
    ]
