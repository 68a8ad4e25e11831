"""Papermill and the command line as a user runs them: a wrong parameter stops at once, a right one trains, and the
README's commands run as written.
"""
import dataclasses
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from chapters import run_here

from test_project import readme_commands

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


def papermill(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """Run papermill as a user would; never with a pipe as standard input, which would make it overwrite the notebook.
    """
    return subprocess.run(
        [str(BIN / "papermill"), *arguments], cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )


def test_a_wrong_parameter_stops_papermill_before_any_work(tmp_path):
    output = tmp_path / "run"
    given = ["-p", "use_rsolra", "True", "-p", "output", str(output)]
    done = papermill("nbs/03_train.ipynb", str(tmp_path / "out.ipynb"), *given)
    assert done.returncode != 0 and "unknown parameter 'use_rsolra'" in done.stderr
    assert "Did you mean 'use_rslora'?" in done.stderr and not output.exists()


def test_a_wrong_value_stops_the_step_before_any_work(tmp_path):
    fault = run_here("03_train", strategy="z", output=str(tmp_path / "run")).fault
    assert "unknown strategy 'z'" in fault and "choose one of: a, b, c, custom" in fault
    assert not (tmp_path / "run").exists()


# --- the command line ------------------------------------------------------------------------------------------------

def test_the_command_line_has_every_field_and_trains(tmp_path, capsys):
    """In this process; test_guide.py calls it as a user does."""
    from vggt_lora.settings import settings_of
    from vggt_lora.train import TrainConfig, main

    assert [s.name for s in settings_of(TrainConfig)] == [f.name for f in dataclasses.fields(TrainConfig)]
    small = ["--scenes", "demo_a", "--epochs", "1", "--image-size", "56", "--frames", "4", "--preflight", "off"]
    assert main(["--model", "random", *small, "--output", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.strip().splitlines()[-1] == str(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["config"]["image_size"] == 56


@pytest.mark.parametrize("arguments, last", [
    (("--strategie", "b"), "unrecognized arguments: --strategie b"),
    (("--strategy", "z"), "unknown strategy 'z'; choose one of: a, b, c, custom."),
])
def test_a_wrong_command_line_fails_with_its_message_last(capsys, arguments, last):
    from vggt_lora.train import main

    with pytest.raises(SystemExit, match="2"):
        main(list(arguments))
    assert last in capsys.readouterr().err.strip().splitlines()[-1]


def test_the_command_fails_with_its_message_last():
    done = subprocess.run(
        [sys.executable, "-m", "vggt_lora.train", "--data", "nowhere"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1 and "nowhere" in done.stderr.strip().splitlines()[-1], done.stderr


# --- README ---------------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_readme_papermill_command_trains(tmp_path):
    """03 as written, at its full size, with one building and one epoch in place of seven and ten."""
    commands = [c for c in readme_commands() if "papermill nbs/" in c and "facebook/" not in c and "path/to" not in c]
    names = [name for c in commands for name in re.findall(r"nbs/(\w+)\.ipynb", c)]
    assert names == ["03_train", "04_evaluate"]
    words = shlex.split(commands[0].split("&&")[-1])
    output = next(i for i, word in enumerate(words) if word.startswith("outputs/"))
    words[output] = str(tmp_path / "executed.ipynb")
    fewer = {"scenes": "demo_a", "epochs": 1, "output": tmp_path / "run"}
    done = papermill(*words[1:], *(word for name, value in fewer.items() for word in ("-p", name, str(value))))
    assert done.returncode == 0, done.stderr[-3000:]
    loss = json.loads((tmp_path / "run" / "results.json").read_text())["held_out_loss"]
    assert loss["after"] < loss["before"]
