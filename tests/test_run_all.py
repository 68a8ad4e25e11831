"""`make test` must not pass on a failure, on a notebook that was not run, or on nothing at all."""
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


@pytest.fixture
def project(tmp_path, monkeypatch):
    """run_all in a project of two notebooks; what its stages say is decided by the test."""
    (tmp_path / "tests").mkdir()
    shutil.copy(HERE / "run_all.py", tmp_path / "tests")
    for name in ("good.ipynb", "deep/other.ipynb", "_draft.ipynb"):
        path = tmp_path / "nbs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    specification = importlib.util.spec_from_file_location("run_all_of_a_test", tmp_path / "tests" / "run_all.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["run_all.py"])
    assert module.ROOT == tmp_path
    return module


def completed(project, *names: str) -> str:
    return "".join(
        f"Starting {project.ROOT}/nbs/{name}\n- Completed {project.ROOT}/nbs/{name}: 0.5 seconds\n" for name in names
    )


BOTH = ("good.ipynb", "deep/other.ipynb")
PASSED = {"export check": (0, "1 passed"), "pytest": (0, "12 passed, 1 skipped in 1.00s")}


def outcome(project, monkeypatch, capsys, **stages) -> tuple[int, str]:
    answers = {**PASSED, **{name.replace("_", " "): value for name, value in stages.items()}}
    monkeypatch.setattr(project, "run", lambda title, command, **environment: answers[title])
    status = project.main()
    return status, capsys.readouterr().out


def test_all_stages_pass(project, monkeypatch, capsys):
    status, text = outcome(project, monkeypatch, capsys, notebooks=(0, completed(project, *BOTH)))
    assert status == 0 and "failed stages: none" in text and "2 of 2 completed" in text
    assert text.splitlines()[-1] == "15 passed, 0 failed, 1 skipped"


@pytest.mark.parametrize("code, names, error", [
    (1, BOTH, ""), (0, BOTH[:1], ""), (0, (), ""),
    (0, BOTH, "good.ipynb"), (1, BOTH, "deep/other.ipynb"),
], ids=["exit status", "one was not run", "none was run", "an error, then completed", "both"])
def test_a_failed_notebook_fails_the_stage(project, monkeypatch, capsys, code, names, error):
    """nbdev prints "- Completed" for failed notebooks too; what tells them apart is the "...Error in" before it."""
    text = completed(project, *names)
    if error:
        text = f"AssertionError in {project.ROOT}/nbs/{error}:\n=====\n\nWhile Executing Cell #1:\n" + text
    status, shown = outcome(project, monkeypatch, capsys, notebooks=(code, text))
    assert status == 1 and "failed stages: notebooks" in shown
    assert " 0 failed" not in shown.splitlines()[-1]
    if error:
        missing = next(line for line in shown.splitlines() if line.startswith("notebooks not completed"))
        assert error in missing and "1 of 2 completed" in shown


def test_slow_runs_what_is_marked_and_nothing_else(project, monkeypatch, capsys):
    """No notebook has slow cells: no stage for them. One has: it is run, and has to be completed."""
    asked = {}

    def answer(title, command, **environment):
        asked[title] = command
        return {"notebooks": (0, completed(project, "good.ipynb")), "pytest": (0, "7 passed in 1.00s")}[title]

    monkeypatch.setattr(project, "run", answer)
    monkeypatch.setattr(sys, "argv", ["run_all.py", "--slow"])
    assert (
        project.main() == 0
        and list(asked) == ["pytest"]
        and asked["pytest"][asked["pytest"].index("-m", 2) + 1] == "slow"
    )
    assert capsys.readouterr().out.splitlines()[-1] == "7 passed, 0 failed, 0 skipped"
    (project.ROOT / "nbs" / "good.ipynb").write_text(json.dumps({"cells": [{"source": ["#| slow\n", "1"]}]}))
    assert (
        project.main() == 0
        and asked["notebooks"][-1] == r"^(good\.ipynb)$"
        and "1 of 1 completed" in capsys.readouterr().out
    )
    (project.ROOT / "nbs" / "deep" / "other.ipynb").write_text(json.dumps({"cells": [{"source": ["#|slow\n", "1"]}]}))
    assert project.main() == 1


def test_no_notebook_at_all_is_a_failure(project, monkeypatch, capsys):
    shutil.rmtree(project.ROOT / "nbs")
    status, text = outcome(project, monkeypatch, capsys, notebooks=(0, ""))
    assert status == 1 and "failed stages: notebooks" in text


@pytest.mark.parametrize(
    "answer",
    [(5, "no tests ran in 0.01s"), (1, "2 failed, 10 passed in 1.00s"), (2, "1 error in 0.5s"), (4, "")],
    ids=["nothing collected", "failures", "a test file that cannot be read", "wrong usage"],
)
def test_pytest_that_fails_or_finds_nothing_is_a_failure(project, monkeypatch, capsys, answer):
    status, text = outcome(project, monkeypatch, capsys, notebooks=(0, completed(project, *BOTH)), pytest=answer)
    assert status == 1 and "failed stages: pytest" in text and " 0 failed" not in text.splitlines()[-1]


def test_the_export_check_is_a_stage(project, monkeypatch, capsys):
    status, text = outcome(
        project, monkeypatch, capsys, notebooks=(0, completed(project, *BOTH)), export_check=(1, "1 failed")
    )
    assert status == 1 and "failed stages: export check" in text and " 0 failed" not in text.splitlines()[-1]


def test_a_stage_keeps_what_it_shows(project, capsys):
    program = "import sys, os; print('one', os.environ['COLOUR']); print('two', file=sys.stderr); sys.exit(3)"
    code, text = project.run("stage", [sys.executable, "-c", program], COLOUR="blue")
    assert code == 3 and set(text.split()) == {"one", "blue", "two"} and "stage: exit 3" in capsys.readouterr().out


def real_outcome(project, monkeypatch, capsys) -> tuple[int, str]:
    """nbdev_test itself on one good and one failing notebook."""
    shutil.copy(HERE.parent / "settings.ini", project.ROOT)
    for name, source in (("good", "assert 1 + 1 == 2"), ("deep/other", "assert 1 + 1 == 3")):
        cell = {
            "cell_type": "code", "id": "a", "execution_count": None, "metadata": {}, "outputs": [], "source": source,
        }
        content = {
            "cells": [cell],
            "metadata": {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}},
            "nbformat": 4, "nbformat_minor": 5,
        }
        (project.ROOT / "nbs" / f"{name}.ipynb").write_text(json.dumps(content))
    real = project.run
    monkeypatch.setattr(
        project,
        "run",
        lambda title, command, **env: real(title, command, **env) if title == "notebooks" else PASSED[title],
    )
    status = project.main()
    return status, capsys.readouterr().out


def test_a_notebook_that_really_fails_fails_the_run(project, monkeypatch, capsys):
    status, text = real_outcome(project, monkeypatch, capsys)
    assert status == 1 and "failed stages: notebooks" in text and " 0 failed" not in text.splitlines()[-1]


def test_a_notebook_that_really_fails_is_named(project, monkeypatch, capsys):
    _, text = real_outcome(project, monkeypatch, capsys)
    assert "notebooks not completed: ['nbs/deep/other.ipynb']" in text and "1 of 2 completed" in text
