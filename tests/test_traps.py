"""The traps of this field, each walked into on purpose: something must catch it.
nbs/reference_data.ipynb lists them with the tests.
"""
import ast
import copy
import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.spatial.transform import Rotation

from vggt_lora.adapters.adapter import apply_lora, load_adapter, save_adapter
from vggt_lora.adapters.base_check import BaseCheck, BaseCheckError
from vggt_lora.core import WeightsError
from vggt_lora.datasets.samples import FrameCache
from vggt_lora.datasets.splits import LeakError, content_hash
from vggt_lora.datasets.windows import make_windows
from vggt_lora.demo.demo_scenes import demo_scene, toy_scene
from vggt_lora.evaluate import evaluate
from vggt_lora.evaluation.clouds import evaluate_clouds, write_clouds
from vggt_lora.evaluation.evaluation_store import (
    NOT_COMPUTED, answers, place_for, EvaluationRequest, renew_report, write_answer, write_forgetting,
)
from vggt_lora.evaluation.forgetting import Drift
from vggt_lora.evaluation.runner import evaluate_windows
from vggt_lora.files.atomic import write_json
from vggt_lora.model.vggt import VGGT
from vggt_lora.reference_data import real_scene
from vggt_lora.scenes import masks
from vggt_lora.scenes.opening import open_scene
from vggt_lora.scenes.scene import SceneError
from vggt_lora.training.config import TrainConfig
from vggt_lora.views.report import run_report

ROOT = Path(__file__).resolve().parent.parent


def defined_tests(path: Path) -> set[str]:
    """Names of the test functions of a file."""
    return {
        node.name
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_every_trap_names_tests_that_exist():
    text = (ROOT / "nbs" / "reference_data.ipynb").read_text(encoding="utf-8")
    for trap in ("swapped camera convention", "base not loaded", "leaked frames", "metric scale forgotten",
                 "masks shifted by the distortion", "alignment computed on invalid pixels"):
        row = next(line for line in text.splitlines() if f"| {trap} |" in line)
        named = re.findall(r"`tests/(\w+\.py)::(\w+)`", row)
        assert named, f"{trap}: no test is named"
        for path, name in named:
            assert name in defined_tests(ROOT / "tests" / path), f"{trap}: {path}::{name} does not exist"


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return toy_scene(tmp_path_factory.mktemp("toy"), frames=8, size=(84, 126))


# --- swapped camera convention ----------------------------------------------------------------------------------------

def test_a_scene_with_camera_to_world_poses_is_refused(toy, tmp_path):
    """Every pose line of images.txt as somebody writes it who takes the file for camera-to-world."""
    import shutil
    broken = Path(shutil.copytree(toy, tmp_path / "toy"))
    path = broken / "dslr_calibration_undistorted" / "images.txt"
    lines = path.read_text().splitlines()
    for k, line in enumerate(lines):
        words = line.split()
        if not line.startswith("#") and words and words[-1].lower().endswith((".jpg", ".png")):
            w, x, y, z, *shift = map(float, words[1:8])
            back = Rotation.from_quat([x, y, z, w]).inv()
            x, y, z, w = back.as_quat()
            lines[k] = " ".join([words[0], *(f"{v:.17g}" for v in (w, x, y, z, *-back.apply(shift))), *words[8:]])
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(
        SceneError, match="camera-to-world.*% of .* keypoints lie on their points if every pose is inverted"
    ):
        open_scene(broken)
    assert len(open_scene(toy)) == 8


# --- base not loaded --------------------------------------------------------------------------------------------------

def test_a_base_that_was_not_loaded_is_refused(tmp_path):
    """The same architecture with fresh weights: under a new adapter, and under one that was trained on the real base.
    """
    real = VGGT.from_pretrained("tiny", track_head=False, point_head=False)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        fresh = VGGT(real.config)
    images = torch.rand(1, 2, 3, 56, 84, generator=torch.Generator().manual_seed(0))
    gate = BaseCheck(real, images)
    adapted, targets = apply_lora(copy.deepcopy(real), "a", rank=2, seed=0)
    gate.check(adapted, targets)
    save_adapter(adapted, tmp_path / "adapter", {})
    with torch.no_grad():  # what lies under the adapter was never loaded
        for name, tensor in adapted.get_base_model().named_parameters():
            if name in (own := dict(fresh.named_parameters())) and "lora_" not in name:
                tensor.copy_(own[name])
    with pytest.raises(BaseCheckError, match="with an untrained adapter|changed when"):
        gate.check(adapted, targets)
    with pytest.raises(WeightsError, match="another base"):
        load_adapter(fresh, tmp_path / "adapter")


# --- leaked frames ----------------------------------------------------------------------------------------------------

def test_photos_that_were_trained_on_cannot_be_measured_under_another_name(toy, tmp_path):
    """A run's record against a folder that holds one of its training photos, renamed: stopped before any weight is
    read.
    """
    scene = open_scene(toy)
    config = TrainConfig(data=str(toy), frames=4, choose_fraction=0.0, image_size=56, frame_cache=False)
    write_json(tmp_path / "run" / "config.json", {"config": dataclasses.asdict(config)})
    write_json(
        tmp_path / "run" / "split.json",
        {"train": {"elsewhere/renamed.jpg": content_hash(scene.frames[2].image_path)}, "val": {}},
    )
    with pytest.raises(
        LeakError,
        match="1 held-out photos were training photos of this run, for instance .*" + Path(scene.frames[2].name).stem,
    ):
        evaluate(tmp_path / "run", str(toy), protocol="median")


# --- masks shifted by the distortion ----------------------------------------------------------------------------------

def test_a_mask_that_is_merely_resized_is_caught(tmp_path, monkeypatch):
    """Masks are drawn on the distorted original; brought over without the lens they lie beside what they cover, and the
    exact parts show it.
    """
    folder = demo_scene(tmp_path, frames=2, size=(252, 378), seed=4, style="stone", layout="corner")
    scene, glass = open_scene(folder), json.loads((folder / "labels/parts.json").read_text()).index("glass")

    def resized(values, frame, original, size, plan=None, outside=0):
        rows, columns = (((np.arange(n) + 0.5) * whole / n).astype(int) for n, whole in zip(size, values.shape))
        return values[rows[:, None], columns]

    differ = right = wrong = 0
    for frame in (f for f in scene.frames if f.mask_path):
        shown = np.array(Image.open(folder / "labels/parts" / f"{Path(frame.name).stem}.png")) == glass
        through_the_lens = masks.photo_mask(scene, frame, frame.size)
        with monkeypatch.context() as patched:
            patched.setattr(masks, "carry_to_grid", resized)
            stretched = masks.photo_mask(scene, frame, frame.size)
        asked = ((through_the_lens == 1) != (stretched == 1)) & (through_the_lens != 2) & (stretched != 2)
        differ, right, wrong = (
            differ + asked.sum(),
            right + ((through_the_lens == 1) == shown)[asked].sum(),
            wrong + ((stretched == 1) == shown)[asked].sum(),
        )
    assert differ > 500 and right > 2.5 * wrong, (differ, right, wrong)  # what is left are borders, half a pixel off


# --- the proof on real photographs ------------------------------------------------------------------------------------

def test_the_real_fountain_under_two_protocols(tmp_path):
    """The tiny network against itself with a known change, on laser depth: the truth is looked up in the file by hand,
    both protocols by numpy alone.
    """
    folder = real_scene("strecha_fountain_p11")
    if folder is None:
        pytest.skip("strecha_fountain_p11 is not here")
    scene = open_scene(folder)
    window, cache = make_windows(scene, frames=8)[0], FrameCache(long_side=112, supervision="laser")
    network = VGGT.from_pretrained("tiny", track_head=False, point_head=False)

    def base(images, heads):
        return network(images, heads=heads)

    def deeper(images, heads):
        return {**(out := network(images, heads=heads)), "depth": out["depth"] * 1.1}

    found = evaluate_windows({"base": base, "adapted": deeper}, [(scene, window)], cache, ("none", "median"))
    table = {(row["protocol"], row["model"]): row for row in found.table()}
    assert found.truth == "laser" and {row["frames"] for row in table.values()} == {8}
    assert table["median", "adapted"]["absrel"] == pytest.approx(table["median", "base"]["absrel"], rel=1e-5)
    assert table["none", "adapted"]["absrel"] != pytest.approx(table["none", "base"]["absrel"], rel=1e-2)
    by_hand = {"none": [], "median": []}
    for k, frame in enumerate(found.maps):
        raw = np.fromfile(folder / "ground_truth_depth" / "dslr_images" / Path(frame.name).name, "<f4").reshape(
            256, 384
        )
        rows, columns = np.nonzero(frame.valid)
        height, width = frame.truth.shape
        own = raw[((rows + 0.5) * 256 / height).astype(int), ((columns + 0.5) * 384 / width).astype(int)]
        truth, pred = frame.truth[frame.valid], frame.depth["base"][frame.valid]
        known = np.isfinite(own)
        # the same depth, to within a pixel of the grid
        assert known.mean() > 0.9 and np.median(np.abs(truth[known] / own[known] - 1)) < 0.01
        assert frame.metric and 3.5 < truth.min() < truth.max() < 16  # metres, as the laser says
        by_hand["none"].append(np.mean(np.abs(pred - truth) / truth))
        by_hand["median"].append(np.mean(np.abs(pred * np.median(truth) / np.median(pred) - truth) / truth))
        assert np.allclose(frame.depth["adapted"], 1.1 * frame.depth["base"])
    for name, values in by_hand.items():
        assert table[name, "base"]["absrel"] == pytest.approx(np.mean(values), rel=1e-6)


# --- nothing takes the place of another answer ------------------------------------------------------------------------

def test_other_data_leaves_the_runs_own_answer_alone(toy, tmp_path):
    """A run asked about itself, about other data and under another protocol: three places, and each report says what
    was asked.
    """
    scene, run = open_scene(toy), tmp_path / "run"
    window, cache = make_windows(scene, frames=4)[0], FrameCache(long_side=56, supervision="sparse")
    models = {
        name: (
            lambda factor: (
                lambda images, heads: {"depth": torch.full((1, images.shape[1], *images.shape[-2:], 1), factor)}
            )
        )(f)
        for name, f in (("base", 1.0), ("adapted", 1.2))
    }
    found = evaluate_windows(models, [(scene, window)], cache, ("none", "median"))
    found.clouds = evaluate_clouds(models, [(scene, window)], cache, ("known scale",), progress=False)
    write_json(run / "config.json", {"config": {"strategy": "b", "data": "demo", "model": "tiny"}})
    (run / "report.md").write_text("# Own\n")
    renew_report(run)
    assert (run / "report.md").read_text().count("not computed") == 3 and run_report(run).count("Not computed.") == 3
    kept = {}
    for asked in (
        EvaluationRequest(), EvaluationRequest(str(tmp_path / "fountain")), EvaluationRequest(protocol="robustmvd"),
        EvaluationRequest(str(tmp_path / "else" / "fountain")),
    ):
        place = place_for(run, asked)
        assert place not in kept and not (place / "clouds").exists()
        write_answer(run, found, asked)
        write_clouds(found.clouds, place / "clouds", ("ply",))
        kept[place] = {
            path: path.read_bytes()
            for path in place.rglob("*")
            if path.is_file() and place != run or path.parent.name == "clouds"
        }
    assert [p.name for p in kept] == ["run", "fountain", "held-out_robustmvd", "fountain-2"] and set(answers(run)) == {
        "fountain",
        "held-out_robustmvd",
        "fountain-2",
    }
    for files in kept.values():
        assert files and all(path.read_bytes() == content for path, content in files.items()), (
            "a later answer changed an earlier one"
        )
    write_forgetting(run, found, Drift([], [], 1), "other scenes")
    renew_report(run)
    text, page = (run / "report.md").read_text(), run_report(run)
    assert NOT_COMPUTED not in text and "Not computed." not in page and text.startswith("# Own\n")
    assert "Forgetting, on other scenes" in text and "fountain-2" in page and "known scale" in page
    cells = [
        "".join(cell["source"])
        for cell in json.loads((ROOT / "nbs" / "04_evaluate.ipynb").read_text(encoding="utf-8"))["cells"]
    ]
    written = [cell for cell in cells if "write_clouds(clouds" in cell]
    assert written and all('place / "clouds"' in cell and 'folder / "clouds"' not in cell for cell in written), (
        "the notebook must ask for the place"
    )
