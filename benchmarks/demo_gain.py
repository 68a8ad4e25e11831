"""Does fine-tuning help? Cases, strategies, seeds and supervision side by side, with intervals over the judged frames.

    python benchmarks/demo_gain.py                                    # the README's table: every case, three seeds
    python benchmarks/demo_gain.py --case points --seeds 0            # six demo buildings without laser files
    python benchmarks/demo_gain.py --case laser --strategies a b c --supervision auto laser+sparse sparse
    python benchmarks/demo_gain.py --case points --set epochs=20 scale_normalization=points

A case says what trains and what judges:
    laser    six demo buildings with laser depth; a building of another style judges, by its laser
    points   the same six without laser files
    ceiling  the same, supervised by the renderer's exact depth: no supervision can do better
    one      one demo building, its own photos train, choose and judge (by laser); mean over seven buildings
    one-laser  the same, trained on laser depth too
    one-ceiling  the same, supervised by the renderer's exact depth
    real     two real courtyards train on COLMAP points, a third scene of the place judges, by its laser (needs
             shared/data)
    real-ceiling  that third scene alone, its own photos train on its laser and judge (needs shared/data)
    place    the same two train, a castle elsewhere judges, by its points (needs shared/data)
    kept     a real building alone; two thirds of its points train, the others judge; mean over two scenes (needs
             shared/data)

`elsewhere` in a block is what the run lost outside its buildings: on procedural worlds like those that the tiny
base was trained on, and, for runs on demo buildings, on two real scenes (needs shared/data).

Runs that are finished are read, not repeated: every run is a folder under --output. Nothing is asserted.
"""
import argparse
import dataclasses
import itertools
import json
import shutil
import time
from pathlib import Path

import numpy as np

from vggt_lora.adapters.adapter import load_adapter
from vggt_lora.core import METRIC_NAMES, project_root
from vggt_lora.datasets.samples import FrameCache
from vggt_lora.datasets.windows import make_windows
from vggt_lora.demo.demo_scenes import DEMO_HELD_OUT, demo_folder, demo_scenes
from vggt_lora.evaluation.forgetting import evaluate_elsewhere
from vggt_lora.evaluation.runner import base_of, evaluate_windows
from vggt_lora.evaluation.statistics import effects, in_words
from vggt_lora.reference_data import real_scene
from vggt_lora.scenes.opening import open_scene
from vggt_lora.supervision.depth_map import DepthAbsent, DepthMap
from vggt_lora.supervision.sources import DEPTH_SOURCES
from vggt_lora.supervision.sparse import sparse_depth
from vggt_lora.train import TrainConfig, train
from vggt_lora.training.build import build_model
from vggt_lora.training.config import read_config

CASES = (
    "laser", "points", "ceiling", "one", "one-laser", "one-ceiling", "real", "real-ceiling", "place", "kept"
)
MODELS = ("base", "adapted")
LASER_FILES = ("ground_truth_depth", "dslr_scan_eval", "occlusion")
# presets/one_building.yaml, judged by six of twelve photos
ONE_BUILDING = {"frames": 4, "epochs": 40, "train_fraction": 0.5}
# cases in which each scene trains and judges alone: what supervises it
ALONE = {
    "one": "sparse+anchored", "one-laser": "laser+sparse+anchored", "one-ceiling": "exact", "real-ceiling": "laser"
}

REAL_CASES = ("real", "real-ceiling", "place", "kept")  # that train on real scenes
REAL_JUDGES = {"strecha_fountain_p11": "laser", "eth3d_pipes": "sparse"}  # outside the domain of demo buildings


def exact_depth(scene, frame, size, plan=None) -> DepthMap:
    """Return the renderer's own depth, for every pixel but the sky."""
    path = scene.root / "exact_depth" / f"{Path(frame.name).stem}.npy"
    if not path.is_file():
        raise DepthAbsent(f"{path} does not exist: only demo scenes have exact depth")
    exact = np.load(path)
    rows, columns = (((np.arange(side) + 0.5) * full / side).astype(int) for side, full in zip(size, exact.shape))
    depth = exact[rows][:, columns].astype(np.float32)
    valid = np.isfinite(depth) & (depth > 0)
    return DepthMap(np.where(valid, depth, 0), valid, valid.astype(np.float32), {})


def some_points(scene, frame, size, plan, judge: bool) -> DepthMap:
    """Return the sparse depth of every third point of a scene, or of the others."""
    chosen = (scene.points.ids[frame.point_rows] % 3 == 0) == judge
    fewer = dataclasses.replace(frame, point_rows=frame.point_rows[chosen], observations=frame.observations[chosen])
    return sparse_depth(scene, fewer, size, plan)


def points_that_train(scene, frame, size, plan=None) -> DepthMap:
    """Return the depth of two thirds of the points."""
    return some_points(scene, frame, size, plan, judge=False)


def points_that_judge(scene, frame, size, plan=None) -> DepthMap:
    """Return the depth of the points that no training sees."""
    return some_points(scene, frame, size, plan, judge=True)


def without_laser(folder: Path) -> Path:
    """Copy the demo scenes into `folder`, those that train without laser files."""
    for scene in demo_scenes():
        if not (folder / scene.name).exists():
            drop = () if scene.name in DEMO_HELD_OUT else LASER_FILES
            shutil.copytree(scene, folder / scene.name, ignore=shutil.ignore_patterns(*drop))
    return folder


def linked(folder: Path, names: tuple[str, ...]) -> Path | None:
    """Link real scenes into one folder; None where they are not at hand."""
    scenes = [real_scene(name) for name in names]
    if not all(scenes):
        return None
    folder.mkdir(parents=True, exist_ok=True)
    for scene in scenes:
        if not (folder / scene.name).exists():
            (folder / scene.name).symlink_to(scene)
    return folder


def case_settings(case: str, work: Path) -> list[dict] | None:
    """Return the settings of a case's runs, one for each building; None where its data are not at hand."""
    held_out = ",".join(DEMO_HELD_OUT)
    if case == "laser":
        return [{}]
    if case == "points":
        return [{"data": str(without_laser(work / "without_laser")), "hold_out": held_out, "units_are_metres": "yes"}]
    if case == "ceiling":
        DEPTH_SOURCES["exact"] = exact_depth
        return [{"supervision": "exact", "frame_cache": False}]
    if case in ALONE:
        DEPTH_SOURCES["exact"] = exact_depth
        own = {"supervision": ALONE[case], "frame_cache": ALONE[case] != "exact", "eval_supervision": "laser"}
        scenes = [real_scene("strecha_fountain_p11")] if case == "real-ceiling" else demo_scenes()
        return [{"data": str(scene), **own, **ONE_BUILDING} for scene in scenes] if all(scenes) else None
    if case == "kept":
        DEPTH_SOURCES.update(points_that_train=points_that_train, points_that_judge=points_that_judge)
        scenes = [real_scene(name) for name in ("sceaux_castle", "eth3d_pipes")]
        own = {"supervision": "points_that_train+anchored", "eval_supervision": "points_that_judge", **ONE_BUILDING}
        return [{"data": str(scene), **own} for scene in scenes] if all(scenes) else None
    judge = {"real": "strecha_fountain_p11", "place": "sceaux_castle"}[case]
    folder = linked(work / case, ("strecha_castle_p30", "strecha_entry_p10", judge))
    return folder and [{"data": str(folder), "hold_out": judge}]


def results_of(config: TrainConfig, case: str) -> dict:
    """Return the results of a case's run, which is made where it is absent."""
    folder = Path(config.output)
    stated = folder / "seconds.json"
    if not stated.is_file():
        started = time.monotonic()
        train(config)
        stated.write_text(json.dumps(round(time.monotonic() - started, 1)))
    results = json.loads((folder / "results.json").read_text())
    return results | {"seconds": json.loads(stated.read_text()), "elsewhere": elsewhere_of(folder, case)}


def elsewhere_of(folder: Path, case: str) -> dict[str, list[dict]]:
    """Return the rows of base and adapted outside a run's buildings, measured where they are not at hand."""
    places = {"worlds": rows_on_worlds}
    if case not in REAL_CASES:
        places |= {name: rows_on_real for name in REAL_JUDGES if real_scene(name)}
    found = {}
    for place, measured in places.items():
        kept = folder / f"elsewhere_{place}.json"
        if not kept.is_file():
            adapted = load_adapter(build_model(read_config(folder)), folder / "adapter")
            kept.write_text(json.dumps(measured(adapted, place), default=float))
        found[place] = json.loads(kept.read_text())
    return found


def rows_on_worlds(adapted, place: str) -> list[dict]:
    """Return the rows of base and adapted on procedural worlds."""
    return evaluate_elsewhere(adapted, demo_folder().parent / place)[0].rows


def rows_on_real(adapted, place: str) -> list[dict]:
    """Return the rows of base and adapted on a real scene."""
    scene = open_scene(real_scene(place))
    frames = FrameCache(adapted.get_base_model().config.img_size, supervision=REAL_JUDGES[place])
    windows = [(scene, window) for window in make_windows(scene)]
    return evaluate_windows({"base": base_of(adapted), "adapted": adapted}, windows, frames).rows


def fields(pairs: list[str]) -> dict:
    """Return NAME=VALUE pairs as fields of TrainConfig, of the fields' types."""
    default, found = TrainConfig(), {}
    for name, value in (pair.split("=", 1) for pair in pairs):
        kind = type(getattr(default, name))
        read = {bool: "True".__eq__, type(None): json.loads}.get(kind, kind)
        found[name] = read(value)
    return found


def runs_of(case: str, settings: list[dict], strategy: str, supervision: str, seed: int, args) -> list[dict]:
    """Return the results of a case's runs with one seed, one for each building."""
    found = []
    for one in settings:
        name = "-".join([case, strategy, supervision, str(seed), Path(one.get("data", "")).name, *args.set]).replace(
            "/", "_"
        )
        own = (
            {"strategy": strategy, "supervision": supervision, "seed": seed, "preflight": "off"}
            | one
            | fields(args.set)
        )
        found.append(results_of(TrainConfig(output=str(args.output / name), **own), case))
    return found


def print_results(title: str, found: list[list[dict]]) -> None:
    """Print a block of lines for one setting; `found` holds the results of each seed, one for each building."""
    runs = [[row for results in of_seed for row in results["frames"]] for of_seed in found]
    every = [results for of_seed in found for results in of_seed]
    seconds = [results["seconds"] for results in every]
    print(f"\n{title}; truth {every[0]['protocol']['truth']}; {min(seconds):.0f} to {max(seconds):.0f} s a run")
    for effect in effects(runs):
        print("  " + in_words(effect, METRIC_NAMES[effect.metric]))
    print("  " + in_words(effects(runs, ("absrel",), "scale+shift per image")[0], "AbsRel after scale and shift"))
    for region in ("wall", "0 to 5"):
        changes = [
            r["change"]
            for results in every
            for r in results["regions"]
            if (r["region"], r["metric"]) == (region, "absrel") and r["change"] is not None
        ]
        if changes:
            print(f"  region {region}: AbsRel {100 * np.mean(changes):+.1f} % in the mean of {len(changes)} runs")
    for place in every[0]["elsewhere"]:
        elsewhere = effects([results["elsewhere"][place] for results in every], ("absrel",))[0]
        print(f"  elsewhere ({place}): " + in_words(elsewhere, "AbsRel"))
    for model in MODELS:
        cameras = [row for results in every for row in results["cameras"] if row["model"] == model]
        rotation, direction = (
            np.mean([row[name] or 0 for row in cameras]) for name in ("rotation_median", "translation_median")
        )
        print(f"  cameras of {model}: rotation {rotation:.2f} degrees, direction {direction:.1f} degrees", flush=True)


def main() -> None:
    """Make the runs and print a block for each setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--strategies", nargs="+", default=[TrainConfig().strategy])
    parser.add_argument(
        "--supervision", nargs="+", default=["auto"], help="for the cases laser, points, real and place"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE")
    parser.add_argument("--output", type=Path, default=project_root() / "outputs" / "demo_gain")
    args = parser.parse_args()
    for case in args.case:
        settings = case_settings(case, args.output / "data")
        if settings is None:
            print(f"\ncase {case}: skipped, its scenes are not at hand (shared/data)")
            continue
        for strategy, supervision in itertools.product(args.strategies, args.supervision):
            found = [runs_of(case, settings, strategy, supervision, seed, args) for seed in args.seeds]
            stated = settings[0].get("supervision", supervision)
            print_results(f"{case}: strategy {strategy}, supervision {stated}, seeds {args.seeds}", found)


if __name__ == "__main__":
    main()
