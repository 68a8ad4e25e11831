"""Measure preprocessing and loading of frames as ratios; print the smallest and the median of several rounds.

    python benchmarks/data.py                            # real scenes if they are installed, else demo scenes
    python benchmarks/data.py --rounds 9 --photos 12 --only strecha_castle_p30

Preprocessing is compared with the plain way: decode at full size, resize with Lanczos, project point by point in a
Python loop into a depth map of full size, and pick from that map. Ours includes everything that a run waits for: the
name of the entry, decoding, projecting, writing to disk and reading back. The shared photos have one megapixel, so
decoding is short and the ratio is near 1. Therefore the first scene is measured again with enlarged photos
(--megapixels) and with more points (--points).

Loading is an epoch over all windows of a scene: decoded on request, or read from the store (a new object each time, so
names and checksums are computed again). The later epochs use the same object, because both keep in memory what they
have read.

Nothing is asserted. A ratio compares two measurements made right after one another; `passed` is wall-clock time,
`worked` processor time.
"""
import argparse
import dataclasses
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from vggt_lora.datasets.frame_store import FrameStore
from vggt_lora.datasets.samples import FrameCache, load_sample
from vggt_lora.datasets.windows import Window, make_windows
from vggt_lora.demo.demo_scenes import demo_scenes
from vggt_lora.files.cache import folder_bytes
from vggt_lora.geometry.cameras import project_points, resize_intrinsics
from vggt_lora.reference_data import real_scene
from vggt_lora.scenes.opening import open_scene

REAL = ("strecha_fountain_p11", "strecha_castle_p30", "sceaux_castle", "eth3d_pipes")


def plain(scene, frame, size) -> tuple:
    """Preprocess a frame the plain way: photo and sparse depth at `size`."""
    with Image.open(frame.image_path) as photo:
        image = np.asarray(photo.convert("RGB").resize(size[::-1], Image.Resampling.LANCZOS))
    depth = np.zeros(frame.size, np.float32)
    for row in frame.point_rows:
        x, y, z = frame.world_to_cam[:3, :3] @ scene.points.xyz[row] + frame.world_to_cam[:3, 3]
        if z > 0:
            u, v = int(frame.K[0, 0] * x / z + frame.K[0, 2]), int(frame.K[1, 1] * y / z + frame.K[1, 2])
            if 0 <= u < frame.size[1] and 0 <= v < frame.size[0] and (depth[v, u] == 0 or z < depth[v, u]):
                depth[v, u] = z
    rows, columns = (((np.arange(new) + 0.5) * old / new).astype(int) for new, old in zip(size, frame.size))
    return image, depth[rows][:, columns]


def enlarged(scene, folder: Path, photos: int, megapixels: float):
    """Return the scene's first photos at so many megapixels, cameras and observations with them."""
    frames = []
    folder.mkdir()
    for frame in scene.frames[:photos]:
        size = tuple(round(side * np.sqrt(1e6 * megapixels / np.prod(frame.size))) for side in frame.size)
        path = folder / Path(frame.name).name
        with Image.open(frame.image_path) as photo:
            photo.convert("RGB").resize(size[::-1], Image.Resampling.BICUBIC).save(path, quality=95)
        frames.append(
            dataclasses.replace(
                frame, image_path=path, size=size, K=resize_intrinsics(frame.K, frame.size, size),
                observations=frame.observations * (size[1] / frame.size[1], size[0] / frame.size[0]),
            )
        )
    return dataclasses.replace(scene, frames=tuple(frames))


def crowded(scene, count: int):
    """Return the scene with `count` points in every frame, the new ones close to those that it observes."""
    rng, xyz, frames, total = np.random.default_rng(0), [scene.points.xyz], [], len(scene.points)
    for frame in scene.frames:
        near = scene.points.xyz[rng.choice(frame.point_rows, max(count - len(frame.point_rows), 0))]
        near = near + 1e-3 * rng.normal(0, 1, near.shape) * np.ptp(near, axis=0)
        pixels, _ = project_points(near, frame.world_to_cam, frame.K)
        frames.append(
            dataclasses.replace(
                frame,
                point_rows=np.concatenate([frame.point_rows, np.arange(total, total + len(near))]),
                observations=np.concatenate([frame.observations, pixels]),
            )
        )
        xyz.append(near)
        total += len(near)
    first = np.zeros(total - len(scene.points), int)  # the rest of a new point is the first one's
    rest = {
        field.name: np.concatenate([getattr(scene.points, field.name), getattr(scene.points, field.name)[first]])
        for field in dataclasses.fields(scene.points)
        if field.name != "xyz"
    }
    return dataclasses.replace(
        scene, frames=tuple(frames), points=dataclasses.replace(scene.points, xyz=np.concatenate(xyz), **rest)
    )


def timed(work) -> np.ndarray:
    """Return seconds passed and seconds of processor time of a call."""
    passed, worked = time.perf_counter(), time.process_time()
    work()
    return np.array([time.perf_counter() - passed, time.process_time() - worked])


def ratios(what: str, slow: list, fast: list, per: int, unit: str) -> None:
    """Print how many times longer the first took than the second, round by round, and what the second took per item."""
    rounds = np.array(slow) / np.maximum(fast, 1e-9)
    (low, low_worked), (middle, middle_worked) = rounds.min(0), np.median(rounds, 0)
    each = np.median(fast, 0)[0] / per * 1000
    print(
        f"  {what:58} passed {low:6.2f} min {middle:6.2f} median   worked {low_worked:6.2f} min {middle_worked:6.2f} "
        f"median   {each:7.1f} ms a {unit}",
        flush=True,
    )


def preprocessing(name: str, scene, arguments) -> None:
    """Compare the making of entries with the plain way."""
    count = min(arguments.photos, len(scene))
    items, cache = [(scene, Window(scene.name, tuple(range(count))))], FrameCache(arguments.size)
    target = cache.size(scene, 0)
    times = {"plain": [], "one": [], "all": []}
    for _ in range(arguments.rounds):
        times["plain"].append(timed(lambda: [plain(scene, frame, target) for frame in scene.frames[:count]]))
        for what, workers in (("one", 1), ("all", None)):
            with tempfile.TemporaryDirectory() as folder:
                store = FrameStore(arguments.size, folder=folder, workers=workers)
                times[what].append(timed(lambda: store.prepare(items, progress=False)))
    height, width = scene.frames[0].size
    print(
        f"{name}: preprocessing {count} photos of {width}x{height} to {target[1]}x{target[0]}, "
        f"{np.mean([len(f.point_rows) for f in scene.frames[:count]]):.0f} points each"
    )
    ratios("plain way / one thread", times["plain"], times["one"], count, "frame")
    ratios(f"plain way / {store.workers} threads", times["plain"], times["all"], count, "frame")


def loading(name: str, scene, arguments) -> None:
    """Compare epochs that decode with epochs that find their frames in the store."""
    items = [(scene, window) for window in make_windows(scene)]
    times = {"decoded": [], "stored": [], "decoded again": [], "stored again": []}

    def epoch(cache):
        for scene, window in items:
            load_sample(scene, window, cache)

    with tempfile.TemporaryDirectory() as folder:
        FrameStore(arguments.size, folder=folder).prepare(items, progress=False)
        for _ in range(arguments.rounds):
            for what, cache in (
                ("decoded", FrameCache(arguments.size)),
                ("stored", FrameStore(arguments.size, folder=folder)),
            ):
                times[what].append(timed(lambda: epoch(cache)))
                times[f"{what} again"].append(timed(lambda: epoch(cache)))
        print(
            f"{name}: loading {len(items)} windows of {len(items[0][1])} photos, {len(scene)} photos in all, "
            f"{folder_bytes(folder) / 1e6 / len(scene):.2f} MB a frame on disk"
        )
    ratios("first epoch, decoded / from the store", times["decoded"], times["stored"], len(items), "window")
    ratios(
        "later epochs, decoded once / from the store", times["decoded again"], times["stored again"], len(items),
        "window",
    )


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=518, help="long side in pixels, a multiple of 14")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--photos", type=int, default=8, help="photos of each scene that are preprocessed")
    parser.add_argument(
        "--full-photos", type=int, default=4, help="photos of the first scene that are enlarged; 0: none"
    )
    parser.add_argument(
        "--megapixels", type=float, nargs="*", default=(6, 24), help="sizes that they are enlarged to; ETH3D's have 24"
    )
    parser.add_argument(
        "--points", type=int, default=100_000,
        help="points of each photo in one more measurement at the last size; 0: none",
    )
    parser.add_argument("--only", nargs="*", help="names of scenes")
    arguments = parser.parse_args()
    if arguments.rounds < 1 or arguments.photos < 1:
        parser.error("--rounds and --photos are 1 or more")
    folders = [folder for name in REAL if (folder := real_scene(name)) is not None] or demo_scenes()
    folders = [folder for folder in folders if not arguments.only or folder.name in arguments.only]
    if not folders:
        parser.error(f"none of {', '.join(arguments.only)} is at hand")
    for folder in folders:
        scene = open_scene(folder)
        preprocessing(folder.name, scene, arguments)
        loading(folder.name, scene, arguments)
    if arguments.full_photos and arguments.megapixels:
        with tempfile.TemporaryDirectory() as temporary:
            for megapixels in arguments.megapixels:
                scene = enlarged(
                    open_scene(folders[0]), Path(temporary) / f"{megapixels:g}", arguments.full_photos, megapixels
                )
                preprocessing(f"{scene.name}, enlarged", scene, arguments)
            if arguments.points:
                preprocessing(f"{scene.name}, enlarged, more points", crowded(scene, arguments.points), arguments)
            loading(f"{scene.name}, enlarged", scene, arguments)


if __name__ == "__main__":
    main()
