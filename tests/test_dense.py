"""Dense depth from known cameras: the half pixel, occlusion, faults in the data, the cache, and COLMAP's depth maps."""

import dataclasses
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vggt_lora.evaluation.confidence import sparsification
from vggt_lora.core import ConfigError, SceneError
from vggt_lora.datasets.samples import FrameCache, collate, load_sample
from vggt_lora.datasets.windows import Window, make_windows
from vggt_lora.demo.demo_scenes import toy_scene
from vggt_lora.geometry.cameras import project_points, unproject_depth
from vggt_lora.reference_data import real_scene
from vggt_lora.scenes.images import plan_image
from vggt_lora.scenes.opening import open_scene
from vggt_lora.scenes.scene import Frame, Points, Scene
from vggt_lora.stereo.estimate import DenseSettings, SweepFrame, neighbour_frame, main_frame
from vggt_lora.stereo.planesweep import Warper, half_size, plane_steps, relative_mapping, sweep, to_full_size
from vggt_lora.stereo.refinement import plane_fit, refine
from vggt_lora.stereo.view_selection import find_neighbours
from vggt_lora.supervision.colmap import read_colmap_array
from vggt_lora.supervision.dense import (
    bends, confidence_of, confirmations, dense_depth, dense_estimate, prepare_dense,
)
from vggt_lora.supervision.depth_map import DepthAbsent
from vggt_lora.supervision.sources import depth_source
from vggt_lora.train import TrainConfig, train
from vggt_lora.training.losses import LossConfig, training_loss

SIZE = (96, 132)
QUICK = {"progress": False}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return open_scene(toy_scene(tmp_path_factory.mktemp("scenes"), frames=4, size=(112, 154)))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("dense")


@pytest.fixture(scope="module")
def estimates(tmp_path_factory):
    """What the tests have computed of the plane below: it is kept by content, so photos that one of them changes are
    estimated anew.
    """
    return tmp_path_factory.mktemp("estimates")


# --- a world that is known exactly ---------------------------------------------------------------------------------

NORMAL = np.array([np.sin(0.5), 0.1, -np.cos(0.5)])
WAVES = np.random.default_rng(1).normal(0, 1, (60, 3)) * np.random.default_rng(2).uniform(2, 14, (60, 1))


def turn(angle):
    return np.array([[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]])


def pose_at(centre, angle=0.0):
    pose = np.eye(4)
    pose[:3, :3] = turn(angle)
    pose[:3, 3] = -pose[:3, :3] @ np.asarray(centre, float)
    return pose


def plane_photo(K, pose, size):
    """Return grey values of a slanted, textured plane, computed for every pixel centre, and exact depth."""
    centre = -pose[:3, :3].T @ pose[:3, 3]
    rays = unproject_depth(np.ones(size), K, pose) - centre
    z = (-6 - NORMAL @ centre) / (rays @ NORMAL)
    return 0.5 + 0.025 * np.sin((centre + rays * z[..., None]) @ WAVES.T).sum(-1), z


CAMERAS = [((0, 0, 0), 0), ((-0.5, 0, 0), 0.03), ((0.5, 0.1, 0), -0.03), ((0.1, -0.5, 0.1), 0), ((-0.9, 0.2, 0), 0.08)]


def plane_scene(folder, size=SIZE, cameras=CAMERAS, blank=()):
    """Write photos of the plane and return a Scene with exact cameras and points."""
    rng = np.random.default_rng(5)
    K = np.array([[1.2 * size[1], 0, size[1] / 2 + 0.4], [0, 1.2 * size[1], size[0] / 2 - 0.3], [0, 0, 1]])
    poses = [pose_at(*camera) for camera in cameras]
    _, z = plane_photo(K, poses[0], size)
    xyz = unproject_depth(z, K, poses[0]).reshape(-1, 3)[rng.choice(z.size, 150, replace=False)]
    frames = []
    for number, pose in enumerate(poses):
        grey, _ = plane_photo(K, pose, size)
        if number in blank:
            grey = 0.5 + 0 * grey
        path = folder / f"{number}.png"
        Image.fromarray(np.repeat(np.round(255 * grey.clip(0, 1)).astype(np.uint8)[..., None], 3, -1)).save(path)
        pixels, depth = project_points(xyz, pose, K)
        rows = np.flatnonzero((depth > 0) & (pixels >= 0).all(1) & (pixels < size[::-1]).all(1))
        frames.append(Frame(path.name, path, size, K, pose, 0, number, rows, pixels[rows]))
    points = Points(
        xyz, np.zeros((len(xyz), 3), np.uint8), np.zeros(len(xyz)), np.full(len(xyz), 4, np.int32), np.arange(len(xyz))
    )
    return Scene("plane", folder, tuple(frames), points, True), z


def test_the_depth_of_a_plane_has_no_bias_of_half_a_pixel(tmp_path, estimates):
    scene, z = plane_scene(tmp_path)
    found = dense_depth(scene, scene.frames[0], SIZE, cache=estimates, **QUICK)
    off = found.depth[found.valid] / z[found.valid] - 1
    assert found.coverage > 0.6
    assert np.median(np.abs(off)) < 0.002 and abs(np.median(off)) < 0.0005
    for half in (slice(0, 48), slice(48, 96)):  # a shift would tilt the error over the picture
        part = found.valid[half]
        assert abs(np.median(found.depth[half][part] / z[half][part] - 1)) < 0.001


def test_neighbours_of_other_sizes_shapes_and_plans_give_the_same_depth(tmp_path, estimates):
    scene, z = plane_scene(tmp_path, size=(98, 140))
    frame = scene.frames[0]
    small = dense_estimate(scene, frame, (70, 98), plan_image(frame.size, target=(70, 98)), cache=estimates, **QUICK)
    plan = plan_image(frame.size, target=(70, 98))
    rows, columns = np.mgrid[:70, :98] + 0.5
    u, v = (
        ((columns + plan.offset[1]) * frame.size[1] / plan.resized_size[1]).astype(int),
        ((rows + plan.offset[0]) * frame.size[0] / plan.resized_size[0]).astype(int),
    )
    sure = small.confidence > 0.1
    assert sure.mean() > 0.4 and np.median(np.abs(small.depth / z[v, u] - 1)[sure]) < 0.004
    padded_plan = plan_image(frame.size, 98, mode="pad")
    padded = dense_depth(scene, frame, padded_plan.size, padded_plan, cache=estimates, **QUICK)
    top, left, bottom, right = padded_plan.content_box
    assert padded.valid.sum() == padded.valid[top:bottom, left:right].sum() > 0.3 * (bottom - top) * (right - left)
    photos = [dataclasses.replace(f, size=(140, 98)) for f in scene.frames]
    assert neighbour_frame(SweepFrame(frame, plan), photos[1]).plan.size == (99, 69)  # as many pixels, its own shape


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_warping_equals_lifting_and_projecting(seed):
    rng = np.random.default_rng(seed)
    size = tuple(int(n) for n in rng.integers(3, 20, 2))
    K, other = (
        np.array(
            [
                [rng.uniform(5, 50), rng.uniform(-1, 1), rng.uniform(0, 20)],
                [0, rng.uniform(5, 50), rng.uniform(0, 20)],
                [0, 0, 1],
            ]
        )
        for _ in range(2)
    )
    poses = [pose_at(rng.normal(0, 1, 3), rng.uniform(-0.5, 0.5)) for _ in range(2)]
    z = rng.uniform(2, 20, size)
    u, v, ratio = Warper(torch.zeros(4, 5), relative_mapping(K, poses[0], other, poses[1]), size).locate(
        torch.tensor(1 / z, dtype=torch.float32)[None]
    )
    pixels, far = project_points(unproject_depth(z, K, poses[0]).reshape(-1, 3), poses[1], other)
    safe = far > 0.5
    assert np.allclose(np.stack([u[0], v[0]], -1).reshape(-1, 2)[safe], pixels[safe], atol=2e-2, rtol=1e-3)
    assert np.allclose((z / ratio[0].numpy()).ravel()[safe], far[safe], rtol=1e-3)


@pytest.mark.parametrize("size", [(48, 64), (49, 65), (50, 63)])
def test_half_and_full_size_stay_in_register(size):
    y, x = torch.meshgrid(torch.arange(size[0]) + 0.5, torch.arange(size[1]) + 0.5, indexing="ij")
    for ramp in (x, y):
        back = to_full_size(half_size(ramp), size)
        assert back.shape == size
        assert (back - ramp)[2:-3, 2:-3].abs().max() < 1e-4


def test_an_occluder_in_some_photos_does_not_move_the_wall(tmp_path, estimates):
    scene, z = plane_scene(tmp_path)
    for number in (1, 3):  # a grey board hides a third of two photos
        path = scene.frames[number].image_path
        photo = np.asarray(Image.open(path)).copy()
        photo[:, 40:84] = np.random.default_rng(number).integers(0, 255, (SIZE[0], 44, 1))
        Image.fromarray(photo).save(path)
    found = dense_depth(scene, scene.frames[0], SIZE, cache=estimates, **QUICK)
    off = np.abs(found.depth / z - 1)[found.valid]
    assert found.valid[:, 44:80].mean() > 0.2 and np.mean(off > 0.02) < 0.03


# --- what must not be believed ---------------------------------------------------------------------------------------


def test_a_frame_without_neighbours_is_empty_and_says_so(tmp_path):
    scene, _ = plane_scene(tmp_path, cameras=CAMERAS[:1])
    found = dense_depth(scene, scene.frames[0], SIZE, cache=tmp_path / "cache", **QUICK)
    assert not found.valid.any() and not found.depth.any() and not found.weight.any()
    assert found.counts["neighbours"] == 0 and found.counts["unconfirmed"] == found.valid.size
    assert not (tmp_path / "cache").exists()


def test_a_turn_on_the_spot_is_no_neighbour(tmp_path, estimates):
    scene, _ = plane_scene(tmp_path, cameras=[((0, 0, 0), 0), ((0, 0, 0), 0.05), ((1e-4, 0, 0), -0.05)])
    assert find_neighbours(scene, scene.frames[0]) == []
    assert not dense_depth(scene, scene.frames[0], SIZE, cache=estimates, **QUICK).valid.any()


def test_one_neighbour_is_enough_for_depth_but_not_for_much_confidence(tmp_path, estimates):
    scene, z = plane_scene(tmp_path, cameras=CAMERAS[:2])
    found = dense_estimate(scene, scene.frames[0], SIZE, cache=estimates, **QUICK)
    assert found.neighbours == 1 and found.confirmed.max() == 1 and 0 < found.confidence.max() <= 0.2
    sure = found.confidence > 0.1
    assert sure.any() and np.median(np.abs(found.depth / z - 1)[sure]) < 0.01


def test_more_photos_may_confirm_than_were_matched(tmp_path, estimates):
    scene, z = plane_scene(tmp_path)
    few, many = (
        dense_estimate(
            scene, scene.frames[0], SIZE, settings=DenseSettings(views=2, checks=checks), cache=estimates, **QUICK
        )
        for checks in (1, 9)
    )
    assert (few.neighbours, many.neighbours) == (2, 4) and few.confirmed.max() == 2
    assert (
        (many.confirmed >= few.confirmed).all() and many.confirmed.max() == 4 and np.array_equal(few.error, many.error)
    )
    sure = many.confirmed == 4
    assert np.median(np.abs(many.depth / z - 1)[sure]) < 0.002


def test_a_blank_wall_gets_no_depth(tmp_path, estimates):
    scene, _ = plane_scene(tmp_path, cameras=CAMERAS[:3], blank=range(3))
    found = dense_depth(scene, scene.frames[0], SIZE, cache=estimates, **QUICK)
    assert found.coverage < 0.01
    assert np.isfinite(found.depth).all() and np.isfinite(found.weight).all()


def test_depth_that_other_photos_contradict_is_not_confirmed(tmp_path):
    scene, z = plane_scene(tmp_path)
    shots = [main_frame(frame, SIZE, None) for frame in scene.frames]
    exact = [torch.tensor(1 / plane_photo(f.K, f.world_to_cam, SIZE)[1], dtype=torch.float32) for f in scene.frames]
    others = list(zip(shots[1:], exact[1:]))
    count, mean = confirmations(shots[0], exact[0], others, DenseSettings())
    assert count[20:-20, 40:-40].min() >= 3
    assert (mean * torch.tensor(z, dtype=torch.float32) - 1)[count > 0].abs().max() < 2e-3
    wrong = exact[0].clone()
    wrong[30:60] *= 1.05
    assert confirmations(shots[0], wrong, others, DenseSettings())[0][30:60].max() == 0
    behind = SweepFrame(dataclasses.replace(scene.frames[1], world_to_cam=pose_at((0, 0, 0), np.pi)), shots[1].plan)
    assert confirmations(shots[0], exact[0], [(behind, exact[1])], DenseSettings())[0].max() == 0


def test_what_a_mask_covers_is_not_trained_on(tmp_path, estimates):
    scene, _ = plane_scene(tmp_path)
    mask = np.full(SIZE, 255, np.uint8)
    mask[:, :66] = 0
    Image.fromarray(mask).save(tmp_path / "mask.png")
    plain = dense_depth(scene, scene.frames[0], SIZE, cache=estimates, **QUICK)
    masked = dense_depth(
        scene, dataclasses.replace(scene.frames[0], photo_mask_path=tmp_path / "mask.png"), SIZE, cache=estimates,
        **QUICK,
    )
    assert not masked.valid[:, :66].any() and np.array_equal(masked.depth[:, 66:], plain.depth[:, 66:])
    assert masked.counts["masked"] == plain.valid[:, :66].sum() > 1000


def test_glass_is_kept_on_stricter_terms_and_people_never(tmp_path, monkeypatch, estimates):
    scene, _ = plane_scene(tmp_path)
    found = dense_estimate(scene, scene.frames[0], SIZE, cache=estimates, **QUICK)
    left = np.arange(SIZE[1]) < 66

    def kept(value, settings=DenseSettings(), **changes):
        """The share of the left half that is kept if a mask of this value lies there."""
        mask = np.where(left, value, 0).astype(np.uint8) * np.ones(SIZE, np.uint8)
        monkeypatch.setattr("vggt_lora.supervision.dense.photo_mask", lambda *arguments: mask)
        monkeypatch.setattr(
            "vggt_lora.supervision.dense.dense_estimate",
            lambda *arguments, **options: dataclasses.replace(found, **changes),
        )
        return dense_depth(scene, scene.frames[0], SIZE, settings=settings).valid[30:60, 50:66].mean()

    assert kept(0) > 0.95 and kept(1) > 0.8 and kept(2) == 0
    assert kept(1, DenseSettings(unfit=1)) == 0
    for doubt in ({"confirmed": np.minimum(found.confirmed, 2)}, {"confidence": 0.25 * found.confidence}):
        assert kept(0, **doubt) > 0.95 and kept(1, **doubt) == 0
    behind = np.where(left, 1.5, 1).astype(np.float32) * found.depth  # a yard mirrored in the pane
    assert kept(0, depth=behind) > 0.95 and kept(1, depth=behind) == 0


def test_photos_that_end_before_a_pixel_do_not_spoil_the_match_of_the_others():
    K = np.array([[158.4, 0, 66.4], [0, 158.4, 47.7], [0, 0, 1]])
    poses = [pose_at(*camera) for camera in CAMERAS[:4]]
    (reference, z), *others = [plane_photo(K, pose, SIZE) for pose in poses]
    reference, inverse = (torch.tensor(values, dtype=torch.float32) for values in (reference, 1 / z))
    warpers = [Warper(torch.tensor(grey - 0.5, dtype=torch.float32), relative_mapping(K, poses[0], K, pose), SIZE, box)
               for (grey, _), pose, box in zip(others, poses[1:], (None, None, (0, 0, SIZE[0], 66)))]
    _, error = refine(reference, warpers, inverse, 0.002, best=3)
    two, three = error[20:-20, 80:-20].median(), error[20:-20, 20:50].median()
    assert two < 2 * three < 0.02


def test_a_wrong_pose_loses_coverage_instead_of_adding_errors(tmp_path, estimates):
    scene, z = plane_scene(tmp_path)
    moved = dataclasses.replace(scene.frames[2], world_to_cam=pose_at((0.6, 0.1, 0), -0.03))
    scene = dataclasses.replace(scene, frames=(*scene.frames[:2], moved, *scene.frames[3:]))
    found = dense_depth(scene, scene.frames[0], SIZE, cache=estimates, **QUICK)
    assert np.mean(np.abs(found.depth / z - 1)[found.valid] > 0.03) < 0.05


def test_the_scene_unit_does_not_matter(tmp_path, estimates):
    (tmp_path / "scaled").mkdir()
    scene, _ = plane_scene(tmp_path, cameras=CAMERAS[:3])
    large = dataclasses.replace(
        scene,
        points=dataclasses.replace(scene.points, xyz=scene.points.xyz * 1000),
        frames=tuple(
            dataclasses.replace(
                f,
                world_to_cam=np.block([[f.world_to_cam[:3, :3], 1000 * f.world_to_cam[:3, 3:]], [np.zeros((1, 3)), 1]]),
            )
            for f in scene.frames
        ),
    )
    one, thousand = (dense_estimate(s, s.frames[0], SIZE, cache=estimates, **QUICK) for s in (scene, large))
    both = (one.confidence > 0.1) & (thousand.confidence > 0.1)
    assert both.sum() > 0.95 * (one.confidence > 0.1).sum()
    assert np.median(np.abs(thousand.depth / one.depth / 1000 - 1)[both]) < 1e-4


def test_planes_beyond_the_bound_are_not_stored(tmp_path):
    warper = Warper(torch.zeros(100, 100), (np.eye(3), np.array([1e6, 0, 0])), (20, 20))
    assert len(plane_steps([warper], 1, 10, most=64)) == 64
    with pytest.raises(ConfigError, match="most_planes is 1; expected a value from 8"):
        DenseSettings(most_planes=1)


def test_unmatched_pictures_have_large_expected_errors():
    generator = torch.Generator().manual_seed(0)
    reference, other = torch.rand(48, 64, generator=generator), torch.rand(48, 64, generator=generator)
    warpers = [Warper(other - 0.5, (np.eye(3), np.array([20.0, 0, 0])), (48, 64))] * 3
    planes = plane_steps(warpers, 2, 10)
    inverse, error = refine(reference, warpers, sweep(reference, warpers, planes), float(planes[1] - planes[0]))
    assert torch.isfinite(inverse).all() and (inverse > 0).all() and error.median() > 0.02


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_planes_are_fixed_points_of_the_fit(seed):
    rng = np.random.default_rng(seed)
    y, x = torch.meshgrid(torch.arange(20.0), torch.arange(30.0), indexing="ij")
    plane = 0.2 + rng.uniform(-1, 1) * 2e-4 * x + rng.uniform(-1, 1) * 2e-4 * y
    info = torch.tensor(rng.uniform(0.5, 2, (20, 30)), dtype=torch.float32)
    fitted, gained = plane_fit(
        plane, info, torch.tensor(0.1 * rng.random((20, 30)), dtype=torch.float32), tolerance=0.01
    )
    assert (fitted - plane).abs()[6:-6, 6:-6].max() < 1e-4 and (gained >= 0.5 * info).all()


# --- the cache -------------------------------------------------------------------------------------------------------


def test_cached_depth_follows_the_photos_content(toy, cache, tmp_path):
    frame = toy.frames[1]
    first = dense_depth(toy, frame, (84, 112), cache=cache, **QUICK)
    files = {p.name: p.stat().st_mtime_ns for p in cache.glob("*.npz")}
    copies = []
    for f in toy.frames:  # the same photos under other names
        copy = tmp_path / ("copy_" + f.image_path.name)
        copy.write_bytes(f.image_path.read_bytes())
        copies.append(dataclasses.replace(f, image_path=copy))
    again = dense_depth(dataclasses.replace(toy, frames=tuple(copies)), copies[1], (84, 112), cache=cache, **QUICK)
    assert np.array_equal(first.depth, again.depth)
    assert {p.name: p.stat().st_mtime_ns for p in cache.glob("*.npz")} == files
    with Image.open(copies[1].image_path) as photo:
        darker = Image.fromarray((np.asarray(photo) * 0.9).astype(np.uint8))
    darker.save(copies[1].image_path, quality=95)
    dense_depth(dataclasses.replace(toy, frames=tuple(copies)), copies[1], (84, 112), cache=cache, **QUICK)
    assert len(list(cache.glob("*.npz"))) > len(files)
    assert not list(cache.glob("*.tmp*"))


def dense_depths(scene, size, cache) -> dict:
    """Compute the dense depth of all frames of a scene first, then read it, by the frames' names."""
    plans = {frame.name: main_frame(frame, size, None).plan for frame in scene.frames}
    prepare_dense(scene, [(frame, plans[frame.name]) for frame in scene.frames], cache=cache, **QUICK)
    return {f.name: dense_depth(scene, f, size, plans[f.name], cache=cache, **QUICK) for f in scene.frames}


def test_all_frames_at_once_are_those_one_by_one(toy, cache):
    together = dense_depths(toy, (84, 112), cache=cache)
    assert list(together) == [f.name for f in toy.frames]
    for frame in toy.frames[::3]:
        assert np.array_equal(
            together[frame.name].depth, dense_depth(toy, frame, (84, 112), cache=cache, **QUICK).depth
        )
    with pytest.raises(ConfigError, match="needs a cache folder"):
        dense_depths(toy, (84, 112), cache=None)


def test_maps_keep_their_promises(toy, cache):
    for found in dense_depths(toy, (84, 112), cache=cache).values():
        assert found.depth.dtype == found.weight.dtype == np.float32 and found.valid.dtype == bool
        assert np.array_equal(found.depth > 0, found.valid) and np.array_equal(found.weight > 0, found.valid)
        assert found.counts["pixels"] == sum(
            found.counts[fate] for fate in ("valid", "unconfirmed", "doubtful", "masked")
        )
        assert not found.valid.any() or found.weight[found.valid].mean() == pytest.approx(1, rel=1e-4)


ALONE = """
import sys
import numpy as np
from vggt_lora.scenes.opening import open_scene
from vggt_lora.supervision.dense import dense_depth
scene = open_scene(sys.argv[1])
np.save(sys.argv[3], dense_depth(scene, scene.frames[0], (56, 84), cache=sys.argv[2], progress=False).depth)
"""


def test_two_processes_may_fill_one_cache(toy, tmp_path):
    cache, answer = tmp_path / "cache", tmp_path / "other.npy"
    other = subprocess.Popen([sys.executable, "-c", ALONE, toy.root, cache, answer])
    while not cache.exists() and other.poll() is None:  # until it has begun
        time.sleep(0.01)
    mine = dense_depth(toy, toy.frames[0], (56, 84), cache=cache, **QUICK).depth
    assert other.wait() == 0 and np.array_equal(mine, np.load(answer))
    assert not [p for p in cache.iterdir() if p.suffix != ".npz"]


def test_broken_and_missing_photos_are_named(tmp_path):
    scene, _ = plane_scene(tmp_path)
    scene.frames[1].image_path.write_bytes(scene.frames[1].image_path.read_bytes()[:500])
    with pytest.raises(SceneError, match="1.png"):
        dense_depth(scene, scene.frames[0], SIZE, cache=None, **QUICK)
    scene.frames[1].image_path.unlink()
    with pytest.raises(SceneError, match="1.png: cannot be read"):
        dense_depth(scene, scene.frames[0], SIZE, cache=None, **QUICK)


def test_importing_the_chapters_does_not_import_torch():
    code = ("import sys, vggt_lora.supervision.dense, vggt_lora.supervision.colmap, vggt_lora.stereo.refinement; "
            "assert not {'torch', 'pycolmap', 'matplotlib', 'scipy'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True)


# --- as supervision --------------------------------------------------------------------------------------------------


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VGGT_LORA_CACHE", str(tmp_path / "own_cache"))
    return tmp_path / "own_cache" / "dense"


def test_training_computes_its_depth_before_the_first_step_and_never_in_between(own_cache, tmp_path, monkeypatch):
    seen = []
    config = TrainConfig(
        data=str(toy_scene(tmp_path, frames=6, size=(84, 126))), output=str(tmp_path / "run"), supervision="dense",
        strategy="a", epochs=1, frames=3, image_size=56, rank=2, lr=1e-3, preflight="off",
    )
    run = train(config, hooks=[lambda event, progress: seen.append((event, len(list(own_cache.glob("*.npz")))))])
    assert {number for _, number in seen} == {6} == {len(list(own_cache.glob("*.npz")))} and seen[0][0] == "step"
    trained = [r for r in run.records if r["split"] == "train"]
    assert trained and all(np.isfinite(r["loss"]) and r["loss_depth_reg"] > 0 for r in trained)
    assert run.results["table"][0]["frames"] > 0


def test_a_pixel_without_depth_is_never_supervised(toy, own_cache):
    frames = FrameCache(84, supervision="dense")
    window = make_windows(toy, frames=3)[0]
    assert frames.work_ahead([(toy, window)]) == {"dense": 4} and frames.work_ahead([(toy, window)]) == {"dense": 0}
    batch = collate([load_sample(toy, window, frames)])
    assert 0.1 < batch["valid"].float().mean() < 0.9
    generator = torch.Generator().manual_seed(0)
    depth, conf = (torch.rand(batch["depth"].shape, generator=generator).add(0.5).requires_grad_() for _ in range(2))
    terms = LossConfig(camera=0, confidence_on_invalid=False)

    def loss(batch):
        return training_loss({"depth": depth[..., None], "depth_conf": 1 + conf}, batch, terms).total

    total = loss(batch)
    for gradient in torch.autograd.grad(total, [depth, conf]):
        assert not gradient[~batch["valid"]].any() and gradient[batch["valid"]].any()
    junk = torch.where(batch["valid"], batch["depth"], 1e6)
    assert torch.equal(loss({**batch, "depth": junk}), total)
    moved = batch["depth"] + 0.1 * (torch.arange(batch["depth"].numel()).view_as(depth) % 7) * batch["valid"]
    assert not torch.equal(loss({**batch, "depth": moved}), total)  # the check can fail


def test_mixtures_take_dense_where_nothing_better_is_known(toy, own_cache):
    alone, sparse, mixed = (
        depth_source(name)(toy, toy.frames[1], (84, 112)) for name in ("dense", "sparse", "laser+sparse+dense")
    )
    assert (
        mixed.counts["laser"] == 0
        and mixed.counts["sparse"] == sparse.valid.sum()
        and mixed.counts["dense"] == (alone.valid & ~sparse.valid).sum() > 1000
    )
    assert np.array_equal(mixed.depth, np.where(sparse.valid, sparse.depth, alone.depth))
    assert TrainConfig(data="demo", output="out", supervision="laser+dense+sparse").supervision == "laser+dense+sparse"


def test_preparing_knows_every_size_at_which_photos_are_needed(toy, own_cache, monkeypatch):
    with Image.open(toy.frames[2].image_path) as photo:
        turned = photo.rotate(90, expand=True)
    path = own_cache.parent / "turned.png"
    path.parent.mkdir(parents=True)
    turned.save(path)
    portrait = dataclasses.replace(toy.frames[2], image_path=path, size=toy.frames[2].size[::-1], name="turned")
    scene = dataclasses.replace(toy, frames=(*toy.frames[:2], portrait, toy.frames[3]))
    frames, windows = (
        FrameCache(56, supervision="sparse+dense"),
        [Window(scene.name, (0, 1, 2)), Window(scene.name, (2, 3))],
    )
    assert frames.work_ahead([(scene, w) for w in windows])["dense"] > len(scene)
    monkeypatch.setattr("vggt_lora.supervision.dense.estimate", lambda *args: pytest.fail("computed while training"))
    for window in windows:
        load_sample(scene, window, frames)


def test_on_a_gpu_every_tensor_is_made_there():
    """No GPU is needed: tensors that claim to be elsewhere raise as soon as an operation mixes devices."""
    grey, shift = torch.rand(40, 60, device="meta"), (np.eye(3), np.array([5.0, 0, 0]))
    whole, half = ([Warper(torch.rand(size, device="meta"), shift, size)] for size in ((40, 60), (20, 30)))
    with pytest.raises(RuntimeError, match="device"):
        half_size(grey) + torch.rand(20, 30)  # the check can fail
    first = to_full_size(sweep(half_size(grey), half, torch.linspace(0.1, 0.5, 32, device="meta")), (40, 60))
    inverse, error = refine(grey, whole, first, 0.01)
    frame = Frame(
        "a", None, (40, 60), np.array([[50.0, 0, 30], [0, 50, 20], [0, 0, 1]]), np.eye(4), 0, 0, np.zeros(0, int),
        np.zeros((0, 2)),
    )
    shot = main_frame(frame, (40, 60), None)
    count, mean = confirmations(
        shot, inverse,
        [(SweepFrame(dataclasses.replace(frame, world_to_cam=pose_at((0.5, 0, 0))), shot.plan), inverse)],
        DenseSettings(),
    )
    confidence = confidence_of(count, error, bends(mean))
    assert (confidence.device.type, confidence.shape) == ("meta", (40, 60))


def test_depth_of_colmap_is_a_source_and_its_absence_is_said(toy):
    assert TrainConfig(data="demo", output="out", supervision="colmap+sparse").supervision == "colmap+sparse"
    with pytest.raises(DepthAbsent, match="holds no dense COLMAP workspace; looked for stereo/depth_maps"):
        depth_source("colmap")(toy, toy.frames[0], (84, 112))
    assert depth_source("colmap+sparse")(toy, toy.frames[0], (84, 112)).counts["colmap"] == 0


# --- against measurements --------------------------------------------------------------------------------------------


def test_the_fountain_agrees_with_its_laser(tmp_path):
    if real_scene("strecha_fountain_p11") is None:
        pytest.skip("the fountain's photos and laser depth are absent")
    scene = open_scene(real_scene("strecha_fountain_p11"))
    frame, size = scene.frames[6], (168, 252)
    found = dense_depth(scene, frame, size, settings=DenseSettings(views=3, checks=3), cache=tmp_path, **QUICK)
    width, height, fx, fy, cx, cy = (
        float(word)
        for text in (scene.root / "dslr_calibration_jpg" / "cameras.txt").read_text().split("\n")
        if text and text[0] != "#"
        for word in text.split()[2:8]
    )
    laser = np.fromfile(scene.root / "ground_truth_depth" / "dslr_images" / frame.image_path.name, "<f4").reshape(
        int(height), int(width)
    )
    rows, columns = np.nonzero(np.isfinite(laser))
    K = main_frame(frame, size, None).K
    u, v = K[0, 0] * (columns + 0.5 - cx) / fx + K[0, 2], K[1, 1] * (rows + 0.5 - cy) / fy + K[1, 2]
    inside = (u >= 0) & (v >= 0) & (u < size[1]) & (v < size[0])
    row, column = v[inside].astype(int), u[inside].astype(int)
    off = (found.depth[row, column] / laser[rows, columns][inside] - 1)[found.valid[row, column]]
    assert (
        len(off) > 0.5 * inside.sum()
        and np.median(np.abs(off)) < 0.003
        and abs(np.median(off)) < 0.001
        and np.mean(np.abs(off) < 0.01) > 0.88
    )
    curves = dense_estimate(scene, frame, size, settings=DenseSettings(views=3, checks=3), cache=tmp_path, **QUICK)
    all_off = np.abs(curves.depth[row, column] / laser[rows, columns][inside] - 1)
    found = sparsification(np.minimum(np.nan_to_num(all_off, nan=1.0), 1.0), curves.confidence[row, column])
    curve, best = found["confidence"], found["oracle"]
    assert (
        (np.diff(curve[:17]) < 0).all()
        and curve[17] < 0.3
        and (best <= curve + 1e-9).all()
        and (curve - best).mean() < 0.2 * (1 - best.mean())
    )


# --- COLMAP's depth maps ---------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=60))
def test_any_bytes_are_read_whole_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any.bin"
    path.write_bytes(data)
    with pytest.raises(SceneError, match="any.bin"):
        read_colmap_array(path)
    path.write_bytes(b"2&3&1&" + data)
    if len(data) == 24:
        assert read_colmap_array(path).shape == (3, 2)
    else:
        with pytest.raises(SceneError, match="announces 2x3"):
            read_colmap_array(path)


def test_a_huge_announcement_is_refused_at_once(tmp_path):
    path = tmp_path / "huge.bin"
    path.write_bytes(b"999999999&999999999&9999&" + bytes(8))
    with pytest.raises(SceneError, match="it is truncated"):
        read_colmap_array(path)
