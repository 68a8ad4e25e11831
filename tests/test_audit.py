"""The audit: a clean scene accuses nobody, a damaged photo is listed for its own reason, and nothing is skipped in
silence.
"""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from vggt_lora.core import ConfigError, SceneError
from vggt_lora.datasets.audit import mask_fault, outliers
from vggt_lora.demo.demo_scenes import toy_scene
from vggt_lora.depth import sparse_depth
from vggt_lora.datasets.audit import AuditLimits, audit_scene
from vggt_lora.scenes.images import plan_image
from vggt_lora.scenes.masks import REGIONS, region_labels, photo_mask
from vggt_lora.scenes.opening import open_scene
from vggt_lora.supervision.depth_map import DepthMap
from vggt_lora.supervision.sources import DEPTH_SOURCES

SIZE = (168, 252)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return open_scene(toy_scene(tmp_path_factory.mktemp("scenes"), frames=6, size=SIZE))


def exact(scene, frame, size=None):
    """The exact depth at a photo's own size, or at the pixel centres of a grid."""
    depth = np.load(scene.root / "exact_depth" / f"{Path(frame.name).stem}.npy")
    rows, columns = (
        ((np.arange(n) + 0.5) * whole / n).astype(int) for n, whole in zip(size or depth.shape, depth.shape)
    )
    return depth[rows[:, None], columns]


@pytest.fixture
def laser(toy, monkeypatch):
    """A source "fake" that knows every second row exactly, but for the frames in `scales`."""
    scales = {}

    def source(scene, frame, size, plan=None):
        depth = exact(toy, frame, size)
        depth[1::2] = 0
        return DepthMap(depth * np.float32(scales.get(frame.name, 1)), depth > 0, (depth > 0).astype(np.float32), {})

    monkeypatch.setitem(DEPTH_SOURCES, "fake", source)
    return scales


@pytest.fixture(scope="module")
def masked(toy, tmp_path_factory):
    """The scene with masks of its photos that leave out the sky: their outline is that of the roofs."""
    folder, frames = tmp_path_factory.mktemp("masks"), []
    for k, frame in enumerate(toy.frames):
        Image.fromarray(np.where(exact(toy, frame) == 0, 0, 255).astype(np.uint8)).save(folder / f"{k}.png")
        frames.append(replace(frame, photo_mask_path=folder / f"{k}.png"))
    return replace(toy, frames=tuple(frames))


def changed(scene, k, **fields):
    return replace(scene, frames=tuple(replace(f, **fields) if i == k else f for i, f in enumerate(scene.frames)))


def audit(scene, *sources, **options):
    return audit_scene(scene, SIZE[1], sources=sources or ("sparse", "fake"), progress=False, **options)


def listed(result):
    return [(row["index"], row["reason"]) for row in result.suspects]


def turned(pose, degrees):
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[c, 0, s, 0], [0, 1, 0, 0], [-s, 0, c, 0], [0, 0, 0, 1]]) @ pose


def test_a_clean_scene_accuses_nobody_and_its_shares_add_up(masked, laser):
    result = audit(masked)
    assert listed(result) == [] and result.absent == {} and "no suspicious photo" in result.text()
    assert result.present == ("sparse", "fake")
    for name, known in (("sparse", sum(sparse_depth(masked, f, SIZE).valid.sum() for f in masked.frames)),
                        ("fake", sum((exact(masked, f, SIZE)[::2] > 0).sum() for f in masked.frames))):
        own = [row for row in result.rows if row["source"] == name]
        assert own[0]["pixels"] == known == sum(row["pixels"] for row in own if row["kind"] == "distance")
        assert result.share(name) == pytest.approx(known / (6 * SIZE[0] * SIZE[1]))
    agreement = result.agreements[0]
    differences = []
    for frame in masked.frames:
        found, truth = sparse_depth(masked, frame, SIZE), exact(masked, frame, SIZE)
        both = found.valid & (truth > 0)
        both[1::2] = False
        differences.append(np.abs(found.depth[both] / truth[both] - 1))
    differences = np.concatenate(differences)
    assert (agreement["one"], agreement["other"], agreement["pixels"]) == ("sparse", "fake", len(differences))
    assert agreement["median"] == pytest.approx(np.median(differences), rel=1e-3) and agreement[
        "90 %"
    ] == pytest.approx(np.quantile(differences, 0.9), rel=1e-3)


@pytest.mark.parametrize("fault", ["pose", "exposure", "mask", "scale", "unreadable"])
def test_a_damaged_photo_is_listed_for_its_own_reason(masked, laser, tmp_path, fault):
    k, frame = 3, masked.frames[3]
    photo = np.asarray(Image.open(frame.image_path)) / 255
    if fault == "pose":
        broken = changed(masked, k, world_to_cam=turned(frame.world_to_cam, 3))
    elif fault == "exposure":
        Image.fromarray((255 * np.clip(photo**2.2 * 0.3, 0, 1) ** (1 / 2.2)).astype(np.uint8)).save(
            tmp_path / "dark.png"
        )
        broken = changed(masked, k, image_path=tmp_path / "dark.png")
    elif fault == "mask":
        Image.fromarray(np.roll(np.asarray(Image.open(frame.photo_mask_path)), (14, 10), (0, 1))).save(
            tmp_path / "moved.png"
        )
        broken = changed(masked, k, photo_mask_path=tmp_path / "moved.png")
    elif fault == "scale":
        broken, laser[frame.name] = masked, 1.1
    else:
        (tmp_path / "cut.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut short")
        broken = changed(masked, k, image_path=tmp_path / "cut.jpg")
    result = audit(broken)
    assert listed(result) == [(k, fault)]
    assert frame.name.rsplit("/", 1)[-1] in result.text() and f": {fault}: " in result.text()
    if fault == "scale":
        assert "+10.0 %" in result.text() or "+9.9 %" in result.text() or "+10.1 %" in result.text()
    if fault == "unreadable":
        assert str(tmp_path / "cut.jpg") in result.text()


def test_neighbours_tell_the_scale_where_there_are_no_points(toy, laser):
    blind = replace(
        toy, frames=tuple(replace(f, point_rows=f.point_rows[:0], observations=f.observations[:0]) for f in toy.frames)
    )
    assert listed(audit(blind, "fake")) == []
    laser[blind.frames[2].name] = 0.9
    result = audit(blind, "fake")
    assert (
        listed(result) == [(2, "scale")]
        and "of both neighbours" in result.text()
        and "poses are not checked" in result.text()
    )


def test_what_is_absent_is_said_and_what_is_empty_is_listed(toy):
    result = audit(toy, "sparse", "laser")
    assert (
        result.present == ("sparse",) and list(result.absent) == ["laser"] and "laser: absent. scene" in result.text()
    )
    assert {row["source"] for row in result.rows} == {"sparse"} and result.agreements == []
    blind = changed(toy, 1, point_rows=toy.frames[1].point_rows[:0], observations=toy.frames[1].observations[:0])
    assert listed(audit(blind, "sparse")) == [(1, "empty")]
    part = audit(toy, "sparse", frames=[5, 0])
    assert (
        [row["index"] for row in part.frames] == [0, 5]
        and "2 of 6 photos" in part.text()
        and "fewer than three" in part.text()
    )


def test_settings_are_checked(toy):
    for call, words in (
        (lambda: audit(toy, "lasr"), "Did you mean 'laser'"),
        (lambda: audit(toy, "sparse", frames=[6]), "indices from 0 to 5"),
        (lambda: audit(toy, "sparse", frames=[]), "indices from 0 to 5"),
        (lambda: AuditLimits(scale=0), "scale is 0"),
    ):
        with pytest.raises(ConfigError, match=words):
            call()


def test_a_scene_that_varies_accuses_nobody():
    rng = np.random.default_rng(0)
    assert not outliers(rng.normal(0, 3, 40), 0.1, 5)[0].any()
    far, middle, limit = outliers([*rng.normal(2, 0.1, 20), 9, np.nan], 0.5, 5)
    assert far.tolist() == [False] * 20 + [True, False] and abs(middle - 2) < 0.1 and limit >= 0.5


def test_laser_samples_under_a_mask_accuse_it():
    clean = {"mask_depth": 0.001, "mask_gain": -0.1, "mask_strong": True, "mask_shift": (0, 0)}
    limits = AuditLimits()
    assert mask_fault(SimpleNamespace(**clean), limits) is None
    assert "20 % of its laser samples" in mask_fault(SimpleNamespace(**clean | {"mask_depth": 0.2}), limits)
    assert "6 px lower and 8 px further left" in mask_fault(
        SimpleNamespace(**clean | {"mask_gain": 0.05, "mask_shift": (6, -8)}), limits
    )
    # windows repeat
    assert mask_fault(SimpleNamespace(**clean | {"mask_gain": 0.05, "mask_strong": False}), limits) is None


def test_labels_become_regions_in_every_plan_and_odd_ones_are_refused(toy, tmp_path):
    frame, (height, width) = toy.frames[0], SIZE
    assert not region_labels(toy, frame, plan_image(frame.size, 140)).any()  # a scene without labels
    drawn = {kind: np.zeros(SIZE, np.uint8) for kind in ("walls", "windows", "edges")}
    (
        drawn["walls"][:, : width // 2],
        drawn["windows"][height // 2 :, : width // 4],
        drawn["edges"][:, width // 2 - 8 : width // 2 + 8],
    ) = 3, 7, 1
    for kind, values in drawn.items():
        (tmp_path / "labels" / kind).mkdir(parents=True)
        Image.fromarray(values).save(tmp_path / "labels" / kind / f"{Path(frame.name).stem}.png")
    scene, plan = replace(toy, root=tmp_path), plan_image(frame.size, 140, "pad")
    codes = region_labels(scene, frame, plan)
    top, left, bottom, right = plan.content_box
    inner = codes[top:bottom, left:right]
    assert not codes[:top].any() and not codes[bottom:].any() and (inner > 0).all()
    def at(v, u):
        return REGIONS[inner[int(v * inner.shape[0]), int(u * inner.shape[1])]]
    assert [at(0.9, 0.1), at(0.1, 0.1), at(0.5, 0.5), at(0.5, 0.9)] == ["window", "wall", "edge", "other"]
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(tmp_path / "labels" / "walls" / f"{Path(frame.name).stem}.png")
    with pytest.raises(SceneError, match="walls.*the mask is 9x9, its photo 252x168"):
        region_labels(scene, frame, plan)


def test_a_mask_or_photo_that_is_gone_is_named(toy, tmp_path):
    gone = replace(toy.frames[0], photo_mask_path=tmp_path / "gone.png")
    for source in (photo_mask, sparse_depth):
        with pytest.raises(SceneError, match="gone.png: no such image file"):
            source(toy, gone, SIZE)
    assert listed(audit(changed(toy, 0, photo_mask_path=tmp_path / "gone.png"), "sparse"))[0] == (0, "unreadable")
