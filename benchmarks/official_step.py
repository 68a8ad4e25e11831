"""Compare a step of the official class and loss with PEFT and this project's step: time and memory.

    python benchmarks/official_step.py --official PATH              # a checkout of facebookresearch/vggt
    python benchmarks/official_step.py --official PATH --shape 8x518x518 --device cuda --strategies b

Nothing of the official code is part of this project: `vggt.models.vggt.VGGT` and the `MultitaskLoss` of its
`training/loss.py` are imported from PATH, in a process of its own. Both sides get the same random weights, the same
photos and depth, the same layers to adapt (PEFT, same rank), AdamW, and one thread count. The official aggregator
recomputes its blocks in training mode; it is in that mode where it has adapters, as its own loop would need.

official   forward from the photos, the official loss, backward, AdamW
ours       the step of this project with its feature cache ("cache" of benchmarks/train_step.py)
forward    both without gradients, in evaluation mode
"""
import argparse
import dataclasses
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import vggt_lora  # noqa: E402, F401  before torch: it sets how its threads wait
import torch  # noqa: E402
import train_step  # noqa: E402
from vggt_lora.adapters.adapter import apply_lora  # noqa: E402
from vggt_lora.training.config import TrainConfig  # noqa: E402

LOSS = {
    "camera": {"weight": 5.0, "loss_type": "l1"},
    "depth": {"weight": 1.0, "gradient_loss_fn": "grad", "valid_range": 0.98},
}


@dataclasses.dataclass
class Job:
    """One measurement, in a process of its own."""

    side: str  # official or ours
    strategy: str  # a, b, c; "forward": no training
    official: str
    size: str  # of benchmarks/train_step.py
    shape: tuple[int, tuple[int, int]]  # photos, (height, width)
    device: str
    precision: str
    rounds: int


def official_class(checkout: str) -> type:
    """Import the official model from a checkout; exits with what is missing."""
    folder = Path(checkout).expanduser().resolve()
    if not (folder / "vggt" / "models" / "vggt.py").is_file() or not (folder / "training" / "loss.py").is_file():
        sys.exit(
            f"{folder} holds no vggt/models/vggt.py and training/loss.py; give a checkout of "
            "https://github.com/facebookresearch/vggt"
        )
    sys.path[:0] = [str(folder), str(folder / "training")]
    from vggt.models.vggt import VGGT

    return VGGT


def official_model(job: Job, base: torch.nn.Module) -> torch.nn.Module:
    """Return the official network with the weights of ours, camera and depth head only."""
    config = base.config
    model = official_class(job.official)(
        img_size=config.img_size, patch_size=config.patch_size, embed_dim=config.embed_dim, enable_camera=True,
        enable_depth=True, enable_point=False, enable_track=False,
    )
    model.load_state_dict(base.state_dict())
    return model.requires_grad_(False).to(job.device).eval()


def official_batch(sample, device: str) -> dict[str, torch.Tensor]:
    """Return a window as the official loss reads it."""
    known = {
        "images": sample.images, "depths": sample.depth, "point_masks": sample.valid,
        "extrinsics": sample.world_to_cam[:, :3], "intrinsics": sample.K,
    }
    return {
        name: (tensor if tensor.dtype == torch.bool else tensor.float())[None].to(device)
        for name, tensor in known.items()
    }


def official_step(job: Job, base: torch.nn.Module) -> Callable[[], float]:
    """Return a function that makes one step of the official loop."""
    from peft import LoraConfig, get_peft_model

    adapted = apply_lora(train_step.twin(base), job.strategy, seed=0, dropout=TrainConfig().dropout)[0]
    ours = adapted.peft_config["default"]
    config = LoraConfig(
        r=ours.r, lora_alpha=ours.lora_alpha, lora_dropout=ours.lora_dropout, bias="none",
        target_modules=ours.target_modules, modules_to_save=ours.modules_to_save,
    )
    layers = {name for name, _ in adapted.named_modules() if name.endswith(".lora_A")}
    del adapted
    model = get_peft_model(official_model(job, base), config)
    found = {name for name, _ in model.named_modules() if name.endswith(".lora_A")}
    if found != layers:
        sys.exit(f"PEFT adapted other layers of the official class: {sorted(found ^ layers)[:3]}")
    model.train(any(".aggregator." in name for name in found))
    from loss import MultitaskLoss

    objective = MultitaskLoss(**LOSS)
    batch = official_batch(train_step.random_sample(*job.shape), job.device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=TrainConfig().lr or 1e-4)

    def step() -> float:
        with torch.autocast(job.device, torch.bfloat16, enabled=job.precision == "bf16"):
            loss = objective(model(batch["images"]), batch)["objective"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def our_step(job: Job, base: torch.nn.Module, folder: Path) -> Callable[[], float]:
    """Return a function that makes one step of this project."""
    stepper = train_step.Stepper(
        base, job.strategy, "cache", train_step.random_sample(*job.shape), job.device, job.precision, folder, True
    )
    return stepper.step


def forward(job: Job, base: torch.nn.Module) -> Callable[[], float]:
    """Return a function that predicts once, without gradients."""
    model = base if job.side == "ours" else official_model(job, base)
    images = train_step.random_sample(*job.shape).images[None].to(job.device)

    def predict() -> float:
        with torch.no_grad(), torch.autocast(job.device, torch.bfloat16, enabled=job.precision == "bf16"):
            return float(model(images)["depth"].mean())

    return predict


def measure(job: Job) -> dict[str, float]:
    """Run one job in this process; returns what a step took and held."""
    base = train_step.new_base(dataclasses.replace(train_step.SIZES[job.size][0], point_head=False), job.device)
    with tempfile.TemporaryDirectory() as folder:
        if job.strategy == "forward":
            step = forward(job, base)
        else:
            step = official_step(job, base) if job.side == "official" else our_step(job, base, Path(folder))
        del base
        gc.collect()
        first = step()  # warms up
        if job.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        wall, work = [], []
        for _ in range(job.rounds):
            began, worked = time.perf_counter(), time.process_time()
            step()
            if job.device == "cuda":
                torch.cuda.synchronize()
            wall.append(time.perf_counter() - began)
            work.append(time.process_time() - worked)
    held = (
        torch.cuda.max_memory_allocated()
        if job.device == "cuda"
        else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )
    return {"first": first, "seconds": statistics.median(wall), "work": statistics.median(work), "peak": held / 1e9}


def in_a_process(job: Job) -> dict[str, float]:
    """Run one job in a process of its own; exits with its message where it fails."""
    command = [sys.executable, __file__, "--job", json.dumps(dataclasses.asdict(job))]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=os.environ)
    if done.returncode:
        sys.exit(done.stderr.strip()[-1500:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> int:
    """Measure both sides and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", metavar="PATH", help="a checkout of facebookresearch/vggt")
    parser.add_argument(
        "--size", choices=train_step.SIZES, default="1b-small",
        help="of the network; the official class has that of VGGT-1B alone",
    )
    parser.add_argument(
        "--shape", type=train_step.shape_of, metavar="FxHxW",
        help="frames x height x width (default: those of the size)",
    )
    parser.add_argument("--strategies", default="forward,a,b,c")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precision", default="auto", choices=("auto", "float32", "bf16"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.job:
        content = json.loads(given.job)
        frames, size = content.pop("shape")
        print(json.dumps(measure(Job(shape=(frames, tuple(size)), **content))))
        return 0
    if not given.official:
        parser.error("give --official PATH, a checkout of https://github.com/facebookresearch/vggt")
    official_class(given.official)
    precision = train_step.resolve_precision(given.precision, given.device)
    threads = "" if given.device == "cuda" else f", {torch.get_num_threads()} thread(s)"
    print(f"{given.size} network, {given.device}{threads}, {precision}, torch {torch.__version__}")
    print(
        "strategy  frames  size     official s  ours s  ratio   official CPU s  ours CPU s  ratio   official GB  ours "
        "GB"
    )
    for shape in [given.shape] if given.shape else train_step.SIZES[given.size][1]:
        for strategy in given.strategies.split(","):
            a, b = (
                in_a_process(
                    Job(side, strategy, given.official, given.size, shape, given.device, precision, given.rounds)
                )
                for side in ("official", "ours")
            )
            if strategy == "forward" and abs(a["first"] - b["first"]) > 1e-2 * abs(b["first"]):
                sys.exit(f"the two forward passes differ: mean depth {a['first']:.4g} and {b['first']:.4g}")
            print(
                f"{strategy:8}  {shape[0]:6}  {shape[1][0]}x{shape[1][1]:<4} {a['seconds']:11.2f}  "
                f"{b['seconds']:6.2f}  {a['seconds'] / b['seconds']:5.2f}  "
                f"{a['work']:15.2f}  {b['work']:10.2f}  {a['work'] / b['work']:5.2f}  {a['peak']:12.2f}  "
                f"{b['peak']:7.2f}",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
