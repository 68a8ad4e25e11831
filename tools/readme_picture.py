"""Draw the README's picture from a finished run: a held-out photo, depth, errors, and the adapted cloud.

    python tools/readme_picture.py [RUN] [PICTURE]

RUN is a run folder (default: the newest under outputs/), PICTURE the PNG to write (default: docs/overview.png). The
frame is always the middle one of the held-out frames, so nobody chooses a favourable one. Depth is aligned by the
median of the image, as in the first table of `nbs/04_evaluate.ipynb`.
"""
import io
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from vggt_lora.evaluate import evaluate, newest_run
from vggt_lora.evaluation.metrics import EvaluatedFrame
from vggt_lora.views.clouds.clouds3d import depth_to_cloud, orbit_camera, render_cloud
from vggt_lora.views.figures import new_figure
from vggt_lora.views.plan import up_direction

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 300_000  # bytes of the picture


def cloud_picture(frame: EvaluatedFrame, depth: np.ndarray, up) -> Image.Image:
    """Draw a depth map as coloured points, from above and beside its own camera."""
    known = frame.valid & (depth > 0)  # where the truth knows something too: the sky has no depth
    points, colours = depth_to_cloud(depth, frame.photo, frame.K, frame.world_to_cam, known)
    K, eye = orbit_camera(points, 28, 18, (520, 780), up=up, forward=frame.world_to_cam[2, :3], zoom=1.2)
    return render_cloud(points, colours, K, eye, (520, 780), point_size=4.0)


def draw(maps: list[EvaluatedFrame]):
    """Draw the page for the middle one of the held-out frames."""
    frame = maps[len(maps) // 2]
    depth = {name: frame.aligned(name) for name in ("base", "adapted")}
    wrong = {
        name: np.where(frame.valid, 100 * np.abs(found / np.where(frame.valid, frame.truth, 1) - 1), np.nan)
        for name, found in depth.items()
    }
    low, high = np.percentile(frame.truth[frame.valid], [2, 98])
    figure = new_figure(11, 5.2)
    grid = figure.subplots(2, 3)
    for ax, title, picture in (
        (grid[0, 0], "a photo of a building that nothing was trained on", frame.photo),
        (
            grid[1, 0],
            "adapted depth, as points",
            cloud_picture(frame, depth["adapted"], up_direction(np.stack([m.world_to_cam for m in maps]))[0]),
        ),
    ):
        ax.imshow(picture)
        ax.set_title(title, fontsize=9)
    for column, name in enumerate(("base", "adapted"), start=1):
        shown = grid[0, column].imshow(depth[name], cmap="viridis", vmin=low, vmax=high)
        grid[0, column].set_title(f"{name}: depth", fontsize=9)
        error = grid[1, column].imshow(wrong[name], cmap="magma", vmin=0, vmax=30)
        grid[1, column].set_title(f"{name}: error, {np.nanmean(wrong[name]):.1f} % in the mean", fontsize=9)
        grid[1, column].set_facecolor("#dddddd")
    for ax in grid.flat:
        ax.set(xticks=[], yticks=[])
    figure.colorbar(shown, ax=list(grid[0, 1:]), shrink=0.85, label="m" if frame.metric else "scene units")
    figure.colorbar(error, ax=list(grid[1, 1:]), shrink=0.85, label="%", extend="max")
    return figure


def save_small(figure, path: Path) -> None:
    """Save a figure as a palette PNG below LIMIT; raises SystemExit where it does not fit."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    image = Image.open(buffer).convert("RGB")
    for colours in (256, 128, 64, 32):
        out = io.BytesIO()
        image.quantize(colours).save(out, "PNG", optimize=True)
        if out.tell() <= LIMIT:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(out.getvalue())
            return
    raise SystemExit(f"{path}: {out.tell()} bytes, over {LIMIT} with the fewest colours")


def main(arguments: list[str]) -> None:
    """Draw from the named run, or the newest."""
    run = Path(arguments[0]) if arguments else newest_run()
    if run is None:
        raise SystemExit("no finished run under outputs/: train first (make train)")
    path = Path(arguments[1]) if len(arguments) > 1 else ROOT / "docs" / "overview.png"
    save_small(draw(evaluate(run, protocol="median").maps), path)
    print(f"{path}: {path.stat().st_size // 1000} kB, from {run.name}")


if __name__ == "__main__":
    main(sys.argv[1:])
