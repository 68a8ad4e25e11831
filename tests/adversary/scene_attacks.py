"""Attacks on what a scene is made of: models, photos, masks, laser depth, scans."""
import io
import os
import struct
from pathlib import Path

import numpy as np
from PIL import Image

from tests.adversary.attack import Attack, digest, write

UNDISTORTED, ORIGINALS = "dslr_calibration_undistorted", "dslr_calibration_jpg"
SIZE = (56, 84)  # of the grid that everything is brought to


# --- uses -------------------------------------------------------------------------------------------------------------

def counted(found) -> list[str]:
    """A depth map's counts, as words."""
    return [f"{name}: {number}" for name, number in found.counts.items()]


def use_scene(folder: Path, *, depth: str = "sparse", images: bool = False) -> tuple:
    """Open a scene and bring all of its frames to one size."""
    from vggt_lora.scenes.opening import open_scene
    from vggt_lora.scenes.images import load_image, plan_image
    from vggt_lora.supervision.sources import DEPTH_SOURCES

    scene = open_scene(folder)
    said, parts = (
        [str(note).replace(str(folder), "") for note in scene.notes],
        [len(scene), len(scene.points), scene.metric],
    )
    for frame in scene.frames:
        parts += [
            frame.name, frame.size, frame.K, frame.world_to_cam, scene.points.ids[frame.point_rows], frame.observations,
        ]
        found = DEPTH_SOURCES[depth](scene, frame, SIZE)
        parts += [found.depth, found.valid, found.weight]
        said += [f"{frame.name} {line}" for line in counted(found)]
        if images:
            parts.append(load_image(frame.image_path, plan_image(frame.size, 84)))
    return digest(*parts), said


def use_photos(folder: Path) -> tuple:
    """Open a scene and decode its photos."""
    return use_scene(folder, images=True)


def use_laser(folder: Path) -> tuple:
    """Open a scene and bring laser depth to its photos."""
    return use_scene(folder, depth="laser")


def use_scans(folder: Path) -> tuple:
    """Likewise from the scans alone, as in a scene without ground truth depth."""
    import shutil

    shutil.rmtree(folder / "ground_truth_depth", ignore_errors=True)
    return use_scene(folder, depth="laser")


# --- COLMAP text ------------------------------------------------------------------------------------------------------

def data_rows(text: str) -> list[int]:
    """Numbers of the lines that hold data."""
    return [i for i, line in enumerate(text.split("\n")) if line.strip() and not line.startswith("#")]


def field_changed(path: str, row: int, field: int, value: str | None, *says: str):
    """Put another value into a field; None drops the field. A message has to name the file, or what is in `says`."""
    def damage(folder: Path) -> str:
        lines = (folder / path).read_text().split("\n")
        number = data_rows((folder / path).read_text())[row]
        words = lines[number].split(" ")
        words[field: field + 1] = [] if value is None else [value]
        lines[number] = " ".join(words)
        return (write(folder / path, "\n".join(lines)), *says)
    return damage


def text_changed(path: str, change, *says: str):
    """Put the whole text of a file through `change` (bytes to bytes).

    A message has to name the file, or what is in `says`.
    """
    def damage(folder: Path) -> str:
        return (write(folder / path, change((folder / path).read_bytes())), *says)
    return damage


def lines_changed(path: str, change, *says: str):
    """Put the list of lines through `change` (lines, rows with data).

    A message has to name the file, or what is in `says`.
    """
    def damage(folder: Path) -> str:
        text = (folder / path).read_text()
        return (write(folder / path, "\n".join(change(text.split("\n"), data_rows(text)))), *says)
    return damage


def removed(path: str, says: str | None = None):
    """Remove a file."""
    def damage(folder: Path) -> str:
        (folder / path).unlink()
        return says or Path(path).name
    return damage


def doubled(lines, rows, which=0, every=1):
    """Repeat the lines of one entry at the end."""
    entry = lines[rows[which]: rows[which] + every]
    return [*lines[:-1], *entry, ""]


def swapped(lines, rows, a, b):
    """Swap two fields of the first entry."""
    words = lines[rows[0]].split(" ")
    words[a], words[b] = words[b], words[a]
    return [*lines[:rows[0]], " ".join(words), *lines[rows[0] + 1:]]


WORDS = {"nan": "nan", "inf": "inf", "minus infinity": "-inf", "a word": "seven", "nothing": None, "1e400": "1e400"}
FIELDS = {
    "cameras": ("id", "model", "width", "height", "fx", "fy", "cx", "cy"),
    "images": ("id", "qw", "qx", "qy", "qz", "tx", "ty", "tz", "camera", "name"),
    "points3D": ("id", "x", "y", "z", "red", "green", "blue", "error", "image of a track", "keypoint of a track"),
}
# a value that is a fault for some fields only
OF_FIELD = {
    ("cameras", "id"): ["-1", "1.5", "99999999999999999999"],
    ("cameras", "width"): ["0", "-5", "2.5", "100000000"],
    ("cameras", "height"): ["0", "-5"],
    ("cameras", "fx"): ["0", "-50", "1e-30"],
    ("cameras", "fy"): ["0", "-50"],
    ("cameras", "cx"): ["1e9"],
    ("cameras", "cy"): ["-1e9"],
    ("images", "id"): ["-3", "4294967296"],
    ("images", "qw"): ["1e9"],
    ("images", "camera"): ["77", "-1"],
    ("images", "tx"): ["1e30"],
    ("images", "name"): ["../../outside.JPG", "/etc/passwd", "nowhere.JPG", "dslr_images_undistorted"],
    ("points3D", "id"): ["-1", "1.0", "18446744073709551616"],
    ("points3D", "x"): ["1e30", "-1e300"],
    ("points3D", "red"): ["256", "-1", "0.5"],
    ("points3D", "image of a track"): ["999", "-2"],
    ("points3D", "keypoint of a track"): ["999999", "-1"],
}
# what else tells a user where to look: the photo whose name leads nowhere, the photo whose pose contradicts that of its
# original
ALSO = {
    ("images", "name"): ("nowhere.JPG", "dslr_images_undistorted"),
    ("images", "tx"): ("another pose than in the undistorted calibration",),
}
COLMAP_TEXTS = {
    "cut in the middle": lambda b: b[: len(b) // 2],
    "cut after a tenth": lambda b: b[: len(b) // 10],
    "last ten bytes lost": lambda b: b[:-10],
    "cut inside the last number": lambda b: b.rstrip()[:-1],
    "empty": lambda b: b"",
    "zero bytes": lambda b: bytes(len(b)),
    "noise": lambda b: np.random.default_rng(1).bytes(len(b)),
    "UTF-16": lambda b: b.decode().encode("utf-16"),
    "UTF-8 with BOM": lambda b: b"\xef\xbb\xbf" + b,
    "CRLF": lambda b: b.replace(b"\n", b"\r\n"),
    "CR alone": lambda b: b.replace(b"\n", b"\r"),
    "tabs": lambda b: b.replace(b" ", b"\t"),
    "two blanks": lambda b: b.replace(b" ", b"  "),
    "commas": lambda b: b.replace(b" ", b","),
    "decimal commas": lambda b: b.replace(b".", b","),
    "a NUL in the middle": lambda b: b[: len(b) // 2] + b"\0" + b[len(b) // 2 :],
    "a byte that is no UTF-8": lambda b: b[: len(b) // 2] + b"\xff" + b[len(b) // 2 :],
    "only comments": lambda b: b"# nothing\n# here\n",
    "a line of a megabyte": lambda b: b + b"9" * 1_000_000 + b"\n",
    "HTML of an error page": lambda b: b"<!DOCTYPE html><html><body>404</body></html>\n",
    "a git LFS pointer": lambda b: (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12\n"
    ),
}


def colmap_text_attacks() -> list[Attack]:
    """Cuts, encodings, and every field of the first entry of every file."""
    found = []
    for stem, fields in FIELDS.items():
        path, group = f"{UNDISTORTED}/{stem}.txt", f"COLMAP text, {stem}"
        # a lost point is a point fewer: the file does not say how many there were, and the header comment counts
        found += [
            Attack(group, name, text_changed(path, change), use_scene, data=name == "cut inside the last number")
            for name, change in COLMAP_TEXTS.items()
        ]
        found.append(Attack(group, "missing", removed(path), use_scene))
        for number, field in enumerate(fields):
            values = {k: v for k, v in WORDS.items() if not (field == "name" and k != "nothing")}
            for what, value in [*values.items(), *((v, v) for v in OF_FIELD.get((stem, field), ()))]:
                found.append(
                    Attack(
                        group, f"{field}: {what}", field_changed(path, 0, number, value, *ALSO.get((stem, field), ())),
                        use_scene,
                    )
                )
    cameras, images, points = (f"{UNDISTORTED}/{stem}.txt" for stem in FIELDS)
    found += [
        Attack("COLMAP text, cameras", "unknown model", field_changed(cameras, 0, 1, "FISHEYE_7"), use_scene),
        Attack(
            "COLMAP text, cameras",
            "a model with distortion",
            lines_changed(
                cameras,
                lambda l, r: [*l[: r[0]], l[r[0]].replace("PINHOLE", "OPENCV") + " 0.1 0 0 0", *l[r[0] + 1 :]],
                "camera 1",
            ),
            use_scene,
        ),
        Attack("COLMAP text, cameras", "the same id twice", lines_changed(cameras, doubled), use_scene),
        Attack(
            "COLMAP text, cameras", "width and height swapped",
            lines_changed(cameras, lambda l, r: swapped(l, r, 2, 3), "its camera"), use_scene,
        ),
        Attack(
            "COLMAP text, cameras", "one line lost", lines_changed(cameras, lambda l, r: [*l[: r[0]], *l[r[0] + 1 :]]),
            use_scene,
        ),
        Attack(
            "COLMAP text, images",
            "quaternion of zeros",
            lines_changed(
                images,
                lambda l, r: [
                    *l[: r[0]],
                    " ".join([l[r[0]].split(" ")[0], "0", "0", "0", "0", *l[r[0]].split(" ")[5:]]),
                    *l[r[0] + 1 :],
                ],
            ),
            use_scene,
        ),
        Attack(
            "COLMAP text, images",
            "quaternion twice as long",
            lines_changed(
                images,
                lambda l, r: [
                    *l[: r[0]],
                    " ".join(
                        [
                            l[r[0]].split(" ")[0],
                            *[str(2 * float(q)) for q in l[r[0]].split(" ")[1:5]],
                            *l[r[0]].split(" ")[5:],
                        ]
                    ),
                    *l[r[0] + 1 :],
                ],
            ),
            use_scene,
        ),
        Attack(
            "COLMAP text, images", "second line of an image lost",
            lines_changed(images, lambda l, r: [*l[: r[0] + 1], *l[r[0] + 2 :]]), use_scene,
        ),
        Attack(
            "COLMAP text, images", "first line of an image lost",
            lines_changed(images, lambda l, r: [*l[: r[0]], *l[r[0] + 1 :]]), use_scene,
        ),
        Attack(
            "COLMAP text, images", "all second lines lost",
            lines_changed(images, lambda l, r: [*l[: r[0]], *[l[i] for i in r[::2]], ""]), use_scene,
        ),
        Attack(
            "COLMAP text, images", "a number too few among the keypoints",
            lines_changed(images, lambda l, r: [*l[: r[1]], l[r[1]].rpartition(" ")[0], *l[r[1] + 1 :]]), use_scene,
        ),
        Attack(
            "COLMAP text, images", "a keypoint of an unknown point",
            field_changed(images, 1, 2, "987654", "points3D.txt"), use_scene,
        ),
        Attack("COLMAP text, images", "a keypoint at nan", field_changed(images, 1, 0, "nan"), use_scene),
        Attack("COLMAP text, images", "a point id that is no number", field_changed(images, 1, 2, "x"), use_scene),
        Attack(
            "COLMAP text, images", "the same id twice", lines_changed(images, lambda l, r: doubled(l, r, every=2)),
            use_scene,
        ),
        Attack(
            "COLMAP text, images",
            "two images of one name",
            lines_changed(
                images,
                lambda l, r: [*l[: r[2]], " ".join([*l[r[2]].split(" ")[:9], l[r[0]].split(" ")[9]]), *l[r[2] + 1 :]],
            ),
            use_scene,
        ),
        Attack("COLMAP text, points3D", "the same id twice", lines_changed(points, doubled), use_scene),
        Attack(
            "COLMAP text, points3D", "a track of half a pair",
            lines_changed(points, lambda l, r: [*l[: r[0]], l[r[0]].rpartition(" ")[0], *l[r[0] + 1 :]]), use_scene,
        ),
        Attack(
            "COLMAP text, points3D",
            "all points at one place",
            lines_changed(
                points,
                lambda l, r: [
                    " ".join([line.split(" ")[0], "1", "2", "3", *line.split(" ")[4:]]) if i in r else line
                    for i, line in enumerate(l)
                ],
            ),
            use_scene,
            data=True,
        ),
    ]
    return found


# --- COLMAP binary ----------------------------------------------------------------------------------------------------

def to_binary(folder: Path) -> None:
    """Turn the model of a copy into binary files, by pycolmap."""
    import pycolmap

    place = folder / UNDISTORTED
    model = pycolmap.Reconstruction(str(place))
    for path in place.glob("*.txt"):
        path.unlink()
    model.write_binary(str(place))


def binary_changed(stem: str, change, *says: str):
    """Put the bytes of a binary file through `change`. A message has to name the file, or what is in `says`."""
    def damage(folder: Path) -> str:
        path = folder / UNDISTORTED / f"{stem}.bin"
        return (write(path, change(path.read_bytes())), *says)
    return damage


def count_is(value: int):
    """Let the number of records say something else."""
    return lambda b: struct.pack("<Q", value) + b[8:]


def flipped(seed: int):
    """Flip eight bits at places drawn from the seed."""
    def change(content: bytes) -> bytes:
        data, rng = bytearray(content), np.random.default_rng(seed)
        for _ in range(8):
            data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        return bytes(data)
    return change


def colmap_binary_attacks() -> list[Attack]:
    """Cuts at many places, wrong counts, flipped bits; the base is the binary form of the scene."""
    found = []
    for stem in FIELDS:
        group = f"COLMAP binary, {stem}"
        for share in (0, 0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98):
            found.append(
                Attack(
                    group, f"cut after {share:.0%}", binary_changed(stem, lambda b, s=share: b[: int(s * len(b))]),
                    use_scene,
                )
            )
        found.append(Attack(group, "last byte lost", binary_changed(stem, lambda b: b[:-1]), use_scene))
        found.append(Attack(group, "bytes behind the end", binary_changed(stem, lambda b: b + b"more"), use_scene))
        for value in (0, 1, 2**32, 2**63, 2**64 - 1):
            found.append(Attack(group, f"says {value} records", binary_changed(stem, count_is(value)), use_scene))
        for seed in range(8):
            found.append(
                Attack(
                    group, f"eight bits flipped, {seed}", binary_changed(stem, flipped(seed), "points3D.bin"),
                    use_scene, data=True,
                )
            )
        found.append(
            Attack(
                group, "missing", lambda folder, s=stem: removed(f"{UNDISTORTED}/{s}.bin", f"{s}")(folder), use_scene
            )
        )
    return found


# --- photos -----------------------------------------------------------------------------------------------------------

PHOTO = "images/dslr_images_undistorted/DSC_5627.JPG"


def picture(photo: Image.Image, form: str, **options) -> bytes:
    """A picture as the bytes of a file."""
    kept = io.BytesIO()
    photo.save(kept, form, **options)
    return kept.getvalue()


def photo_changed(change, path: str = PHOTO):
    """Replace a photo by `change` of its picture."""
    def damage(folder: Path) -> str:
        with Image.open(folder / path) as photo:
            photo.load()
            return write(folder / path, change(photo))
    return damage


def turned(photo: Image.Image) -> bytes:
    """The same pixels with an EXIF note to show them turned."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return picture(photo, "JPEG", quality=95, exif=exif)


def bomb(photo: Image.Image) -> bytes:
    """A PNG whose header promises 60000 x 60000 pixels."""
    content = bytearray(picture(photo, "PNG"))
    content[16:24] = struct.pack(">II", 60000, 60000)
    import zlib
    content[29:33] = struct.pack(">I", zlib.crc32(bytes(content[12:29])))
    return bytes(content)


def in_place_of(path: str, make):
    """Put something that is no ordinary file in a file's place."""
    def damage(folder: Path) -> str:
        (folder / path).unlink()
        make(folder / path)
        return Path(path).name
    return damage


PHOTOS = {
    "wrong size": lambda p: picture(p.resize((p.width // 2 + 3, p.height // 2)), "JPEG"),
    "turned by 90 degrees": lambda p: picture(p.transpose(Image.Transpose.ROTATE_90), "JPEG"),
    "decompression bomb": bomb,
    "text": lambda p: b"this is no photo\n",
    "empty": lambda p: b"",
    "zero bytes": lambda p: bytes(4000),
    "HTML": lambda p: b"<html>404</html>",
    "TIFF of floats": lambda p: picture(Image.fromarray(np.asarray(p.convert("L")).astype(np.float32)), "TIFF"),
}
HONEST_PHOTOS = {  # other pixels, but a photo: they are read for what they are
    "grey": lambda p: picture(p.convert("L"), "JPEG"),
    "CMYK": lambda p: picture(p.convert("CMYK"), "JPEG"),
    "black": lambda p: picture(Image.new("RGB", p.size), "JPEG"),
    "16-bit grey PNG": lambda p: picture(Image.fromarray((np.asarray(p.convert("L")).astype(np.uint16) * 257)), "PNG"),
    "EXIF says turned": turned,
    "a GIF": lambda p: picture(p.convert("P"), "GIF"),
    "half transparent": lambda p: picture(p.convert("RGBA").point(lambda v: v // 2), "PNG"),
    "palette PNG under a JPG name": lambda p: picture(p.convert("P"), "PNG"),
    "progressive": lambda p: picture(p, "JPEG", progressive=True, quality=40),
}


def photo_attacks() -> list[Attack]:
    """Photos that are cut, turned, empty, of another kind, or no files at all."""
    found = [
        Attack(
            "photo", f"cut after {share:.0%}", text_changed(PHOTO, lambda b, s=share: b[: int(s * len(b))]), use_photos
        )
        for share in (0.01, 0.1, 0.5, 0.9, 0.99)
    ]
    found += [Attack("photo", name, photo_changed(change), use_photos) for name, change in PHOTOS.items()]
    found += [
        Attack("photo", name, photo_changed(change), use_photos, data=True) for name, change in HONEST_PHOTOS.items()
    ]
    found += [
        Attack(
            "photo", f"noise in the middle, {seed}",
            text_changed(PHOTO, lambda b, s=seed: b[:2000] + np.random.default_rng(s).bytes(500) + b[2500:]),
            use_photos, data=True,
        )
        for seed in range(3)
    ]
    found += [
        Attack("photo", "missing", removed(PHOTO), use_photos),
        Attack("photo", "a folder in its place", in_place_of(PHOTO, Path.mkdir), use_photos),
        Attack("photo", "a pipe in its place", in_place_of(PHOTO, os.mkfifo), use_photos),
        Attack("photo", "a link to nowhere", in_place_of(PHOTO, lambda p: p.symlink_to("nowhere.JPG")), use_photos),
        Attack("photo", "a link to itself", in_place_of(PHOTO, lambda p: p.symlink_to(p.name)), use_photos),
        Attack(
            "photo", "a link out of the scene", in_place_of(PHOTO, lambda p: p.symlink_to("/etc/hostname")), use_photos
        ),
        Attack(
            "photo", "name in lower case", in_place_of(PHOTO, lambda p: write(p.with_name(p.name.lower()), b"x")),
            use_photos,
        ),
    ]
    return found


# --- masks ------------------------------------------------------------------------------------------------------------

MASK = "masks_for_images/dslr_images/DSC_5627.png"
MASKS = {
    "colour": lambda p: picture(p.convert("RGB"), "PNG"),
    "wrong size": lambda p: picture(p.resize((50, 40)), "PNG"),
    "value 7": lambda p: picture(p.point(lambda v: 7), "PNG"),
    "values 0 and 255": lambda p: picture(p.point(lambda v: 255 if v else 0), "PNG"),
    "16 bit": lambda p: picture(Image.fromarray(np.asarray(p).astype(np.uint16) * 300), "PNG"),
    "a JPEG": lambda p: picture(p.convert("RGB"), "JPEG"),
    "text": lambda p: b"mask",
    "empty": lambda p: b"",
    "with transparency": lambda p: picture(p.convert("RGBA"), "PNG"),
    "decompression bomb": bomb,
    "turned": lambda p: picture(p.transpose(Image.Transpose.ROTATE_90), "PNG"),
    "all covered": lambda p: picture(p.point(lambda v: 2), "PNG"),
}


def mask_attacks() -> list[Attack]:
    """Masks of wrong size, kind and value."""
    found = [Attack("mask", name, photo_changed(change, MASK), use_laser) for name, change in MASKS.items()]
    found += [
        Attack("mask", f"cut after {share:.0%}", text_changed(MASK, lambda b, s=share: b[: int(s * len(b))]), use_laser)
        for share in (0.1, 0.5, 0.9)
    ]
    found += [
        Attack("mask", "missing", removed(MASK), use_laser),
        Attack("mask", "a folder in its place", in_place_of(MASK, Path.mkdir), use_laser),
    ]
    return found


# --- laser depth and scans --------------------------------------------------------------------------------------------

DEPTH = "ground_truth_depth/dslr_images/DSC_5627.JPG"


def floats(change):
    """Put the raw depth of a photo through `change` (float32 array to bytes or array)."""
    def damage(folder: Path) -> str:
        changed = change(np.frombuffer((folder / DEPTH).read_bytes(), "<f4").copy())
        return write(folder / DEPTH, changed if isinstance(changed, bytes) else np.asarray(changed).tobytes())
    return damage


def with_value(value: float):
    """Let some pixels hold a value."""
    def change(depth):
        depth[100:140] = value
        return depth
    return change


DEPTHS = {
    "a byte short": lambda d: d.tobytes()[:-1],
    "a row short": lambda d: d[:-126],
    "half": lambda d: d[: len(d) // 2],
    "a value too many": lambda d: np.append(d, d[:1]),
    "empty": lambda d: b"",
    "big-endian": lambda d: d.astype(">f4").tobytes(),
    "float64": lambda d: d.astype(np.float64),
    "float16": lambda d: d.astype(np.float16),
    "nan": with_value(np.nan),
    "negative": with_value(-2.0),
    "zero": with_value(0.0),
    "minus infinity": with_value(-np.inf),
    "all unknown": lambda d: np.full_like(d, np.inf),
    "a JPEG": lambda d: b"\xff\xd8\xff\xe0" + bytes(1000),
    "noise": lambda d: np.random.default_rng(0).bytes(4 * len(d)),
    "zeros": lambda d: np.zeros_like(d),
    "a denormal": with_value(1e-40),
    "1e30": with_value(1e30),
    "text": lambda d: " ".join(map(str, d[:100])).encode(),
}
HONEST_DEPTHS = {"in millimetres": lambda d: d * 1000}
SCAN, ALIGNMENT, MESH = "dslr_scan_eval/scan1.ply", "dslr_scan_eval/scan_alignment.mlp", "occlusion/surface_mesh.ply"


def header(change):
    """Put a PLY file's header through `change` (bytes to bytes) and keep the rest."""
    def apply(content: bytes) -> bytes:
        head, mark, body = content.partition(b"end_header\n")
        return change(head) + mark + body
    return apply


def vertices(value: float):
    """Overwrite some coordinates behind the header."""
    def apply(content: bytes) -> bytes:
        start = content.index(b"end_header\n") + len(b"end_header\n")
        return content[:start] + np.full(3, value, "<f4").tobytes() + content[start + 12:]
    return apply


def more(old: bytes, new: bytes):
    """Replace bytes; the pattern has to be there."""
    def apply(content: bytes) -> bytes:
        assert old in content, old
        return content.replace(old, new, 1)
    return apply


def count(number: int):
    """Let a header promise another number of vertices."""
    import re
    return header(lambda h: re.sub(rb"element vertex \d+", b"element vertex %d" % number, h))


PLYS = {
    "empty": lambda b: b"",
    "header cut": lambda b: b[:40],
    "data cut": lambda b: b[: len(b) * 2 // 3],
    "no end_header": lambda b: b.replace(b"end_header\n", b""),
    "says a billion": count(10**9),
    "says minus one": header(lambda h: h.replace(b"element vertex ", b"element vertex -")),
    "says 2**62": count(2**62),
    "one fewer": count(3),
    "ascii format": more(b"binary_little_endian", b"ascii"),
    "unknown format": more(b"binary_little_endian", b"binary_middle_endian"),
    "no x": more(b" x\n", b" q\n"),
    "unknown type": more(b"property float x", b"property float128 x"),
    "a vertex at nan": vertices(np.nan),
    "a vertex at infinity": vertices(np.inf),
    "a vertex at 1e30": vertices(1e30),
    "text": lambda b: b"not a ply\n",
    "HTML": lambda b: b"<html></html>",
    "header of a megabyte": lambda b: b"ply\n" + b"comment " + b"x" * 1_000_000 + b"\n" + b[4:],
}
MLPS = {
    "empty": lambda b: b"",
    "cut": lambda b: b[: len(b) // 2],
    "not XML": lambda b: b"scan1.ply 1 0 0 0",
    "no mesh": lambda b: b"<!DOCTYPE MeshLabDocument>\n<MeshLabProject><MeshGroup/></MeshLabProject>\n",
    "a file that is absent": more(b"scan1.ply", b"scan9.ply"),
    "a file outside": more(b'filename="scan1.ply"', b'filename="../../../scan1.ply"'),
    "an absolute file": more(b'filename="scan1.ply"', b'filename="/etc/passwd"'),
    "matrix of words": more(b"<MLMatrix44>", b"<MLMatrix44>one two "),
    "matrix of nan": more(b"<MLMatrix44>", b"<MLMatrix44>nan nan nan nan nan "),
    "entities": lambda b: (
        b'<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;"><!ENTITY c '
        b'"&b;&b;&b;&b;&b;&b;&b;&b;&b;&b;">]>'
        + b[b.index(b"\n") + 1 :].replace(b"scan1", b"&c;scan1")
    ),
    "an outside entity": lambda b: (
        b'<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/hostname">]>'
        + b[b.index(b"\n") + 1 :].replace(b"scan1", b"&e;scan1")
    ),
    "UTF-16": lambda b: b.decode().encode("utf-16"),
}


def sheared(folder: Path) -> str:
    """A matrix that is not a rotation."""
    import re
    path = folder / ALIGNMENT
    text = path.read_text()
    start = text.index("<MLMatrix44>") + len("<MLMatrix44>")
    rows = text[start: text.index("</MLMatrix44>")]
    return write(path, text[:start] + re.sub(r"\S+", "3.5", rows, count=1) + text[start + len(rows):])


def laser_attacks() -> list[Attack]:
    """Raw depth, scans, their alignment, and the surfaces that hide."""
    found = [Attack("laser depth", name, floats(change), use_laser) for name, change in DEPTHS.items()]
    found += [
        Attack("laser depth", name, floats(change), use_laser, data=True) for name, change in HONEST_DEPTHS.items()
    ]
    found += [
        Attack("laser depth", "missing", removed(DEPTH), use_laser),
        Attack("laser depth", "a folder in its place", in_place_of(DEPTH, Path.mkdir), use_laser),
    ]
    found += [Attack("scan", name, text_changed(SCAN, change), use_scans) for name, change in PLYS.items()]
    found += [Attack("scan", "missing", removed(SCAN), use_scans)]
    found += [Attack("alignment", name, text_changed(ALIGNMENT, change), use_scans) for name, change in MLPS.items()]
    found += [
        Attack("alignment", "sheared", sheared, use_scans),
        Attack("alignment", "missing", removed(ALIGNMENT, "laser"), use_scans),
    ]
    found += [Attack("occlusion mesh", name, text_changed(MESH, change), use_scans) for name, change in PLYS.items()]
    for stem in ("cameras", "images"):
        path = f"{ORIGINALS}/{stem}.txt"
        found += [
            Attack(f"original's {stem}", name, text_changed(path, COLMAP_TEXTS[name], f"its {stem} file"), use_laser)
            for name in (
                "cut in the middle", "empty", "noise", "UTF-16", "only comments", "CRLF", "HTML of an error page",
            )
        ]
        found.append(Attack(f"original's {stem}", "missing", removed(path, "original"), use_laser))
    return found


def layout_attacks() -> list[Attack]:
    """scene.json, folders that are missing or no folders."""
    import shutil

    def gone(name):
        def damage(folder: Path) -> str:
            shutil.rmtree(folder / name)
            return name
        return damage

    texts = {
        "broken": "{", "a list": "[]", "unknown unit": '{"unit": "foot"}', "a number": "7",
        "unit is a list": '{"unit": ["metre"]}', "empty": "", "deep": "[" * 100_000,
    }
    found = [
        Attack("scene.json", name, lambda folder, t=text: write(folder / "scene.json", t), use_scene)
        for name, text in texts.items()
    ]
    found += [Attack("layout", f"no {name}", gone(name), use_scene) for name in (UNDISTORTED, "images")]
    found += [
        Attack("layout", "no masks", gone("masks_for_images"), use_laser),
        Attack("layout", "no cameras of the originals", gone(ORIGINALS), use_laser),
    ]
    return found
