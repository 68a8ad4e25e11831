"""Compare dense depth with exact depth, a laser and sparse points; print coverage, errors and seconds a photo.

    python benchmarks/dense_depth.py                     # demo scenes at 336 x 504, two photos each; real scenes if
                                                         # they are installed
    python benchmarks/dense_depth.py --photos 12 --real-size 512 768 --device cuda
    OMP_NUM_THREADS=2 python benchmarks/dense_depth.py --threads 2 --only strecha_fountain_p11 --photos 1

Covered pixels are those that dense_depth keeps. Under mask value 2 (people, trees) it keeps none, under value 1
(glass) the most reliable, so coverage is also given for each. "Its own points" is the agreement with the sparse points
that the photo observes, photo by photo and over all. "Seen by k others" counts, from the exact depth of all photos of a
demo scene, the pixels that a perfect method could confirm in at least k other photos, and the covered part of them.

Seconds are those of one photo's estimate (its neighbours cost the same again, once), of the processor and on the clock,
with --threads threads. A table at the end has a line for each scene: coverage of all pixels (without the sky, if exact
depth is known), and agreement with the sparse points that the photos observe. Nothing is asserted.
"""
import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from vggt_lora.evaluation.confidence import sparsification
from vggt_lora.demo.demo_scenes import DEMO, demo_scenes
from vggt_lora.geometry.cameras import project_points
from vggt_lora.reference_data import real_scene
from vggt_lora.scenes.images import ImagePlan, load_image
from vggt_lora.scenes.masks import photo_mask
from vggt_lora.scenes.opening import open_scene
from vggt_lora.stereo.estimate import DenseSettings, neighbour_frame, estimate, main_frame
from vggt_lora.stereo.planesweep import depth_range
from vggt_lora.stereo.view_selection import find_neighbours
from vggt_lora.supervision.dense import (
    confirmations, dense_depth, dense_estimate, prepare_dense, scene_down,
)

REAL = ("strecha_fountain_p11", "strecha_castle_p30", "strecha_entry_p10", "sceaux_castle", "eth3d_pipes")


def resized(values: np.ndarray, size: tuple) -> np.ndarray:
    """Return values at another size, nearest pixel."""
    rows, columns = (((np.arange(new) + 0.5) * old / new).astype(int) for new, old in zip(size, values.shape))
    return values[rows][:, columns]


def plain_plan(frame, size) -> ImagePlan:
    """Return the plan of a plain resize."""
    return ImagePlan(tuple(frame.size), size, (0, 0), size, "squash")


def textured(frame, size) -> np.ndarray:
    """Return pixels whose 7x7 surroundings vary by more than four grey levels (standard deviation)."""
    from scipy.ndimage import uniform_filter

    grey = load_image(frame.image_path, plain_plan(frame, size)) @ np.array([0.299, 0.587, 0.114])
    return uniform_filter(grey ** 2, 7) - uniform_filter(grey, 7) ** 2 > 16


def line(what: str, error: np.ndarray, candidates: int) -> str:
    """Return one row of the table: what, coverage, and the errors of what is covered."""
    if not len(error):
        return f"  {what:34} covered {0:6.1%}"
    return (
        f"  {what:34} covered {len(error) / max(candidates, 1):6.1%}   median {np.median(error):7.3%}   90 % below "
        f"{np.quantile(error, 0.9):7.2%}   "
        f"within 1 % {np.mean(error < 0.01):6.1%}   off by 5 % {np.mean(error > 0.05):6.2%}"
    )


def ranking(error: np.ndarray, confidence: np.ndarray) -> str:
    """Return what the sparsification curve says, of all pixels, kept or not."""
    error = np.minimum(np.nan_to_num(error, nan=1.0), 1.0)
    found = sparsification(error, confidence)
    shares = 1 - found["removed"][::-1]
    curve, best = (error.mean() * found[name][::-1] for name in ("confidence", "oracle"))
    area = (curve - best).mean()
    points = ", ".join(
        f"{share:.0%}: {one:.2%} ({other:.2%})" for share, one, other in zip(shares[1::2], curve[1::2], best[1::2])
    )
    return (
        f"  mean error of the most confident (best possible) {points}\n  "
        f"{'falls all the way' if (np.diff(curve) > 0).all() else 'does not fall all the way'}, AUSE {area:.2%}"
    )


def estimated(scene, frame, size, arguments, cache):
    """Return the estimate of a frame, and the pixels that dense_depth keeps of it."""
    options = {"settings": arguments.settings, "device": arguments.device, "cache": cache, "progress": False}
    return dense_estimate(scene, frame, size, **options), dense_depth(scene, frame, size, **options).valid


def seen_by(scene, frame, size, settings) -> np.ndarray:
    """Return in how many other photos each pixel is seen (h, w): how many would confirm it if all depth were exact."""
    def inverse(shot):
        exact = resized(np.load(scene.root / "exact_depth" / f"{Path(shot.frame.name).stem}.npy"), shot.plan.size)
        return torch.from_numpy(np.where(exact > 0, 1 / np.where(exact > 0, exact, 1), 1e-6).astype(np.float32))

    main = main_frame(frame, size, None)
    others = [neighbour_frame(main, other) for other in scene.frames if other.name != frame.name]
    return confirmations(main, inverse(main), [(other, inverse(other)) for other in others], settings)[0].numpy()


def chosen(scene, photos: int) -> list:
    """Return so many frames of a scene, evenly spread."""
    count = min(photos, len(scene))
    return [scene.frames[int((k + 0.5) * len(scene) / count)] for k in range(count)]


def prepared(scene, size, arguments, cache) -> None:
    """Compute the estimates that the chosen photos need, with a bar."""
    prepare_dense(
        scene, [(frame, plain_plan(frame, size)) for frame in chosen(scene, arguments.photos)], arguments.settings,
        arguments.device, cache,
    )


def demo(scene, arguments, cache) -> None:
    """Print what exact depth says about a demo scene."""
    size, parts = tuple(arguments.size), json.loads((scene.root / "labels" / "parts.json").read_text())
    prepared(scene, size, arguments, cache)
    depth, truth, confidence, valid, texture, mask, part, seen = [], [], [], [], [], [], [], []
    for frame in chosen(scene, arguments.photos):
        found, kept = estimated(scene, frame, size, arguments, cache)
        stem = Path(frame.name).stem
        exact = resized(np.load(scene.root / "exact_depth" / f"{stem}.npy"), size)
        known = exact > 0
        for into, values in (
            (depth, found.depth), (truth, exact), (confidence, found.confidence), (valid, kept),
            (texture, textured(frame, size)), (mask, photo_mask(scene, frame, size)),
            (part, resized(np.asarray(Image.open(scene.root / "labels" / "parts" / f"{stem}.png")), size)),
            (seen, seen_by(scene, frame, size, arguments.settings)),
        ):
            into.append(values[known])
    depth, truth, confidence, valid, texture, mask, part, seen = map(
        np.concatenate, (depth, truth, confidence, valid, texture, mask, part, seen)
    )
    error = np.abs(depth / truth - 1)
    print(f"{scene.name}: {arguments.photos} photos at {size[1]}x{size[0]}")
    print(line("all pixels but sky", error[valid], len(valid)))
    for count in (1, 2, 3):
        there = seen >= count
        print(line(f"seen by {count} others ({there.mean():.1%} of them)", error[valid & there], int(there.sum())))
    sure = valid & (confidence >= 0.03)
    print(line("of confidence 0.03 and more", error[sure], len(valid)))
    for what, value in (
        ("outside of masks", 0),
        ("under mask value 1 (glass)", 1),
        ("under mask value 2 (people, trees)", 2),
    ):
        print(line(what, error[valid & (mask == value)], int((mask == value).sum())))
    print(line("textured pixels", error[valid & texture], int(texture.sum())))
    for number, name in enumerate(parts):
        if (part == number).sum() > 0.005 * len(part):
            print(
                line(
                    f"  {name} ({(part == number).mean():.0%} of pixels)",
                    error[valid & (part == number)],
                    int((part == number).sum()),
                )
            )
    print(ranking(error, confidence))
    arguments.table[scene.name] = {"size": size, "covered": valid.mean(), "median": np.median(error[valid])}


def laser(scene, arguments, cache) -> None:
    """Print what the fountain's laser says."""
    size, header = (
        tuple(arguments.real_size),
        (scene.root / "dslr_calibration_jpg" / "cameras.txt").read_text().split("\n"),
    )
    width, height, fx, fy, cx, cy = map(float, next(text for text in header if text and text[0] != "#").split()[2:8])
    errors, candidates, confidences = [], 0, []
    for frame in chosen(scene, arguments.photos):
        found, kept = estimated(scene, frame, size, arguments, cache)
        depth = np.fromfile(scene.root / "ground_truth_depth" / "dslr_images" / Path(frame.name).name, "<f4").reshape(
            int(height), int(width)
        )
        rows, columns = np.nonzero(np.isfinite(depth))
        K = plain_plan(frame, size).intrinsics(frame.K)
        u, v = K[0, 0] * (columns + 0.5 - cx) / fx + K[0, 2], K[1, 1] * (rows + 0.5 - cy) / fy + K[1, 2]
        inside = (u >= 0) & (v >= 0) & (u < size[1]) & (v < size[0])
        row, column = v[inside].astype(int), u[inside].astype(int)
        keep = kept[row, column]
        off = np.abs(found.depth[row, column] / depth[rows, columns][inside] - 1)
        errors.append(off[keep])
        candidates += len(keep)
        confidences.append(np.stack([found.confidence[row, column], off]))
        print(line(f"laser, {Path(frame.name).name}", off[keep], len(keep)))
    print(line("laser, all", np.concatenate(errors), candidates))
    confidence, off = np.concatenate(confidences, 1)
    for share in (0.65, 0.8):
        print(
            line(
                f"laser, most confident {share:.0%}",
                off[np.argsort(-confidence, kind="stable")][: int(share * len(off))],
                len(off),
            )
        )
    print(ranking(off, confidence))


def held_out(scene, arguments, cache) -> None:
    """Print what the points of *other* photos say, which the frame itself does not observe, and its own."""
    size = tuple(arguments.real_size if scene.name not in DEMO else arguments.size)
    results, covered = {"its own points": [], "points of its neighbours alone": []}, []
    totals = dict.fromkeys(results, 0)
    through = []
    for frame in chosen(scene, arguments.photos):
        found, kept = estimated(scene, frame, size, arguments, cache)
        covered.append(kept.mean())
        own = np.unique(frame.point_rows)
        around = [scene.frames[n.index].point_rows for n in find_neighbours(scene, frame, arguments.settings.views)]
        others = np.setdiff1d(np.concatenate([*around, own[:0]]), own)
        K, keep = plain_plan(frame, size).intrinsics(frame.K), kept
        for what, rows in zip(results, (own, others)):
            pixels, z = project_points(scene.points.xyz[rows], frame.world_to_cam, K)
            inside = (z > 0) & (pixels >= 0).all(1) & (pixels < size[::-1]).all(1)
            column, row = pixels[inside].astype(int).T
            there, ratio = keep[row, column], found.depth[row, column] / z[inside]
            totals[what] += int(inside.sum())
            results[what].append(np.abs(ratio - 1)[there])
            if rows is others:
                through.append(ratio[there] > 1.05)
            else:
                print(line(f"its own points, {Path(frame.name).name}", results[what][-1], int(inside.sum())))
    for what, parts in results.items():
        print(line(what, np.concatenate(parts), totals[what]))
    own = np.concatenate(results["its own points"])
    arguments.table.setdefault(scene.name, {"size": size, "covered": np.mean(covered), "median": np.nan}).update(
        points=len(own) / max(totals["its own points"], 1), agree=np.median(own), agree90=np.quantile(own, 0.9)
    )
    through = np.concatenate(through)
    print(
        f"  {'':34} of the latter the dense depth lies 5 % behind the point at "
        f"{through.mean() if len(through) else 0:.2%}; in front may be true occlusion"
    )


def seconds(scene, size, arguments) -> None:
    """Print the processor time of one estimate."""
    frame = scene.frames[len(scene) // 2]
    main = main_frame(frame, size, None)
    others = [
        neighbour_frame(main, scene.frames[n.index]) for n in find_neighbours(scene, frame, arguments.settings.views)
    ]
    depths = depth_range(scene, frame, arguments.settings.near, arguments.settings.far)
    start, worked = time.perf_counter(), time.process_time()
    _, _, planes = estimate(main, others, depths, arguments.settings, arguments.device, np.array(scene_down(scene)))
    worked, passed = time.process_time() - worked, time.perf_counter() - start
    print(
        f"  one photo, {planes} planes, {len(others)} neighbours: {worked:.1f} s of processor time, {passed:.1f} s "
        f"passed, {torch.get_num_threads()} threads, {arguments.device}",
        flush=True,
    )
    arguments.table[scene.name].update(worked=worked, passed=passed)


def summary(table: dict, threads: int, device: str) -> None:
    """Print a line for each scene."""
    print(
        f"\n{'scene':22} {'size':>9} {'covered':>8} {'median error':>13} {'points covered':>15} "
        f"{'agreement median':>17} {'90 % below':>11} {'s worked':>9} {'s passed':>9}   {threads} threads, {device}"
    )
    for name, row in table.items():
        median = "" if np.isnan(row["median"]) else f"{row['median']:.3%}"
        print(
            f"{name:22} {row['size'][1]:>5}x{row['size'][0]:<3} {row['covered']:8.1%} {median:>13} "
            f"{row['points']:15.1%} {row['agree']:17.3%} {row['agree90']:11.2%} "
            f"{row['worked']:9.1f} {row['passed']:9.1f}"
        )


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=(336, 504), help="height and width for the demo scenes")
    parser.add_argument(
        "--real-size", type=int, nargs=2, default=(512, 768), help="height and width for the real scenes"
    )
    parser.add_argument("--photos", type=int, default=2, help="photos of each scene, evenly spread")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cache", help="folder that keeps estimates between calls; default: a temporary one")
    parser.add_argument("--only", nargs="*", help="names of scenes")
    parser.add_argument("--threads", type=int, help="of the processor; default: what torch takes")
    arguments = parser.parse_args()
    arguments.settings, arguments.table = DenseSettings(), {}
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as temporary:
        cache = Path(arguments.cache or temporary)
        wanted = not arguments.only or set(arguments.only) & set(DEMO)  # making them takes a minute
        for folder in demo_scenes() if wanted else ():
            if not arguments.only or folder.name in arguments.only:
                scene = open_scene(folder)
                demo(scene, arguments, cache)
                held_out(scene, arguments, cache)
                seconds(scene, tuple(arguments.size), arguments)
        for name in REAL:
            if arguments.only and name not in arguments.only:
                continue
            if real_scene(name) is None:
                print(f"{name}: absent, skipped")
                continue
            scene = open_scene(real_scene(name))
            prepared(scene, tuple(arguments.real_size), arguments, cache)
            print(f"{name}: {arguments.photos} photos at {arguments.real_size[1]}x{arguments.real_size[0]}")
            if name == "strecha_fountain_p11":
                laser(scene, arguments, cache)
            held_out(scene, arguments, cache)
            seconds(scene, tuple(arguments.real_size), arguments)
    summary(arguments.table, torch.get_num_threads(), arguments.device)


if __name__ == "__main__":
    main()
