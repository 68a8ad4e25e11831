"""Protocols, cameras, regions and drift against other people's code, and the traps that an evaluation must not fall
into.
"""
import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from vggt_lora.core import ConfigError, SceneError
from vggt_lora.datasets.samples import FrameCache, load_sample
from vggt_lora.datasets.windows import make_windows
from vggt_lora.demo.demo_scenes import demo_scene
from vggt_lora.evaluate import evaluate
from vggt_lora.evaluation import regions, runner
from vggt_lora.evaluation.cameras import auc, camera_metrics, looks_swapped, pair_errors, pose_scale, umeyama
from vggt_lora.evaluation.confidence import ause, confidence_rows, confidence_table
from vggt_lora.evaluation.metrics import depth_metrics
from vggt_lora.evaluation.protocols import PROTOCOLS, STANDARD, Protocol
from vggt_lora.evaluation.runner import evaluate_windows, trusted_truth, window_scale
from vggt_lora.geometry.cameras import encode_pose, invert_pose, relative_to_first
from vggt_lora.scenes.opening import open_scene
from vggt_lora.train import TrainConfig

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A demo building with laser depth and labels."""
    return demo_scene(
        tmp_path_factory.mktemp("data"), frames=6, size=(168, 252), seed=4, style="stone", layout="corner"
    )


@pytest.fixture(scope="module")
def window(folder):
    """Scene, window, frames and the sample of a window with dense truth."""
    scene = open_scene(folder)
    cache = FrameCache(long_side=252, supervision="laser")
    item = make_windows(scene)[0]
    return scene, item, cache, load_sample(scene, item, cache)


def exact(sample, depth_factor=1.0, fill=None, camera=None):
    """A model that knows the truth, in the network's unit; `fill` is put where there is none."""
    unit = window_scale(sample, trusted_truth(sample))
    depth = torch.where(
        sample.valid, sample.depth * depth_factor, sample.depth if fill is None else torch.full_like(sample.depth, fill)
    )
    poses = relative_to_first(sample.world_to_cam.numpy())
    poses[:, :3, 3] /= unit
    poses = poses if camera is None else camera(poses)
    encoded = torch.from_numpy(encode_pose(poses, sample.K.double().numpy(), tuple(depth.shape[1:])))[None]
    answer = {"depth": (depth / unit)[None, ..., None], "pose_enc": encoded, "depth_conf": torch.ones_like(depth)[None]}
    return lambda images, heads: answer


def rows_of(window, model, protocols=STANDARD, **options):
    scene, item, cache, _ = window
    return evaluate_windows({"model": model}, [(scene, item)], cache, protocols, **options)


# --- metrics and protocols ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(5))
def test_logarithms_and_inliers_agree_with_torchmetrics(seed):
    from torchmetrics.functional import mean_squared_error
    random = np.random.default_rng(seed)
    truth = random.uniform(0.5, 30, 400)
    pred = truth * random.uniform(0.9, 1.2, 400)
    ours = depth_metrics(pred, truth, truth > 0)
    p, t = torch.from_numpy(np.log(pred)), torch.from_numpy(np.log(truth))
    assert ours["log_rmse"] == pytest.approx(mean_squared_error(p, t, squared=False).item())
    assert ours["silog"] == pytest.approx(mean_squared_error(p - p.mean(), t - t.mean(), squared=False).item())
    assert ours["inlier"] == ((p - t).abs() < np.log(1.03)).double().mean().item()
    assert depth_metrics(7 * pred, truth, truth > 0)["silog"] == pytest.approx(ours["silog"])


def test_every_row_of_everything_names_its_protocol(window):
    found = rows_of(window, exact(window[3]), (*STANDARD, "robustmvd", "vggt-omega"))
    assert {row["protocol"] for row in found.rows} == {row["protocol"] for row in found.table()} == set(PROTOCOLS)
    for rows in (
        found.rows, found.table(), found.pairs, found.cameras(), confidence_rows(found.maps, models=("model",)),
        confidence_table(confidence_rows(found.maps, models=("model",))),
        regions.region_rows(found.maps, models=("model",)),
    ):
        assert rows and all(row["protocol"] for row in rows)


def test_a_known_error_under_each_protocol(window):
    """A prediction 10 % too deep, with exact cameras: visible without a fit to true depth, gone with one."""
    table = {row["protocol"]: row for row in rows_of(window, exact(window[3], 1.1), (*STANDARD, "vggt-omega")).table()}
    assert {name: round(row["absrel"], 4) for name, row in table.items()} == {
        "none": 0.1, "pose": 0.1, "median": 0, "scale": 0, "scale+shift": 0, "median-sequence": 0, "vggt-omega": 0}
    assert {name: row["alignment"] for name, row in table.items()}["pose"] == "pose per sequence"


def test_photo_resolution_clip_and_truth_range(window):
    scene, item, cache, sample = window
    mine = Protocol("mine", "none", resolution="photo", clip=(0.1, 5.0))
    found = {row["protocol"]: row for row in rows_of(window, exact(sample), ("none", mine)).table()}
    photos = [cache.source(scene, scene.frames[i], scene.frames[i].size) for i in item.frames]
    assert found["mine"]["pixels"] == sum(int(d.valid.sum()) for d in photos), (
        "not every pixel of the photos' own truth was counted"
    )
    limited = rows_of(window, exact(sample), Protocol("near", "none", truth_range=(0.1, 8.0))).table()[0]
    depth, known = sample.depth.numpy(), sample.valid.numpy()
    assert 0 < limited["pixels"] == ((depth >= 0.1) & (depth <= 8) & known).sum() < known.sum()
    assert limited["absrel"] < 0.5  # the length of the window is that of all truth
    cut = rows_of(window, exact(sample), Protocol("cut", "none", clip=(0.1, 5.0))).table()[0]
    errors = [np.abs(np.minimum(d[k], 5) - d[k]).mean() for d, k in zip(depth.astype(float), known)]
    assert cut["mae"] == pytest.approx(np.mean(errors), rel=1e-5) and cut["mae"] > 0.1
    with pytest.raises(ConfigError, match="not available at the photo's size"):
        evaluate_windows({"m": exact(sample)}, [(scene, item)], FrameCache(252, supervision="completed"), "robustmvd")


def test_a_sequence_shares_one_scale_even_where_a_frame_is_scored_elsewhere(window):
    scene, item, cache, sample = window
    halved = sample.depth.clone()
    halved[0] /= 2
    unit = window_scale(sample, trusted_truth(sample))
    model = lambda images, heads: {"depth": (halved[:images.shape[1]] / unit)[None, ..., None]}  # noqa: E731
    found = rows_of(window, model, ("median", "median-sequence"))
    scales = {p: [row["scale"] for row in found.rows if row["protocol"] == p] for p in ("median", "median-sequence")}
    assert scales["median"] == pytest.approx([2] + [1] * 5) and len(set(scales["median-sequence"])) == 1
    used = sample.valid.numpy()
    assert scales["median-sequence"][0] == pytest.approx(
        np.median(sample.depth.numpy()[used]) / np.median(halved.numpy()[used]), rel=1e-5
    )


# --- the traps ------------------------------------------------------------------------------------------------------

def test_alignment_on_invalid_pixels_would_show(window, monkeypatch):
    model = exact(window[3], fill=1e5)
    clean = rows_of(window, model)
    assert all(row["absrel"] < 1e-5 for row in clean.rows)
    monkeypatch.setattr(
        "vggt_lora.evaluation.metrics.counted_pixels", lambda truth, valid: np.ones(np.shape(truth), bool)
    )
    with np.errstate(all="ignore"):
        careless = rows_of(window, model)
    assert not any(row["absrel"] < 0.1 for row in careless.rows), (
        "counting every pixel makes no difference: the test sees nothing"
    )


def test_a_forgotten_unit_is_reported(window, monkeypatch):
    assert not rows_of(window, exact(window[3])).warnings
    monkeypatch.setattr(runner, "window_scale", lambda *_: 1.0)
    found = rows_of(window, exact(window[3]))
    assert any("unit forgotten" in w for w in found.warnings)
    table = {row["protocol"]: row["absrel"] for row in found.table()}
    assert table["none"] > 0.5 and table["median"] < 1e-5


def test_swapped_cameras_are_reported(window):
    assert not rows_of(window, exact(window[3])).warnings
    found = rows_of(window, exact(window[3], camera=invert_pose))
    assert any("camera-to-world taken for world-to-camera" in w for w in found.warnings)
    assert found.cameras()[0]["auc_30"] < 0.5 < rows_of(window, exact(window[3])).cameras()[0]["auc_3"]


# --- cameras --------------------------------------------------------------------------------------------------------

def poses_of(turns, random):
    poses = np.tile(np.eye(4), (len(turns), 1, 1))
    poses[:, :3, :3], poses[:, :3, 3] = turns.as_matrix(), random.normal(size=(len(turns), 3))
    return poses


@pytest.mark.parametrize("seed", range(3))
def test_relative_poses_agree_with_scipy(seed):
    random = np.random.default_rng(seed)
    truth, pred = (poses_of(Rotation.random(7, rng=np.random.default_rng(seed + k)), random) for k in (0, 100))
    pairs, turned, way = pair_errors(pred, truth)
    assert len(pairs) == 21
    for (i, j), angle, direction in zip(pairs, turned, way):
        moved = []
        for poses in (pred, truth):
            a, b = (Rotation.from_matrix(poses[k, :3, :3]) for k in (i, j))
            moved.append((b * a.inv(), poses[j, :3, 3] - (b * a.inv()).apply(poses[i, :3, 3])))
        assert angle == pytest.approx(np.degrees((moved[0][0] * moved[1][0].inv()).magnitude()), abs=1e-6)
        cosine = moved[0][1] @ moved[1][1] / np.linalg.norm(moved[0][1]) / np.linalg.norm(moved[1][1])
        assert direction == pytest.approx(np.degrees(np.arccos(cosine)), abs=1e-6)
    exact_turn, exact_way = pair_errors(truth, truth)[1:]
    assert exact_turn.max() < 1e-5 and exact_way.max() < 1e-5  # 0 degrees, not 180
    assert camera_metrics(exact_turn, exact_way)["auc_3"] == 1
    assert looks_swapped(invert_pose(truth), truth) and not looks_swapped(truth, truth)
    assert (
        pair_errors(mirrored(truth), truth)[2].min() > 179
        and pair_errors(mirrored(truth), truth, fold=True)[2].max() < 1e-5
    )


def mirrored(poses):
    """The same rotations, every motion into the opposite direction."""
    poses = poses.copy()
    poses[:, :3, 3] *= -1
    return poses


def test_auc_is_the_area_under_the_curve():
    errors = np.random.default_rng(0).gamma(2, 4, 50)
    assert auc(errors, 30) == pytest.approx(np.mean([(errors < k).mean() for k in range(1, 31)]), abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_similarity_agrees_with_colmap(seed):
    import pycolmap
    random = np.random.default_rng(seed)
    a = random.normal(size=(6, 3))
    b = 3 * a @ Rotation.random(rng=random).as_matrix().T + [1, -2, 5] + random.normal(0, 0.1, (6, 3))
    scale, R, t = umeyama(a, b)
    theirs = pycolmap.estimate_sim3d(a, b)
    assert (
        scale == pytest.approx(theirs.scale)
        and np.allclose(R, theirs.rotation.matrix())
        and np.allclose(t, theirs.translation)
    )
    truth = poses_of(Rotation.random(5, rng=random), random)
    smaller = truth.copy()
    smaller[:, :3, 3] *= 0.2
    assert pose_scale(smaller, truth) == pytest.approx(5)
    assert np.isnan(pose_scale(truth[:2], truth[:2]))


# --- confidence and regions -----------------------------------------------------------------------------------------

def test_ause_of_an_oracle_and_of_the_opposite():
    error = np.random.default_rng(0).gamma(1, 1, 2000)
    assert ause(error, -error) == 0 < 0.3 < ause(error, np.ones(2000)) < ause(error, error)


def test_planes_of_a_building_and_what_a_shift_does_to_them(window):
    scene, item, cache, sample = window
    found = rows_of(window, exact(sample), "none")
    frame = found.maps[0]
    planes = regions.true_planes(frame.truth, frame.valid, frame.K)
    assert len(planes) >= 2
    for plane in planes:
        assert regions.plane_errors(frame.truth, plane, frame.K)["normal_deg"] < 1e-4
        away = 1.1 * frame.truth  # all depths 10 % too large: a plane at distance d stands d / 10 behind
        moved = regions.plane_errors(away, plane, frame.K)
        assert moved["offset_cm"] == pytest.approx(10 * plane.offset, rel=1e-3) and moved["normal_deg"] < 1e-3
    masks, by = regions.region_masks(frame, planes)
    assert by == "labels" and min(masks[k].sum() for k in ("wall", "window", "edge")) > 50
    assert (sum(masks[k].astype(int) for k in ("wall", "window", "edge", "rest")) == frame.valid).all()
    unlabelled, by = regions.region_masks(dataclasses.replace(frame, labels=frame.labels * 0), planes)
    assert by == "planes"
    upright = {bool(abs(plane.normal @ frame.world_to_cam[:3, 2]) < 0.26): plane.mask for plane in planes}
    assert (unlabelled["wall"] & upright[False]).sum() == 0
    built = masks["wall"] | masks["window"] | masks["edge"]
    on = [(part & built).sum() / part.sum() for part in (unlabelled["wall"], upright[False])]
    assert on[0] > 0.7 > 0.2 > on[1], "vertical planes are on the building, the horizontal one on the ground"


def test_up_is_found_in_a_world_of_any_orientation(window):
    """Turned by any rotation, a scene has the same walls; with z taken for up, as some worlds have it, it would not."""
    frames = [
        dataclasses.replace(frame, labels=frame.labels * 0, depth={"base": frame.truth})
        for frame in rows_of(window, exact(window[3]), "none").maps
    ]
    planes = [regions.true_planes(frame.truth, frame.valid, frame.K) for frame in frames]
    up = regions.world_up(frames, planes)["demo"]
    assert up @ [0, 0, 1] > np.cos(np.radians(2))
    turn = Rotation.from_euler("xyz", [70, 20, -110], degrees=True).as_matrix()
    turned = [
        dataclasses.replace(
            frame,
            world_to_cam=np.block(
                [[frame.world_to_cam[:3, :3] @ turn.T, frame.world_to_cam[:3, 3:]], [np.zeros((1, 3)), np.ones((1, 1))]]
            ),
        )
        for frame in frames
    ]
    assert np.allclose(regions.world_up(turned, planes)["demo"], turn @ up)
    walls = [
        [row["pixels"] for row in regions.region_rows(f, "none", ("base",), **o) if row["region"] == "wall"]
        for f, o in ((frames, {}), (turned, {}), (turned, {"up": (0, 0, 1)}))
    ]
    assert walls[0] == walls[1] and min(walls[0]) > 1000 and sum(walls[2]) < 0.8 * sum(walls[0])


def test_an_improvement_on_windows_alone_is_found_there_alone(window):
    maps = []
    for k in range(8):
        for frame in rows_of(window, exact(window[3]), "none").maps[:1]:
            glass = frame.labels == regions.LABELS["window"]
            random = np.random.default_rng(k)
            base = frame.truth + random.normal(0, 0.3 + 0.05 * k, frame.truth.shape)
            adapted = np.where(glass, frame.truth + 0.4 * (base - frame.truth), base)
            maps.append(dataclasses.replace(frame, name=str(k), depth={"base": base, "adapted": adapted}))
    found = regions.region_effects(regions.region_rows(maps, "none"))
    assert found["window"][0].change == pytest.approx(-0.6) and found["window"][0].verdict == "better"
    assert found["wall"][0].change == 0 and found["wall"][0].verdict != "better"
    verdicts = {row["region"]: row["verdict"] for row in regions.check_claims(found)}
    assert verdicts["window"] == "exceeded" and verdicts["wall"] in ("refuted", "not tested")


def test_window_masks_of_the_user(window, tmp_path):
    from PIL import Image
    frame = rows_of(window, exact(window[3]), "none").maps[0]
    frame = dataclasses.replace(frame, labels=frame.labels * 0, depth={"base": frame.truth})
    with pytest.raises(ConfigError, match="holds no mask"):
        regions.region_rows([frame], "none", ("base",), tmp_path)
    height, width = frame.plan.source_size
    drawn = np.zeros((height, width), np.uint8)
    drawn[:, : width // 2] = 1
    name = tmp_path / f"{frame.name.rsplit('/', 1)[-1].rpartition('.')[0]}.png"
    Image.fromarray(drawn).save(name)
    row = next(r for r in regions.region_rows([frame], "none", ("base",), tmp_path) if r["region"] == "window")
    half = frame.valid[:, : frame.valid.shape[1] // 2].sum()
    assert row["by"] == "planes and masks" and row["pixels"] == pytest.approx(half, rel=0.05)
    Image.fromarray(drawn[:-3]).save(name)
    with pytest.raises(SceneError, match="expected equal sizes"):
        regions.region_rows([frame], "none", ("base",), tmp_path)


# --- a base alone, as the guide says -------------------------------------------------------------------------------

@pytest.mark.slow
def test_the_guides_command_for_a_base_alone_runs_on_demo_data(folder, tmp_path):
    """The very command that the guide gives for the real weights, with the tiny network and a demo scene."""
    cells = json.loads((ROOT / "nbs" / "guide" / "measurements.ipynb").read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells)
    command, = re.findall(r"^papermill nbs/04_evaluate.ipynb outputs/robustmvd.ipynb .*$", text, re.M)
    words = (
        command.replace("facebook/VGGT-1B", "tiny")
        .replace("path/to/eth3d", str(folder))
        .replace("outputs/", f"{tmp_path}/")
        .split()
    )
    done = subprocess.run(
        [str(Path(sys.executable).parent / words[0]), *words[1:], "-p", "pictures", "1"], cwd=ROOT, capture_output=True,
        text=True, stdin=subprocess.DEVNULL, env={**os.environ, "VGGT_LORA_CACHE": str(tmp_path / "cache")},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Unable to parse" not in done.stderr
    written = (tmp_path / "robustmvd.ipynb").read_text(encoding="utf-8")
    assert re.search(r"\| robustmvd \| base \| median per image \| 6 \|", written)


def test_evaluate_takes_models_folders_and_configurations(folder):
    calls = []

    def flat(images, heads):
        calls.append(images.shape[1])
        return {"depth": torch.ones(1, images.shape[1], *images.shape[-2:], 1)}

    everything = evaluate(flat, folder, protocol="median")
    held_out = evaluate(
        {"base": flat},
        TrainConfig(data=str(folder), train_fraction=0.5, frames=3, frame_cache=False),
        protocol=("median", "none"),
    )
    assert (everything.table()[0]["frames"], held_out.table()[0]["frames"]) == (6, 3) and calls == [6, 3]
    with pytest.raises(ConfigError, match="data is missing: to evaluate models"):
        evaluate(flat)
    with pytest.raises(ConfigError, match="Did you mean 'robustmvd'"):
        evaluate(flat, folder, protocol="robust")
