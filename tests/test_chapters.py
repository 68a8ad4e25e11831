"""The numbered notebooks by papermill, made small, as a user runs them; with their own settings: test_papermill.py."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
from chapters import parameters
from run_all import CHAPTERS, watched

from vggt_lora.demo.demo_scenes import demo_scene

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """One folder for all chapters: 04 measures the run that 03 has trained."""
    return tmp_path_factory.mktemp("chapters")


@pytest.fixture(scope="module")
def house(room):
    """A building of six small photos, with all that a demo building has."""
    return str(demo_scene(room, "house", frames=6, size=(112, 168), seed=13, style="stone", layout="corner"))


def papermill(name: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run papermill; never with a pipe as standard input, which would make it overwrite the notebook."""
    command = [str(Path(sys.executable).parent / "papermill"), f"nbs/{name}.ipynb", *arguments]
    return subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True)


def test_every_chapter_is_here(tmp_path):
    assert sorted(parameters(tmp_path)) == sorted(path.stem for path in (ROOT / "nbs").glob(CHAPTERS))


@pytest.mark.parametrize("name", parameters(Path()))
def test_a_chapter_runs_to_its_end_and_asks_no_other_machine(name, room, house, monkeypatch):
    asked = room / "asked.txt"
    for variable, value in watched(asked).items():
        monkeypatch.setenv(variable, value)
    before = (ROOT / "nbs" / f"{name}.ipynb").read_bytes()
    given = [word for key, value in parameters(room, house)[name].items() for word in ("-p", key, str(value))]
    done = papermill(name, *given)  # without a path for the executed notebook, which is printed
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["nbformat"] == 4
    assert (ROOT / "nbs" / f"{name}.ipynb").read_bytes() == before
    assert not asked.exists(), asked.read_text()


def test_the_run_of_03_is_complete_and_has_learned(room):
    run = room / "run"
    for name in ("config.json", "model.txt", "train.log", "metrics.jsonl", "results.json", "report.md",
                 "figures/losses.png", "figures/held_out.png",
                 "checkpoints/last.pt", "checkpoints/best.pt", "adapter/adapter_config.json",
                 "adapter/adapter_model.safetensors"):
        assert (run / name).is_file(), name
    assert any((run / "tensorboard").iterdir())
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    held_out = [record["loss"] for record in records if record["split"] == "val"]
    assert held_out[-1] < held_out[0]
