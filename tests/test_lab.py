"""`make lab`: a working copy that git does not see, and an environment without dialogs."""
import json
import subprocess
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import lab  # noqa: E402


def test_the_copy_is_folded_and_git_ignores_it(tmp_path):
    assert lab.refresh(tmp_path) == []
    copies = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.ipynb")}
    assert {"00_data.ipynb", "06_predict.ipynb", "guide/quickstart.ipynb"} <= copies
    cells = nbformat.read(tmp_path / "03_train.ipynb", as_version=4).cells
    folded = [
        cell.metadata.get("jupyter", {}).get("source_hidden", False)
        for cell in cells
        if cell.source.startswith("#| export")
    ]
    assert len(folded) > 5 and all(folded)
    ignored = subprocess.run(["git", "check-ignore", "-q", str(lab.LAB / "03_train.ipynb")], cwd=ROOT)
    assert ignored.returncode == 0


def test_an_edited_copy_stays_until_the_notebook_changes(tmp_path, monkeypatch):
    lab.refresh(tmp_path)
    mine = tmp_path / "00_data.ipynb"
    notebook = nbformat.read(mine, as_version=4)
    notebook.cells[1].source = 'data: str = "mine"'
    nbformat.write(notebook, mine)
    assert lab.refresh(tmp_path) == [] and nbformat.read(mine, as_version=4).cells[1].source == 'data: str = "mine"'
    changed = lab.working_copy

    def newer(path):
        copy = changed(path)
        if path.name == mine.name:
            copy.metadata["vggt_lora"] = {"copy_of": "a later state"}
        return copy

    monkeypatch.setattr(lab, "working_copy", newer)
    aside, = lab.refresh(tmp_path)
    assert nbformat.read(aside, as_version=4).cells[1].source == 'data: str = "mine"'
    assert nbformat.read(mine, as_version=4).cells[1].source != 'data: str = "mine"'


def test_settings_keep_what_is_there(tmp_path):
    file = tmp_path / "labconfig" / "page_config.json"
    file.parent.mkdir()
    file.write_text(json.dumps({"lockedExtensions": {"a": True}, "disabledExtensions": {"b": True}}))
    assert lab.write_settings(tmp_path) == file
    found = json.loads(file.read_text())
    assert found["lockedExtensions"] == {"a": True} and found["disabledExtensions"]["b"] and not found["buildCheck"]
    assert len(found["disabledExtensions"]) == 2
    assert "tools/lab.py --settings" in (ROOT / "Makefile").read_text(encoding="utf-8"), (
        "make env no longer switches the dialogs off"
    )
