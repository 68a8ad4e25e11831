"""Scenes that are whole and do not fit together: each case of tests/cases.py gets its answer, sound scenes keep their
silence.
"""
import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent))
import cases  # noqa: E402

from vggt_lora.core import ConfigError, SceneError  # noqa: E402
from vggt_lora.demo.demo_scenes import toy_scene  # noqa: E402
from vggt_lora.reference_data import real_scene  # noqa: E402
from vggt_lora.scenes import fit, opening  # noqa: E402
from vggt_lora.scenes.fit import Check  # noqa: E402
from vggt_lora.scenes.opening import open_scene  # noqa: E402


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """A sound scene of eight photos."""
    return toy_scene(tmp_path_factory.mktemp("sound"), frames=8, size=(168, 252))


@pytest.mark.parametrize("name", cases.CASES)
def test_each_case_gets_its_answer(name, source, tmp_path):
    one = cases.CASES[name]
    one.build(source, tmp_path / name)
    answer, said = one.said_of(tmp_path / name)
    assert answer == one.answer, said
    for words in one.words:
        assert words in said


def test_a_check_that_cannot_be_made_says_so(source, tmp_path):
    cases.CASES["no_colours"].build(source, tmp_path / "grey")
    keypoints, colours = open_scene(tmp_path / "grey").fit[:2]
    assert (keypoints.verdict, colours.verdict) == ("fits", "not checked")
    assert "no colours" in colours.looked_at


def always_fits(name: str):
    """A check that finds nothing."""
    return lambda *_: Check(name, "fits", "")


# What a part of scenes/fit becomes when it is taken away, and the cases that must then lose their answer.
SILENT = {
    "check_keypoints": always_fits("keypoints"),
    "check_colours": always_fits("colours"),
    "check_unit": always_fits("unit"),
    "check_centre": always_fits("centre"),
    "check_upright": always_fits("upright"),
    "check_lengths": always_fits("lengths"),
    "check_depth": always_fits("depth"),
    "check_masks": always_fits("masks"),
    "among_photos": lambda *_: float("nan"),
    "camera_hint": lambda *_: "",
    "keypoint_fit": lambda *_: None,
    "far_points": lambda *_: np.zeros(0, np.int64),
    "check_convention": lambda *_: None,
    "refuse_misfit": lambda *_: None,
}
NEEDED_BY = {
    "check_keypoints": ("principal_point_zero", "focal_too_short", "keypoints_of_another_size"),
    "check_colours": ("swapped_photos", "mirrored_photos", "one_foreign_photo", "one_black_photo", "random_colours"),
    "check_unit": ("millimetres",),
    "check_centre": ("cropped_photos",),
    "check_upright": ("turned_by_exif",),
    "check_lengths": ("far_cluster",),
    "check_depth": ("laser_in_millimetres", "two_depths_exchanged"),
    "check_masks": ("inverted_masks", "small_masks"),
    "among_photos": ("random_colours",),
    "camera_hint": ("principal_point_zero", "focal_too_short", "stale_poses"),
    "keypoint_fit": ("keypoints_of_another_size",),
    "far_points": ("far_points",),
    "check_convention": ("inverted_poses",),
    "refuse_misfit": ("swapped_photos", "stale_poses"),
}


@pytest.mark.parametrize("part, name", [(part, name) for part, names in NEEDED_BY.items() for name in names])
def test_without_a_check_its_cases_lose_their_answer(part, name, source, tmp_path, monkeypatch):
    for module in (fit, opening):
        if hasattr(module, part):
            monkeypatch.setattr(module, part, SILENT[part])
    one = cases.CASES[name]
    one.build(source, tmp_path / name)
    answer, said = one.said_of(tmp_path / name)
    assert answer != one.answer or not all(words in said for words in one.words)


def test_every_check_has_a_case_that_needs_it():
    callers = {"check_fit", "check_scene"}  # which call the others
    assert {name for name in fit.__all__ if name.startswith("check_")} - callers <= NEEDED_BY.keys()


@pytest.mark.parametrize("name", cases.SOUND)
def test_sound_scenes_get_no_new_word(name):
    path = real_scene(name)
    if path is None:
        pytest.skip(f"{name} is not at hand")
    scene = open_scene(path)
    assert [note for note in scene.notes if not note.startswith("unit unknown")] == []
    assert {check.verdict for check in scene.fit} <= {"fits", "not checked"}


def settings(folder: Path, run: Path, **more):
    """A tiny run on one scene."""
    from vggt_lora.train import TrainConfig

    return TrainConfig(
        data=str(folder), output=str(run), model="random", epochs=1, frames=2, image_size=56, train_fraction=0.75,
        frame_cache=False, feature_cache="off", **more,
    )


def test_a_run_without_a_usable_pixel_stops_before_its_first_step(source, tmp_path):
    """A scene in millimetres that is called metric: all depth lies beyond the limits."""
    from vggt_lora.train import train

    sparse = cases.write(source, tmp_path / "mm")
    cases.scale_model(sparse, 1000.0)
    with pytest.raises(ConfigError, match="no depth to learn from.*outside depth_min.*millimetres"):
        train(settings(tmp_path / "mm", tmp_path / "run", units_are_metres="yes", supervision="sparse"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_loss_of_exactly_nothing_ends_the_run(source, tmp_path, monkeypatch):
    from vggt_lora.core import TrainingError
    from vggt_lora.training import loop
    from vggt_lora.train import train

    real = loop.window_loss

    def nothing(*args, **kwargs):
        result = real(*args, **kwargs)
        if result.total.requires_grad:
            for name in ("depth_conf", "depth_reg"):
                result.terms[name] = 0 * result.terms[name]
        return result
    monkeypatch.setattr(loop, "window_loss", nothing)
    with pytest.raises(TrainingError, match="nothing to learn from .depth_conf"):
        train(settings(source, tmp_path / "run"))


def test_the_audit_says_by_what_factor_a_source_is_off(source, tmp_path):
    """Of maps as of scans: whatever gives depth is compared with the sparse points."""
    from vggt_lora.datasets.audit import audit_scene

    for name, factor in (("sound", 1.0), ("long", 1.1)):
        cases.laser(source, tmp_path / name, lambda depth: factor * depth)
    notes = [audit_scene(open_scene(tmp_path / name), 112, progress=False).notes for name in ("sound", "long")]
    assert not any("laser depth is" in note for note in notes[0])
    assert any("laser depth is 1.1 times" in note or "laser depth is 1.10" in note for note in notes[1]), notes[1]


# --- the split --------------------------------------------------------------------------------------------------------

def test_the_audit_knows_a_photo_again(source, tmp_path):
    """At two thirds of its size and a low quality, under another name, in another scene."""
    from vggt_lora.datasets.splits import LeakError, audit_split, split_windows

    cases.as_it_is(source, tmp_path / "one")
    cases.renamed_copies(source, tmp_path / "two")
    both = [open_scene(tmp_path / name) for name in ("one", "two")]
    with pytest.raises(LeakError, match="8 photos both train and judge as copies"):
        audit_split(split_windows(both, frames=2, hold_out="two"), both)
    assert audit_split(split_windows(both[0], frames=2), both[0])["shared"] == 0  # neighbours are no copies


def test_twins_of_one_instant_are_counted(source, tmp_path):
    from vggt_lora.datasets.splits import audit_split, instant_twins, moment_of, split_windows

    assert (
        moment_of("cam0/0007.jpg") == ("cam0/*", "0007")
        and moment_of("cam1/IMG_0007_left.png") == ("cam1/IMG_*_left", "0007")
        and moment_of("a/left.png") == ("a/left", "")
    )
    assert instant_twins(open_scene(source)) == {}
    cases.eth3d_rig(source, tmp_path / "rig")
    rig = open_scene(tmp_path / "rig")
    found = audit_split(split_windows(rig, frames=2), rig)
    assert found["twins"] == 2 and "2 of 2 judged frames were taken at the same instant" in found["notes"][0]
    late = [frame.name.replace("127523", "127660") if "cam5" in frame.name else frame.name for frame in rig.frames]
    frames = tuple(dataclasses.replace(frame, name=name) for frame, name in zip(rig.frames, late))
    assert late != [frame.name for frame in rig.frames]  # the second camera's clock is 137 nanoseconds ahead
    assert instant_twins(dataclasses.replace(rig, frames=frames)) == instant_twins(rig)


def test_the_report_says_that_judged_frames_have_a_twin(source, tmp_path):
    from vggt_lora.train import train

    cases.eth3d_rig(source, tmp_path / "rig")
    run = train(settings(tmp_path / "rig", tmp_path / "run", supervision="sparse"))
    assert "2 of 2 judged frames were taken at the same instant" in run.results["warnings"][0]
    assert "taken at the same instant" in (tmp_path / "run" / "report.md").read_text()


def test_folders_with_the_same_numbers_are_no_rig(source, tmp_path):
    """Two floors with the same file names: far apart, so no instant is shared."""
    from vggt_lora.datasets.splits import instant_twins

    scene = open_scene(source)
    half = len(scene) // 2
    frames = tuple(
        dataclasses.replace(frame, name=f"floor{i // half}/{i % half:04d}.jpg") for i, frame in enumerate(scene.frames)
    )
    assert instant_twins(dataclasses.replace(scene, frames=frames)) == {}


# --- a folder of photos -----------------------------------------------------------------------------------------------

def test_photos_that_are_passed_over_are_named(tmp_path):
    from vggt_lora.scenes.reconstruct import passed_over, photos_in

    folder = cases.phone_photos(tmp_path / "photos")
    assert passed_over(folder) == ""
    for name in ("a.HEIC", "b.HEIC", "c.webp"):
        (folder / name).write_bytes(b"x")
    assert passed_over(folder).startswith("passed over: 2 .HEIC, 1 .webp")
    for photo in folder.glob("*.jpg"):
        photo.unlink()
    with pytest.raises(SceneError, match="holds no photo .*2 .HEIC"):
        photos_in(folder)


def test_photos_are_turned_upright_once(tmp_path):
    from vggt_lora.scenes.reconstruct import photos_in, upright_photos

    folder, said = cases.phone_photos(tmp_path / "photos", orientation=6), []
    names = photos_in(folder)
    upright = upright_photos(folder, names, "one", tmp_path / "work", said.append)
    for name in names:
        with Image.open(upright / name) as photo:
            assert photo.size == (48, 64) and photo.getexif().get(0x0112, 1) == 1
    assert said == ["3 of 3 photos turned upright, as EXIF says"]
    plain = cases.phone_photos(tmp_path / "plain")
    assert upright_photos(plain, names, "one", tmp_path / "work2", said.append) == plain


def test_photos_of_several_sizes_name_the_setting(tmp_path):
    from vggt_lora.scenes.reconstruct import photos_in, upright_photos

    folder = cases.phone_photos(tmp_path / "photos", sizes=((64, 48), (64, 48), (40, 48)))
    with pytest.raises(
        ConfigError, match=r"64x48 \(2: IMG_0.jpg ...\), 40x48 \(1: IMG_2.jpg\). Give camera='each photo'"
    ):
        upright_photos(folder, photos_in(folder), "one", tmp_path / "work")
    assert upright_photos(folder, photos_in(folder), "each photo", tmp_path / "work") == folder


# --- the folder of photos ---------------------------------------------------------------------------------------------

def test_a_look_alike_folder_is_offered_and_can_be_said(source, tmp_path):
    cases.as_it_is(source, tmp_path / "house")
    (tmp_path / "house" / "images").rename(tmp_path / "house" / "input_4")
    with pytest.raises(SceneError, match="input_4/dslr_images_undistorted holds 8 photos of such names"):
        open_scene(tmp_path / "house")
    (tmp_path / "house" / "scene.json").write_text('{"images": "input_4"}')
    assert len(open_scene(tmp_path / "house")) == 8
    (tmp_path / "house" / "scene.json").write_text('{"images": "../elsewhere"}')
    with pytest.raises(SceneError, match='"images" is .*expected a folder below'):
        open_scene(tmp_path / "house")


def test_the_folder_of_photos_is_a_setting(source, tmp_path):
    """Below the scene, or anywhere: for a run, and for the doctor."""
    from vggt_lora.doctor import Plan, check_data
    from vggt_lora.training.build import open_scenes

    cases.as_it_is(source, tmp_path / "house")
    (tmp_path / "house" / "images").rename(tmp_path / "house" / "raw")
    house, photos = str(tmp_path / "house"), tmp_path / "photos"
    assert len(open_scenes(settings(tmp_path / "house", tmp_path / "run", images="raw"))[0]) == 8
    (tmp_path / "house" / "raw").rename(photos)
    assert len(open_scenes(settings(tmp_path / "house", tmp_path / "run", images=str(photos)))[0]) == 8
    assert [found.status for found in check_data(Plan(data=house, images=str(photos)))] == ["ok", "ok"]
    with pytest.raises(SceneError, match="images is 'nowhere'; expected a folder"):
        open_scene(tmp_path / "house", images="nowhere")


def test_another_ending_is_offered(source, tmp_path):
    cases.as_it_is(source, tmp_path / "house")
    photo = cases.photos_of(tmp_path / "house")[0]
    photo.rename(photo.with_suffix(".png"))
    with pytest.raises(SceneError, match=f"{photo.stem}.png is there, but its ending"):
        open_scene(tmp_path / "house")
