"""Completed depth: exact on planes, honest about the rest, and never mistaken for a measurement."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vggt_lora.core import ConfigError
from vggt_lora.datasets.samples import FrameCache
from vggt_lora.demo.demo_scenes import toy_scene
from vggt_lora.depth import sparse_depth
from vggt_lora.supervision.sources import completed_depth
from vggt_lora.geometry.planes import Plane, find_planes
from vggt_lora.scenes.images import plan_image
from vggt_lora.scenes.opening import open_scene
from vggt_lora.supervision.completed import CompletionSettings, complete, sky_of
from vggt_lora.supervision.depth_map import DepthMap
from vggt_lora.supervision.sources import DEPTH_SOURCES, depth_source
from vggt_lora.training.config import TrainConfig

SIZE = (168, 252)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return open_scene(toy_scene(tmp_path_factory.mktemp("scenes"), frames=4, size=SIZE))


def exact(scene, frame):
    return np.load(scene.root / "exact_depth" / f"{Path(frame.name).stem}.npy")


# --- a made-up photo of two walls -------------------------------------------------------------------------------------


def two_walls(height=60, width=90):
    """A dark wall on the left and a light one on the right, their planes, inverse depths and a few anchors on each."""
    photo = np.full((height, width, 3), 70, np.uint8)
    photo[:, width // 2:] = 170
    v, u = np.mgrid[:height, :width] + 0.5
    rays = np.stack([(u - width / 2) / width, (v - height / 2) / width, np.ones_like(u)], -1)
    planes = np.array([[0.08, 0.0, 0.2], [-0.05, 0.02, 0.1]])
    inverse = np.where(u < width / 2, rays @ planes[0], rays @ planes[1])
    valid = np.zeros((height, width), bool)
    valid[6::16, 5::13] = True
    anchors = DepthMap(np.where(valid, 1 / inverse, 0).astype(np.float32), valid, valid.astype(np.float32))
    return photo, rays.reshape(-1, 3), planes, 1 / inverse, anchors


def test_planes_are_carried_exactly_up_to_the_edge():
    photo, rays, planes, truth, anchors = two_walls()
    found = complete(photo, rays, anchors, planes)
    reached = found.depth > 0
    assert reached.mean() > 0.9
    assert np.abs(found.depth[reached] / truth[reached] - 1).max() < 1e-4  # both sides of the edge, to the last pixel
    assert (found.confidence[anchors.valid] == 1).all() and (found.confidence[reached & ~anchors.valid] < 1).all()
    blind = complete(photo, rays, anchors, planes, CompletionSettings(edges=0))
    assert np.abs(blind.depth[reached] / truth[reached] - 1).max() > 0.1  # it was the edge that held the walls apart


def test_without_planes_the_same_pixels_are_worse_and_say_so():
    photo, rays, planes, truth, anchors = two_walls()
    flat, none = complete(photo, rays, anchors, planes), complete(photo, rays, anchors, np.zeros((0, 3)))
    both = (flat.depth > 0) & (none.depth > 0) & ~anchors.valid
    assert np.abs(none.depth[both] / truth[both] - 1).mean() > 10 * np.abs(flat.depth[both] / truth[both] - 1).mean()
    assert none.confidence[both].mean() < 0.8 * flat.confidence[both].mean()


def test_confidence_falls_with_the_way_and_ends_at_the_reach():
    photo, rays, planes, truth, anchors = two_walls()
    one = np.zeros_like(anchors.valid)
    one[30, 10] = True
    alone = DepthMap(np.where(one, truth, 0).astype(np.float32), one, one.astype(np.float32))
    found = complete(photo, rays, alone, np.zeros((0, 3)), CompletionSettings(reach=0.2, doubt=0))
    row = found.confidence[30, 10:32]
    assert row[0] == 1 and (np.diff(row[:18]) < 0).all() and found.depth[30, 30] == 0 and np.isinf(found.error[30, 30])


def test_untrusted_anchors_are_kept_but_not_carried_on():
    photo, rays, planes, truth, anchors = two_walls()
    wrong = anchors.depth.copy()
    wrong[22, 18] *= 3
    weight = np.where(
        np.arange(wrong.size).reshape(wrong.shape) == 22 * wrong.shape[1] + 18, 0.05, anchors.weight
    ).astype(np.float32)
    found = complete(photo, rays, DepthMap(wrong, anchors.valid, weight), planes, CompletionSettings(reach=0.5))
    assert found.depth[22, 18] == wrong[22, 18] and found.confidence[22, 18] == np.float32(0.05)
    assert abs(found.depth[23, 20] / truth[23, 20] - 1) < 1e-4


def test_the_sky_is_closed_where_no_point_was_found_in_it():
    rng = np.random.default_rng(0)
    photo = rng.integers(20, 120, (80, 120, 3)).astype(np.uint8)
    photo[:30] = 230
    points = np.zeros((80, 120), bool)
    points[40::7, 3::9] = True
    sky = sky_of(photo, points)
    assert sky[:28].all() and not sky[36:].any()
    points[4:26:6, 5::9] = True  # points inside: a white wall, then
    assert not sky_of(photo, points).any()


# --- scenes -----------------------------------------------------------------------------------------------------------


def test_confidence_ranks_the_errors_on_a_built_scene(toy):
    errors, sure = [], []
    for frame in toy.frames[:2]:
        found, before, truth = (
            completed_depth(toy, frame, SIZE, anchors="sparse"),
            sparse_depth(toy, frame, SIZE),
            exact(toy, frame),
        )
        guess = found.valid & ~before.valid
        assert (
            found.counts["measured"] == before.valid.sum()
            and found.counts["completed"] == guess.sum() > 10 * before.valid.sum()
        )
        assert found.counts["measured"] + found.counts["completed"] + found.counts["unknown"] == found.valid.size
        assert np.array_equal(found.depth[before.valid], before.depth[before.valid])
        assert (
            (found.weight > 0)[found.valid].all()
            and (found.weight[guess] < 1).all()
            and found.weight.max() <= 1
            and not found.weight[~found.valid].any()
        )
        known = guess & (truth > 0)
        errors.append(np.abs(found.depth[known] / truth[known] - 1))
        sure.append(found.weight[known])
    errors, sure = np.concatenate(errors), np.concatenate(sure)
    upper, lower = errors[sure >= np.median(sure)], errors[sure < np.median(sure)]
    assert (
        np.median(upper) < 0.01
        and np.median(upper) < np.median(lower)
        and (upper > 0.03).mean() < 0.6 * (lower > 0.03).mean()
    )


@pytest.mark.parametrize("mode", ["crop", "pad"])
def test_plans_cut_and_pad_as_for_every_source(toy, mode):
    frame = toy.frames[1]
    plan = plan_image(frame.size, 140, mode)
    # no edge keeps it out of the padding
    found = completed_depth(toy, frame, plan.size, plan, anchors="sparse", settings=CompletionSettings(edges=0))
    before = sparse_depth(toy, frame, plan.size, plan)
    top, left, bottom, right = plan.content_box
    outside = np.ones(plan.size, bool)
    outside[top:bottom, left:right] = False
    assert found.valid.sum() > 5 * before.valid.sum() and not found.valid[outside].any()
    assert np.array_equal(found.depth[before.valid], before.depth[before.valid]) and found.valid[before.valid].all()


def test_a_mask_leaves_its_pixels_unknown(toy, tmp_path):
    from PIL import Image

    frame, keep = toy.frames[1], np.full(SIZE, 255, np.uint8)
    keep[:, :100] = 0
    Image.fromarray(keep).save(tmp_path / "own.png")
    found = completed_depth(toy, replace(frame, photo_mask_path=tmp_path / "own.png"), SIZE, anchors="sparse")
    assert not found.valid[:, :99].any() and found.valid[:, 101:].any() and found.counts["masked"] >= 99 * SIZE[0]


def test_completed_is_a_supervision_like_any_other(toy, monkeypatch):
    assert TrainConfig(supervision="laser+completed").supervision == "laser+completed"
    maps = {
        name: FrameCache(140, supervision=name).get(toy, 0, (98, 140)).depth
        for name in ("sparse", "completed", "laser+completed")
    }
    assert np.array_equal(maps["completed"].depth, maps["laser+completed"].depth)  # this scene has no laser
    assert maps["laser+completed"].counts["laser"] == 0 < maps["laser+completed"].counts["completed completed"]
    sure = np.full((98, 140), 2.5, np.float32)
    half = np.zeros((98, 140), bool)
    half[:, :70] = True
    monkeypatch.setitem(
        DEPTH_SOURCES,
        "half",
        lambda scene, frame, size, plan=None: DepthMap(sure * half, half, half.astype(np.float32), {}),
    )
    mixed = depth_source("half+completed")(toy, toy.frames[0], (98, 140))
    assert (mixed.depth[half] == 2.5).all() and (mixed.weight[half] == 1).all() and mixed.counts["half"] == half.sum()
    anchored = completed_depth(toy, toy.frames[0], (98, 140), anchors="half")
    assert (anchored.depth[half] == 2.5).all() and anchored.counts["measured"] == half.sum()
    for anchors, words in (("completed", "which is an estimate itself"), ("lasr", "Did you mean 'laser'")):
        with pytest.raises(ConfigError, match=words):
            completed_depth(toy, toy.frames[0], (98, 140), anchors=anchors)


def test_planes_of_a_scene_do_not_depend_on_where_the_world_begins(toy):
    moved = replace(toy, points=replace(toy.points, xyz=toy.points.xyz + [4e5, 5e6, 100.0]))
    shift = np.eye(4)
    shift[:3, 3] = [-4e5, -5e6, -100.0]
    moved = replace(moved, frames=tuple(replace(f, world_to_cam=f.world_to_cam @ shift) for f in toy.frames))
    here, there = find_planes(toy), find_planes(moved)
    assert len(here) >= 2 and [len(p.rows) for p in here[:2]] == [len(p.rows) for p in there[:2]]
    for one, other in zip(here[:2], there[:2]):
        m, n = one.inverse_depth(toy.frames[0].world_to_cam), other.inverse_depth(moved.frames[0].world_to_cam)
        assert np.allclose(m, n, rtol=1e-4, atol=1e-6)
    assert Plane(np.array([0, 0, 1.0]), 0.0, np.arange(0)).inverse_depth(np.eye(4)) is None


def test_importing_it_is_light():
    heavy = "{'torch', 'open3d', 'matplotlib', 'pycolmap', 'scipy.ndimage', 'scipy.sparse'}"
    code = (
        "import vggt_lora.supervision.completed, vggt_lora.datasets.audit, vggt_lora.depth, sys; "
        f"print(sorted({heavy} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
