"""Images against the official goldens and against every plan that hypothesis can think of."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vggt_lora.core import SceneError
from vggt_lora.reference_data import reference
from vggt_lora.scenes import images
from vggt_lora.geometry.cameras import project_points
from vggt_lora.scenes.images import MODES, load_image, plan_image, target_size

lenient = settings(deadline=None, max_examples=150, derandomize=True)
sides = st.integers(1, 9000)
photo_sizes = st.one_of(st.just((4032, 6048)), st.just((4135, 6208)),
                        st.tuples(st.integers(60, 7000), st.integers(60, 7000)))
multiples = st.integers(1, 40).map(lambda n: 14 * n)


def golden(name):
    """Load a golden file, or skip saying which one is absent."""
    path = reference(name)
    if path is None:
        pytest.skip(f"the golden file {name} is absent")
    from safetensors.numpy import load_file
    return load_file(path)


# Corner of one golden picture: the first 8 x 8 pixels of "land" (130 x 87), and what the official "crop" makes of them,
# every third pixel. Pixels further away do not reach these outputs (the bicubic filter spans 2 source pixels).
LAND_CORNER = np.frombuffer(
    bytes.fromhex(
        "2e45bc183ad4264fdc1e3ace053fcd1d3ac31645bc1d33d91c35d30526df2c4bbb1e51ce003de52d4bcd0427c90153cf"
        "0049c4032ae30347cf172dd4002ebb152ab71131c80c2fb92224df282fb8232ae01327bf2e44e00531d20e49b82f32c5"
        "1536d01b43de0b4db51e3ad70049bb193dc92250e30630b71c2bbe1747e02c27c50654cb1f53c10e3edf1a3eb3153ed7"
        "1047c3004ecb2926b60630b4283db21d4dc71546be0621bb363ac83925cc3a1ec10e38d73d30d51820be134dc8284ab6"
    ),
    np.uint8,
).reshape(8, 8, 3)

CROP_CORNER = np.frombuffer(bytes.fromhex(
    "32281a2423132c21132825121c110627251001010104140e14171b1713191f23261d181c48433d4f3f39403b354c4741"
    "382f284851484c3e2a483b2f322f2c32292d262c36352d36b6c1d5dfd5ccc2cad8d1ced1d2d8ddbdc5d8c1d0e4cdd2cd"
    "d7cfc7ddcdc9e0d3c1d2c9cb"), np.uint8).reshape(3, 6, 6)


def at_network_size(photo, mode, folder):
    """Read a photo (h, w, 3|4) uint8 as `load_image` does, (3, H, W)."""
    Image.fromarray(photo).save(folder / "photo.png")
    return load_image(folder / "photo.png", plan_image(photo.shape[:2], mode=mode)).transpose(2, 0, 1)


def test_corner_of_the_golden_crop_without_the_golden_file(tmp_path):
    photo = np.zeros((87, 130, 3), np.uint8)
    photo[:8, :8] = LAND_CORNER
    got = at_network_size(photo, "aspect", tmp_path)
    assert got.shape == (3, 350, 518)
    assert (got[:, :18:3, :18:3] == CROP_CORNER).all()


@pytest.mark.parametrize("key, mode", [("crop.eth", "aspect"), ("crop.land", "aspect"), ("crop.rgba", "aspect"),
                                       ("pad.land", "pad"), ("pad.port", "pad")])
def test_golden_preprocessing(key, mode, tmp_path):
    """The official `crop` of a photo that is wider than high is `aspect`, its `pad` is `pad`: bit for bit."""
    data = golden("preprocess.safetensors")
    sums = json.loads(reference("preprocess.json").read_text())["full_shapes_and_checksums"]
    got = at_network_size(data[f"src.{key.partition('.')[2]}"], mode, tmp_path)
    assert [1, *got.shape] == sums[key]
    assert (got[:, ::3, ::3] == data[f"out.{key}"][0]).all()
    assert int(got.sum()) == sums.get(f"{key}.checksum_uint8_sum", int(got.sum()))


def test_golden_target_shapes():
    # the official training shapes: width 518, height rounded DOWN to a multiple of 14
    path = reference("dataset_processing.json")
    if path is None:
        pytest.skip("the golden file dataset_processing.json is absent")
    for aspect, shape in json.loads(path.read_text())["meta"]["target_shapes"].items():
        assert [int(518 * float(aspect)) // 14 * 14, 518] == shape


@lenient
@given(st.tuples(sides, sides), multiples)
def test_target_sizes_fit_the_network(size, long_side):
    height, width = target_size(size, long_side)
    assert height % 14 == 0 and width % 14 == 0 and max(height, width) == long_side and min(height, width) >= 14
    assert (height >= width) or (size[1] >= size[0])
    exact = min(size) * long_side / max(size)
    assert abs(min(height, width) - max(14, exact)) <= 7 + 1e-9


@lenient
@given(photo_sizes, st.sampled_from(MODES), st.one_of(st.none(), st.tuples(multiples, multiples)), multiples,
       st.floats(0.3, 3), st.floats(0.3, 3), st.floats(-0.3, 1.3), st.floats(-0.3, 1.3), st.integers(0, 1000))
def test_projecting_with_planned_intrinsics_equals_moving_the_pixels(
        size, mode, target, long_side, fx, fy, cx, cy, seed):
    height, width = size
    K = np.array([[fx * width, 0, cx * width], [0, fy * height, cy * height], [0, 0, 1]])
    plan = plan_image(size, long_side, mode, target=target)
    points = np.random.default_rng(seed).uniform([-2, -2, 1], [2, 2, 9], size=(20, 3))
    in_photo, _ = project_points(points, np.eye(4), K)
    in_plan, _ = project_points(points, np.eye(4), plan.intrinsics(K))
    assert np.abs(in_plan - plan.points(in_photo)).max() <= 1e-9 * max(1, np.abs(in_plan).max())


@lenient
@given(photo_sizes, st.sampled_from(MODES), st.one_of(st.none(), st.tuples(multiples, multiples)), multiples)
def test_plans_are_sound(size, mode, target, long_side):
    plan = plan_image(size, long_side, mode, target=target)
    top, left, bottom, right = plan.content_box
    assert 0 <= top < bottom <= plan.size[0] and 0 <= left < right <= plan.size[1]
    assert all(side % 14 == 0 for side in plan.size)
    assert target is None or plan.size == target
    corners = plan.points(np.array([[0, 0], size[::-1]], dtype=float))
    if mode == "pad":  # the whole photo is there, and nothing but it lies in the box
        assert np.allclose(corners, [[left, top], [right, bottom]])
    else:  # no padding: the photo covers the whole image
        assert plan.content_box == (0, 0, *plan.size)
        assert (corners[0] <= 1e-9).all() and (corners[1] >= np.subtract(plan.size[::-1], 1e-6)).all()
    # centred to within half a pixel
    assert np.abs(corners.sum(0) - plan.size[::-1]).max() <= 1 + 1e-6


@pytest.mark.parametrize("mode", MODES)
def test_load_image_agrees_with_the_plan(mode, tmp_path):
    # one bright dot on black: its centre of brightness must lie where plan.points puts it
    size, dot = (301, 467), np.array([201.5, 140.5])
    photo = np.zeros((*size, 3), np.uint8)
    photo[140, 201] = 255
    Image.fromarray(photo).save(tmp_path / "dot.png")
    plan = plan_image(size, 1036, mode)
    pixels = load_image(tmp_path / "dot.png", plan)[..., 0].astype(float)
    pixels[:plan.content_box[0]] = pixels[plan.content_box[2]:] = 0
    assert pixels.shape == plan.size
    rows, columns = np.indices(pixels.shape) + 0.5
    found = np.array([(pixels * columns).sum(), (pixels * rows).sum()]) / pixels.sum()
    assert np.abs(found - plan.points(dot)).max() < 0.05  # the filter's negative lobes are cut at black


def test_a_draft_is_used_and_fits_a_full_decode(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 255, (13, 20, 3), dtype=np.uint8))
    coarse.resize((2003, 1301), Image.Resampling.BICUBIC).save(tmp_path / "photo.jpg", quality=95)
    plan = plan_image((1301, 2003), 252)
    quick = load_image(tmp_path / "photo.jpg", plan).astype(int)
    asked = []
    monkeypatch.setattr(images.Image.Image, "draft", lambda *a: None)
    from PIL import JpegImagePlugin
    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "draft", lambda self, mode, size: asked.append(size))
    full = load_image(tmp_path / "photo.jpg", plan).astype(int)
    assert asked == [(504, 336)]
    assert np.abs(quick - full).mean() < 1 and np.abs(quick - full).max() < 12
    assert (quick != full).any()  # else the draft was never taken


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "folder", "absent"])
def test_broken_files_are_named(damage, tmp_path):
    path = tmp_path / "photo.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)).save(path)
    whole = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(whole[:len(whole) // 2])
    elif damage == "empty":
        path.touch()
    elif damage == "text":
        path.write_text("this is no photo")
    elif damage == "folder":
        path.mkdir()
    with pytest.raises(SceneError, match="photo.jpg"):
        load_image(path, plan_image((60, 90), 42))


def test_a_shrunk_photo_is_refused_with_both_sizes(tmp_path):
    Image.new("RGB", (1244, 829)).save(tmp_path / "DSC_0634.JPG")
    with pytest.raises(SceneError, match=r"DSC_0634.JPG: .*1244x829.*6220x4141.*resized"):
        load_image(tmp_path / "DSC_0634.JPG", plan_image((4141, 6220)))
