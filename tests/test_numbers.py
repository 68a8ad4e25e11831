"""Single precision against double on scenes that are hard on numbers, and parsers and geometry under whatever
Hypothesis thinks of.
"""
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_losses import leaves, scene
from vggt_lora.core import SceneError
from vggt_lora.evaluation.metrics import ALIGNMENTS, align_depth, depth_metrics
from vggt_lora.geometry.cameras import (
    decode_pose, encode_pose, invert_pose, matrix_to_quaternion, project_points, relative_to_first, unproject_depth,
)
from vggt_lora.training.losses import LossConfig, training_loss
from vggt_lora.training.step_guard import nonfinite_terms

HARD = (
    "ordinary", "points far away", "tiny baseline", "pure rotation", "one plane", "half a turn", "a turn and a little",
    "huge world", "tiny world",
)


def hard_scene(kind: str) -> tuple[dict, dict]:
    """Predictions and truth (float64) of a scene of this kind."""
    outputs, batch = scene(scenes=1)
    outputs = {n: [t.double() for t in v] if isinstance(v, list) else v.double() for n, v in outputs.items()}
    batch = {
        n: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for n, v in batch.items()
    } | {"metric": False}
    poses, valid = batch["world_to_cam"], batch["valid"]
    angle = {"pure rotation": 0.4, "half a turn": math.pi, "a turn and a little": math.pi - 1e-7}.get(kind, 0.0)
    for frame in (1, 2):
        turn = torch.tensor(
            [
                [math.cos(angle * frame), 0, math.sin(angle * frame)],
                [0, 1, 0],
                [-math.sin(angle * frame), 0, math.cos(angle * frame)],
            ],
            dtype=torch.float64,
        )
        poses[:, frame, :3, :3] = (
            turn if kind != "a turn and a little" else turn if frame == 1 else torch.eye(3, dtype=torch.float64)
        )
    if kind == "points far away":
        batch["depth"] = torch.where(
            valid & (torch.arange(valid.shape[-1]) % 7 == 0), batch["depth"] * 1e7, batch["depth"]
        )
    elif kind == "tiny baseline":
        poses[..., :3, 3] *= 1e-7
    elif kind == "pure rotation":
        poses[..., :3, 3] = 0
    elif kind == "one plane":
        batch["depth"] = torch.where(valid, 5.0, 0.0).double()
    elif kind in ("huge world", "tiny world"):
        factor = 1e6 if kind == "huge world" else 1e-6
        batch["depth"] *= factor
        poses[..., :3, 3] *= factor
    return outputs, batch


def single(values: dict) -> dict:
    """The same in float32."""
    return {
        n: [t.float() for t in v]
        if isinstance(v, list)
        else v.float()
        if isinstance(v, torch.Tensor) and v.is_floating_point()
        else v
        for n, v in values.items()
    }


@pytest.mark.parametrize("kind", HARD)
def test_losses_and_gradients_agree_with_their_twins_in_double(kind):
    config = LossConfig(point_conf=1, point_reg=1, point_grad=1, depth_range=None)
    outputs, batch = hard_scene(kind)
    results = []
    for change in (dict, single):
        ours, theirs = change(outputs), change(batch)
        ours = {
            n: [t.detach().clone() for t in v] if isinstance(v, list) else v.detach().clone() for n, v in ours.items()
        }
        tensors = leaves(ours)
        result = training_loss(ours, theirs, config)
        result.total.backward()
        assert not nonfinite_terms(result) and all(t.grad is None or t.grad.isfinite().all() for t in tensors)
        results.append((result, [t.grad for t in tensors if t.grad is not None]))
    (double, wanted), (half, found) = results
    assert double.counts == half.counts and double.left_out == half.left_out
    for name, term in double.terms.items():
        assert float(half.terms[name].detach()) == pytest.approx(float(term.detach()), rel=1e-3, abs=1e-6), name
    for a, b in zip(wanted, found, strict=True):
        assert torch.linalg.norm(a.double() - b.double()) <= 1e-2 * torch.linalg.norm(a) + 1e-7


@pytest.mark.parametrize("kind", HARD)
def test_geometry_agrees_with_its_twin_in_double(kind):
    _, batch = hard_scene(kind)
    depth, K, pose = (batch[n][0].numpy() for n in ("depth", "K", "world_to_cam"))
    relative = relative_to_first(pose)
    points, points32 = (
        unproject_depth(depth.astype(t), K.astype(t), relative_to_first(pose.astype(t)))
        for t in (np.float64, np.float32)
    )
    size = np.abs(points).max()
    assert np.isfinite(points32).all() and np.abs(points - points32).max() <= 1e-5 * size
    back = invert_pose(invert_pose(pose.astype(np.float32)))
    assert np.abs(back - pose).max() <= 1e-5 * max(1, np.abs(pose).max())
    code, code32 = (
        encode_pose(relative, K, depth.shape[1:]),
        encode_pose(relative.astype(np.float32), K.astype(np.float32), depth.shape[1:]),
    )
    turned, turned32 = (decode_pose(np.asarray(c, np.float64), depth.shape[1:])[0] for c in (code, code32))
    # the quaternion's sign may differ at half a turn, the rotation not
    assert np.abs(turned[..., :3, :3] - turned32[..., :3, :3]).max() < 1e-5


@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize("how", ALIGNMENTS)
def test_metrics_of_hard_scenes_are_finite_or_said_to_be_missing(kind, how):
    outputs, batch = hard_scene(kind)
    truth, valid = batch["depth"][0, 0].numpy(), batch["valid"][0, 0].numpy()
    found = [
        depth_metrics(
            align_depth((outputs["depth"][0, 0, ..., 0].numpy()).astype(t), truth.astype(t), valid, how)[0],
            truth.astype(t),
            valid,
        )
        for t in (np.float64, np.float32)
    ]
    for name, value in found[0].items():
        if isinstance(value, float) and math.isfinite(value):
            assert float(found[1][name]) == pytest.approx(value, rel=5e-2, abs=0.02), name


@settings(deadline=None, max_examples=150, derandomize=True)
@given(
    st.lists(st.floats(-math.pi, math.pi), min_size=3, max_size=3),
    st.sampled_from([0, 1e-12, 1e-7, math.pi, math.pi - 1e-7]),
)
def test_rotations_near_half_a_turn_survive_the_quaternion(axis, less):
    from scipy.spatial.transform import Rotation

    length = np.linalg.norm(axis)
    if length < 1e-6:
        return
    turn = Rotation.from_rotvec(np.array(axis) / length * (math.pi - less)).as_matrix()
    q = np.asarray(matrix_to_quaternion(turn))
    assert np.isfinite(q).all() and abs(np.linalg.norm(q) - 1) < 1e-9
    again = Rotation.from_quat(q).as_matrix()  # x, y, z, w in both
    assert np.abs(again - turn).max() < 1e-7


@settings(deadline=None, max_examples=100, derandomize=True)
@given(st.floats(-1e12, 1e12), st.floats(-1e12, 1e12), st.floats(-1e12, 1e12))
def test_a_projection_is_a_number_or_is_marked(x, y, z):
    K = np.array([[40.0, 0, 20], [0, 40, 15], [0, 0, 1]])
    with np.errstate(all="ignore"):
        found = project_points(np.array([[x, y, z]]), np.eye(4), K)
    pixel, depth = found if isinstance(found, tuple) else (found, np.array([z]))
    assert not np.isnan(np.asarray(depth)).any() and (
        np.asarray(depth).reshape(-1)[0] <= 1e-6 or np.isfinite(np.asarray(pixel)).all()
    )


TEXTS = st.one_of(
    st.text(max_size=300),
    st.lists(
        st.sampled_from(
            ["1", "PINHOLE", "84", "nan", "-1", "1e400", "a.JPG", "#", "\n", "\r\n", " ", "\x00", "0.5", "٣"]
        ),
        max_size=60,
    ).map(" ".join),
)


@settings(deadline=None, max_examples=150, derandomize=True)
@given(TEXTS, st.sampled_from(["cameras.txt", "images.txt", "points3D.txt"]))
def test_colmap_text_is_read_or_refused(tmp_path_factory, text, name):
    from vggt_lora.scenes.colmap_model import read_model

    folder = tmp_path_factory.mktemp("model", numbered=True)
    for other, content in {
        "cameras.txt": "1 PINHOLE 84 56 40 40 42 28\n",
        "images.txt": "1 1 0 0 0 0 0 0 1 a.JPG\n1 1 1\n",
        "points3D.txt": "1 0 0 1 9 9 9 0.1 1 0\n",
    }.items():
        (folder / other).write_text(text if other == name else content, encoding="utf-8", errors="surrogatepass")
    try:
        read_model(folder)
    except SceneError as error:
        assert str(error)


@settings(deadline=None, max_examples=150, derandomize=True)
@given(st.binary(max_size=400))
def test_ply_is_read_or_refused(tmp_path_factory, content):
    from vggt_lora.scenes.ply import read_ply

    path = tmp_path_factory.mktemp("ply", numbered=True) / "a.ply"
    path.write_bytes(b"ply\nformat binary_little_endian 1.0\n" + content)
    with pytest.raises(SceneError):
        read_ply(path)
        raise SceneError("read")
