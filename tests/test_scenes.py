"""Scenes from outside: malformed files, binary models, layouts, links that lead out, and splits that leak."""
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from chapters import run_here
from PIL import Image

from vggt_lora.core import SceneError
from vggt_lora.datasets.splits import LeakError, audit_split, split_windows
from vggt_lora.datasets.windows import Window
from vggt_lora.geometry.cameras import project_points
from vggt_lora.reference_data import real_scene
from vggt_lora.scenes.opening import find_scenes, ETH3D_PHOTOS, open_scene

# Two cameras of different size, three photos whose lines are not in capture order, two points, a keypoint outside the
# frame.
CAMERAS = ["# cameras", "0 PINHOLE 100 80 90 91 50.5 40", "4 SIMPLE_PINHOLE 60 40 70 30 20"]
IMAGES = [
    "# images", "12 1 0 0 0 0 0 1 4 sub/DSC_10.JPG", "30 20 -1 31 21 9",
    "3 0.707107 0 0.707107 0 1 2 3 0 sub/DSC_9.JPG", "50 40 7 51 -4 9 52 42 -1", "5 1 0 0 0 0 0 0 0 sub/DSC_11.JPG", "",
]
POINTS = ["# points", "9 1 2 3 10 20 30 0.5 3 1 12 1", "7 0.5 0.25 4 1 2 3 -1 3 0"]
SIZES = {"sub/DSC_10.JPG": (60, 40), "sub/DSC_9.JPG": (100, 80), "sub/DSC_11.JPG": (100, 80)}


def write_text_model(folder, cameras=CAMERAS, images=IMAGES, points=POINTS, end="\n"):
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in (("cameras", cameras), ("images", images), ("points3D", points)):
        (folder / f"{name}.txt").write_bytes("".join(line + end for line in lines).encode())
    return folder


def write_photos(folder, sizes=SIZES):
    for number, (name, size) in enumerate(sizes.items()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (number * 20, 50, 60)).save(folder / name)
    return folder


@pytest.fixture
def scene_folder(tmp_path):
    write_text_model(tmp_path / "house" / "sparse" / "0")
    write_photos(tmp_path / "house" / "images")
    return tmp_path / "house"


def same(one, two):
    """Compare two scenes frame by frame."""
    assert [f.name for f in one.frames] == [f.name for f in two.frames]
    for a, b in zip(one.frames, two.frames):
        assert (a.size, a.camera_id, a.image_id) == (b.size, b.camera_id, b.image_id)
        for field in ("K", "world_to_cam", "observations"):
            np.testing.assert_array_equal(getattr(a, field), getattr(b, field))
        np.testing.assert_array_equal(one.points.ids[a.point_rows], two.points.ids[b.point_rows])
    order = np.argsort(one.points.ids), np.argsort(two.points.ids)
    for field in ("ids", "xyz", "rgb", "error", "track_length"):
        np.testing.assert_array_equal(getattr(one.points, field)[order[0]], getattr(two.points, field)[order[1]])


def test_opens_in_capture_order(scene_folder):
    scene = open_scene(scene_folder)
    # not 10, 11, 9 nor the file's order
    assert [f.name for f in scene.frames] == ["sub/DSC_9.JPG", "sub/DSC_10.JPG", "sub/DSC_11.JPG"]
    assert [f.size for f in scene.frames] == [(80, 100), (40, 60), (80, 100)]
    assert [f.camera_id for f in scene.frames] == [0, 4, 0]
    assert scene.frames[1].K.tolist() == [[70, 0, 30], [0, 70, 20], [0, 0, 1]]
    assert abs(scene.frames[0].world_to_cam - [[0, 0, 1, 1], [0, 1, 0, 2], [-1, 0, 0, 3], [0, 0, 0, 1]]).max() < 1e-12
    assert scene.frames[0].observations.tolist() == [[50, 40], [51, -4]]
    assert scene.points.ids[scene.frames[0].point_rows].tolist() == [7, 9]
    assert scene.frames[2].point_rows.shape == (0,)
    assert scene.metric is False and scene.name == "house"


# file, line (from 0) to replace, its new text, the line that the message must name (from 1), and words of the message
MALFORMED = [
    ("cameras", 1, "0 PINHOLE 100 80 90 91 50.5", 2, "3 parameters; expected 4"),
    ("cameras", 1, "0 PINHOLE 100 80 90 91 50.5 40 1", 2, "5 parameters; expected 4"),
    ("cameras", 1, "0 PINHOLE 100", 2, "3 fields"),
    ("cameras", 1, "0 PINHOL 100 80 90 91 50.5 40", 2, "unknown camera model 'PINHOL'"),
    ("cameras", 1, "0 PINHOLE 100 80 0 91 50.5 40", 2, "focal length 0"),
    ("cameras", 1, "0 PINHOLE 100 80 -90 91 50.5 40", 2, "focal length -90"),
    ("cameras", 1, "0 PINHOLE 100 80 nan 91 50.5 40", 2, "(fx) is 'nan'"),
    ("cameras", 1, "0 PINHOLE 100 80 90 inf 50.5 40", 2, "(fy) is 'inf'"),
    ("cameras", 1, "0 PINHOLE 100 80 90 1e999 50.5 40", 2, "not finite"),
    ("cameras", 1, "0 PINHOLE 100.5 80 90 91 50.5 40", 2, "width is 100.5"),
    ("cameras", 1, "0 PINHOLE 100 0 90 91 50.5 40", 2, "height is 0"),
    ("cameras", 1, "-1 PINHOLE 100 80 90 91 50.5 40", 2, "camera id is -1"),
    ("cameras", 1, "4294967296 PINHOLE 100 80 90 91 50.5 40", 2, "camera id is 4294967296"),
    ("cameras", 1, "0 PINHOLE 10000000000 80 90 91 50.5 40", 2, "width is 10000000000"),
    ("images", 1, "4294967308 1 0 0 0 0 0 1 4 sub/DSC_10.JPG", 2, "image id is 4294967308"),
    ("images", 1, "12 1 0 0 0 0 0 1 4294967300 sub/DSC_10.JPG", 2, "camera id is 4294967300"),
    ("cameras", 2, "0 SIMPLE_PINHOLE 60 40 70 30 20", 3, "camera 0 occurs a second time"),
    ("images", 1, "12 1 0 0 0 0 0 1 5 sub/DSC_10.JPG", 2, "names camera 5"),
    ("images", 1, "12 1 0 0 0 0 0 1 sub/DSC_10.JPG", 2, "9 fields where a pose line"),
    ("images", 1, "12 1 0 0 0 0 zero 1 4 sub/DSC_10.JPG", 2, "(ty) is 'zero'"),
    ("images", 1, "12 nan 0 0 0 0 0 1 4 sub/DSC_10.JPG", 2, "(qw) is 'nan'"),
    ("images", 1, "12 0 0 0 0 0 0 1 4 sub/DSC_10.JPG", 2, "quaternion has length 0"),
    ("images", 1, "12 2 0 0 0 0 0 1 4 sub/DSC_10.JPG", 2, "quaternion has length 2"),
    ("images", 1, "12.5 1 0 0 0 0 0 1 4 sub/DSC_10.JPG", 2, "image id is 12.5"),
    ("images", 1, "12 1 0 0 0 0 0 1 4 ../sub/DSC_10.JPG", 2, "leads out of the folder"),
    ("images", 1, "12 1 0 0 0 0 0 1 4 sub/../../DSC_10.JPG", 2, "leads out of the folder"),
    ("images", 1, "12 1 0 0 0 0 0 1 4 /etc/passwd", 2, "absolute path"),
    ("images", 1, "12 1 0 0 0 0 0 1 4 C:\\photos\\x.jpg", 2, "absolute path"),
    ("images", 3, "12 0.707107 0 0.707107 0 1 2 3 0 sub/DSC_9.JPG", 4, "image id 12 occurs a second time"),
    ("images", 3, "3 0.707107 0 0.707107 0 1 2 3 0 sub/DSC_10.JPG", 4, "name sub/DSC_10.JPG occurs a second time"),
    ("images", 2, "30 20 -1 31 21", 3, "5 fields in a keypoint line"),
    ("images", 2, "30 20 -1 31 21 x", 3, "(point id of keypoint 1) is 'x'"),
    ("images", 2, "30 nan -1 31 21 9", 3, "(y of keypoint 0) is 'nan'"),
    ("images", 2, "30 20 -2 31 21 9", 3, "point id of a keypoint is -2"),
    ("images", 2, "30 20 -1 31 21 9.5", 3, "point id of a keypoint is 9.5"),
    ("images", 2, None, 2, "has no keypoint line"),  # None: the line is taken out
    ("points3D", 1, "9 1 2 3 10 20 30", 2, "7 fields"),
    ("points3D", 1, "9 1 2 3 10 20 30 0.5 3 1 12", 2, "11 fields"),
    ("points3D", 1, "9 1 2 inf 10 20 30 0.5 3 1 12 1", 2, "(z) is 'inf'"),
    ("points3D", 1, "9 1 2 1e999 10 20 30 0.5 3 1 12 1", 2, "not finite"),
    ("points3D", 1, "9 1 2 3 10 20 30 half 3 1 12 1", 2, "(error) is 'half'"),
    ("points3D", 1, "9 1 2 3 10 256 30 0.5 3 1 12 1", 2, "colour"),
    ("points3D", 1, "9 1 2 3 10 -1 30 0.5 3 1 12 1", 2, "colour"),
    ("points3D", 1, "9.5 1 2 3 10 20 30 0.5 3 1 12 1", 2, "not a whole number"),
    ("points3D", 1, "9 1 2 3 10 20 30 0.5 3 1 12 1.5", 2, "not a whole number"),
    ("points3D", 1, "9 1 2 3 10 20 30 0.5 3 1 13 1", 2, "names image 13"),
    ("points3D", 1, "9 1 2 3 10 20 30 0.5 3 1 12 2", 2, "names keypoint 2 of image 12, which has 2"),
    ("points3D", 1, "9 1 2 3 10 20 30 0.5 3 1 5 0", 2, "names keypoint 0 of image 5, which has 0"),
    ("points3D", 1, "9 1 2 3 10 20 30 0.5 3 1 12 0", 2, "which names point -1"),
    ("points3D", 2, "9 0.5 0.25 4 1 2 3 -1", 3, "point id 9 occurs a second time"),
    ("points3D", 2, "7 0.5 0.25 4 1 2 3 -1 3 1", 3, "in a track a second time"),
]


@pytest.mark.parametrize("file, row, text, line, words", MALFORMED)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_malformed_text_names_file_line_and_fault(scene_folder, file, row, text, line, words, end):
    tables = {"cameras": list(CAMERAS), "images": list(IMAGES), "points3D": list(POINTS)}
    tables[file][row:row + 1] = [] if text is None else [text]
    write_text_model(scene_folder / "sparse" / "0", tables["cameras"], tables["images"], tables["points3D"], end)
    with pytest.raises(SceneError) as caught:
        open_scene(scene_folder)
    assert f"{file}.txt:{line}: " in str(caught.value)
    assert words in str(caught.value)
    assert "expected" in str(caught.value)


@pytest.mark.parametrize("change", [
    lambda text: text.replace("\n", "\r\n"),
    lambda text: "\ufeff" + text,
    lambda text: "# one more\n\n   # and one more\n" + text,
    lambda text: text.replace(" ", "  ").replace("  0  ", "\t0 "),
    lambda text: text.rstrip("\n"),
])
def test_harmless_variants_open_alike(scene_folder, change):
    expected = open_scene(scene_folder)
    for path in (scene_folder / "sparse" / "0").glob("*.txt"):
        path.write_bytes(change(path.read_text()).encode())
    same(open_scene(scene_folder), expected)


def test_names_with_spaces_survive(scene_folder):
    images = [line.replace("DSC_9", "DSC 9 old") for line in IMAGES]
    write_text_model(scene_folder / "sparse" / "0", images=images)
    (scene_folder / "images/sub/DSC_9.JPG").rename(scene_folder / "images/sub/DSC 9 old.JPG")
    assert open_scene(scene_folder).frame("DSC 9 old.JPG").image_id == 3


@pytest.mark.parametrize("images, word", [(IMAGES[:2] + IMAGES[3:4] + IMAGES[5:6], "stripped"),
                                          (IMAGES[:2] + [""] + IMAGES[3:4] + [""] + IMAGES[5:], "empty")])
def test_lost_keypoints_keep_the_tracks(scene_folder, images, word):
    expected = open_scene(scene_folder)
    write_text_model(scene_folder / "sparse" / "0", images=images)
    scene = open_scene(scene_folder)
    assert any(word in note for note in scene.notes)
    for frame, before in zip(scene.frames, expected.frames, strict=True):
        assert sorted(frame.point_rows) == sorted(before.point_rows)
        assert np.isnan(frame.observations).all() and frame.observations.shape == before.observations.shape
        np.testing.assert_array_equal(frame.world_to_cam, before.world_to_cam)


def test_binary_equals_text(scene_folder):
    import pycolmap
    expected = open_scene(scene_folder)
    model = scene_folder / "sparse" / "0"
    pycolmap.Reconstruction(model).write_binary(model)  # writes rigs.bin and frames.bin too
    for path in model.glob("*.txt"):
        path.unlink()
    same(open_scene(scene_folder), expected)
    for name in ("rigs.bin", "frames.bin"):
        assert (model / name).exists()
        (model / name).write_bytes(b"stale")
    same(open_scene(scene_folder), expected)


def test_newer_text_with_rigs_and_frames(scene_folder):
    import pycolmap
    expected, model = open_scene(scene_folder), scene_folder / "sparse" / "0"
    pycolmap.Reconstruction(model).write_text(model)
    assert (model / "rigs.txt").exists()
    same(open_scene(scene_folder), expected)
    (model / "frames.txt").write_text("stale\n")
    same(open_scene(scene_folder), expected)


@pytest.mark.parametrize("name", ["cameras", "images", "points3D"])
@pytest.mark.parametrize("damage", ["cut", "longer", "count", "empty"])
def test_damaged_binary_is_an_error_not_a_crash(scene_folder, name, damage):
    import pycolmap
    model = scene_folder / "sparse" / "0"
    pycolmap.Reconstruction(model).write_binary(model)
    path = model / f"{name}.bin"
    data = path.read_bytes()
    path.write_bytes(
        {"cut": data[:-1], "longer": data + b"x", "count": (2**60).to_bytes(8, "little") + data[8:], "empty": b""}[
            damage
        ]
    )
    with pytest.raises(SceneError, match=f"{name}.bin.*expected"):
        open_scene(scene_folder)


def test_binary_faults_name_the_record(scene_folder):
    import pycolmap
    model = scene_folder / "sparse" / "0"
    pycolmap.Reconstruction(model).write_binary(model)
    data = (model / "images.bin").read_bytes()
    (model / "images.bin").write_bytes(data.replace(b"sub/DSC_9.JPG", b"../DSC_99.JPG"))
    with pytest.raises(SceneError, match=r"images.bin, record \d at byte \d+: image name '../DSC_99.JPG' leads out"):
        open_scene(scene_folder)


def test_missing_parts_are_named(scene_folder, tmp_path):
    with pytest.raises(SceneError, match="no COLMAP model found: looked for .*sparse/0.*is not a folder"):
        open_scene(tmp_path / "nowhere")
    (scene_folder / "images/sub/DSC_9.JPG").rename(scene_folder / "images/sub/DSC_9.jpg")
    with pytest.raises(
        SceneError,
        match="1 of 3 photos are missing .*sub/DSC_9.JPG; DSC_9.jpg is there, but upper and lower case differ",
    ):
        open_scene(scene_folder)
    shutil.move(scene_folder / "images", tmp_path / "photos")
    with pytest.raises(SceneError, match="none of the 3 photos found.*house/images.*images="):
        open_scene(scene_folder)
    (tmp_path / "photos/sub/DSC_9.jpg").rename(tmp_path / "photos/sub/DSC_9.JPG")
    assert len(open_scene(scene_folder, images=tmp_path / "photos")) == 3
    (tmp_path / "photos/sub/DSC_9.JPG").write_bytes(b"no photo")
    with pytest.raises(SceneError, match="DSC_9.JPG: no readable photo"):
        open_scene(scene_folder, images=tmp_path / "photos")
    (scene_folder / "sparse/0/images.txt").unlink()
    with pytest.raises(SceneError, match="images.txt missing"):
        open_scene(scene_folder)


def test_undistorted_photos_beside_the_model_win_over_originals_of_the_same_names(scene_folder):
    """COLMAP's workspace: images/ and dense/images/ hold files of the same names, and dense/sparse fits the second
    only.
    """
    write_text_model(scene_folder / "dense" / "sparse")
    for number, name in enumerate(SIZES):
        path = scene_folder / "dense" / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", SIZES[name], (number, 200, 200)).save(path)
    for path in ("dense", "dense/sparse"):
        scene = open_scene(scene_folder / path)
        assert scene.root == scene_folder and len(scene) == 3
        assert all(frame.image_path.is_relative_to(scene_folder / "dense" / "images") for frame in scene.frames)
    for path in (".", "sparse/0"):
        assert all(
            frame.image_path.is_relative_to(scene_folder / "images") for frame in open_scene(scene_folder / path).frames
        )
    (scene_folder / "dense/images/sub/DSC_9.JPG").unlink()  # the original of that name is no replacement
    with pytest.raises(SceneError, match="1 of 3 photos are missing in .*dense/images: sub/DSC_9.JPG"):
        open_scene(scene_folder / "dense")


def test_numbered_models(scene_folder):
    assert not any("further model" in note for note in open_scene(scene_folder).notes)
    write_text_model(scene_folder / "sparse" / "1")
    scene = open_scene(scene_folder / "sparse" / "1")
    assert (scene.name, scene.root, len(scene)) == ("house", scene_folder, 3)
    assert "1 further model in sparse/ not used; this is sparse/1" in scene.notes
    write_text_model(scene_folder / "sparse" / "2")
    assert "2 further models in sparse/ not used; this is sparse/0" in open_scene(scene_folder).notes
    scene_folder.rename(scene_folder.with_name("2024"))  # a number as the name of a scene is only a name
    assert open_scene(scene_folder.with_name("2024")).name == "2024"


@pytest.mark.parametrize(
    "place", [".", "dslr_calibration_undistorted", "sparse/0", "sparse", "0", "colmap/sparse/0", "dense/sparse"]
)
def test_what_opens_is_found(tmp_path, place):
    """The word `data` and open_scene look in the same places."""
    write_text_model(tmp_path / "all" / "house1" / place)
    write_photos(tmp_path / "all" / "house1" / "images")
    assert len(open_scene(tmp_path / "all" / "house1")) == 3
    assert (
        find_scenes(str(tmp_path / "all" / "house1"))
        == find_scenes(str(tmp_path / "all"))
        == [tmp_path / "all" / "house1"]
    )


def test_every_folder_of_an_eth3d_scene_is_found(tmp_path):
    def place(kind):
        return tmp_path / f"multi_view_training_{kind}" / "office"
    eth3d_layout(tmp_path, place)
    for kind in ("dslr_undistorted", "dslr_occlusion", "dslr_depth"):
        assert find_scenes(str(place(kind).parent)) == [place(kind)]
        assert len(open_scene(place(kind))) == 3


def binary_scene(scene_folder):
    """Rewrite the model as binary and return its folder."""
    import pycolmap
    model = scene_folder / "sparse" / "0"
    pycolmap.Reconstruction(model).write_binary(model)
    for path in model.glob("*.txt"):
        path.unlink()
    return model


@pytest.mark.parametrize(
    "name, old, new, words",
    [
        (
            "images", b"sub/DSC_9.JPG", b"sub/DSC_\xe9.JPG",
            r"images.bin, record \d at byte \d+: the name of the image is not UTF-8",
        ),
        (
            "points3D", (9).to_bytes(8, "little"), (2**63 + 9).to_bytes(8, "little"),
            r"points3D.bin, record \d at byte \d+: point id 9223372036854775817; expected",
        ),
        (
            "images", (9).to_bytes(8, "little"), (2**63).to_bytes(8, "little"),
            r"images.bin, record \d at byte \d+: a keypoint names point 9223372036854775808",
        ),
    ],
)
def test_broken_values_in_binary_models_name_the_record(scene_folder, name, old, new, words):
    path = binary_scene(scene_folder) / f"{name}.bin"
    assert old in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(old, new))
    with pytest.raises(SceneError, match=words):
        open_scene(scene_folder)


def test_random_damage_to_binary_models_gives_one_named_error_or_none(scene_folder):
    rng, model = np.random.default_rng(0), binary_scene(scene_folder)
    whole = {
        path.name: path.read_bytes() for path in model.glob("*.bin") if path.stem in ("cameras", "images", "points3D")
    }
    refused = 0
    for _ in range(300):
        name = rng.choice(sorted(whole))
        data = bytearray(whole[name])
        for _ in range(rng.integers(1, 4)):
            data[rng.integers(len(data))] = rng.integers(256)
        (model / name).write_bytes(data)
        try:
            open_scene(scene_folder)
        except SceneError as error:
            assert len(str(error)) > 20
            refused += 1
        (model / name).write_bytes(whole[name])
    assert refused > 100


def test_empty_models_are_refused(scene_folder):
    write_text_model(scene_folder / "sparse" / "0", images=["# none"], points=[])
    with pytest.raises(SceneError, match="no posed image"):
        open_scene(scene_folder)


def test_no_points_at_all(scene_folder):
    write_text_model(
        scene_folder / "sparse" / "0",
        images=[line if i % 2 or i == 0 else "" for i, line in enumerate(IMAGES)],
        points=["# none"],
    )
    scene = open_scene(scene_folder)
    assert len(scene.points) == 0 and all(f.observations.shape == (0, 2) for f in scene.frames)


@pytest.mark.parametrize(
    "camera", ["0 OPENCV 100 80 90 91 50.5 40 0.1 0 0 0", "0 THIN_PRISM_FISHEYE 100 80 90 91 50.5 40 0 0 0 0 0 0 0 0"]
)
def test_lens_distortion_is_refused(scene_folder, camera):
    write_text_model(scene_folder / "sparse" / "0", cameras=[camera, CAMERAS[2]])
    with pytest.raises(
        SceneError, match=r"camera 0 is \w+ and distorts; expected an undistorted.*pycolmap.undistort_images"
    ):
        open_scene(scene_folder)


def pasted(message: str, begin: str, end: str = "$") -> None:
    """Run the command that stands in a message, as somebody would who pastes it into a terminal."""
    command = re.search(f"{begin}(.*?)(?:{end})", message)[1]
    command = command.replace("python ", f"{shlex.quote(sys.executable)} ", 1)
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.returncode == 0, (command, done.stderr)


def test_the_command_of_a_refusal_mends_it(scene_folder):
    """A lens is undistorted, and photos elsewhere are linked, by the command in the message with the reader's own
    paths.
    """
    folder = scene_folder.rename(scene_folder.with_name("my house"))
    write_text_model(folder / "sparse" / "0", cameras=["0 SIMPLE_RADIAL 100 80 90 50.5 40 0.01", CAMERAS[2]])
    with pytest.raises(SceneError) as lens:
        open_scene(folder)
    pasted(str(lens.value), "open what this writes: ")
    assert len(open_scene(f"{folder}_undistorted").frames) == 3
    write_text_model(folder / "sparse" / "0")
    (folder / "images").rename(folder.with_name("my photos"))
    with pytest.raises(SceneError) as away:
        open_scene(folder)
    pasted(str(away.value), "link their folder: ", r" \(or say")
    assert len(open_scene(folder).frames) == 3


def test_shrunk_photos_scale_k_and_say_so(scene_folder):
    expected = open_scene(scene_folder)
    write_photos(scene_folder / "images", {"sub/DSC_9.JPG": (50, 40)})
    scene = open_scene(scene_folder)
    assert any("1 of 3 photos have another size" in note and "50x40 against 100x80" in note for note in scene.notes)
    small, large = scene.frames[0], expected.frames[0]
    assert small.size == (40, 50)
    xyz = scene.points.xyz[small.point_rows]
    np.testing.assert_allclose(
        project_points(xyz, small.world_to_cam, small.K)[0], project_points(xyz, large.world_to_cam, large.K)[0] / 2
    )
    np.testing.assert_allclose(small.observations, large.observations / 2)


@pytest.mark.parametrize(
    "size, word",
    [((80, 100), "turned by 90 degrees"), ((100, 70), "cropped or stretched"), ((99, 80), "expected the same shape")],
)
def test_other_shapes_are_refused(scene_folder, size, word):
    write_photos(scene_folder / "images", {"sub/DSC_9.JPG": size})
    with pytest.raises(
        SceneError,
        match=f"DSC_9.JPG: is {size[0]}x{size[1]}, its camera 100x80.*{word}" if "shape" not in word else word,
    ):
        open_scene(scene_folder)


def test_links_out_of_the_scene_are_refused(scene_folder, tmp_path):
    outside = tmp_path / "outside.JPG"
    shutil.move(scene_folder / "images/sub/DSC_9.JPG", outside)
    (scene_folder / "images/sub/DSC_9.JPG").symlink_to(outside)
    with pytest.raises(SceneError, match="is a link to .*outside.JPG"):
        open_scene(scene_folder)
    # a linked folder of photos as a whole is the user's own choice
    shutil.move(scene_folder / "images", tmp_path / "store")
    (tmp_path / "store/sub/DSC_9.JPG").unlink()
    shutil.move(outside, tmp_path / "store/sub/DSC_9.JPG")
    (scene_folder / "images").symlink_to(tmp_path / "store")
    assert len(open_scene(scene_folder)) == 3


def eth3d_layout(tmp_path, place):
    """Write the same scene as ETH3D would; `place` says where a kind of data goes."""
    images = [line.replace("sub/", "dslr_images_undistorted/") for line in IMAGES]
    write_text_model(place("dslr_undistorted") / "dslr_calibration_undistorted", images=images)
    write_photos(
        place("dslr_undistorted") / "images",
        {n.replace("sub/", "dslr_images_undistorted/"): s for n, s in SIZES.items()},
    )
    write_text_model(
        place("dslr_jpg") / "dslr_calibration_jpg", images=[line.replace("sub/", "dslr_images/") for line in IMAGES]
    )
    write_photos(place("dslr_occlusion") / "masks_for_images", {"dslr_images/DSC_9.png": (100, 80)})
    (place("dslr_depth") / "ground_truth_depth/dslr_images").mkdir(parents=True)
    (place("dslr_depth") / "ground_truth_depth/dslr_images/DSC_10.JPG").write_bytes(bytes(60 * 40 * 4))


@pytest.mark.parametrize("layout", ["merged", "one root per kind"])
def test_eth3d_layouts(tmp_path, layout):
    def place(kind):
        return tmp_path / "office" if layout == "merged" else tmp_path / f"multi_view_training_{kind}" / "office"
    eth3d_layout(tmp_path, place)
    scene = open_scene(place("dslr_undistorted"))
    assert scene.name == "office" and scene.metric is True
    assert [f.mask_path is not None for f in scene.frames] == [True, False, False]
    assert [f.depth_path is not None for f in scene.frames] == [False, True, False]
    assert scene.frames[0].mask_path == place("dslr_occlusion") / "masks_for_images/dslr_images/DSC_9.png"
    assert scene.jpg_cameras == place("dslr_jpg") / "dslr_calibration_jpg"
    assert any("office has 26 photos, this folder 3" in note for note in scene.notes)
    same(open_scene(place("dslr_undistorted") / "dslr_calibration_undistorted"), scene)
    same(open_scene(place("dslr_occlusion")), scene)  # any of the scene's folders will do
    with pytest.raises(SceneError, match="expected one of them: office"):
        open_scene(place("dslr_undistorted").parent)


def test_photo_counts_of_eth3d():
    assert sum(ETH3D_PHOTOS.values()) == 454 and len(ETH3D_PHOTOS) == 13
    assert [ETH3D_PHOTOS[n] for n in ("facade", "electro", "office", "terrace", "delivery_area")] == [
        76, 45, 26, 23, 44,
    ]


@pytest.mark.parametrize(
    "content, outcome",
    [
        ('{"unit": "metre"}', True), ('{"unit": "arbitrary"}', False), ("{}", False),
        ('{"unit": "meter"}', "Did you mean 'metre'"), ("{", "not valid JSON"),
    ],
)
def test_unit(scene_folder, content, outcome):
    (scene_folder / "scene.json").write_text(content)
    if isinstance(outcome, bool):
        assert open_scene(scene_folder).metric is outcome
        assert open_scene(scene_folder, metric=True).metric is True
    else:
        with pytest.raises(SceneError, match=outcome):
            open_scene(scene_folder)


def test_audit_fails_when_a_frame_is_shared(scene_folder, tmp_path):
    scene = open_scene(scene_folder)
    split = split_windows(scene, frames=2)
    assert audit_split(split, scene)["shared"] == 0
    with pytest.raises(LeakError, match="DSC_9.JPG"):
        audit_split(replace(split, val=split.val + (Window("house", (0,)),)), scene)
    shutil.copytree(scene_folder, tmp_path / "copy")  # the same building under another name
    both = [scene, open_scene(tmp_path / "copy")]
    with pytest.raises(LeakError, match="3 photos both train and judge"):
        audit_split(split_windows(both, frames=2, hold_out="copy"), both)


@pytest.mark.parametrize(
    "hold_out, torn",
    [
        ("entry", "entry judges while castle, fountain of the same group train"),
        ("castle,fountain", "castle, fountain judge while entry of the same group trains"),
        ("castle,entry,fountain", None),
        ("barn", None),
        ("", None),
    ],
)
def test_a_group_of_scenes_is_not_held_out_in_part(scene_folder, tmp_path, hold_out, torn):
    folders = {name: tmp_path / name for name in ("castle", "entry", "fountain", "barn")}
    for number, folder in enumerate(folders.values()):
        shutil.copytree(scene_folder, folder)
        for photo in folder.rglob("*.JPG"):
            # each scene has photos of its own: only the group can tell
            photo.write_bytes(photo.read_bytes() + b"%d" % number)
    scenes, held = [open_scene(folder) for folder in folders.values()], [name for name in hold_out.split(",") if name]
    group = "castle, entry,fountain;"
    if torn is None:
        split = split_windows(scenes, frames=2, hold_out=held, groups=group)
        assert audit_split(split, scenes, group)["groups"] == [["castle", "entry", "fountain"]]
        return
    with pytest.raises(LeakError, match=torn):
        split_windows(scenes, frames=2, hold_out=held, groups=group)
    split = split_windows(scenes, frames=2, hold_out=held)
    assert audit_split(split, scenes)["shared"] == 0  # the files alone do not tell
    with pytest.raises(LeakError, match=torn):
        audit_split(split, scenes, group)


def test_real_scenes_read_binary_alike(tmp_path):
    path = real_scene("strecha_fountain_p11")
    if path is None:
        pytest.skip("real scenes are not at hand")
    import pycolmap
    model = tmp_path / "fountain" / "sparse" / "0"
    model.mkdir(parents=True)
    pycolmap.Reconstruction(path / "dslr_calibration_undistorted").write_binary(model)
    same(open_scene(Path(model), images=path / "images"), open_scene(path))


# --- the notebook of the first step, and of the second where scenes are poor -----------------------------------------


@pytest.mark.parametrize("name, wrong, right", [("00_data", "dat", "data"), ("01_depth", "scene_nam", "scene_name")])
def test_a_misspelt_parameter_stops_the_step(name, wrong, right):
    fault = run_here(name, **{wrong: "nowhere"}).fault
    assert f"unknown parameter '{wrong}'" in fault and f"Did you mean '{right}'?" in fault


CAMERAS_LARGER = ["0 PINHOLE 252 182 190 191 126 91", "4 SIMPLE_PINHOLE 252 182 190 126 91"]
ONE_BEHIND = [POINTS[0], "9 1 2 -30 10 20 30 0.5 3 1 12 1", POINTS[2]]
NO_POINTS = [line if i % 2 or i == 0 else "" for i, line in enumerate(IMAGES)]


@pytest.mark.parametrize("step, images, points, says", [
    ("00_data", IMAGES, ONE_BEHIND, "left out: 1 observations of points behind the camera, in 1 photos"),
    ("00_data", [*IMAGES[:2], "31 21 9"], ["9 1 2 30 10 20 30 0.5 12 0"], "no split: scene house has one photo"),
    ("01_depth", NO_POINTS, ["# none"], "No photo of this scene sees any point"),
    ("01_depth", [IMAGES[0], *IMAGES[1::2]], POINTS, "no point with a stored keypoint"),
], ids=["behind the camera", "one photo", "no points", "lost keypoints"])
def test_poor_scenes_are_shown_and_told_not_refused(tmp_path, step, images, points, says):
    write_text_model(tmp_path / "house" / "sparse" / "0", CAMERAS_LARGER, images, points)
    write_photos(tmp_path / "house" / "images", dict.fromkeys(SIZES, (252, 182)))
    ran = run_here(step, data=str(tmp_path / "house"))
    assert not ran.fault and says in ran.printed
