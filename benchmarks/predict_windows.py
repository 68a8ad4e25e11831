"""Compare joined windows with one window, and a closed loop with the open chain; run many photos through a kill.

    python benchmarks/predict_windows.py [--photos 60] [--size 112] [--frames 8] [--one 12]
    python benchmarks/predict_windows.py --many 300

A demo street is photographed on a walk forth and back, so the last photo is taken beside the first. Camera centres are
compared with the true ones after the best similarity, so bend and drift are measured, not the unit. `--many` runs the
command `vggt_lora_predict` on that many photos, kills it (SIGKILL) after the tenth window, runs it again, and prints
time and peak memory of both. Everything is made in a temporary folder.
"""
import argparse
import signal
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from vggt_lora.demo.write_scene import write_demo
from vggt_lora.evaluation.cameras import rotation_angles
from vggt_lora.evaluation.fusion import fit_similarity
from vggt_lora.geometry.cameras import camera_centre, compose_poses, invert_pose
from vggt_lora.prediction.network import load_network
from vggt_lora.prediction.photos import open_photos
from vggt_lora.prediction.solve import align_to, solve
from vggt_lora.scenes.opening import open_scene

DEPTH = 12.0  # m, typical of the street that is photographed


def walk(folder: Path, count: int, size: tuple[int, int]) -> tuple[Path, np.ndarray]:
    """Render a walk forth and back; returns the folder of its photos in walking order, and the true cameras (count, 4,
    4).
    """
    scene = folder / "scene"
    scene.mkdir()
    write_demo(scene, {"style": "plaster", "layout": "street", "frames": count, "size": size, "seed": 5})
    order = [*range(0, count, 2), *reversed(range(1, count, 2))]
    frames, photos = open_scene(scene).frames, folder / "photos"
    photos.mkdir()
    for place, k in enumerate(order):
        shutil.copy(frames[k].image_path, photos / f"{place:04}.jpg")
    return photos, np.stack([frames[k].world_to_cam for k in order])


def bend(found, truth: np.ndarray) -> float:
    """Root mean square distance of the camera centres from the true ones, metres."""
    return fit_similarity(camera_centre(found.geometry.world_to_cam), camera_centre(truth)).residual


def closure(found, truth: np.ndarray, frames: int) -> tuple[float, float]:
    """Medians over the pairs of the first and the last photos: error of the rotation between them, degrees, and of the
    way, share of its photo's depth.
    """
    half = frames // 2
    pose, unit = found.geometry.world_to_cam, float(np.median(found.geometry.depth))
    turned, way = [], []
    for i in range(half):
        for j in range(len(pose) - half, len(pose)):
            said, real = (compose_poses(p[j], invert_pose(p[i])) for p in (pose, truth))
            turned.append(float(rotation_angles(said[:3, :3], real[:3, :3])))
            way.append(abs(np.linalg.norm(said[:3, 3]) / unit - np.linalg.norm(real[:3, 3]) / DEPTH))
    return float(np.median(turned)), float(np.median(way))


def command(photos: Path, output: Path, killed_after: int | None = None) -> None:
    """Run vggt_lora_predict in a process of its own; print what it says, its time and its peak memory."""
    words = ["--photos", str(photos), "--model", "tiny", "--output", str(output)]
    code = "import sys; from vggt_lora.commands import predict_command; sys.exit(predict_command(sys.argv[1:]))"
    begin, store = time.monotonic(), output.with_name(f".{output.name}.windows")
    process, peak = subprocess.Popen([sys.executable, "-c", code, *words]), 0
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text().split()
        peak = int(status[status.index("VmHWM:") + 1]) if "VmHWM:" in status else peak
        if killed_after is not None and len(list(store.glob("*.npz"))) >= killed_after:
            process.send_signal(signal.SIGKILL)
        time.sleep(0.05)
    print(f"\nstatus {process.returncode}, {time.monotonic() - begin:.0f} s, peak memory {peak / 1e6:.2f} GB, "
          f"{len(list(store.glob('*.npz')))} windows kept", flush=True)


def many(folder: Path, count: int) -> None:
    """Predict many photos, with a kill on the way."""
    photos, _ = walk(folder, 60, (216, 324))
    for k in range(60, count):  # the same walk again and again: rendering more would take longer than all the rest
        shutil.copy(photos / f"{k % 60:04}.jpg", photos / f"{k:04}.jpg")
    output = folder / "out"
    command(photos, output, killed_after=10)
    command(photos, output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=int, default=60)
    parser.add_argument("--size", type=int, default=112, help="long side that the network sees")
    parser.add_argument("--frames", type=int, default=8, help="photos of a window")
    parser.add_argument("--one", type=int, default=12, help="photos that also go through one window")
    parser.add_argument("--many", type=int, help="photos for the command, which is killed once")
    given = parser.parse_args()
    if given.many:
        with tempfile.TemporaryDirectory() as temporary:
            return many(Path(temporary), given.many)
    network = load_network("tiny")
    with tempfile.TemporaryDirectory() as temporary:
        source, truth = walk(Path(temporary), given.photos, (288, 432))
        photos = open_photos(str(source), given.size)
        names = photos.names[: given.one]
        few = open_photos(str(source), given.size, wanted=names)
        whole, parts = (
            solve(network.model, few, frames, progress="", loop=False) for frames in (given.one, given.frames)
        )
        moved, error = align_to(parts.geometry, whole.geometry, few.inside)
        depth = np.median(np.abs(np.log(moved.depth / whole.geometry.depth)))
        print(
            f"{given.one} photos, joined windows of {given.frames} against one window: depth differs by "
            f"{100 * depth:.1f} %, points by {100 * error:.1f} % of the depth "
            f"(medians); camera centres are off the truth by {bend(parts, truth[: given.one]):.2f} m joined, "
            f"{bend(whole, truth[: given.one]):.2f} m in one window"
        )
        begin = time.monotonic()
        with tempfile.TemporaryDirectory() as store:
            closed = solve(network.model, photos, given.frames, store=Path(store), key="walk")
            seconds = time.monotonic() - begin
            open_chain = solve(
                network.model, photos, given.frames, loop=False, store=Path(store), key="walk", progress=""
            )
        print(
            f"{given.photos} photos in {len(closed.windows)} windows: {seconds:.0f} s; loop "
            f"{'closed' if closed.closed else 'not found'}"
        )
        for name, found in (("open chain", open_chain), ("closed loop", closed)):
            turned, way = closure(found, truth, given.frames)
            print(
                f"{name}: camera centres off by {bend(found, truth):.2f} m; the last photos against the first: turned "
                f"by {turned:.1f} degrees too much or too little, "
                f"moved by {100 * way:.0f} % of the depth"
            )


if __name__ == "__main__":
    main()
