"""Names and texts that want to be markup, files that want to be elsewhere; pages and notebooks that load nothing from the network."""
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
            if name in self.LOADS and not value.startswith(("data:image/", "#")) and (tag != "a" or value.startswith("javascript:")):
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
    for text in ("<script src=a></script>", "<img src='http://a/b'>", "<p onclick=x()>", "<style>@import 'x'</style>", "<div style='background:url(http://a)'>", "<link rel=x href=y>",
                 "<a href='javascript:x()'>"):
        assert asks(text), text
    assert asks("<img src='data:image/png;base64,AA'><a href='http://a'>a link that waits for a click</a><style>p { color: red }</style>") == []


# --- pages ----------------------------------------------------------------------------------------------------------

def hostile_run(folder: Path) -> Path:
    """A run whose names, notes, warnings and errors all are markup."""
    import sys

    sys.path.insert(0, str(Path(__file__).parent))
    from test_compare import invented_run

    invented_run(folder, "a", 0, 0.7)
    for name in ("config.json", "results.json", "cost.json"):
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
    (folder / "cost.json").unlink()
    (folder / "train.log").write_text(EVIL + "\n")
    return folder


def test_a_run_full_of_markup_gives_a_page_of_text(tmp_path):
    from vggt_lora.views.report import run_report

    page = run_report(hostile_run(tmp_path / "run"))
    assert asks(page) == []
    assert "&lt;img src=http://evil.example" in page and "<script" not in page


def test_a_comparison_of_such_runs_too(tmp_path):
    from vggt_lora.compare import compare_runs, comparison_page, read_record

    hostile_run(tmp_path / "run")
    (tmp_path / "run" / "cost.json").write_text('{"trainable": 100, "seconds": 10.0}')
    page = comparison_page(compare_runs([read_record(tmp_path / "run")]), EVIL, {EVIL: {"state": "failed", "error": EVIL}}, notes=(EVIL,))
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
    frame = {"photo": np.full((8, 12, 3), 0.5), "truth": one, "valid": one > 0, "base": one, "adapted": one, "name": "$\\frac{1$ " + EVIL}
    for figure in (depth_comparison([frame], "m"), loss_curves([{"step": i, "split": s, "loss": 1.0 / (i + 1)} for i in range(3) for s in ("train", "val")])):
        getattr(figure, "figure", figure).savefig(tmp_path / "figure.png", bbox_inches="tight")
        assert (tmp_path / "figure.png").stat().st_size > 1000
    figure = new_figure(3, 2)
    ax = figure.subplots()
    ax.set_yticks([0, 1], ["$\\frac{a$", "b"])
    ax.set(xscale="log", xlim=(1, 1000), title="$\\nothing{$")
    figure.savefig(tmp_path / "ticks.png")
    assert any(label.get_parse_math() and "10^" in label.get_text() for label in ax.get_xticklabels())  # powers on a logarithmic axis are still set as such


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
            assert not re.search(r"!\[[^\]]*\]\(\s*https?:", text) and not re.search(r"<(script|iframe|img|link)\b[^>]*https?:", text, re.I), path.name
        else:
            assert not re.search(r"^\s*[!%](?!matplotlib)", "".join(cell["source"]), re.M), f"{path.name}: a command of the shell"


def test_no_module_opens_connections_but_the_downloads():
    """Who may ask the network is named: the dataset's download and the hub's library, both on the user's word."""
    allowed = {"scenes/fetch.py", "scenes/download.py", "download.py", "model/weights.py", "adapters/hub.py", "doctor.py"}
    for path in sorted((ROOT / "vggt_lora").rglob("*.py")):
        name = path.relative_to(ROOT / "vggt_lora").as_posix()
        if re.search(r"^\s*(import|from) (requests|urllib\.request|http\.client|http\.server|socket|ftplib|aiohttp|huggingface_hub)\b", path.read_text(encoding="utf-8"), re.M):
            assert name in allowed, name
        assert not re.search(r"trust_remote_code\s*=\s*True|weights_only\s*=\s*False|allow_pickle\s*=\s*True|(?<![.\w] )(?<![.\w])eval\(|(?<![.\w])exec\(|os\.system\(|shell\s*=\s*True|pickle\.loads?\(", code_of(path)), name


def code_of(path: Path) -> str:
    """A module without its texts and comments."""
    import io
    import tokenize

    kept = [t.string for t in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline) if t.type not in (tokenize.STRING, tokenize.COMMENT)]
    return re.sub(r" ?([.(=]) ?", r"\1", " ".join(kept))


# --- files that want to be elsewhere --------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["../outside.JPG", "/etc/hostname", "a/../../outside.JPG", "..\\outside.JPG"])
def test_a_photo_may_not_be_named_outside_of_its_scene(name, tmp_path):
    """Photos named by a model lie in the scene's folder, whatever the model says."""
    from tests.torture.jobs import scene_of
    from vggt_lora.scenes.eth3d import open_scene

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

    for name, write in {"plain.pt": lambda p: p.write_bytes(pickle.dumps(Trap())), "torch.pt": lambda p: torch.save({"weights": Trap(), "counters": {"step": 1}}, p)}.items():
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
