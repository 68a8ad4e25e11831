"""The bar of long work: what a real kernel keeps of it, and what a terminal shows."""
import subprocess
import sys

import nbformat
import pytest

CELL = """\
import sys
from vggt_lora.progress import progress_bar
with progress_bar(total=3, desc="outer", unit="photo") as outer:
    for k in progress_bar(range(4), desc="inner", unit="step", mininterval=0):
        if k == 3:
            outer.update(3)
with progress_bar(total=9, desc="broken", unit="window") as bar:
    bar.update(2)
print("after")
"""


def test_a_notebook_keeps_one_quiet_line_for_each_bar():
    """No red box, no states of the past, no clock: what is run twice is the same twice."""
    client = pytest.importorskip("nbclient")
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(CELL)],
        metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}},
    )
    client.NotebookClient(notebook, timeout=120).execute()
    outputs = notebook.cells[0].outputs
    assert [output.get("name") for output in outputs if output.output_type == "stream"] == ["stdout"], outputs
    lines = [output for output in outputs if output.output_type == "display_data"]
    assert [line.data["text/plain"] for line in lines] == [
        "outer: 3 photos",
        "inner: 4 steps",
        "broken: 2 of 9 windows",
    ]
    assert all(set(line.data) == {"text/plain"} and line.metadata == {"vggt_lora": "progress"} for line in lines)


def test_a_terminal_shows_the_plain_bar():
    done = subprocess.run([sys.executable, "-c", CELL], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "after\n", done.stderr
    assert "inner: 100%" in done.stderr and "broken:  22%" in done.stderr
