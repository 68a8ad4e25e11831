"""What a newcomer reads: the READMEs in two languages, the guide and its commands, and every link between them."""
import dataclasses
import html
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
sys.path.insert(0, str(ROOT / "tools"))
import execute_notebooks  # noqa: E402
import render_guide  # noqa: E402

from vggt_lora.training.config import TrainConfig  # noqa: E402

ELSEWHERE = {  # what stands in a command -> why no test runs it as it is written
    "facebook/": "needs the published weights; test_protocols and test_doctor run the same with the small network",
    "path/to": "names the reader's own data; test_train, test_project and test_wayback run the same on the demo and "
               "on copies of it",
    "my_photos": "needs the reader's photos; nbs/scenes/reconstruct.ipynb reconstructs photos of its own",
    "my_house": "needs the scene that the reader's photos become; the same steps run on the demo",
    "vggt_lora_download": "asks the network; test_download runs it against a server of its own",
    "tensorboard --logdir": "serves until it is stopped; test_engine reads what it would show",
    "make ": "builds an environment; `make newcomer` runs it on a fresh clone, and test_project looks at each target",
    "benchmarks/": "takes the better part of an hour",
    ". .venv/bin/activate": "changes the reader's own shell",
}


def markdown_of(path: Path) -> str:
    """The text of a README or of a notebook's markdown cells."""
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    return "\n\n".join(
        "".join(cell["source"])
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
        if cell["cell_type"] == "markdown"
    )


def texts() -> list[Path]:
    return [
        ROOT / "README.md",
        ROOT / "README.zh.md",
        *sorted((ROOT / "docs").glob("*.md")),
        *(
            p
            for p in sorted((ROOT / "nbs").rglob("*.ipynb"))
            if not any(part.startswith((".", "_")) for part in p.relative_to(ROOT).parts)
        ),
    ]


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))


def first_lines(path: Path) -> tuple[str, str]:
    """Return the title and the subtitle of a notebook."""
    title, _, subtitle, *_ = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"]).split("\n")
    return title, subtitle


def test_a_notebook_has_a_title_and_a_short_subtitle():
    """The title of a room's notebook is its module; the subtitle says in at most 20 words what a reader can do."""
    notebooks = {path.relative_to(ROOT / "nbs"): first_lines(path) for path in texts() if path.suffix == ".ipynb"}
    rooms = {path for path in notebooks if len(path.parts) > 1 and path.parts[0] not in ("guide", "appendix")}
    assert len(rooms) > 150, "the rule would hold for nothing"
    assert [path for path in rooms if notebooks[path][0] != "# " + ".".join(path.with_suffix("").parts)] == []
    assert [path for path, (_, subtitle) in notebooks.items() if not 2 < len(subtitle.split()) <= 21] == []


def links(text: str) -> list[str]:
    """Targets of links and pictures in markdown that point to files."""
    found = re.findall(r"\]\(([^)\s]+)\)", without_code(text))
    return [target for target in found if not re.match(r"[a-z]+:|#", target)]


def test_every_relative_link_has_a_target():
    found = {path: links(markdown_of(path)) for path in texts()}
    assert sum(map(len, found.values())) > 15, "the rule would hold for nothing"
    assert [f"{path.relative_to(ROOT)}: {target}" for path, targets in found.items() for target in targets
            if not (path.parent / target.split("#")[0]).exists()] == []


def blocks(text: str) -> list[str]:
    return re.findall(r"^```\w*\n.*?^```", text, re.M | re.S)


def tables(text: str) -> list[list[list[str]]]:
    """The numbers and the code of every row of every table."""
    rows = [
        [re.findall(r"`[^`]+`|[-+−]?\d[\d.,e-]*\d|\d", cell) for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    return rows


def test_the_two_readmes_say_the_same():
    """Same commands, numbers in tables, headings, pictures and names of files; each links the other."""
    english, chinese = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh.md"))
    assert blocks(english) == blocks(chinese) and len(blocks(english)) > 4
    assert tables(english) == tables(chinese) and len(tables(english)) > 12
    headings = [
        [len(mark) for mark in re.findall(r"^(#+) ", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)]
        for text in (english, chinese)
    ]
    assert headings[0] == headings[1]
    names = [
        sorted(re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)))
        for text in (english, chinese)
    ]
    assert names[0] == names[1]
    for text in (english, chinese):  # the first screen; details stand in the guide
        assert (
            len(text.splitlines()) <= 120
            and max(len(line) for line in text.splitlines() if not line.startswith("|")) <= 120
        )
    assert "](README.zh.md)" in english and "](README.md)" in chinese and "](docs/overview.png)" in english


def guide_commands() -> list[str]:
    """Every line of the guide's sh blocks, once."""
    found = [
        line.strip()
        for name in render_guide.GUIDE
        for block in re.findall(
            r"^```sh\n(.*?)^```", markdown_of(ROOT / "nbs" / "guide" / f"{name}.ipynb"), re.M | re.S
        )
        for line in block.splitlines()
        if line.strip() and not line.startswith("#")
    ]
    return list(dict.fromkeys(found))


def runnable() -> list[str]:
    return [command for command in guide_commands() if not any(word in command for word in ELSEWHERE)]


def readme_commands() -> list[str]:
    """Every line of the README's sh blocks, once, without the folder that papermill needs."""
    found = [
        line.strip().removeprefix("mkdir -p outputs && ")
        for block in re.findall(r"^```sh\n(.*?)^```", markdown_of(ROOT / "README.md"), re.M | re.S)
        for line in block.splitlines()
        if line.strip()
    ]
    return list(dict.fromkeys(found))


RUN_ELSEWHERE = {  # command of the README -> the test that runs it
    "papermill nbs/03_train.ipynb outputs/03_train_b.ipynb -p strategy b": "tests/test_project.py",
    "papermill nbs/04_evaluate.ipynb outputs/04_evaluate.ipynb": "tests/test_project.py",
    "python -m vggt_lora.train --strategy b": "tests/test_guide.py",
}


def test_every_command_of_the_readme_is_run_or_says_why_not():
    commands = readme_commands()
    assert len(commands) > 12
    assert [c for c in commands if c not in RUN_ELSEWHERE and not any(word in c for word in ELSEWHERE)] == []
    assert [c for c in RUN_ELSEWHERE if c not in commands] == [], "the README has it no longer"
    everything = " ".join([*commands, *guide_commands()])
    assert [word for word in ELSEWHERE if word not in everything] == [], "a reason that excuses nothing"
    for name in set(re.findall(r"test_\w+", " ".join(ELSEWHERE.values()))):
        assert (ROOT / "tests" / f"{name}.py").is_file(), name


SMALL = {  # what makes a command cheap, by its notebook
    "00_data": [],
    "01_depth": ["-p", "image_size", "126", "-p", "audit_photos", "2"],
    "02_lora": [],
    "03_train": [
        "-p", "epochs", "1", "-p", "frames", "2", "-p", "overlap", "0.0", "-p", "image_size", "56", "-p", "scenes",
        "demo_a,demo_held", "-p", "hold_out", "demo_held",
    ],
    "04_evaluate": ["-p", "pictures", "1"],
}


def small_options() -> list[str]:
    """What makes a training cheap, as options of a command line."""
    names, values = SMALL["03_train"][1::3], SMALL["03_train"][2::3]
    return [word for name, value in zip(names, values) for word in (f"--{name.replace('_', '-')}", value)]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """One small finished run for every command that wants one."""
    folder = tmp_path_factory.mktemp("guide") / "run"
    command = [sys.executable, "-m", "vggt_lora.train", "--strategy", "b", *small_options(), "--output", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_the_guide_has_commands_of_every_step():
    commands = " ".join(guide_commands())
    assert len(runnable()) >= 6
    for step in ("00_data", "01_depth", "02_lora", "03_train", "04_evaluate", "05_compare", "06_predict"):
        assert f"nbs/{step}.ipynb" in commands, step
    unknown = [c for c in runnable() if not c.startswith(("papermill nbs/", "ls ", "vggt_lora_doctor", "python -m "))]
    assert unknown == [], "the test below does not know how to run these"


def test_names_of_parameters_in_the_guide_exist():
    """Also in the commands that cannot be run here: -p NAME has to be a parameter of that notebook."""
    seen = 0
    for command in [c for c in guide_commands() if c.startswith("papermill nbs/")]:
        words = shlex.split(command)
        cells = json.loads((ROOT / words[1]).read_text(encoding="utf-8"))["cells"]
        known = re.findall(
            r"^(\w+): ",
            "".join("".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", [])),
            re.M,
        )
        if words[1] == "nbs/03_train.ipynb":  # its cell shows some of the settings, and -p takes them all
            known = [field.name for field in dataclasses.fields(TrainConfig)]
        given = [words[i + 1] for i, word in enumerate(words) if word == "-p"]
        seen += len(given)
        assert set(given) <= set(known), command
    assert seen > 8


# Plain forms of 00, 01, 02, 04 and 05 are run whole by the browser test, and 03 and 04 as the README has them by
# test_project; VGGT_LORA_GUIDE=all runs them here, too.
TO_RUN = [
    c
    for c in runnable()
    if os.environ.get("VGGT_LORA_GUIDE") == "all"
    and "05_compare" not in c
    or not any(step in c for step in ("00_data", "01_depth", "02_lora", "04_evaluate", "05_compare", "06_predict"))
    and ("03_train" not in c or "agreement_weight" in c)
]


@pytest.mark.slow
@pytest.mark.parametrize("command", TO_RUN)
def test_the_guides_commands_run(command, request, tmp_path):
    """As written, from the repository root, made small; results go to a folder of the test's own."""
    if command == "python -m vggt_lora.train --strategy b":  # the run that others want is made by it
        assert (request.getfixturevalue("run_folder") / "results.json").is_file()
        return
    words = shlex.split(command)
    if words[0] == "papermill":
        step = Path(words[1]).stem
        words[2] = str(tmp_path / "out.ipynb")
        given = {words[i + 1] for i, word in enumerate(words) if word == "-p"}
        for i in range(0, len(SMALL[step]), 3):
            if SMALL[step][i + 1] not in given:
                words += SMALL[step][i:i + 3]
        words += {
            "03_train": ["-p", "output", str(tmp_path / "run")],
            "04_evaluate": ["-p", "run", str(request.getfixturevalue("run_folder"))] if step == "04_evaluate" else [],
        }.get(step, [])
    if words[0] == "ls":
        words = ["ls", "-d", words[1]]
    words[0] = (
        sys.executable if words[0] == "python" else str(BIN / words[0]) if (BIN / words[0]).exists() else words[0]
    )
    if not Path(words[0]).exists() and words[0] == "vggt_lora_doctor":
        pytest.skip("vggt_lora_doctor is not installed in this environment")
    done = subprocess.run(
        words, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL,
        env={**os.environ, "MPLBACKEND": "agg"},
    )
    assert done.returncode == 0, (command, done.stdout[-1500:], done.stderr[-2500:])


def python_blocks() -> list:
    """Every fenced Python block of the README and the guide; those that need a finished run are slow."""
    pages = [ROOT / "README.md", *sorted((ROOT / "nbs" / "guide").glob("*.ipynb"))]
    found = []
    for page in pages:
        blocks = re.findall(r"^```python\n(.*?)^```", markdown_of(page), re.M | re.S)
        for number, block in enumerate(blocks):
            marks = [pytest.mark.slow] if "my_run" in block else []
            found.append(pytest.param(block, id=f"{page.stem}-{number}", marks=marks))
    return found


@pytest.mark.parametrize("block", python_blocks())
def test_fenced_python_runs(block, request, tmp_path):
    """As written, in a folder where outputs/my_run is a finished run."""
    if "my_run" in block:
        (tmp_path / "outputs").mkdir()
        (tmp_path / "outputs" / "my_run").symlink_to(request.getfixturevalue("run_folder"))
    done = subprocess.run(
        [sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr[-1500:]


def test_the_guide_renders_with_working_links(tmp_path):
    pages = render_guide.render(tmp_path)
    assert len(pages) == 1 + len(render_guide.GUIDE) + len(list((ROOT / "nbs").glob("0*.ipynb")))
    seen = 0
    for page in pages:
        text = page.read_text(encoding="utf-8")
        targets = [html.unescape(t) for t in re.findall(r'<a [^>]*href="([^"#]+)[^"]*"', text)]
        for target in [t for t in targets if not re.match(r"[a-z]+:", t)]:
            seen += 1
            assert (page.parent / target).is_file(), f"{page.name}: {target}"
        assert not re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="https?://[^"]+"', text), (
            f"{page.name} asks another machine for something"
        )
        assert not re.search(r"\\frac(?![^<]*>)", text), f"{page.name} shows a formula as TeX"
    assert seen > 15


def test_pictures_of_a_notebook_shrink_below_the_limit():
    """Photos and drawings, which together are far over the limit; a photo becomes JPEG, a drawing stays PNG."""
    import base64
    import io

    import nbformat
    import numpy as np
    from PIL import Image
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 255, (24, 36, 3), dtype=np.uint8)).resize((900, 600), Image.BICUBIC)
    photo = np.clip(np.asarray(smooth, float) + rng.normal(0, 12, (600, 900, 3)), 0, 255).astype(np.uint8)
    drawing = np.full((600, 900, 3), 255, np.uint8)
    drawing[100:500:40] = drawing[:, 100:800:50] = (0, 114, 178)
    outputs = []
    for _ in range(1):
        for picture in (photo, drawing):
            buffer = io.BytesIO()
            Image.fromarray(picture).save(buffer, "PNG")
            outputs.append(
                nbformat.v4.new_output("display_data", {"image/png": base64.b64encode(buffer.getvalue()).decode()})
            )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("show()", outputs=outputs)])
    assert execute_notebooks.weight(notebook) > 4 * execute_notebooks.LIMIT_OF_A_BLOCK
    execute_notebooks.shrink(notebook, Path("x.ipynb"), execute_notebooks.LIMIT_OF_A_BLOCK)
    assert execute_notebooks.weight(notebook) <= execute_notebooks.LIMIT_OF_A_BLOCK
    kinds = [next(iter(output["data"])) for output in notebook.cells[0].outputs]
    assert kinds[:2] == ["image/jpeg", "image/png"]
    for output in notebook.cells[0].outputs:
        picture = Image.open(io.BytesIO(base64.b64decode(next(iter(output["data"].values())))))
        assert picture.width >= 400


def test_what_is_kept_of_an_output_is_neutral():
    """No bar, no warning, no widget; no path of this machine and no moment; and the rest as it was."""
    import tempfile

    import nbformat
    new = nbformat.v4.new_output
    outputs = [
        new("stream", name="stderr", text="a warning"),
        new("display_data", {"text/plain": "audit: 3 photos"}, metadata={"vggt_lora": "progress"}),
        new(
            "stream",
            name="stdout",
            text=f"run: {ROOT}/outputs/b-20301231-235959 in {Path.home()}/.cache and "
                 f"{tempfile.gettempdir()}/tmpab_1/x, turned 30° (1.2 s), loss 1.2 s\n",
        ),
        new("stream", name="stdout", text="[Open3D INFO] WebRTC GUI backend enabled.\nand on\n"),
        new(
            "execute_result",
            {"text/plain": "Viewer()", "application/vnd.jupyter.widget-view+json": {"model_id": "1"}},
            execution_count=1,
        ),
        new("execute_result", {"text/plain": f"{ROOT}"}, execution_count=1),
    ]
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell("x", outputs=outputs)], metadata={"widgets": {}}
    )
    execute_notebooks.clean_outputs(notebook)
    kept = notebook.cells[0].outputs
    assert kept[0].text == "run: outputs/b-<date>-<time> in ~/.cache and $TMPDIR/x, turned 30°, loss 1.2 s\nand on\n"
    assert kept[1].data == {"text/plain": "."} and len(kept) == 2 and "widgets" not in notebook.metadata


def test_stale_outputs_are_told_and_seconds_are_not():
    """Also a picture that is gone; a number may differ by a tenth or 0.02; a cell tagged volatile is not compared."""
    import nbformat
    new = nbformat.v4

    def cell(text, picture=True, tags=()):
        outputs = [new.new_output("stream", name="stdout", text=text)]
        outputs += [new.new_output("display_data", {"image/png": "x"})] if picture else []
        return new.new_code_cell("x", outputs=outputs, metadata={"tags": list(tags)})

    differences = execute_notebooks.differences
    assert differences(cell("loss 0.91, 1.2 s, 3.4 GB\n"), cell("loss 0.91, 45 s, 3.5 GB\n")) == []
    assert differences(cell("1085 points,  0.008 m\n"), cell("1083 points, -0.006 m\n")) == []
    assert differences(cell("a\nloss 0.91\n"), cell("a\nloss 1.02\n")) == ["-loss 0.91", "+loss 1.02"]
    assert differences(cell("loss 0.91"), cell("gain 0.91")) and differences(cell("3 photos"), cell("4 photos"))
    assert differences(cell("x"), cell("x\ny")) and differences(cell("x"), cell("x", picture=False))
    assert differences(cell("loss 0.91", tags=["volatile"]), cell("loss 3", tags=["volatile"])) == []


def test_kept_outputs_are_what_the_cells_make():
    names = ["nbs/settings.ipynb", "training/config", "guide/settings"]
    done = subprocess.run(
        [sys.executable, "tools/execute_notebooks.py", "--check", *names], cwd=ROOT, capture_output=True, text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr[-3000:]
