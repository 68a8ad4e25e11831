"""Laser depth and masks: through both cameras, behind nothing, and refused where a file is not what it should be."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

pycolmap = pytest.importorskip("pycolmap")

from vggt_lora.core import ConfigError, SceneError
from vggt_lora.datasets.samples import FrameCache
from vggt_lora.demo.demo_scenes import demo_scene, toy_scene
from vggt_lora.depth import sparse_depth
from vggt_lora.supervision.laser import laser_agreement, laser_depth
from vggt_lora.scenes.masks import photo_mask
from vggt_lora.geometry import ray_tracer
from vggt_lora.geometry.cameras import pinhole_pixels, pixel_centres, resize_intrinsics
from vggt_lora.reference_data import real_scene
from vggt_lora.scenes.images import plan_image, target_size
from vggt_lora.scenes.masks import mask_at
from vggt_lora.scenes.opening import open_scene
from vggt_lora.scenes.undistortion import Original, original_camera, read_originals, to_original
from vggt_lora.supervision.depth_map import DepthAbsent, DepthMap, zbuffer_mean
from vggt_lora.supervision.laser_scans import SCAN_FATES, load_occluder, load_scans, scan_depth
from vggt_lora.supervision.sources import DEPTH_SOURCES, depth_source
from vggt_lora.training.config import TrainConfig

SETTINGS = {"frames": 3, "size": (252, 378), "seed": 4, "style": "stone", "layout": "corner"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return demo_scene(tmp_path_factory.mktemp("laser"), **SETTINGS)


@pytest.fixture(scope="module")
def scene(folder):
    return open_scene(folder)


@pytest.fixture
def copy(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "demo"))


def exact(scene, frame):
    return np.load(scene.root / "exact_depth" / f"{Path(frame.name).stem}.npy")


# --- the two cameras ------------------------------------------------------------------------------------------------

LENSES = {
    "THIN_PRISM_FISHEYE": [0.209, 0.22, 7e-5, -3e-5, -0.186, 0.42, 9e-4, 5e-4],
    "OPENCV": [-0.1, 0.02, 1e-3, -1e-3],
    "OPENCV_FISHEYE": [0.05, -0.01, 0.002, 0.0],
    "RADIAL": [-0.08, 0.01],
    "FULL_OPENCV": [-0.1, 0.02, 1e-3, -1e-3, 0, 0, 0, 0],
}


@settings(max_examples=40, deadline=None)
@given(lens=st.sampled_from(sorted(LENSES)), seed=st.integers(0, 10**6))
def test_every_lens_that_pycolmap_knows_goes_there_and_back(lens, seed):
    rng = np.random.default_rng(seed)
    height, width = (int(n) for n in rng.integers(100, 5000, 2))
    focal = 0.56 * max(height, width) * rng.uniform(1, 2)
    middle = [width / 2 + rng.uniform(-9, 9), height / 2 + rng.uniform(-9, 9)]
    params = [focal] if lens == "RADIAL" else [focal, 1.01 * focal]
    camera = Original(
        (height, width),
        pycolmap.Camera(model=lens, width=width, height=height, params=[*params, *middle, *LENSES[lens]]),
        lens,
    )
    K = np.array([[focal * 0.9, 0, width * 0.52], [0, focal * 0.95, height * 0.49], [0, 0, 1]])
    pixels = rng.uniform(0, 1, (200, 2)) * [width, height]
    there = pinhole_pixels(camera.rays(pixels), K)
    np.testing.assert_allclose(to_original(there, K, camera), pixels, atol=1e-4)
    # one point, one place, whatever its distance
    point = np.array([*camera.rays(pixels[:1])[0], 1.0]) * rng.uniform(0.1, 50)
    np.testing.assert_allclose(camera.camera.img_from_cam(point), pixels[0], atol=1e-4)


def test_nothing_comes_back_from_behind_the_lens(scene):
    camera = original_camera(scene, scene.frames[0])
    assert np.isnan(camera.pixels(np.array([[np.nan, 0], [np.inf, 0], [1e9, 1e9]]))).all()
    assert np.isnan(camera.rays(np.array([[np.nan, 3.0]]))).all()


def test_photo_pairs_with_its_original_by_name_even_where_ids_differ(copy, scene):
    """images.txt of the originals decides; without it the camera id does."""
    path = copy / "dslr_calibration_jpg" / "cameras.txt"
    lines = path.read_text().splitlines()
    path.write_text(
        "\n".join(line.replace("0 THIN", "7 THIN") if line.startswith("0 ") else line for line in lines) + "\n"
    )
    images = copy / "dslr_calibration_jpg" / "images.txt"
    images.write_text(
        "\n".join(line.replace(" 0 dslr_images/", " 7 dslr_images/") for line in images.read_text().splitlines()) + "\n"
    )
    other = open_scene(copy)
    for frame, same in zip(other.frames, scene.frames):
        assert np.array_equal(laser_depth(other, frame, (84, 126)).depth, laser_depth(scene, same, (84, 126)).depth)
    images.unlink()
    with pytest.raises(SceneError, match="holds no camera 0"):
        [laser_depth(other, frame, (84, 126)) for frame in other.frames]
    path.write_text("\n".join(lines) + "\n")
    assert [laser_depth(other, frame, (84, 126)).valid.any() for frame in other.frames] == [True] * 3


def test_changed_calibration_is_read_again(copy):
    scene = open_scene(copy)
    before = laser_depth(scene, scene.frames[0], (84, 126)).depth
    path = scene.jpg_cameras / "cameras.txt"
    path.write_text(
        "\n".join(
            line
            if line.startswith("#")
            else " ".join([*line.split()[:6], str(float(line.split()[6]) + 20), *line.split()[7:]])
            for line in path.read_text().splitlines()
        )
        + "\n"
    )
    assert not np.array_equal(before, laser_depth(scene, scene.frames[0], (84, 126)).depth)


@pytest.mark.parametrize(
    "fault, words",
    [
        (lambda f: (f / "cameras.txt").unlink(), "holds no cameras.txt"),
        (lambda f: (f / "cameras.txt").write_text("0 THIN_PRISM_FISHEYE 378 252 1 2 3\n"), "expected 12"),
        (lambda f: (f / "cameras.txt").write_text("0 FISHBOWL 378 252 1 2 3\n"), "unknown camera model"),
        (
            lambda f: (f / "images.txt").write_text("# nothing\n1 1 0 0 0 0 0 0 0 dslr_images/other.JPG\n\n"),
            "does not hold",
        ),
    ],
)
def test_broken_calibration_of_the_originals_is_named(copy, fault, words):
    scene = open_scene(copy)
    fault(scene.jpg_cameras)
    with pytest.raises(SceneError, match=words):
        laser_depth(scene, scene.frames[0], (84, 126))


# --- ground truth depth -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode, side", [("aspect", 378), ("aspect", 140), ("crop", 196), ("pad", 196), ("squash", 140)])
def test_laser_meets_exact_depth_in_every_plan(scene, mode, side):
    """Each supervised pixel against the exact depths of the part of the photo that it covers."""
    for frame in scene.frames:
        plan = plan_image(frame.size, side, mode)
        found, truth, K = laser_depth(scene, frame, plan.size, plan), exact(scene, frame), plan.intrinsics(frame.K)
        row, column = np.nonzero(found.valid)
        low, high = (
            ((np.stack([column, row], -1) + step - K[:2, 2]) / np.diag(K)[:2] * np.diag(frame.K)[:2] + frame.K[:2, 2])
            for step in (0, 1)
        )
        inside = good = 0
        for (left, top), (right, bottom), z in zip(low - 1, high + 1, found.depth[row, column]):
            there = truth[max(int(top), 0): int(np.ceil(bottom)), max(int(left), 0): int(np.ceil(right))]
            there = there[there > 0]
            inside += 1
            good += there.size > 0 and there.min() * 0.99 <= z <= there.max() * 1.01
        assert inside == found.counts["landed"] > 500 and good > 0.997 * inside, (frame.name, mode)


def test_size_of_the_photo_on_disk_does_not_matter(scene):
    """A photo that was shrunk, with its K, gives the same map: the laser never asks for the photo's size."""
    frame = scene.frames[0]
    small = replace(
        frame,
        size=(frame.size[0] // 2, frame.size[1] // 2),
        K=resize_intrinsics(frame.K, frame.size, (frame.size[0] // 2, frame.size[1] // 2)),
    )
    one, other = (laser_depth(scene, f, (126, 196)) for f in (frame, small))
    assert (one.valid == other.valid).mean() > 0.995 and one.counts["observed"] == other.counts["observed"]
    both = one.valid & other.valid
    assert np.median(np.abs(one.depth[both] / other.depth[both] - 1)) < 1e-6


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(0, 400), cells=st.integers(1, 50))
def test_pooling_is_the_harmonic_mean_of_the_front(seed, count, cells):
    rng = np.random.default_rng(seed)
    flat, z = (
        rng.integers(0, cells, count),
        (rng.uniform(1, 4, count) if seed % 2 else rng.choice([2.0, 2.03, 2.2, 5.0], count)).astype(np.float32),
    )
    depth, front = zbuffer_mean(flat, z, cells)
    for cell in range(cells):
        own = z[flat == cell]
        near = own[own <= own.min() * np.float32(1.02)] if len(own) else own
        assert depth[cell] == pytest.approx(len(near) / np.sum(1 / near.astype(float)) if len(near) else 0, rel=1e-6)
    assert front.sum() <= count and (front.any() or not count)


def test_depth_file_faults(scene, tmp_path):
    frame = scene.frames[0]
    good = np.fromfile(frame.depth_path, "<f4")
    odd = tmp_path / "DSC_0001.JPG"

    def attempt(content):
        odd.write_bytes(content)
        return laser_depth(scene, replace(frame, depth_path=odd), (84, 126))

    def changed(value):
        spoilt = good.copy()
        spoilt[1234] = value
        return spoilt.tobytes()

    assert attempt(good.tobytes()).valid.any()
    camera = original_camera(scene, frame)
    for content, words in (
        (good.tobytes()[:-1], "cut short"), (good.tobytes() + b"0", "another camera"), (b"", "cut short"),
        (frame.image_path.read_bytes(), "JPEG photo"), (changed(np.nan), "1 values are not a number"),
        (changed(0), "zero or negative"), (changed(-3), "zero or negative"), (changed(-np.inf), "zero or negative"),
    ):
        with pytest.raises(SceneError, match=words) as error:
            attempt(content)
        assert str(odd) in str(error.value)
    assert f"{camera.size[1]}x{camera.size[0]}" in str(pytest.raises(SceneError, attempt, b"1234").value)
    assert not attempt(np.full(good.shape, np.inf, "<f4").tobytes()).valid.any()  # nothing measured is no fault


def test_without_the_originals_cameras_nothing_is_stretched(copy):
    shutil.rmtree(copy / "dslr_calibration_jpg")
    scene = open_scene(copy)
    for source in (laser_depth, sparse_depth):  # the sparse points need the mask
        frame = next(f for f in scene.frames if f.mask_path)
        with pytest.raises(SceneError, match="put dslr_calibration_jpg"):
            source(scene, frame, (84, 126))


# --- scans ------------------------------------------------------------------------------------------------------------


def without_truth(scene):
    return replace(scene, frames=tuple(replace(f, depth_path=None) for f in scene.frames))


@pytest.mark.parametrize("hide", ["mesh", "discs"])
def test_no_wall_is_seen_through(scene, hide):
    from scipy.ndimage import maximum_filter

    through = total = 0
    for frame in scene.frames:
        truth = exact(scene, frame)
        farthest = maximum_filter(np.where(truth > 0, truth, np.inf), 3)
        found = scan_depth(scene, frame, frame.size, hide=hide)
        assert (
            found.counts["observed"]
            == sum(found.counts[fate] for fate in SCAN_FATES)
            == sum(map(len, load_scans(scene).points))
        )
        through += (found.depth > 1.1 * farthest)[found.valid].sum()
        total += found.valid.sum()
    assert total > 5000 and through < 0.001 * total


def test_scans_stand_in_where_there_is_no_ground_truth(scene):
    other = without_truth(scene)
    for frame, bare in zip(scene.frames, other.frames):
        assert np.array_equal(laser_depth(other, bare, (126, 196)).depth, scan_depth(scene, frame, (126, 196)).depth)
        row = laser_agreement(scene, frame, (126, 196))
        assert row["median"] < 0.003 and row["90 %"] < 0.03 and row["overlap"] > 0.6


def test_scans_do_not_care_where_the_world_begins(copy, scene):
    """The same scene moved by half a million metres, as surveys are, gives the same depth."""
    import re

    far = np.array([512000.0, 5403000.0, 250.0])
    moved = replace(
        without_truth(scene),
        root=copy,
        frames=tuple(
            replace(
                f, depth_path=None, mask_path=None,
                world_to_cam=f.world_to_cam @ np.block([[np.eye(3), -far[:, None]], [np.zeros((1, 3)), 1]]),
            )
            for f in scene.frames
        ),
    )
    path = copy / "dslr_scan_eval" / "scan_alignment.mlp"
    rows = iter(np.tile(np.array([*far, 0.0]), 2))
    path.write_text(
        re.sub(
            r"^((?:\S+ ){3})(\S+) $", lambda m: f"{m[1]}{float(m[2]) + next(rows):.9f} ", path.read_text(), flags=re.M
        )
    )
    (copy / "occlusion" / "surface_mesh.ply").unlink()  # single precision in the file itself
    here = replace(
        without_truth(scene), frames=tuple(replace(f, depth_path=None, mask_path=None) for f in scene.frames)
    )
    for frame, same in zip(moved.frames, here.frames):
        one, other = scan_depth(moved, frame, (126, 196)), scan_depth(here, same, (126, 196), hide="discs")
        both = one.valid & other.valid
        assert (
            both.sum() > 0.99 * other.valid.sum() > 500
            and np.median(np.abs(one.depth[both] - other.depth[both])) < 1e-4
        )


def test_an_occlusion_mesh_hides_the_same_points_without_open3d(scene, monkeypatch):
    pytest.importorskip("open3d")
    import vggt_lora.supervision.laser_scans as scans

    by_open3d = scan_depth(scene, scene.frames[0], (126, 196), hide="mesh")
    monkeypatch.setattr(scans, "make_tracer", lambda *mesh: ray_tracer.make_tracer(*mesh, tracer="embreex"))
    scans._load_occluder.cache_clear()
    by_embreex = scan_depth(scene, scene.frames[0], (126, 196), hide="mesh")
    scans._load_occluder.cache_clear()
    assert by_embreex.counts["hidden"] == pytest.approx(by_open3d.counts["hidden"], rel=1e-3) and by_open3d.valid.any()
    assert (by_embreex.valid == by_open3d.valid).mean() > 0.999


def test_files_are_read_once(scene, monkeypatch):
    import vggt_lora.supervision.laser_scans as scans

    load_scans(scene), load_occluder(scene)
    monkeypatch.setattr(scans, "read_ply", lambda path: pytest.fail(f"{path} was read again"))
    scan_depth(scene, scene.frames[0], (84, 126))


def test_broken_scans_and_meshes_are_named(copy):
    scene = without_truth(open_scene(copy))
    def ask():
        return laser_depth(scene, scene.frames[0], (84, 126))
    assert ask().valid.any()
    mesh = copy / "occlusion" / "surface_mesh.ply"
    whole = mesh.read_bytes()
    mesh.write_bytes(whole[:400])
    with pytest.raises(SceneError, match="surface_mesh.ply: is cut short"):
        ask()
    mesh.write_bytes(whole)
    with pytest.raises(ConfigError, match="choose one of: auto, discs, mesh"):
        scan_depth(scene, scene.frames[0], (84, 126), hide="mush")
    shutil.rmtree(copy / "occlusion")
    assert ask().valid.any()  # discs
    with pytest.raises(ConfigError, match="use hide='discs'"):
        scan_depth(scene, scene.frames[0], (84, 126), hide="mesh")
    scan = copy / "dslr_scan_eval" / "scan2.ply"
    scan.write_bytes(scan.read_bytes()[:-1])
    with pytest.raises(SceneError, match="scan2.ply: is cut short"):
        ask()
    scan.unlink()
    with pytest.raises(SceneError, match="scan2.ply missing"):
        ask()


# --- masks ------------------------------------------------------------------------------------------------------------


def test_masks_cover_what_they_were_drawn_for(scene, folder):
    names = json.loads((folder / "labels/parts.json").read_text())
    away = [names.index(name) for name in ("person", "trunk", "foliage") if name in names]
    checked = 0
    for frame in scene.frames:
        parts = np.array(Image.open(folder / "labels/parts" / f"{Path(frame.name).stem}.png"))
        mask = photo_mask(scene, frame, frame.size)
        if np.isin(parts, away).any():
            checked += 1
            assert (mask[np.isin(parts, away)] == 2).mean() > 0.97
        sparse, laser = sparse_depth(scene, frame, frame.size), laser_depth(scene, frame, frame.size)
        # a sample beside the border of its pixel's mask
        assert (mask[sparse.valid] > 0).mean() < 0.05 and (mask[laser.valid] == 2).mean() < 0.02
    assert checked


def test_value_1_stops_sparse_points_only(scene, tmp_path):
    frame = scene.frames[0]
    size = original_camera(scene, frame).size
    for value in (0, 1, 2):
        Image.fromarray(np.full(size, value, np.uint8)).save(tmp_path / "mask.png")
        (tmp_path / "mask.png").touch()
        masked = replace(frame, mask_path=tmp_path / "mask.png")
        assert sparse_depth(scene, masked, (84, 126)).valid.any() == (value == 0)
        assert laser_depth(scene, masked, (84, 126)).valid.any() == (value < 2)
        assert scan_depth(scene, masked, (84, 126)).valid.any() == (value < 2)
        assert (photo_mask(scene, masked, (84, 126)) == value).all()


@pytest.mark.parametrize("make, words", [
    (lambda size: np.zeros((size[0], size[1] + 10), np.uint8), "stretched mask"),
    (lambda size: np.zeros(size[::-1], np.uint8), "stretched mask"),
    (lambda size: np.full(size, 255, np.uint8), "value 255"),
    (lambda size: np.full(size, 3, np.uint8), "value 3"),
    (lambda size: np.zeros((*size, 4), np.uint8), "one channel"),
    (lambda size: np.zeros(size, np.uint16), "one channel"),
])
@pytest.mark.parametrize("source", [laser_depth, sparse_depth, photo_mask])
def test_odd_masks_are_refused(scene, tmp_path, make, words, source):
    frame, path = scene.frames[0], tmp_path / "odd.png"
    Image.fromarray(make(original_camera(scene, frame).size)).save(path)
    with pytest.raises(SceneError, match=words) as error:
        source(scene, replace(frame, mask_path=path), (84, 126))
    assert str(path) in str(error.value)


def test_masks_of_ones_own_scene_are_found_and_unused_ones_are_told(tmp_path):
    folder = toy_scene(tmp_path, frames=2, size=(84, 126))
    (folder / "masks").mkdir()
    frame = open_scene(folder).frames[0]
    Image.fromarray(np.zeros(frame.size, np.uint8)).save(folder / "masks" / "else.png")
    assert any("masks is not used" in note and f"{frame.name}.png" in note for note in open_scene(folder).notes)
    path = folder / "masks" / f"{frame.name}.png"
    path.parent.mkdir(parents=True)
    Image.fromarray(np.zeros(frame.size, np.uint8)).save(path)
    scene = open_scene(folder)
    assert not any("masks" in note for note in scene.notes)
    found = [sparse_depth(scene, f, (84, 126)) for f in scene.frames]
    assert (
        not found[0].valid.any()
        and found[0].counts["masked"] == found[0].counts["observed"] - found[0].counts["repeated"]
        and found[1].valid.any()
    )
    assert mask_at(scene, scene.frames[0], np.array([[1.0, 1.0], [-5.0, 1.0]])).tolist() == [2, 0]


def test_own_mask_also_covers_the_laser(scene, tmp_path):
    frame = scene.frames[0]
    left = np.full(frame.size, 255, np.uint8)
    left[:, : frame.size[1] // 2] = 0
    Image.fromarray(left).save(tmp_path / "own.png")
    found = laser_depth(scene, replace(frame, photo_mask_path=tmp_path / "own.png"), frame.size)
    plain = laser_depth(scene, frame, frame.size)
    assert not found.valid[:, : frame.size[1] // 2].any() and np.array_equal(
        found.depth[:, frame.size[1] // 2 + 1 :], plain.depth[:, frame.size[1] // 2 + 1 :]
    )
    assert found.counts["observed"] == sum(found.counts[fate] for fate in SCAN_FATES)


# --- as supervision ---------------------------------------------------------------------------------------------------


def test_supervision_names_reach_the_samples(scene, monkeypatch):
    assert TrainConfig(data="demo", output="out", supervision="laser+sparse").supervision == "laser+sparse"
    with pytest.raises(ConfigError, match="choose one of: .*laser.*joined by"):
        TrainConfig(data="demo", output="out", supervision="lazer")
    maps = {
        name: FrameCache(196, supervision=name).get(scene, 0, (126, 196)).depth
        for name in ("sparse", "laser", "laser+sparse")
    }
    assert np.array_equal(maps["laser+sparse"].valid, maps["laser"].valid | maps["sparse"].valid)
    assert (
        maps["laser+sparse"].counts["laser"]
        == maps["laser"].valid.sum()
        > 10 * maps["laser+sparse"].counts["sparse"]
        > 0
    )
    monkeypatch.setitem(DEPTH_SOURCES, "flat", lambda scene, frame, size, plan=None: DepthMap(
        np.ones(size, np.float32), np.ones(size, bool), np.ones(size, np.float32), {}))
    everything = depth_source("laser+sparse+flat")(scene, scene.frames[0], (126, 196))
    assert everything.valid.all() and sum(everything.counts[name] for name in ("laser", "sparse", "flat")) == 126 * 196


def test_a_scene_without_laser_says_what_is_missing_and_what_remains(tmp_path):
    scene = open_scene(toy_scene(tmp_path, frames=2, size=(84, 126)))
    with pytest.raises(DepthAbsent, match="no ground_truth_depth and no dslr_scan_eval.*'sparse'"):
        laser_depth(scene, scene.frames[0], (84, 126))
    mixed = depth_source("laser+sparse")(scene, scene.frames[0], (84, 126))
    assert mixed.counts["laser"] == 0 and mixed.counts["sparse"] == mixed.valid.sum() > 0


def test_a_broken_file_stops_a_mixture_too(scene, tmp_path):
    (tmp_path / "short.JPG").write_bytes(b"123")
    with pytest.raises(SceneError, match="cut short"):
        depth_source("laser+sparse")(scene, replace(scene.frames[0], depth_path=tmp_path / "short.JPG"), (84, 126))


def test_importing_the_sources_is_light():
    heavy = "{'torch', 'open3d', 'matplotlib', 'pycolmap', 'scipy.ndimage'}"
    code = (
        f"import vggt_lora.supervision.laser, vggt_lora.datasets.samples, sys; print(sorted({heavy} & "
        "set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


# --- real data --------------------------------------------------------------------------------------------------------


def test_fountain_laser_meets_its_sparse_points_in_every_photo():
    folder = real_scene("strecha_fountain_p11")
    if folder is None:
        pytest.skip("strecha_fountain_p11 is not at hand")
    scene = open_scene(folder)
    for frame in scene.frames:
        size = target_size(frame.size, 518)
        laser, sparse = laser_depth(scene, frame, size), sparse_depth(scene, frame, size)
        both = laser.valid & sparse.valid
        off = laser.depth[both] / sparse.depth[both] - 1
        assert (
            len(off) > 500
            and np.median(np.abs(off)) < 0.0015
            and abs(np.median(off)) < 0.0007
            and laser.coverage > 0.35
        ), frame.name


def test_real_eth3d_lens_is_read_from_its_file():
    folder = real_scene("eth3d_real_text")
    if folder is None:
        pytest.skip("eth3d_real_text is not at hand")
    originals = read_originals(folder / "delivery_area_as_found" / "dslr_calibration_jpg")
    assert list(originals.cameras) == [0] and originals.photos == {} and originals.cameras[0].size == (4032, 6048)
    K = np.array([[3408.59, 0, 3117.24], [0, 3408.87, 2064.07], [0, 0, 1]])
    at = to_original(pixel_centres((4, 4)) * [6208 / 4, 4135 / 4], K, originals.cameras[0])
    assert np.isfinite(at).all() and (at > 0).all() and (at < [6048, 4032]).all()
