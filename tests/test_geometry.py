"""Geometry against the official goldens, in numpy and torch, and round trips that hypothesis tries to break."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vggt_lora.reference_data import reference
from vggt_lora.geometry.cameras import (
    camera_centre, centre_to_corner_intrinsics, corner_to_centre_intrinsics, crop_intrinsics, crop_pixels,
    decode_pose, encode_pose, invert_pose, matrix_to_quaternion, project_points, quaternion_to_matrix,
    relative_to_first, resize_intrinsics, resize_pixels, to_4x4, transform_points, unproject_depth)

lenient = settings(deadline=None, max_examples=150, derandomize=True)
number = st.floats(-10, 10).map(lambda x: round(x, 6))
quaternions = st.tuples(number, number, number, number).filter(lambda q: sum(x * x for x in q) > 1e-3)
translations = st.tuples(number, number, number)
image_sizes = st.tuples(st.integers(14, 7000), st.integers(14, 7000))
KINDS = {"numpy": np.asarray, "torch": torch.as_tensor}


def pose_of(q, t):
    return to_4x4(np.column_stack([quaternion_to_matrix(np.array(q, dtype=float)), t]))


def close(got, golden, tolerance=1e-6):
    got, golden = np.asarray(got, dtype=float), np.asarray(golden, dtype=float)
    assert got.shape == golden.shape
    assert np.abs(got - golden).max() <= tolerance * max(np.abs(golden).max(), 1e-30)


# ---- the official numbers -------------------------------------------------------------------------------------------

# rows of the golden file: quaternion in, its matrix, the quaternion back
GOLDEN_ROTATIONS = [
    ([0.5980837345123291, 0.16844864189624786, -0.5557486414909363, -0.5523263216018677],
     [[0.3255370259284973, -0.41241639852523804, -0.8508456945419312],
      [0.8154019713401794, -0.3331214189529419, 0.47344452142715454],
      [-0.4786912202835083, -0.8479049801826477, 0.2278417944908142]],
     [-0.5980837345123291, -0.16844864189624786, 0.5557486414909363, 0.5523263216018677]),
    ([-0.19950298964977264, -0.925895094871521, 0.2230992466211319, -0.23052868247032166],
     [[-0.814110279083252, 0.4722992777824402, 0.33787286281585693],
      [0.2665761411190033, 0.8208505511283875, -0.5051153898239136],
      [-0.5159087777137756, -0.32115069031715393, -0.7941665649414062]],
     [0.19950298964977264, 0.9258951544761658, -0.2230992466211319, 0.23052869737148285]),
    ([0.6290510296821594, 0.20956799387931824, 0.10571711510419846, 0.7410802841186523],
     [[0.88981032371521, 0.10696819424629211, 0.4436163306236267],
      [0.420347660779953, 0.1862373948097229, -0.8880447745323181],
      [-0.17761050164699554, 0.9766644835472107, 0.12075209617614746]],
     [0.6290510296821594, 0.20956799387931824, 0.10571710765361786, 0.7410802841186523]),
]
# a camera for a 350 x 518 image and its code; arbitrary nine numbers and the camera they mean at 392 x 518
GOLDEN_POSE = [[0.9713671207427979, -0.23432926833629608, 0.0391874685883522, 2.860304355621338],
               [-0.1137571781873703, -0.31392383575439453, 0.9426087737083435, -2.66800856590271],
               [-0.2085789442062378, -0.9200770258903503, -0.33159196376800537, 2.216095209121704]]
GOLDEN_K = [[651.6925659179688, 0.0, 260.38873291015625], [0.0, 522.8977661132812, 180.59173583984375], [0, 0, 1]]
GOLDEN_CODE = [2.860304355621338, -2.66800856590271, 2.216095209121704, -0.8088390827178955, 0.1075882837176323,
               0.05235636234283447, 0.575728178024292, 0.6459123492240906, 0.7565720081329346]
GOLDEN_PREDICTION = [
    2.3493762016296387, 1.7456741333007812, 0.535603940486908, -1.0188144445419312, -0.37104442715644836,
    1.2735862731933594, 0.7205715775489807, 1.2648674249649048, 0.8736305236816406,
]
GOLDEN_DECODED_POSE = [[-0.06104779243469238, -0.32541483640670776, -0.9435985088348389, 2.3493762016296387],
                       [0.7812924981117249, -0.6039090156555176, 0.1577204167842865, 1.7456741333007812],
                       [-0.6211723685264587, -0.7275980114936829, 0.29111164808273315, 0.535603940486908]]
GOLDEN_DECODED_K = [[554.7276611328125, 0.0, 259.0], [0.0, 267.44940185546875, 196.0], [0.0, 0.0, 1.0]]
# depth at (row, column) of a 14 x 22 map with these intrinsics (integer pixel centres) seen by GOLDEN_POSE: world point
GOLDEN_LIFT_K = [[32.58462905883789, 0.0, 11.0], [0.0, 26.144887924194336, 7.0], [0.0, 0.0, 1.0]]
GOLDEN_LIFTS = [((3, 5), 1.242224, [-3.0793504767833384, 0.8420001200959548, 2.537619403975258]),
                ((13, 21), 0.04576564, [-2.6167774335170537, 1.8229837261975745, 3.1329144053038758])]
# a world point in front of no camera (z < 0) and where the official code puts it: nothing is guarded
GOLDEN_BEHIND = ([-0.3495539724826813, 2.2937653064727783, -0.02422122098505497],
                 [[0.3255370259284973, -0.41241639852523804, -0.8508456945419312, -3.6470799446105957],
                  [0.8154019713401794, -0.3331214189529419, 0.47344452142715454, -0.05126164108514786],
                  [-0.4786912202835083, -0.8479049801826477, 0.2278417944908142, -1.4655349254608154]],
                 [[392.2605895996094, 0.0, 253.1067657470703], [0.0, 566.0565795898438, 183.62109375], [0, 0, 1]],
                 [818.9566650390625, 377.3571472167969], -3.24862003326416)


@pytest.mark.parametrize("kind", KINDS)
def test_golden_numbers_without_the_golden_file(kind):
    make = lambda values: KINDS[kind](np.array(values, dtype=np.float32))  # noqa: E731
    for q, R, back in GOLDEN_ROTATIONS:
        close(quaternion_to_matrix(make(q)), R)
        close(matrix_to_quaternion(make(R)), back)
    close(encode_pose(make(GOLDEN_POSE), make(GOLDEN_K), (350, 518)), GOLDEN_CODE)
    pose, K = decode_pose(make(GOLDEN_PREDICTION), (392, 518))
    close(pose[:3], GOLDEN_DECODED_POSE)
    close(K, GOLDEN_DECODED_K)
    for (row, column), depth, world in GOLDEN_LIFTS:
        grid = np.zeros((14, 22), np.float32)
        grid[row, column] = depth
        lifted = unproject_depth(make(grid), centre_to_corner_intrinsics(make(GOLDEN_LIFT_K)), make(GOLDEN_POSE))
        close(lifted[row, column], world, 2e-6)
        careless = unproject_depth(make(grid), make(GOLDEN_LIFT_K), make(GOLDEN_POSE))
        assert np.abs(np.asarray(careless[row, column]) - world).max() > 1e-4  # half a pixel is far above the tolerance
    point, pose, K, pixel, z = GOLDEN_BEHIND
    pixels, depths = project_points(make([point]), make(pose), centre_to_corner_intrinsics(make(K)))
    close(pixels[0] - 0.5, pixel)
    close(depths[0], z)


@pytest.mark.parametrize("kind", KINDS)
def test_golden_geometry(kind):
    path = reference("geometry.safetensors")
    if path is None:
        pytest.skip("the golden file geometry.safetensors is absent")
    from safetensors.numpy import load_file
    golden = load_file(path)
    data = {key: KINDS[kind](value) for key, value in golden.items()}
    close(quaternion_to_matrix(data["quat_in"]), golden["rotmat"])
    close(quaternion_to_matrix(data["quat_nonunit"]), golden["rotmat_nonunit"])
    close(matrix_to_quaternion(data["rotmat"]), golden["quat_back"])
    close(encode_pose(data["extrinsics"], data["intrinsics"], (350, 518)), golden["pose_enc.h350.w518"])
    for encoding, size, name, end in (("pose_enc.h350.w518", (350, 518), "decoded", ""),
                                      ("pred_pose_enc", (392, 518), "pred.decoded", ".h392.w518")):
        pose, K = decode_pose(data[encoding], size)
        close(pose[..., :3, :], golden[f"{name}.extrinsics{end}"])
        close(K, golden[f"{name}.intrinsics{end}"])
    close(invert_pose(data["extrinsics"][0, :3]), golden["inverse_se3"])
    lift_K = centre_to_corner_intrinsics(data["unproject.intrinsics"])
    lifted = unproject_depth(data["unproject.depth"][..., 0], lift_K, data["unproject.extrinsics"])
    close(lifted, golden["unproject.world_points"], 2e-6)
    pose, K = data["extrinsics"][0, :3], centre_to_corner_intrinsics(data["intrinsics"][0, :3])
    pixels, z = project_points(data["project.world_points"], pose, K)
    close(pixels - 0.5, golden["project.image_points"])
    close(z, golden["project.cam_points"][:, 2])


# ---- properties -----------------------------------------------------------------------------------------------------

@lenient
@given(quaternions, translations, st.floats(0.2, 5), st.floats(0.2, 5), image_sizes)
def test_pose_code_round_trip(q, t, fx, fy, size):
    height, width = size
    K = np.array([[fx * width, 0, width / 2], [0, fy * height, height / 2], [0, 0, 1]])
    pose = pose_of(q, t)
    code = encode_pose(pose, K, size)
    assert code[6] >= 0
    pose_back, K_back = decode_pose(code, size)
    assert np.abs(pose_back - pose).max() < 1e-7
    assert np.abs(K_back - K).max() < 1e-7 * max(size) * 5


@lenient
@given(quaternions, translations, translations)
def test_inverse_and_centre(q, t, point):
    pose, points = pose_of(q, t), np.array([point])
    there = transform_points(pose, points)
    assert np.abs(there - (pose @ [*point, 1])[:3]).max() < 1e-9
    assert np.abs(transform_points(invert_pose(pose), there) - points).max() < 1e-9
    assert np.abs(transform_points(pose, camera_centre(pose)[None])).max() < 1e-9


@lenient
@given(st.lists(st.tuples(quaternions, translations), min_size=2, max_size=5), translations)
def test_first_camera_becomes_the_world(cameras, point):
    poses = np.stack([pose_of(q, t) for q, t in cameras])
    moved = transform_points(poses[0], np.array([point]))
    for old, new in zip(poses, relative_to_first(poses)):
        assert np.abs(transform_points(new, moved) - transform_points(old, np.array([point]))).max() < 1e-9


@lenient
@given(
    image_sizes, image_sizes, st.integers(-500, 500), st.integers(-500, 500), st.floats(-50, 50), st.integers(0, 999)
)
def test_projection_follows_resize_and_crop(old, new, top, left, skew, seed):
    K = np.array([[1.1 * old[1], skew, 0.4 * old[1]], [0, 0.9 * old[0], 0.7 * old[0]], [0, 0, 1]])
    points = np.random.default_rng(seed).uniform([-2, -2, 1], [2, 2, 8], size=(10, 3))
    K_new = crop_intrinsics(resize_intrinsics(K, old, new), top, left)
    pixels, _ = project_points(points, np.eye(4), K)
    pixels_new, _ = project_points(points, np.eye(4), K_new)
    assert np.allclose(pixels_new, crop_pixels(resize_pixels(pixels, old, new), top, left), rtol=1e-9, atol=1e-6)
    back = resize_intrinsics(crop_intrinsics(K_new, -top, -left), new, old)
    assert np.allclose(back, K, rtol=1e-9, atol=1e-6)
    assert np.allclose(centre_to_corner_intrinsics(corner_to_centre_intrinsics(K)), K)


@lenient
@given(quaternions, translations, st.integers(1, 9), st.integers(1, 9), st.integers(0, 999))
def test_lifted_depth_projects_to_pixel_centres(q, t, height, width, seed):
    pose, rng = pose_of(q, t), np.random.default_rng(seed)
    K = np.array([[8 + rng.random(), rng.random(), 4], [0, 7, 3 + rng.random()], [0, 0, 1]])
    depth = rng.uniform(0.5, 20, size=(height, width))
    pixels, z = project_points(unproject_depth(depth, K, pose).reshape(-1, 3), pose, K)
    row, column = np.indices((height, width)) + 0.5
    assert np.allclose(pixels, np.stack([column.ravel(), row.ravel()], -1), atol=1e-6)
    assert np.allclose(z, depth.ravel())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", KINDS)
def test_kind_and_dtype_are_kept(kind, dtype):
    make = lambda values: KINDS[kind](np.array(values, dtype=dtype))  # noqa: E731
    pose, K = make([np.eye(4)] * 2), make([np.diag([5.0, 5, 1])] * 2)
    results = [quaternion_to_matrix(make([0, 0, 0, 1])), matrix_to_quaternion(pose[:, :3, :3]), to_4x4(pose[:, :3]),
               invert_pose(pose), relative_to_first(pose), camera_centre(pose),
               *project_points(make([[1, 2, 3]]), pose, K), unproject_depth(make(np.ones((2, 3, 4))), K, pose),
               resize_intrinsics(K, (3, 4), (6, 8)), crop_intrinsics(K, 1, 2), encode_pose(pose, K, (3, 4)),
               *decode_pose(make(np.full((2, 9), 0.5)), (3, 4))]
    for result in results:
        assert type(result) is type(pose) and result.dtype == pose.dtype


def test_torch_gradients_are_finite():
    half_turns = [np.diag(d) for d in ([1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1])]
    pose = to_4x4(torch.tensor(np.array([np.column_stack([R, [0, 0, 0]]) for R in half_turns]))).requires_grad_()
    K = torch.diag(torch.tensor([5.0, 5, 1], dtype=torch.float64)).requires_grad_()
    encode_pose(pose, K, (3, 4)).square().sum().backward()
    assert torch.isfinite(pose.grad).all() and torch.isfinite(K.grad).all() and K.grad.abs().sum() > 0
    depth = torch.ones(4, 3, 4, dtype=torch.float64, requires_grad=True)
    unproject_depth(depth, K, pose.detach()).square().sum().backward()
    assert torch.isfinite(depth.grad).all()


def test_decoding_never_gives_an_infinite_or_negative_focal_length():
    code = np.zeros((5, 9))
    code[:, 6] = 1
    code[:, 7:] = np.array([-1, 0, 1e-9, math.pi, 4])[:, None]
    focal = decode_pose(code, (350, 518))[1][:, 0, 0]
    assert np.isfinite(focal).all() and (focal > 0).all()
    assert focal[1] == pytest.approx(259 / math.tan(0.5e-3))


def test_points_behind_the_camera_are_the_callers_to_mask():
    pixels, z = project_points(np.array([[1.0, 0, 2], [1, 0, -2], [1, 0, 0]]), np.eye(4), np.diag([10.0, 10, 1]))
    assert z.tolist() == [2, -2, 0]
    assert pixels[:2, 0].tolist() == [5, -5]
    assert not np.isfinite(pixels[2]).any()
