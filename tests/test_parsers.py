"""What is written is read as it was, and any other bytes are refused by name: COLMAP's text and binary, PLY, raw depth,
calibrations.
"""
import math
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vggt_lora.core import SceneError
from vggt_lora.demo.colmap_writer import cameras_text
from vggt_lora.scenes.colmap_binary import KEYPOINT, scan_cameras_binary, scan_images_binary, scan_points_binary
from vggt_lora.scenes.colmap_text import camera_models, scan_cameras_text, scan_images_text, scan_points_text
from vggt_lora.scenes.ply import PLY_TYPES, read_ply
from vggt_lora.supervision.laser import read_ground_truth

FEW = settings(deadline=None, max_examples=40, derandomize=True)
numbers = st.floats(-1e6, 1e6, allow_subnormal=False)
names = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=12).map(
    lambda n: n.lstrip("#") or "a"
)


@st.composite
def models(draw):
    """(cameras, images, points) as lists of plain values; every observation stands in its image and in its point."""
    photos, count = draw(st.integers(1, 3)), draw(st.integers(0, 4))
    seen = draw(st.lists(st.lists(st.booleans(), min_size=count, max_size=count), min_size=photos, max_size=photos))
    names_ = draw(st.lists(names, min_size=photos, max_size=photos, unique=True))
    ids = sorted(draw(st.sets(st.integers(1, 2**31 - 2), min_size=photos, max_size=photos)))
    images = []
    for k in range(photos):
        q = np.array(draw(st.lists(st.floats(-1, 1), min_size=4, max_size=4)))
        q = q / np.linalg.norm(q) if np.linalg.norm(q) > 1e-3 else np.array([1.0, 0, 0, 0])
        pixels = [(draw(st.floats(0, 640)), draw(st.floats(0, 480)), 7 + j if seen[k][j] else -1) for j in range(count)]
        images.append((ids[k], list(q), draw(st.lists(numbers, min_size=3, max_size=3)), names_[k], pixels))
    points = [
        (
            7 + j, draw(st.lists(numbers, min_size=3, max_size=3)),
            draw(st.lists(st.integers(0, 255), min_size=3, max_size=3)), draw(st.floats(0, 50)),
            [(ids[k], j) for k in range(photos) if seen[k][j]],
        )
        for j in range(count)
    ]
    cameras = [(1, "PINHOLE", 640, 480, [draw(st.floats(1, 1e4)) for _ in range(2)] + [320.0, 240.0])]
    return cameras, images, points


def write_text(folder, cameras, images, points):
    """The three text files, floats with all their digits."""
    def line(*values):
        return " ".join(repr(float(v)) if isinstance(v, float) else str(v) for v in values) + "\n"

    (folder / "cameras.txt").write_text(
        "# cameras\n" + "".join(line(n, model, w, h, *params) for n, model, w, h, params in cameras)
    )
    (folder / "images.txt").write_text(
        "".join(
            line(n, *map(float, q), *t, 1, name) + line(*(v for row in pixels for v in row))
            for n, q, t, name, pixels in images
        ),
        encoding="utf-8",
    )
    (folder / "points3D.txt").write_text(
        "".join(
            line(n, *xyz, *rgb, error, *(v for pair in track for v in pair)) for n, xyz, rgb, error, track in points
        )
    )


def write_binary(folder, cameras, images, points):
    """The three tables as cameras.bin, images.bin and points3D.bin."""
    parts = [struct.pack("<Q", len(cameras.ids))]
    for camera, model, (width, height), params in zip(cameras.ids, cameras.models, cameras.sizes, cameras.params):
        parts += [
            struct.pack("<IiQQ", camera, camera_models()[model].number, width, height),
            np.asarray(params, "<f8").tobytes(),
        ]
    (folder / "cameras.bin").write_bytes(b"".join(parts))
    parts = [struct.pack("<Q", len(images.ids))]
    for row, name in enumerate(images.names):
        table = images.keypoints[row] if images.keypoints[row] is not None else np.zeros((0, 3))
        raw = np.zeros(len(table), KEYPOINT)
        raw["xy"] = table[:, :2]
        raw["id"] = table[:, 2].astype(np.int64).astype(np.uint64)  # -1 becomes 2^64 - 1
        parts += [
            struct.pack(
                "<I7dI", images.ids[row], *images.quaternions[row], *images.translations[row], images.camera_ids[row]
            ),
            name.encode() + b"\0",
            struct.pack("<Q", len(table)),
            raw.tobytes(),
        ]
    (folder / "images.bin").write_bytes(b"".join(parts))
    parts, ends = [struct.pack("<Q", len(points.ids))], np.cumsum(points.track_lengths)
    for row, (length, end) in enumerate(zip(points.track_lengths, ends)):
        parts += [
            struct.pack(
                "<Q3d3BdQ", points.ids[row], *points.xyz[row], *points.rgb[row].astype(int), points.error[row], length
            ),
            points.tracks[end - length : end].astype("<u4").tobytes(),
        ]
    (folder / "points3D.bin").write_bytes(b"".join(parts))


@FEW
@given(models())
def test_colmap_models_survive_text_and_binary(tmp_path_factory, model):
    folder = tmp_path_factory.mktemp("model", numbered=True)
    write_text(folder, *model)
    cameras, images, points = (
        scan_cameras_text(folder / "cameras.txt"),
        scan_images_text(folder / "images.txt"),
        scan_points_text(folder / "points3D.txt"),
    )
    assert [list(p) for p in cameras.params] == [c[4] for c in model[0]]
    for row, (number, q, t, name, pixels) in enumerate(model[1]):
        assert (images.ids[row], images.names[row], list(images.quaternions[row]), list(images.translations[row])) == (
            number, name, q, t,
        )
        assert (
            images.keypoints[row] is None
            and not pixels
            or [tuple(p) for p in images.keypoints[row]] == [(x, y, float(i)) for x, y, i in pixels]
        )
    assert [list(xyz) for xyz in points.xyz] == [p[1] for p in model[2]] and list(points.error) == [
        p[3] for p in model[2]
    ]
    write_binary(folder, cameras, images, points)
    again = (
        scan_cameras_binary(folder / "cameras.bin"),
        scan_images_binary(folder / "images.bin"),
        scan_points_binary(folder / "points3D.bin"),
    )
    for one, other, fields in (
        (cameras, again[0], "ids models sizes params"),
        (images, again[1], "ids quaternions translations camera_ids names"),
        (points, again[2], "ids xyz rgb error track_lengths tracks"),
    ):
        for field in fields.split():
            np.testing.assert_array_equal(getattr(one, field), getattr(other, field), err_msg=field)
    for one, other in zip(images.keypoints, again[1].keypoints, strict=True):
        np.testing.assert_array_equal(np.zeros((0, 3)) if one is None else one, other)


@FEW
@given(models())
def test_pycolmap_reads_what_is_written(tmp_path_factory, model):
    """The judge that is not ours: ids, names, poses and points of the binary model."""
    pycolmap = pytest.importorskip("pycolmap")
    folder = tmp_path_factory.mktemp("judge", numbered=True)
    write_text(folder, *model)
    write_binary(
        folder, scan_cameras_text(folder / "cameras.txt"), scan_images_text(folder / "images.txt"),
        scan_points_text(folder / "points3D.txt"),
    )
    for path in folder.glob("*.txt"):
        path.unlink()
    found = pycolmap.Reconstruction(folder)
    assert {i: image.name for i, image in found.images.items()} == {number: name for number, _, _, name, _ in model[1]}
    for number, q, t, _, _ in model[1]:
        pose = found.images[number].cam_from_world()
        assert np.allclose(np.abs(np.dot(pose.rotation.quat, [*q[1:], q[0]])), 1, atol=1e-9) and np.allclose(
            pose.translation, t
        )
    assert {i: list(point.xyz) for i, point in found.points3D.items()} == {p[0]: p[1] for p in model[2]}


@settings(deadline=None, max_examples=100, derandomize=True)
@given(
    st.binary(max_size=300),
    st.integers(0, 3),
    st.sampled_from(
        [("cameras.bin", scan_cameras_binary), ("images.bin", scan_images_binary), ("points3D.bin", scan_points_binary)]
    ),
)
def test_any_bytes_are_a_binary_model_or_refused(tmp_path_factory, content, count, kind):
    path = tmp_path_factory.getbasetemp() / kind[0]
    path.write_bytes(count.to_bytes(8, "little") + content)
    try:
        table = kind[1](path)
    except SceneError as error:
        assert kind[0] in str(error)
    else:
        assert len(table.ids) == count


@FEW
@given(
    st.dictionaries(st.sampled_from(["red", "nx", "intensity"]), st.sampled_from(sorted(PLY_TYPES)), max_size=3),
    st.sampled_from(["float", "float64", "double", "float32"]),
    st.randoms(use_true_random=False),
    st.sampled_from("<>"),
    st.lists(st.tuples(*[st.floats(-1e5, 1e5, width=32)] * 3), max_size=5),
    st.integers(-5, 5),
)
def test_ply_files_of_every_layout_are_read(tmp_path_factory, more, kind, order, endian, points, change):
    """Properties in any order and of any type, both byte orders; a byte too few or too many is told."""
    properties = [("x", kind), ("y", kind), ("z", kind), *more.items()]
    order.shuffle(properties)
    record = np.dtype([(name, endian + PLY_TYPES[t]) for name, t in properties])
    table = np.zeros(len(points), record)
    for k, axis in enumerate("xyz"):
        table[axis] = [p[k] for p in points]
    header = [
        "ply", f"format binary_{'little' if endian == '<' else 'big'}_endian 1.0", "comment a",
        f"element vertex {len(points)}", *(f"property {t} {n}" for n, t in properties), "end_header",
    ]
    data = table.tobytes()
    path = tmp_path_factory.getbasetemp() / "any.ply"
    path.write_bytes("\n".join(header).encode() + b"\n" + (data[:change] if change < 0 else data + bytes(change)))
    if change == 0 or change < 0 and not data:
        np.testing.assert_array_equal(read_ply(path), np.array(points, np.float32).reshape(-1, 3))
    else:
        with pytest.raises(SceneError, match="any.ply"):
            read_ply(path)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(st.lists(st.floats(width=32), min_size=1, max_size=12), st.integers(-9, 9))
def test_raw_depth_is_read_whole_or_refused(tmp_path_factory, values, change):
    data = np.array(values, "<f4")
    path = tmp_path_factory.getbasetemp() / "DSC.JPG"
    path.write_bytes(data.tobytes()[:change] if change < 0 else data.tobytes() + bytes(change))
    if change or not all(v > 0 for v in values):  # a NaN is not above 0
        with pytest.raises(SceneError, match="DSC.JPG"):
            read_ground_truth(path, (1, len(values)))
    else:
        np.testing.assert_array_equal(read_ground_truth(path, (1, len(values))), data[None])


@FEW
@given(
    st.dictionaries(
        st.integers(0, 2**31 - 2),
        st.tuples(
            st.integers(1, 9999),
            st.integers(1, 9999),
            st.lists(st.floats(1e-2, 1e5), min_size=4, max_size=4),
            st.one_of(st.none(), st.lists(st.floats(-1, 1), min_size=8, max_size=8)),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_calibrations_are_read_as_they_were_written(tmp_path_factory, cameras):
    """To the six digits that ETH3D's own files have."""
    path = tmp_path_factory.getbasetemp() / "cameras.txt"
    path.write_text(
        cameras_text(
            {
                n: ((h, w), np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]]), *([lens] if lens else []))
                for n, (h, w, (fx, fy, cx, cy), lens) in cameras.items()
            }
        )
    )
    found = scan_cameras_text(path)
    assert sorted(found.ids) == sorted(cameras)
    for row, number in enumerate(found.ids):
        height, width, params, lens = cameras[int(number)]
        assert tuple(found.sizes[row]) == (width, height) and found.models[row] == (
            "THIN_PRISM_FISHEYE" if lens else "PINHOLE"
        )
        for got, wanted in zip(found.params[row], [*params, *(lens or ())], strict=True):
            assert math.isclose(got, wanted, rel_tol=1e-5, abs_tol=1e-300)
