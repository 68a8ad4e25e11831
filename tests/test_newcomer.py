"""The newcomer's log: steps are timed once and remembered, a step that ends otherwise than expected ends the walk, and
the page names no machine.
"""
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import newcomer  # noqa: E402

PLY = b"ply\nformat binary_little_endian 1.0\nelement vertex 1234\nproperty float x\nend_header\n"


def glb(size: int = 20) -> bytes:
    return b"glTF" + (2).to_bytes(4, "little") + size.to_bytes(4, "little") + bytes(size - 12)


@pytest.fixture
def walked(tmp_path):
    """A folder in which all steps are done, with next to nothing in it."""
    folder = tmp_path / "walk"
    run = folder / newcomer.CLONE / "outputs" / "b-20300101-101112"
    (run / "clouds").mkdir(parents=True)
    (folder / newcomer.CLONE / ".git").mkdir()
    (run / "results.json").write_text("{}")
    (run / "report.md").write_text("# Strategy b on demo\n\n**AbsRel 0.12 → 0.09: better.**\n\nno verdict\n")
    (run / "clouds" / "hall-adapted.ply").write_bytes(PLY)
    (run / "clouds" / "hall-adapted.glb").write_bytes(glb())
    (folder / newcomer.CLONE / ".venv" / "bin").mkdir(parents=True)
    python = folder / newcomer.CLONE / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    journey = newcomer.Journey(folder)
    for name in ("clone", "environment", "doctor", "doctor_no_data", "doctor_half_weights", "train", "evaluate"):
        journey.done[name] = {
            "command": f"do {name}",
            "seconds": 100.0,
            "lines": [f"line of {name}", "held-out loss 1.2 -> 0.9; results in outputs/b-20300101-101112"],
            "status": int("no_" in name or "half" in name),
        }
    return journey


def test_a_step_is_timed_once_and_a_wrong_end_is_an_end(tmp_path):
    (tmp_path / newcomer.CLONE).mkdir()
    (tmp_path / "cache").mkdir()
    command = (
        f"echo $VGGT_LORA_CACHE/frames {tmp_path}/{newcomer.CLONE}/x https://index.example/simple; echo once >> "
        f"{tmp_path}/count; echo ${{VGGT_LORA_SHARED:-unset}}"
    )
    for _ in range(2):  # the second journey is another process that goes on
        step = newcomer.Journey(tmp_path).step("say", command)
    assert (tmp_path / "count").read_text() == "once\n"
    assert step["lines"] == ["~/.cache/vggt_lora/frames x <address>", "unset"] and step["seconds"] >= 0
    with pytest.raises(SystemExit, match="ended with status 3"):
        newcomer.Journey(tmp_path).step("fails", "echo last words; exit 3")
    with pytest.raises(SystemExit, match="ended with status 0"):
        newcomer.Journey(tmp_path).step("should fail", "true", expect=1)
    assert set(json.loads((tmp_path / "newcomer.json").read_text())) == {"say"}


def test_the_page_holds_the_steps_and_no_machine(walked):
    text = newcomer.page(walked)
    for said in (
        "| `do environment` | 1 min 40 s |", "line of doctor_no_data", "the exit status is 1",
        "> **AbsRel 0.12 → 0.09: better.**", "1,234 points", "outputs/b-<date>-<time>/clouds/hall-adapted.glb",
        "**11 min 40 s**",
    ):
        assert said in text, said
    assert "no verdict" not in text and str(walked.folder) not in text and "20300101" not in text


@pytest.mark.parametrize("damage", ["gone", "cut", "another"])
def test_a_cloud_that_is_not_there_is_noticed(walked, damage):
    path = walked.folder / newcomer.CLONE / "outputs" / "b-20300101-101112" / "clouds" / "hall-adapted.glb"
    path.unlink() if damage == "gone" else path.write_bytes(glb()[:-1] if damage == "cut" else PLY)
    with pytest.raises(SystemExit):
        newcomer.page(walked)


def test_words():
    assert [newcomer.time_words(s) for s in (3.21, 45.4, 200, 4000)] == ["3.2 s", "45 s", "3 min 20 s", "1 h 6 min"]
    assert [newcomer.size_words(s) for s in (999, 11_824_784, 2_900_000_000)] == ["999 B", "12 MB", "2.9 GB"]


def test_the_log_in_the_repository_is_neutral():
    path = ROOT / "docs" / "newcomer.md"
    if not path.is_file():
        pytest.skip("docs/newcomer.md has not been written yet (make newcomer)")
    text = path.read_text(encoding="utf-8")
    assert re.findall(r"(?<![\w.~])/(?:tmp|root|home|work|Users|var|opt)/", text) == [] and "://" not in text
    assert "fail" in text and ".ply" in text and "make train" in text
