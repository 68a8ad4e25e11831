"""Small scenes that are well-formed and wrong, or unusual and right, and what is said of each.

    python -m tests.cases            # the table of cases, and the figures of sound scenes that the limits come from

Each case is built out of a sound scene in ETH3D's layout: what a user's exporter, camera or habit makes of it.
"""
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import numpy as np
from PIL import Image

CASES: dict[str, "Case"] = {}
SOUND = ("strecha_castle_p30", "strecha_entry_p10", "strecha_fountain_p11", "sceaux_castle", "eth3d_pipes")


@dataclass(frozen=True)
class Case:
    """One way in which a scene is wrong or unusual, and what must be said of it."""

    build: Callable[[Path, Path], None]  # (sound scene, folder to write)
    answer: str  # "refuse", "note" or "fits"
    words: tuple[str, ...]  # which what is said must hold
    ask: Callable[[Path], tuple[str, str]] | None = None  # what to do with the folder; None: open the scene

    @property
    def about(self) -> str:
        return self.build.__doc__.splitlines()[0]

    def said_of(self, folder: Path) -> tuple[str, str]:
        """What is said of the case in a folder: ("refuse", "note" or "fits", words)."""
        return (self.ask or answer_to)(folder)


def case(answer: str, *words: str, ask=None):
    def register(build):
        CASES[build.__name__] = Case(build, answer, words, ask)
        return build
    return register


def model_of(source: Path):
    """The scene's model as pycolmap reads it."""
    import pycolmap

    return pycolmap.Reconstruction(str(source / "dslr_calibration_undistorted"))


def photos_of(source: Path) -> list[Path]:
    """The scene's photos, by name."""
    return sorted((source / "images" / "dslr_images_undistorted").iterdir())


def write(source: Path, out: Path, model=None, photos: bool = True, rigs: bool = False) -> Path:
    """Write a model as text to sparse/0, and the photos; without rigs.txt and frames.txt, as before COLMAP 3.12."""
    sparse = out / "sparse" / "0"
    sparse.mkdir(parents=True)
    (model_of(source) if model is None else model).write_text(str(sparse))
    for name in () if rigs else ("rigs.txt", "frames.txt"):
        (sparse / name).unlink(missing_ok=True)
    if photos:
        shutil.copytree(source / "images", out / "images")
    return sparse


def map_lines(path: Path, change: Callable[[int, list[str]], list[str]], pose: bool = True) -> None:
    """Change every pose line of images.txt, or every keypoint line: change(number of the image, words)."""
    lines, number, is_pose = path.read_text().splitlines(), 0, True
    for i, line in enumerate(lines):
        if line.startswith("#"):
            continue
        if is_pose == pose:
            lines[i] = " ".join(change(number, line.split()))
        number, is_pose = number + (not is_pose), not is_pose
    path.write_text("\n".join(lines) + "\n")


def set_cameras(out: Path, change: Callable[[list[float]], list[float]]) -> None:
    """Change the parameters of every PINHOLE camera."""
    path = out / "sparse" / "0" / "cameras.txt"
    lines = path.read_text().splitlines()
    for i, line in enumerate(lines):
        if not line.startswith("#"):
            words = line.split()
            lines[i] = " ".join([*words[:4], *(repr(float(v)) for v in change([float(w) for w in words[4:]]))])
    path.write_text("\n".join(lines) + "\n")


def turn(number: int, words: list[str], degrees: float = 20.0) -> list[str]:
    """Turn every second pose."""
    from scipy.spatial.transform import Rotation

    if number % 2 == 0:
        w, x, y, z = map(float, words[1:5])
        x, y, z, w = (Rotation.from_rotvec([0, np.radians(degrees), 0]) * Rotation.from_quat([x, y, z, w])).as_quat()
        words[1:5] = [repr(float(v)) for v in (w, x, y, z)]
    return words


# --- keypoints and colours --------------------------------------------------------------------------------------------

@case("fits")
def as_it_is(source, out):
    """The sound scene itself, as a plain COLMAP model."""
    write(source, out)


@case("refuse", "correlate by", "under each other's names")
def swapped_photos(source, out):
    """Photos stand under each other's names."""
    write(source, out, photos=False)
    photos = photos_of(source)
    (out / "images/dslr_images_undistorted").mkdir(parents=True)
    for place, photo in enumerate(photos):
        # the scene has two cameras of different size
        other = Image.open(photos[(place + len(photos) // 2) % len(photos)])
        other.resize(Image.open(photo).size).save(out / "images/dslr_images_undistorted" / photo.name, quality=95)


@case("refuse", "correlate by")
def mirrored_photos(source, out):
    """Every photo is mirrored."""
    write(source, out)
    for photo in photos_of(out):
        Image.open(photo).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(photo, quality=95)


@case("note", "1 of 8 photos do not look like the points")
def one_foreign_photo(source, out):
    """One photo is another one under its name."""
    write(source, out)
    photos = photos_of(out)
    Image.open(photos[-1]).resize(Image.open(photos[1]).size).save(photos[1])


@case("note", "1 of 8 photos do not look like the points", "a photo of one tone")
def one_black_photo(source, out):
    """One photo is black."""
    write(source, out)
    photo = photos_of(out)[1]
    Image.new("RGB", Image.open(photo).size).save(photo)


@case("note", "the photos fit one another")
def random_colours(source, out):
    """Points have random colours, as an exporter without colours writes them; the photos are right."""
    model, rng = model_of(source), np.random.default_rng(0)
    for point in model.points3D.values():
        point.color = rng.integers(0, 256, 3).astype(np.uint8)
    write(source, out, model)


@case("fits")
def no_colours(source, out):
    """All points are black: colours are not checked."""
    model = model_of(source)
    for point in model.points3D.values():
        point.color = np.zeros(3, np.uint8)
    write(source, out, model)


@case("refuse", "look at the poses")
def stale_poses(source, out):
    """Every second pose is turned by 20 degrees."""
    map_lines(write(source, out) / "images.txt", turn)


def invert(number: int, words: list[str]) -> list[str]:
    """Write a pose as camera-to-world."""
    from scipy.spatial.transform import Rotation

    w, x, y, z, *shift = map(float, words[1:8])
    back = Rotation.from_quat([x, y, z, w]).inv()
    x, y, z, w = back.as_quat()
    words[1:8] = [repr(float(v)) for v in (w, x, y, z, *-back.apply(shift))]
    return words


@case("refuse", "the poses look like camera-to-world")
def inverted_poses(source, out):
    """Every pose is written as camera-to-world."""
    map_lines(write(source, out) / "images.txt", invert)


@case("refuse", "principal point")
def principal_point_zero(source, out):
    """The principal point is (0, 0)."""
    write(source, out)
    set_cameras(out, lambda p: [*p[:2], 0, 0])


@case("note", "off their points", "a focal length 0.98 times as long")
def focal_little_too_long(source, out):
    """The focal length is 2 % too long."""
    write(source, out)
    set_cameras(out, lambda p: [1.02 * p[0], 1.02 * p[1], *p[2:]])


@case("refuse", "a focal length 1.43 times as long")
def focal_too_short(source, out):
    """The focal length is 0.7 of what it should be."""
    write(source, out)
    set_cameras(out, lambda p: [0.7 * p[0], 0.7 * p[1], *p[2:]])


@case("note", "belong to photos 2 times the size")
def keypoints_of_another_size(source, out):
    """Keypoints belong to photos twice as large; depth is right."""
    sparse = write(source, out)

    def double(_, words):
        words[0::3], words[1::3] = ([repr(2 * float(v)) for v in words[axis::3]] for axis in (0, 1))
        return words
    map_lines(sparse / "images.txt", double, pose=False)


# --- what a folder promises -------------------------------------------------------------------------------------------

@case("note", "none of its 8 files (.png) is read", "unit unknown")
def png_depth(source, out):
    """16-bit PNG depth in ground_truth_depth: no file that the laser source reads, so no metres."""
    write(source, out)
    (out / "ground_truth_depth/dslr_images").mkdir(parents=True)
    for photo in photos_of(source):
        Image.fromarray(np.full((40, 60), 9000, np.uint16)).save(
            out / "ground_truth_depth/dslr_images" / f"{photo.stem}.png"
        )


@case("note", "files (.JPG) is read", "unit unknown")
def photo_as_depth(source, out):
    """Pictures under the names of raw depth."""
    write(source, out)
    (out / "ground_truth_depth/dslr_images").mkdir(parents=True)
    for photo in photos_of(source):
        Image.fromarray(np.full((40, 60), 9000, np.uint16)).save(
            out / "ground_truth_depth/dslr_images" / photo.name, "PNG"
        )


def scale_model(sparse: Path, factor: float) -> None:
    """Multiply the unit of a text model."""
    lines = (sparse / "points3D.txt").read_text().splitlines()
    for i, line in enumerate(lines):
        if not line.startswith("#"):
            words = line.split()
            lines[i] = " ".join([words[0], *(repr(factor * float(v)) for v in words[1:4]), *words[4:]])
    (sparse / "points3D.txt").write_text("\n".join(lines) + "\n")
    map_lines(
        sparse / "images.txt", lambda _, words: [*words[:5], *(repr(factor * float(v)) for v in words[5:8]), *words[8:]]
    )


@case("note", "nearer than 0.1 or farther than 100 m", "millimetre")
def millimetres(source, out):
    """A model in millimetres whose scene.json says metre."""
    scale_model(write(source, out), 1000.0)
    (out / "scene.json").write_text('{"unit": "metre"}')


@case("note", "principal point of 8 of 8 photos", "cropped")
def cropped_photos(source, out):
    """Photos were cropped after calibration, the cameras kept right."""
    sparse = write(source, out)
    for photo in photos_of(out):
        with Image.open(photo) as image:
            image.crop((image.width // 3, 0, *image.size)).save(photo, quality=95)
    cuts = {}
    lines = (sparse / "cameras.txt").read_text().splitlines()
    for i, line in enumerate(lines):
        if not line.startswith("#"):
            words = line.split()
            cuts[words[0]] = int(words[2]) // 3
            words[2], words[6] = str(int(words[2]) - cuts[words[0]]), repr(float(words[6]) - cuts[words[0]])
            lines[i] = " ".join(words)
    (sparse / "cameras.txt").write_text("\n".join(lines) + "\n")
    camera_of: list[str] = []
    map_lines(sparse / "images.txt", lambda _, words: camera_of.append(words[8]) or words)
    map_lines(
        sparse / "images.txt",
        lambda k, words: [repr(float(w) - cuts[camera_of[k]]) if i % 3 == 0 else w for i, w in enumerate(words)],
        pose=False,
    )


@case("note", "EXIF orientation 6", "lying on their side")
def turned_by_exif(source, out):
    """Photos carry an EXIF orientation that COLMAP did not follow."""
    write(source, out)
    for photo in photos_of(out):
        with Image.open(photo) as image:
            exif = image.getexif()
            exif[0x0112] = 6
            image.save(photo, "JPEG", quality=95, exif=exif)


# --- laser depth and masks -------------------------------------------------------------------------------------------

def laser(source: Path, out: Path, change=lambda depth: depth) -> list[Path]:
    """Write the scene in ETH3D's layout with a laser depth map per photo: the depth of the nearest point."""
    from scipy.interpolate import NearestNDInterpolator

    from vggt_lora.geometry.cameras import project_points
    from vggt_lora.scenes.opening import open_scene

    shutil.copytree(source, out)
    shutil.copytree(out / "dslr_calibration_undistorted", out / "dslr_calibration_jpg")
    scene, paths = open_scene(out), []
    folder = out / "ground_truth_depth/dslr_images"
    folder.mkdir(parents=True)
    for frame in scene.frames:
        pixels, z = project_points(scene.points.xyz[frame.point_rows], frame.world_to_cam, frame.K)
        row, column = np.indices(frame.size) + 0.5
        depth = NearestNDInterpolator(pixels, z)(column, row)
        paths.append(folder / frame.name.rsplit("/", 1)[-1])
        change(depth).astype("<f4").tofile(paths[-1])
    return paths


@case("fits")
def laser_depth(source, out):
    """Laser depth that agrees with the points."""
    laser(source, out)


@case("refuse", "1000 times that of the points", "another unit")
def laser_in_millimetres(source, out):
    """Laser depth in millimetres beside a model in metres."""
    laser(source, out, lambda depth: 1000 * depth)


@case("note", "8 of 8 photos do not fit", "1.05 times that of the points")
def laser_a_little_long(source, out):
    """Laser depth is 5 % longer than the points lie: poor points or a wrong scale, so it opens."""
    laser(source, out, lambda depth: 1.05 * depth)


@case("note", "2 of 8 photos do not fit", "depth of other photos")
def two_depths_exchanged(source, out):
    """The laser depth of two photos of one size stands under each other's names."""
    paths = laser(source, out)
    one = next(path for path in paths[3:] if path.stat().st_size == paths[0].stat().st_size)
    first, second = paths[0].read_bytes(), one.read_bytes()
    paths[0].write_bytes(second)
    one.write_bytes(first)


def masks(source: Path, out: Path, upper: int, size: tuple[int, int] | None = None) -> None:
    """Give every photo a mask in COLMAP's convention whose upper fifth is `upper` and whose rest is not."""
    write(source, out)
    for photo in photos_of(out):
        width, height = size or Image.open(photo).size
        mask = np.full((height, width), 255 - upper, np.uint8)
        mask[: height // 5] = upper
        path = out / "masks/dslr_images_undistorted" / f"{photo.name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(path)


@case("fits")
def masks_of_the_sky(source, out):
    """Masks leave out the upper fifth."""
    masks(source, out, upper=0)


@case("note", "the masks of 8 of 8 photos leave out more than 50 %")
def inverted_masks(source, out):
    """Masks keep what they should leave out."""
    masks(source, out, upper=255)


@case("note", "the mask is 90x60", "expected equal sizes")
def small_masks(source, out):
    """Masks of another size than their photos."""
    masks(source, out, upper=0, size=(90, 60))


# --- lengths, poses and lenses ----------------------------------------------------------------------------------------

@case("note", "3 of ", "they are left out")
def far_points(source, out):
    """Three points lie 1e5 units away along a ray of a photo that sees them."""
    model = model_of(source)
    for number in sorted(model.points3D)[:: len(model.points3D) // 3][:3]:
        point = model.points3D[number]
        centre = model.images[point.track.elements[0].image_id].projection_center()
        point.xyz = centre + (point.xyz - centre) / np.linalg.norm(point.xyz - centre) * 1e5
    write(source, out, model)


@case("note", "in 8 of 8 photos far points make the mean depth")
def far_cluster(source, out):
    """One point in eight lies a hundred times as far: too many to be left out."""
    model = model_of(source)
    for number in sorted(model.points3D)[::8]:
        point = model.points3D[number]
        centre = model.images[point.track.elements[0].image_id].projection_center()
        point.xyz = centre + (point.xyz - centre) * 100
    write(source, out, model)


@case("note", "rigs and frames are used")
def stale_images(source, out):
    """A rig model: every second pose of images.txt is turned, frames.txt has the right ones."""
    map_lines(write(source, out, rigs=True) / "images.txt", turn)


@case("note", "images are used")
def stale_frames(source, out):
    """A rig model: frames.txt holds poses that images.txt does not have, and the keypoints fit images.txt."""
    sparse = write(source, out, rigs=True)
    lines = (sparse / "frames.txt").read_text().splitlines()
    frames = [i for i, line in enumerate(lines) if not line.startswith("#")]
    for number, i in enumerate(frames):
        frame, rig, *rest = lines[i].split()
        lines[i] = " ".join([frame, *turn(number, [rig, *rest])])
    (sparse / "frames.txt").write_text("\n".join(lines) + "\n")


@case("note", "moves no pixel by more than", "taken as pinholes")
def nearly_pinhole(source, out):
    """Cameras OPENCV with coefficients of 1e-10, as an undistorter leaves them."""
    path = write(source, out) / "cameras.txt"
    path.write_text(
        "".join(
            f"{line.replace(' PINHOLE ', ' OPENCV ')}{'' if line.startswith('#') else ' 1e-10 -3e-11 0 0'}\n"
            for line in path.read_text().splitlines()
        )
    )


@case("refuse", "distorts; expected", "its lens moves pixels by up to")
def real_distortion(source, out):
    """Cameras OPENCV whose distortion moves pixels."""
    path = write(source, out) / "cameras.txt"
    path.write_text(
        "".join(
            f"{line.replace(' PINHOLE ', ' OPENCV ')}{'' if line.startswith('#') else ' 1e-3 0 0 0'}\n"
            for line in path.read_text().splitlines()
        )
    )


@case("note", "entries whose keypoints name no point")
def one_way_tracks(source, out):
    """Some points have tracks whose keypoints do not name the point, as a global mapper writes them."""
    sparse = write(source, out)
    rows = [line.split() for line in (sparse / "points3D.txt").read_text().splitlines()]
    two_views = {row[0] for row in rows if row and row[0] != "#" and len(row) == 12}
    assert two_views
    map_lines(
        sparse / "images.txt",
        lambda _, words: ["-1" if i % 3 == 2 and word in two_views else word for i, word in enumerate(words)],
        pose=False,
    )


# --- layouts ----------------------------------------------------------------------------------------------------------

@case("note", "sparse/1 holds 8 photos, sparse/0 3; the larger one is opened")
def scrap_model_first(source, out):
    """sparse/0 holds three photos, sparse/1 all."""
    write(source, out).rename(out / "sparse" / "1")
    model = model_of(source)
    for key in sorted(model.images)[3:]:
        model.deregister_frame(model.images[key].frame_id)
    write(source, out, model, photos=False)


@case("note", "dense/0/sparse is opened")
def automatic_layout(source, out):
    """COLMAP's automatic layout: sparse/0 with lens distortion, dense/0 with the undistorted model and photos."""
    real_distortion(source, out)
    cut = out / "other"
    write(source, cut)
    (out / "dense").mkdir()
    (cut / "sparse" / "0").rename(cut / "model")
    (cut / "sparse").rmdir()
    (cut / "model").rename(cut / "sparse")
    cut.rename(out / "dense" / "0")


@case("fits")
def eth3d_rig(source, out):
    """ETH3D's low-resolution layout: rig_calibration_undistorted and images_rig_cam4_undistorted/<nanoseconds>.png."""
    model = model_of(source)
    (out / "rig_calibration_undistorted").mkdir(parents=True)
    for number, key in enumerate(sorted(model.images)):
        image = model.images[key]
        new = f"images_rig_cam{4 + number % 2}_undistorted/{1477843917481127523 + number // 2 * 10**8}.png"
        (out / "images" / new).parent.mkdir(parents=True, exist_ok=True)
        Image.open(source / "images" / image.name).save(out / "images" / new)
        image.name = new
    model.write_text(str(out / "rig_calibration_undistorted"))


@case("note", "another size than their camera")
def renamed_copies(source, out):
    """Sound by itself: all photos at two thirds of their size, re-encoded, under other names (beside the first scene it
    leaks).
    """
    model = model_of(source)
    for number, key in enumerate(sorted(model.images)):
        image = model.images[key]
        photo = Image.open(source / "images" / image.name)
        image.name = f"copy_{number:03d}.jpg"
        (out / "images").mkdir(parents=True, exist_ok=True)
        photo.resize((photo.width * 2 // 3, photo.height * 2 // 3)).save(out / "images" / image.name, quality=60)
    write(source, out, model, photos=False)


# --- the split, a run, and a folder of photos ---------------------------------------------------------------------

def split_answer(folder: Path) -> tuple[str, str]:
    """What the audit of a split says; the second of several scenes is held out."""
    from vggt_lora.datasets.splits import LeakError, audit_split, split_windows
    from vggt_lora.scenes.opening import find_scenes, open_scene

    scenes = [open_scene(path) for path in find_scenes(str(folder))]
    split = split_windows(scenes, frames=2, hold_out=[scene.name for scene in scenes[1:]])
    try:
        notes = audit_split(split, scenes)["notes"]
    except LeakError as error:
        return "refuse", str(error)
    return ("note" if notes else "fits"), "; ".join(notes)


def run_answer(folder: Path) -> tuple[str, str]:
    """What a small run says that is told the unit is the metre."""
    from vggt_lora.core import ConfigError
    from vggt_lora.train import TrainConfig, train

    small = {"model": "random", "epochs": 1, "frames": 2, "image_size": 56, "frame_cache": False}
    small |= {"feature_cache": "off", "train_fraction": 0.75, "supervision": "sparse", "units_are_metres": "yes"}
    try:
        run = train(TrainConfig(data=str(folder), output=str(folder / "run"), **small))
    except ConfigError as error:
        return "refuse", str(error)
    return "fits", f"held-out loss {run.results['held_out_loss']}"


def photos_answer(folder: Path) -> tuple[str, str]:
    """What is said of a folder of photos before its cameras are computed."""
    from vggt_lora.core import ConfigError
    from vggt_lora.scenes.reconstruct import passed_over, photos_in, upright_photos

    said = [passed_over(folder)]
    try:
        with tempfile.TemporaryDirectory() as work:
            upright_photos(folder, photos_in(folder), "one", Path(work), said.append)
    except ConfigError as error:
        return "refuse", str(error)
    return ("note" if any(said) else "fits"), "; ".join(filter(None, said))


@case("refuse", "8 photos both train and judge as copies", ask=split_answer)
def copies(source, out):
    """Two scenes: the second holds the first's photos, smaller, re-encoded, under other names."""
    as_it_is(source, out / "one")
    renamed_copies(source, out / "two")


@case("note", "2 of 2 judged frames were taken at the same instant", ask=split_answer)
def rig_walk(source, out):
    """Two cameras carried together: at one instant, one trains and the other judges."""
    eth3d_rig(source, out)


@case("refuse", "no depth to learn from", "millimetres", ask=run_answer)
def nothing_to_learn(source, out):
    """A run on a scene in millimetres that is called metric: no pixel lies within its depth limits."""
    scale_model(write(source, out), 1000.0)


def phone_photos(folder: Path, sizes=((64, 48),) * 3, orientation: int = 1) -> Path:
    """Write small photos as a phone does, with an EXIF orientation."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, size in enumerate(sizes):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.effect_noise(size, 60).save(folder / f"IMG_{number}.jpg", exif=exif)
    return folder


@case("note", "3 of 3 photos turned upright, as EXIF says", ask=photos_answer)
def photos_sideways(source, out):
    """Photos for `reconstruct` that lie on their side, with an EXIF orientation."""
    phone_photos(out, orientation=6)


@case("refuse", "64x48 (2: IMG_0.jpg ...), 40x48 (1: IMG_2.jpg)", "Give camera='each photo'", ask=photos_answer)
def photos_mixed(source, out):
    """Photos for `reconstruct` of two sizes."""
    phone_photos(out, sizes=((64, 48), (64, 48), (40, 48)))


@case("note", "passed over: 2 .HEIC, 1 .webp", ask=photos_answer)
def photos_heic(source, out):
    """Photos for `reconstruct` in formats that are not read, beside some that are."""
    phone_photos(out)
    for name in ("a.HEIC", "b.HEIC", "c.webp"):
        (out / name).write_bytes(b"x")


# --- the table --------------------------------------------------------------------------------------------------------

def answer_to(folder: Path) -> tuple[str, str]:
    """What is said of a scene: ("refuse", message), ("note", notes) or ("fits", checks); the unit alone is no note."""
    from vggt_lora.core import SceneError
    from vggt_lora.scenes.opening import open_scene

    try:
        scene = open_scene(folder)
    except SceneError as error:
        return "refuse", str(error)
    if all(note.startswith("unit unknown") for note in scene.notes):
        return "fits", "; ".join(map(str, scene.fit))
    return "note", "; ".join(sorted(scene.notes, key=lambda note: note.startswith("unit unknown")))


def sound_scenes() -> list[Path]:
    """The real scenes and the demo buildings, as far as they are at hand."""
    from vggt_lora.demo.demo_scenes import demo_scenes
    from vggt_lora.reference_data import real_scene

    return [*(path for name in SOUND if (path := real_scene(name))), *demo_scenes()]


def photo_figures(frames, points) -> dict[str, np.ndarray]:
    """Return per photo what the limits are about; nan where it is not known."""
    from vggt_lora.scenes import fit

    fits, own = [fit.keypoint_fit(frame, points) for frame in frames], points.rgb @ np.array(fit.LUMA)
    seen = [fit.seen_brightness(frame, points) for frame in frames]
    depths = [fit.depths_of(frame, points) for frame in frames]
    return {
        "share": np.array([found.share if found else np.nan for found in fits]),
        "offset": np.array([found.offset if found else np.nan for found in fits]),
        "colours": np.array([fit.correlation(here, own[rows]) for rows, here in seen]),
        "farthest": np.array([z.max() / np.median(z) if len(z) else np.nan for z in depths]),
        "mean over median": np.array([fit.mean_over_median(frame, points) for frame in frames]),
        "centre": np.array([np.abs(frame.K[:2, 2] / frame.size[::-1] - 0.5).max() for frame in frames]),
    }


def main() -> None:
    from vggt_lora.demo.demo_scenes import toy_scene
    from vggt_lora.scenes.opening import open_scene

    with tempfile.TemporaryDirectory() as work:
        source = toy_scene(work, frames=8, size=(168, 252))
        print(f"{'case':28} {'is':7} {'right':7} said")
        for name, one in CASES.items():
            one.build(source, Path(work) / name)
            answer, said = one.said_of(Path(work) / name)
            print(f"{name:28} {answer:7} {one.answer:7} {said.replace(work + os.sep, '')[:400]}")
    print(f"\nsound scenes: {len(SOUND)} real ones, where they are at hand, and the demo buildings. They are few, so "
          "limits keep a distance from them.\nLeast, median and most of the photos; laser depth: lower median, masks: "
          "most; then checks and notes.")
    for path in sound_scenes():
        scene = open_scene(path)
        rows = photo_figures(scene.frames, scene.points)
        text = [f"{name} {np.nanmin(v):.3g} {np.nanmedian(v):.3g} {np.nanmax(v):.3g}" for name, v in rows.items()]
        text += [f"{check.name} {check.figure:.3g}" for check in scene.fit if check.name in ("depth", "masks")]
        verdicts = ", ".join(f"{check.name} {check.verdict}" for check in scene.fit)
        print(f"{scene.name:20} {'; '.join(text)}; {verdicts}; {len(scene.notes)} notes", flush=True)


if __name__ == "__main__":
    sys.exit(main())
