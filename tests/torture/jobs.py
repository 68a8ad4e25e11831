"""Commands that write something worth keeping, each as small as can be; the same call begins, or goes on after a kill.
"""
import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np


@dataclasses.dataclass(frozen=True)
class Job:
    """Something that a user starts, and that may be killed."""

    name: str
    work: Callable[[Path, Path], None]  # receives the shared input and the folder that it writes to
    living: tuple[str, ...] = ()  # names (globs) of files that grow while the job runs, so that they may end anywhere
    clocks: tuple[str, ...] = ()  # names (globs) of files that say when and how long, so that no two are equal


def scene_of(base: Path) -> Path:
    """The scene that all jobs read; made where it is absent."""
    from vggt_lora.demo.demo_scenes import demo_scene

    return demo_scene(base, "small_house", 4, (84, 126), seed=3, style="plaster", layout="corner")


def demo(base: Path, out: Path) -> None:
    """A generated scene."""
    from vggt_lora.demo.demo_scenes import demo_scene

    demo_scene(out, "house", 4, (84, 126), seed=5, style="brick", layout="corner")


def store(base: Path, out: Path) -> None:
    """Frames preprocessed and kept."""
    from vggt_lora.scenes.opening import open_scene
    from vggt_lora.datasets.frame_store import FrameStore
    from vggt_lora.datasets.windows import Window

    scene = open_scene(scene_of(base))
    FrameStore(56, supervision="laser+sparse", folder=out).prepare(
        [(scene, Window(scene.name, tuple(range(len(scene)))))], progress=False
    )


def dense(base: Path, out: Path) -> None:
    """Dense depth with its cache."""
    from vggt_lora.supervision.dense import dense_depth
    from vggt_lora.files.cache import write_arrays
    from vggt_lora.scenes.opening import open_scene

    scene, how = open_scene(scene_of(base)), {"cache": out / "cache", "progress": False}
    write_arrays(out / "maps.npz", **{f.name: dense_depth(scene, f, (56, 84), **how).depth for f in scene.frames})


def checkpoints(base: Path, out: Path) -> None:
    """A chain of checkpoints, each made from the one before it: what the training does between its steps."""
    import torch

    from vggt_lora.training.checkpoint import checkpoint_files, load_checkpoint, save_step, take_up
    from vggt_lora.training.run import remove_remainders

    torch.manual_seed(0)
    remove_remainders(out)
    out = out / "checkpoints"
    model = torch.nn.Linear(200, 200)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    step = load_checkpoint(take_up(out, keep=2)[1], model, optimizer)["step"] if checkpoint_files(out) else 0
    while step < 25:
        optimizer.zero_grad()
        model(torch.rand(2, 200)).square().mean().backward()
        optimizer.step()
        step += 1
        save_step(out, model, optimizer, keep=2, step=step)


def training_config(base: Path, out: Path, **changes):
    """The smallest training."""
    from vggt_lora.training.config import TrainConfig

    settings = {
        "strategy": "b", "model": "random", "data": str(base / "small_house"), "output": str(out), "epochs": 3,
        "frames": 2, "image_size": 56, "rank": 2, "lr": 1e-3, "train_fraction": 0.5, "save_every": 1,
        "supervision": "sparse", "device": "cpu",
    }
    known = {f.name for f in dataclasses.fields(TrainConfig)}
    return TrainConfig(**{n: v for n, v in (settings | changes).items() if n in known})


def train(base: Path, out: Path, **changes) -> None:
    """A training, from its first line to its report."""
    from vggt_lora.train import train as run
    from vggt_lora.training.checkpoint import checkpoint_files

    scene_of(base)
    run(training_config(base, out, resume=bool(checkpoint_files(out / "checkpoints")), **changes))


def prefix(base: Path, out: Path) -> None:
    """States after the frozen layers, kept for every window."""
    import torch

    from vggt_lora.model.vggt import VGGT, VGGTConfig
    from vggt_lora.efficiency.feature_store import FeatureStore

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = VGGT(VGGTConfig.golden()).eval()
        photos = torch.rand(24, 2, 3, 56, 56)
    kept = FeatureStore(model, 1, folder=out)
    for number, images in enumerate(photos):
        kept.state(images, (f"photo {number}", "another"))


def export(base: Path, out: Path) -> None:
    """An adapter melted into its base's checkpoint; who has an export already keeps it."""
    from vggt_lora.adapters.export import UNFINISHED, export_merged

    merged = out / "merged"
    if not (merged / "config.json").is_file() or (merged / UNFINISHED).exists():
        export_merged(base / "adapter", merged, base=base / "model")


def grid(base: Path, out: Path) -> None:
    """A comparison of two runs side by side, each in a notebook of its own: papermill in a process, a kernel below it.
    """
    from vggt_lora.compare import CompareConfig, compare

    given = training_config(scene_of(base).parent, out, epochs=1, model="tiny", image_size=84)
    names = (
        "model", "data", "epochs", "frames", "image_size", "lr", "train_fraction", "supervision", "device",
        "save_every",
    )
    compare(
        CompareConfig(
            grid="rank=2,4", settings="; ".join(f"{n}={getattr(given, n)}" for n in names), output=str(out), jobs=2
        ),
        tell=lambda text: None,
    )


RUN = {
    "living": ("metrics.jsonl", "train.log", "tensorboard/*", "events.*", "executed.ipynb", "failed-*"),
    "clocks": (
        "preflight.json", "resource_usage.json", "report.html", "config.json", "state.json", "comparison.html",
        "metrics.jsonl", "step-*.pt", "last.pt",
    ),
}
JOBS = {
    job.name: job
    for job in (
        Job("demo", demo), Job("store", store), Job("dense depth", dense), Job("checkpoints", checkpoints),
        Job("prefix", prefix), Job("export", export), Job("training", train, **RUN), Job("comparison", grid, **RUN),
    )
}
QUICK = ("demo", "store", "checkpoints", "training")
# begun twice at once; checkpoints have their run's lock
SHARED = ("demo", "store", "dense depth", "prefix", "export", "training", "comparison")


def make_base(base: Path, network: bool = False) -> Path:
    """What all jobs read: a scene, and with `network` a small model and an adapter for it."""
    scene_of(base)
    if network and not (base / "adapter").exists():
        from tests.adversary.network_attacks import make_base as make_network

        make_network(base)
    return base


# --- what became of a folder ------------------------------------------------------------------------------------------

def fault_of(path: Path) -> str:
    """Say why a file is not whole; empty if it is, or if its kind does not show."""
    import json
    import zipfile

    try:
        if path.suffix in (".json", ".ipynb"):
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".safetensors":
            from safetensors.numpy import load_file

            load_file(path)
        elif path.suffix in (".npz", ".pt"):
            with zipfile.ZipFile(path) as held:
                if held.testzip():
                    return "a sum inside differs"
        elif path.suffix == ".npy":
            np.load(path)
        elif path.suffix.lower() in (".png", ".jpg"):
            from PIL import Image

            with Image.open(path) as image:
                image.load()
        elif path.suffix == ".html" and not path.read_text(encoding="utf-8").endswith("</html>\n"):
            return "has no end"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "" if path.stat().st_size else "empty"


def final_names(out: Path, job: Job) -> dict[str, Path]:
    """Files under their final names; what a name with a dot in front hides is nobody's."""
    found = {path.relative_to(out).as_posix(): path for path in sorted(out.rglob("*")) if path.is_file()}
    return {name: path for name, path in found.items() if not any(part.startswith(".") for part in Path(name).parts)}


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a file, or its folder, is named by a pattern."""
    path = Path(name)
    return any(path.match(pattern) or path.match(f"{pattern}/*") for pattern in patterns)


def half_written(out: Path, job: Job, expected: dict[str, str]) -> list[str]:
    """Files that have their final name, are not whole, and are not what they were to become."""
    now = content(out, job, whole_only=True)
    names = {n: p for n, p in final_names(out, job).items() if not matches(n, job.living) and not n.endswith(".lock")}
    return [
        f"{name} ({fault})"
        for name, path in names.items()
        if now.get(name, 0) != expected.get(name) and (fault := fault_of(path))
    ]


def content(out: Path, job: Job, whole_only: bool = False) -> dict[str, str]:
    """{name: digest} of everything that two undisturbed runs have in common; records without their clocks."""
    import hashlib
    import json

    found = {}
    for name, path in final_names(out, job).items():
        if whole_only and (matches(name, job.living) or path.suffix == ".pt"):
            continue
        if path.name == "metrics.jsonl":
            records = [json.loads(line) for line in path.read_text().splitlines()]
            data = json.dumps([{k: v for k, v in r.items() if k not in ("wall", "seconds")} for r in records]).encode()
        elif path.suffix == ".pt" and path.parent.name == "checkpoints":
            data = trained_content(path)
        elif matches(name, (*job.living, *job.clocks)):
            continue
        else:
            data = path.read_bytes().replace(str(out).encode(), b"OUT")
        found[name] = hashlib.sha256(data).hexdigest()
    return found


def trained_content(path: Path) -> bytes:
    """What a checkpoint says about the training: weights, optimiser, random streams."""
    from vggt_lora.training.checkpoint import content_digest, read_checkpoint

    held = read_checkpoint(path)
    return content_digest(
        [held["weights"], held.get("optimizer"), [r["torch"] for r in held.get("random", ())]]
    ).encode()
