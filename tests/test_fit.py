"""Scenes that are whole and do not fit together: each case of tests/cases.py gets its answer, sound scenes keep their silence."""
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
import cases  # noqa: E402

from vggt_lora.core import ConfigError  # noqa: E402
from vggt_lora.demo.demo_scenes import toy_scene  # noqa: E402
from vggt_lora.reference_data import real_scene  # noqa: E402
from vggt_lora.scenes.opening import open_scene  # noqa: E402


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """A sound scene of eight photos."""
    return toy_scene(tmp_path_factory.mktemp("sound"), frames=8, size=(168, 252))


@pytest.mark.parametrize("name", cases.CASES)
def test_each_case_gets_its_answer(name, source, tmp_path):
    one = cases.CASES[name]
    one.build(source, tmp_path / name)
    answer, said = cases.answer_to(tmp_path / name)
    assert answer == one.answer, said
    for words in one.words:
        assert words in said


def test_a_check_that_cannot_be_made_says_so(source, tmp_path):
    cases.CASES["no_colours"].build(source, tmp_path / "grey")
    keypoints, colours = open_scene(tmp_path / "grey").fit[:2]
    assert (keypoints.verdict, colours.verdict) == ("fits", "not checked")
    assert "no colours" in colours.looked_at


@pytest.mark.parametrize("name", cases.SOUND)
def test_sound_scenes_get_no_new_word(name):
    path = real_scene(name)
    if path is None:
        pytest.skip(f"{name} is not at hand")
    scene = open_scene(path)
    assert [note for note in scene.notes if not note.startswith("unit unknown")] == []
    assert {check.verdict for check in scene.fit} <= {"fits", "not checked"}


def settings(folder: Path, run: Path, **more):
    """A tiny run on one scene."""
    from vggt_lora.train import TrainConfig

    return TrainConfig(data=str(folder), output=str(run), model="random", epochs=1, frames=2, image_size=56, train_fraction=0.75, frame_cache=False, feature_cache="off", **more)


def test_a_run_without_a_usable_pixel_stops_before_its_first_step(source, tmp_path):
    """A scene in millimetres that is called metric: all depth lies beyond the limits."""
    from vggt_lora.train import train

    sparse = cases.write(source, tmp_path / "mm")
    model = cases.model_of(source)
    scaled = [line if line.startswith("#") else " ".join([*line.split()[:1], *(repr(1000 * float(v)) for v in line.split()[1:4]), *line.split()[4:]])
              for line in (sparse / "points3D.txt").read_text().splitlines()]
    (sparse / "points3D.txt").write_text("\n".join(scaled) + "\n")
    cases.map_lines(sparse / "images.txt", lambda _, words: [*words[:5], *(repr(1000 * float(v)) for v in words[5:8]), *words[8:]])
    assert len(model.images) == 8
    with pytest.raises(ConfigError, match="no depth to learn from.*outside depth_min.*millimetres"):
        train(settings(tmp_path / "mm", tmp_path / "run", units_are_metres="yes", supervision="sparse"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_loss_of_exactly_nothing_ends_the_run(source, tmp_path, monkeypatch):
    from vggt_lora.core import TrainingError
    from vggt_lora.training import loop
    from vggt_lora.train import train

    real = loop.window_loss

    def nothing(*args, **kwargs):
        result = real(*args, **kwargs)
        if result.total.requires_grad:
            for name in ("depth_conf", "depth_reg"):
                result.terms[name] = 0 * result.terms[name]
        return result
    monkeypatch.setattr(loop, "window_loss", nothing)
    with pytest.raises(TrainingError, match="nothing to learn from .depth_conf"):
        train(settings(source, tmp_path / "run"))
