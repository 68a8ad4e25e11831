"""Lint: the package, the tests and the tools keep the rules of ruff.toml; files that do not yet are listed there."""
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytest.importorskip("ruff")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import lint  # noqa: E402


def test_the_rules_are_kept():
    done = subprocess.run([sys.executable, "tools/lint.py"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_every_exception_names_a_file():
    """And none covers a whole folder, so a new file begins clean."""
    excepted = tomllib.loads((ROOT / "ruff.toml").read_text(encoding="utf-8"))["lint"]["per-file-ignores"]
    assert [path for path in excepted if not (ROOT / path).is_file()] == []


def test_a_line_that_is_too_long_is_found_and_one_of_all_is_not(tmp_path, monkeypatch):
    long = "value = '" + "x" * 120 + "'\n"
    (tmp_path / "vggt_lora").mkdir()
    (tmp_path / "vggt_lora" / "a.py").write_text(f"__all__ = ['value',\n           '{'y' * 120}']\n{long}import os\n")
    (tmp_path / "ruff.toml").write_text((ROOT / "ruff.toml").read_text(encoding="utf-8"))
    monkeypatch.setattr(lint, "ROOT", tmp_path)
    monkeypatch.setattr(lint, "CHECKED", ("vggt_lora",))
    assert [(found["code"], found["location"]["row"]) for found in lint.findings() if found["code"] != "F822"] == [
        ("E501", 3),
        ("F401", 4),
    ]
    assert lint.write_exceptions() == 1 and lint.findings() == []
