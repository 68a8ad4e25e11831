"""The demo buildings: what is written is what was built, seen through two independent lenses."""
import json
import subprocess
import sys
import xml.etree.ElementTree as tree
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pycolmap = pytest.importorskip("pycolmap")
pytest.importorskip("open3d")

from vggt_lora.core import SceneError
from vggt_lora.scenes.demo import points_per_photo, prepare, undistorted, write_demo
from vggt_lora.scenes.eth3d import open_scene
from vggt_lora.scenes.geometry import project_points
from vggt_lora.scenes.panels import PARTS, UNSCANNED
from vggt_lora.scenes.shading import photograph, pinhole_rays
from vggt_lora.scenes.synthetic import DEMO, DEMO_HELD_OUT, STYLES, demo_scene, folder_hashes, scene_fault, toy_scene

SETTINGS = {"frames": 6, "size": (252, 378), "seed": 4, "style": "stone", "layout": "corner"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return demo_scene(tmp_path_factory.mktemp("demo"), **SETTINGS)


@pytest.fixture(scope="module")
def scene(folder):
    return open_scene(folder)


@pytest.fixture(scope="module")
def models(folder):
    return {name: pycolmap.Reconstruction(str(folder / f"dslr_calibration_{name}")) for name in ("undistorted", "jpg")}


def label(folder, kind, frame):
    return np.array(Image.open(folder / "labels" / kind / f"{stem(frame)}.png"))


def stem(frame) -> str:
    return Path(frame.name).stem


def exact(folder, frame):
    return np.load(folder / "exact_depth" / f"{stem(frame)}.npy")


def laser(folder, frame, models):
    camera = models["jpg"].cameras[frame.camera_id]
    return np.fromfile(folder / "ground_truth_depth/dslr_images" / f"{stem(frame)}.JPG", "<f4").reshape(camera.height, camera.width)


def centres(size):
    u, v = np.meshgrid(np.arange(size[1]) + 0.5, np.arange(size[0]) + 0.5)
    return np.stack([u, v], -1).reshape(-1, 2)


def through_the_lens(frame, models, pixels):
    """Pixels of the undistorted photo -> pixels of the original, by pycolmap alone."""
    rays = np.column_stack([models["undistorted"].cameras[frame.camera_id].cam_from_img(pixels), np.ones(len(pixels))])
    return np.array(models["jpg"].cameras[frame.camera_id].img_from_cam(rays))


def test_the_layout_is_complete_and_opens(folder, scene, models):
    assert scene_fault(folder) is None and scene.metric and len(scene) == 6 and scene.jpg_cameras is not None
    assert {c.model.name for c in models["jpg"].cameras.values()} == {"THIN_PRISM_FISHEYE"}
    assert {c.model.name for c in models["undistorted"].cameras.values()} == {"PINHOLE"}
    assert len({frame.size for frame in scene.frames}) == 2 and len({frame.K[0, 0] for frame in scene.frames}) == 2
    for frame in scene.frames:
        name = stem(frame)
        camera = models["jpg"].cameras[frame.camera_id]
        assert Image.open(folder / "images/dslr_images" / f"{name}.JPG").size == (camera.width, camera.height)
        assert frame.depth_path.stat().st_size == 4 * camera.width * camera.height
        assert 1.01 < frame.size[1] / camera.width < 1.04
        grown = np.array(frame.size[::-1]) - [camera.width, camera.height]  # the principal point moves by half of it
        np.testing.assert_allclose(frame.K[:2, 2] - camera.params[2:4], grown / 2, atol=2e-3)
        assert exact(folder, frame).shape == frame.size == label(folder, "edges", frame).shape
    with_mask = [frame.mask_path for frame in scene.frames if frame.mask_path]
    assert with_mask


def test_resampling_moves_nothing():
    """The undistorted photo, resampled from the original, lies on one rendered straight through the pinhole camera."""
    shoot = prepare({**SETTINGS, "frames": 2, "size": (200, 300)})
    photo, caster, light = shoot.photos[1], shoot.casters[1], shoot.lights[1]
    camera, rotation = shoot.cameras[photo.camera_id], photo.world_to_cam[:3, :3]
    centre = -rotation.T @ photo.world_to_cam[:3, 3]
    bent, _, _ = photograph(caster, rotation, centre, shoot.rays[photo.camera_id], camera.original_size, camera.original_K[0, 0], light)
    direct, _, _ = photograph(caster, rotation, centre, pinhole_rays(photo.K, photo.size), photo.size, photo.K[0, 0], light)
    there = undistorted(bent, shoot.sources[photo.camera_id]).mean(2)[4:-4, 4:-4]
    here = direct.mean(2)
    down, right = (g[4:-4, 4:-4].ravel() for g in np.gradient(here))
    shift = np.linalg.lstsq(np.stack([right, down], 1), (here[4:-4, 4:-4] - there).ravel(), rcond=None)[0]
    assert np.abs(shift).max() < 0.05  # pixels


def test_both_calibrations_tell_the_same_story(models):
    sharp, bent = models["undistorted"], models["jpg"]
    assert set(sharp.points3D) == set(bent.points3D)
    for i, image in sharp.images.items():
        other = bent.images[i]
        assert other.name == image.name.replace("_undistorted", "")
        np.testing.assert_array_equal(other.cam_from_world().matrix(), image.cam_from_world().matrix())
        assert [p.point3D_id for p in image.points2D] == [p.point3D_id for p in other.points2D]
        for p in other.points2D:
            assert (p.xy >= 0).all() and p.xy[0] <= bent.cameras[other.camera_id].width
    outside = sum(bool((p.xy < 0).any()) for image in sharp.images.values() for p in image.points2D)
    assert outside > 0  # the undistorted frame is cropped


@pytest.mark.parametrize("name", ["undistorted", "jpg"])
def test_stated_errors_are_the_reprojection_errors(models, folder, name):
    model = pycolmap.Reconstruction(str(folder / f"dslr_calibration_{name}"))
    stated = {i: p.error for i, p in model.points3D.items()}
    model.update_point_3d_errors()
    off = np.array([abs(model.points3D[i].error - stated[i]) for i in stated])
    assert off.max() < 1e-3 and 0.05 < np.median(list(stated.values())) < 0.4


def test_depth_is_the_plane_of_the_wall(folder, scene):
    """Every wall pixel's depth, from the wall's plane in labels/walls.json and the pose in images.txt."""
    walls = {int(k): v for k, v in json.loads((folder / "labels/walls.json").read_text()).items()}
    for frame in scene.frames:
        rays = np.column_stack([centres(frame.size), np.ones(frame.size[0] * frame.size[1])]) @ np.linalg.inv(frame.K).T @ frame.world_to_cam[:3, :3]
        centre = -frame.world_to_cam[:3, :3].T @ frame.world_to_cam[:3, 3]
        depth, wall = exact(folder, frame).ravel(), label(folder, "walls", frame).ravel()
        assert (wall > 0).mean() > 0.1
        for number in np.unique(wall[wall > 0]):
            here, plane = wall == number, walls[int(number)]
            z = (plane["offset"] - centre @ plane["normal"]) / (rays[here] @ plane["normal"])
            np.testing.assert_allclose(depth[here], z, rtol=1e-5)


def test_vertices_project_to_where_they_are_seen(folder, scene):
    """Corners of the mesh, projected, are at their depth or hidden behind something nearer."""
    panels = prepare({**SETTINGS, "size": list(SETTINGS["size"])}).panels
    scanned = ~np.isin(panels.part, [PARTS.index(p) for p in UNSCANNED])
    corners = panels.vertices[panels.triangles]
    sides = np.linalg.norm(corners - np.roll(corners, 1, axis=1), axis=2)
    area = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1)
    wide = area / sides.max(1) > 0.25  # metres; narrower things fall between the pixels' centres
    inner = corners.mean(1)[scanned[panels.owner] & wide]
    seen = 0
    for frame in scene.frames:
        uv, z = project_points(inner, frame.world_to_cam, frame.K)
        good = (z > 0.1) & (uv > 1).all(1) & (uv < np.array(frame.size[::-1]) - 1).all(1)
        column, row = np.floor(uv[good] - 0.5).astype(int).T
        right, down = (uv[good] - 0.5 - np.stack([column, row], -1)).T
        depth, edges = exact(folder, frame), label(folder, "edges", frame)
        corners = [(row + i, column + j, (down if i else 1 - down) * (right if j else 1 - right)) for i in (0, 1) for j in (0, 1)]
        flat = np.all([(edges[r, c] == 0) & (depth[r, c] > 0) for r, c, _ in corners], 0)
        with np.errstate(divide="ignore"):  # 1/z is linear on a plane, so this interpolation is exact
            inverse = sum(share / depth[r, c] for r, c, share in corners)
        off = z[good][flat] * inverse[flat] - 1
        assert off.min() > -1e-4  # never in front of what is seen
        seen += (np.abs(off) < 1e-4).sum()
    assert seen > 300


def resized(frame, models, uv):
    """What a reader does who forgets that the photo was undistorted."""
    camera = models["jpg"].cameras[frame.camera_id]
    return uv * [camera.width / frame.size[1], camera.height / frame.size[0]]


def laser_against_exact(folder, scene, models, to_original, least=0.0, walls=True):
    """Relative differences away from edges (on walls, or everywhere), where the lens moves pixels by more than `least`."""
    offs = []
    for frame in scene.frames:
        pixels = centres(frame.size)
        flat = (label(folder, "edges", frame) == 0).ravel() & (exact(folder, frame) > 0).ravel()
        flat &= (label(folder, "walls", frame) > 0).ravel() | (not walls)
        moved = np.linalg.norm(through_the_lens(frame, models, pixels) - resized(frame, models, pixels), axis=1)
        flat &= moved >= least
        truth = laser(folder, frame, models)
        column, row = np.floor(to_original(frame, models, pixels[flat])).astype(int).T
        inside = (column >= 0) & (row >= 0) & (column < truth.shape[1]) & (row < truth.shape[0])
        z, depth = truth[row[inside], column[inside]], exact(folder, frame).ravel()[flat][inside]
        offs.append((z / depth - 1)[np.isfinite(z)])
    return np.concatenate(offs)


def test_laser_depth_agrees_with_exact_depth_through_the_lens(folder, scene, models):
    offs = laser_against_exact(folder, scene, models, through_the_lens)
    assert len(offs) > 2000
    assert abs(np.median(offs)) < 3e-4 and np.median(np.abs(offs)) < 0.004 and np.quantile(np.abs(offs), 0.98) < 0.03

    anywhere = laser_against_exact(folder, scene, models, through_the_lens, walls=False)
    assert len(anywhere) > 1.5 * len(offs) and (anywhere > 0.1).mean() < 0.002  # nothing from behind what is seen
    good, wrong = (laser_against_exact(folder, scene, models, way, least=1.5) for way in (through_the_lens, resized))
    assert len(good) > 200 and np.quantile(np.abs(wrong), 0.8) > 3 * np.quantile(np.abs(good), 0.8)


def test_ground_truth_is_thin_infinite_and_never_under_a_mask(folder, scene, models):
    for frame in scene.frames:
        depth = laser(folder, frame, models)
        known = np.isfinite(depth)
        assert 0.04 < known.mean() <= 0.10 and (depth[known] > 0.5).all() and np.isposinf(depth[~known]).all()
        if frame.mask_path:
            mask = np.array(Image.open(frame.mask_path))
            assert mask.shape == depth.shape and mask.dtype == np.uint8 and set(np.unique(mask)) <= {0, 1, 2}
            assert not known[mask == 2].any()


def test_masks_live_in_the_distorted_frame(folder, scene, models):
    """Glass and occluders are where the lens puts them; a mask that is merely resized is visibly beside them."""
    warped = stretched = count = 0
    for frame in scene.frames:
        if frame.mask_path is None:
            continue
        mask = np.array(Image.open(frame.mask_path))
        pixels = centres(frame.size)
        parts = label(folder, "parts", frame).ravel()
        at = through_the_lens(frame, models, pixels)
        naive = resized(frame, models, pixels)
        read = lambda uv: mask[np.floor(uv[:, 1]).astype(int).clip(0, mask.shape[0] - 1), np.floor(uv[:, 0]).astype(int).clip(0, mask.shape[1] - 1)]
        away = np.isin(parts, [1 + PARTS.index(p) for p in UNSCANNED])
        if away.any():
            assert (read(at)[away] == 2).mean() > 0.97
        if (mask == 1).any():
            far = (np.linalg.norm(at - naive, axis=1) > 1.5) & (read(at) != 2)
            glass = parts == 1 + PARTS.index("glass")
            warped += ((read(at) == 1) != glass)[far].sum()
            stretched += ((read(naive) == 1) != glass)[far].sum()
            count += (glass & far).sum()
    assert count > 300 and warped < 0.25 * count  # borders, within a pixel
    assert stretched > 2 * warped


def test_scans_lie_in_scanner_frames_and_come_back(folder):
    import open3d

    walls = json.loads((folder / "labels/walls.json").read_text()).values()
    text = (folder / "dslr_scan_eval/scan_alignment.mlp").read_text()
    assert text.count(" \n") == 8  # each row of the two matrices ends in a space
    near = lambda xyz: np.min([np.abs(xyz @ w["normal"] - w["offset"]) for w in walls], 0)
    names = []
    for item in tree.fromstring(text.split("\n", 1)[1]).iter("MLMesh"):
        names.append(item.get("filename"))
        cloud = open3d.io.read_point_cloud(str(folder / "dslr_scan_eval" / names[-1]))
        raw = np.asarray(cloud.points).copy()
        matrix = np.array(item.find("MLMatrix44").text.split(), float).reshape(4, 4)
        assert np.allclose(matrix[:3, :3] @ matrix[:3, :3].T, np.eye(3), atol=1e-7)
        away = near(np.asarray(cloud.transform(matrix).points))
        assert len(raw) > 1000 and (away < 0.006).mean() > 0.1 and (near(raw) < 0.006).mean() < 0.03
    assert names == ["scan1.ply", "scan2.ply"]


def test_points_are_on_surfaces_and_never_on_glass_or_people(folder, scene):
    truth = np.load(folder / "exact_depth/points.npz")
    row_of = {int(i): k for k, i in enumerate(truth["ids"])}
    offs, parts, counts = [], [], []
    for frame in scene.frames:
        rows = np.array([row_of[int(scene.points.ids[r])] for r in frame.point_rows])
        rows = rows[~truth["outlier"][rows]]
        uv, z = project_points(truth["xyz"][rows], frame.world_to_cam, frame.K)
        inside = (uv >= 0).all(1) & (uv < np.array(frame.size[::-1])).all(1)
        column, row = np.floor(uv[inside]).astype(int).T
        offs.append(z[inside] / np.maximum(exact(folder, frame)[row, column], 1e-3) - 1)
        parts.append(label(folder, "parts", frame)[row, column])
        counts.append(len(frame.point_rows))
    offs, parts = np.abs(np.concatenate(offs)), np.concatenate(parts)
    assert np.median(offs) < 0.003 and np.quantile(offs, 0.85) < 0.05
    assert (parts == 1 + PARTS.index("glass")).mean() < 0.05  # only where the pixel's centre is just beside the frame
    assert 0.6 < np.mean(counts) / points_per_photo(scene.frames[0].size) < 1.4
    assert truth["outlier"].any() and 1900 < points_per_photo((1000, 1500)) < 2100


def test_edges_are_where_depth_jumps(folder, scene):
    for frame in scene.frames:
        depth, edges = exact(folder, frame), label(folder, "edges", frame)
        jump = np.abs(np.diff(depth, axis=1)) > 0.25 * np.minimum(depth[:, 1:], depth[:, :-1]) + 0.5
        assert (edges[:, 1:][jump] == 1).all() and 0.02 < edges.mean() < 0.6
        assert label(folder, "windows", frame).max() > 5


def test_photos_differ_in_light(folder, scene):
    means = [np.array(Image.open(frame.image_path)).mean() for frame in scene.frames]
    assert max(means) / min(means) > 1.1


SMALL = {"frames": 2, "size": (84, 126), "style": "brick", "layout": "courtyard"}


def test_same_seed_same_bytes_whatever_the_threads(tmp_path):
    first = demo_scene(tmp_path / "a", seed=1, **SMALL)
    (tmp_path / "b").mkdir()
    write_demo(tmp_path / "b", {**SMALL, "seed": 1}, threads=1)
    assert folder_hashes(tmp_path / "b") == folder_hashes(first)
    other = folder_hashes(demo_scene(tmp_path / "c", seed=2, **SMALL))
    same = {name for name, digest in other.items() if folder_hashes(first).get(name) == digest}
    assert same == {"scene.json", "labels/parts.json", "dslr_calibration_undistorted/cameras.txt", "dslr_calibration_jpg/cameras.txt"}


def test_unknown_names_and_a_missing_open3d_are_said_plainly(tmp_path, monkeypatch):
    with pytest.raises(SceneError, match="Did you mean 'brick'"):
        demo_scene(tmp_path, style="bricks")
    with pytest.raises(SceneError, match="Did you mean 'courtyard'"):
        demo_scene(tmp_path, layout="courtyards")
    monkeypatch.setitem(sys.modules, "open3d", None)
    with pytest.raises(SceneError, match="libusb-1.0-0"):
        demo_scene(tmp_path, **SMALL)
    assert not (tmp_path / "demo").exists()
    assert scene_fault(toy_scene(tmp_path, frames=2, size=(84, 126))) is None  # needs no Open3D


def test_importing_the_generator_is_light():
    heavy = "{'torch', 'open3d', 'matplotlib', 'pycolmap', 'scipy.spatial'}"
    code = f"import vggt_lora.scenes.synthetic, sys; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_the_held_out_style_is_not_trained_on():
    held = {DEMO[name]["style"] for name in DEMO_HELD_OUT}
    assert held and not held & {rest["style"] for name, rest in DEMO.items() if name not in DEMO_HELD_OUT}
    assert "plaster" in STYLES
