"""Measure time and memory of a training step per strategy: with the feature cache, without it, and plain.

    python benchmarks/train_step.py                      # tiny network, CPU, seconds per step
    python benchmarks/train_step.py --size 1b-small      # VGGT-1B shape, random weights, 2 frames of 140 x 182;
                                                         # needs 12 GB of free memory
    python benchmarks/train_step.py --size 1b            # VGGT-1B shape, 8 frames of 518 x 518 and of 518 x 350, on
                                                         # a GPU
    python benchmarks/train_step.py --size 1b --shape 8x518x518 --kinds small --no-time   # its memory on a CPU; slow
    python benchmarks/train_step.py --size 1b --shape 2x518x518 --precision bf16 --kinds plain,cache,half \\
        --rounds 1 --no-memory                           # a CPU with bf16
    python benchmarks/train_step.py --profile b          # where the time of a cached step goes
    python benchmarks/train_step.py --size 1b --count    # only count operations, on any machine

plain    whole forward from the photos, every aggregator block checkpointed, heads in float32, no cache; the aggregator
         in --precision, as all kinds
off      this project without the cache: nothing recomputed, frozen layers record nothing
cache    the state after the frozen layers read from disk (float32, or bf16 on a GPU)
half     "cache" with the depth head in bf16 up to its last convolutions (head_precision="bf16")
small    "cache" with checkpointing and one frame at a time in the depth head (memory before time)

A step is forward, loss, backward, AdamW on one window. Every round runs the kinds one after the other, and the median
of the rounds is taken, so a busy machine slows all of them alike. CPU time is this process's own. Peak memory on a GPU
is that of the allocator; on the CPU each kind runs once in a process of its own, and the largest resident size during
its steps is given.

"by count" is plain/this in multiplications and additions of matrix products and convolutions, forward and backward
(torch's FlopCounterMode, on the meta device), "heads" the heads' share of this kind. The rest of a measured ratio is
other work: dropout, resizing, activations, the loss, AdamW.
"""
import argparse
import copy
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import torch

from vggt_lora.adapters.adapter import apply_lora
from vggt_lora.datasets.samples import Sample
from vggt_lora.efficiency.compute_options import cast_frozen_to_bf16, set_gradient_checkpointing
from vggt_lora.efficiency.feature_store import FeatureStore
from vggt_lora.efficiency.frozen_prefix import find_frozen_prefix, free_prefix, pieces
from vggt_lora.efficiency.lora_forward import fuse_lora_forward
from vggt_lora.model.aggregator import AggregatorState
from vggt_lora.model.vggt import VGGT, VGGTConfig
from vggt_lora.training.config import TrainConfig
from vggt_lora.training.distributed import resolve_precision
from vggt_lora.training.losses import loss_config, window_loss
from vggt_lora.training.optimizer import make_optimizer

SIZES = {
    "tiny": (VGGTConfig.tiny(), [(4, (154, 224))]),
    "1b-small": (VGGTConfig.vggt_1b(track_head=False), [(2, (140, 182))]),
    "1b": (VGGTConfig.vggt_1b(track_head=False), [(8, (518, 518)), (8, (350, 518))]),
}
KINDS = ("plain", "off", "cache", "half", "small")


def random_sample(frames: int, size: tuple[int, int]) -> Sample:
    """A window of noise with depth everywhere."""
    torch.manual_seed(1)
    K = torch.tensor([[size[1], 0, size[1] / 2], [0, size[1], size[0] / 2], [0, 0, 1.0]]).repeat(frames, 1, 1)
    pose = torch.eye(4, dtype=torch.float64).repeat(frames, 1, 1)
    pose[:, 0, 3] = torch.arange(frames, dtype=torch.float64)
    depth = 2 + torch.rand(frames, *size)
    return Sample(
        torch.rand(frames, 3, *size), K, pose, depth, depth > 0, torch.ones_like(depth),
        torch.zeros(depth.shape, dtype=torch.uint8), tuple(map(str, range(frames))), "noise", True,
    )


def shape_of(text: str) -> tuple[int, tuple[int, int]]:
    """(frames, (height, width)) of a text such as 8x518x518; raises ValueError for another."""
    frames, height, width = map(int, text.split("x"))
    return frames, (height, width)


def set_way(model, kind: str) -> None:
    """Choose what a kind recomputes, and how many frames the depth head takes at once."""
    bare = model.get_base_model()
    if kind == "plain":
        bare.set_gradient_checkpointing(True)
    else:
        set_gradient_checkpointing(model, kind == "small")
        bare.depth_head.frames_chunk = 1 if kind == "small" else None
        bare.depth_head.body_dtype = torch.bfloat16 if kind == "half" else None
        fuse_lora_forward(model)


class Stepper:
    """One way to run a training step."""

    def __init__(
        self, base, strategy: str, kind: str, sample: Sample, device: str, precision: str, folder: Path, free: bool
    ):
        self.model = apply_lora(base, strategy, seed=0, dropout=TrainConfig().dropout)[0].train()
        self.kind, self.sample, self.device, self.store = kind, sample, device, None
        self.precision = precision
        set_way(self.model, kind)
        if kind != "plain" and self.precision == "bf16":
            cast_frozen_to_bf16(self.model)
        self.losses = loss_config(TrainConfig(strategy=strategy))
        self.optimizer = make_optimizer(self.model, TrainConfig(strategy=strategy).optim)
        if kind in ("cache", "half", "small"):
            layer = find_frozen_prefix(self.model).layer
            self.store = FeatureStore(self.model, layer, self.precision, precision=self.precision, folder=folder)
            self.digests = tuple(map(str, range(len(sample.names))))
            self.store.state(sample.images, self.digests)
            if free:
                self.store.freed = free_prefix(self.model, layer)

    def step(self) -> float:
        """One step; returns the loss."""
        state = self.store.state(self.sample.images, self.digests) if self.store else None
        with torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16"):
            loss = window_loss(self.model, self.sample, self.losses, self.device, state).total
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.device == "cuda":
            torch.cuda.synchronize()
        return float(loss.detach())


def new_base(config: VGGTConfig, device: str) -> VGGT:
    """A random network; LayerScales and the rest as torch draws them."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = VGGT(config)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02, generator=generator)
    model.aggregator.reset_constants()
    if model.point_head is not None:
        model.point_head = None
    return model.requires_grad_(False).to(device).eval()


def blank_state(model, layer: int, shape, learns: bool) -> AggregatorState:
    """A state after a layer, without numbers, on the meta device."""
    config, (frames, size) = model.get_base_model().config, shape
    tokens = config.patch_start + size[0] // config.patch_size * (size[1] // config.patch_size)
    outputs = {
        int(name.removeprefix("output.")): torch.empty(1, frames, tokens, width, device="meta", requires_grad=learns)
        for name, width in pieces(model, layer).items()
        if name.startswith("output.")
    }
    return AggregatorState(torch.empty(1, frames, tokens, config.embed_dim, device="meta"), layer, outputs, tuple(size))


def count_step(config: VGGTConfig, shape, strategy: str, kind: str) -> tuple[int, int]:
    """Return the floating-point operations of a step's forward and backward, and of the heads alone; nothing is
    computed.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model = apply_lora(
            VGGT(dataclasses.replace(config, point_head=False)).requires_grad_(False),
            strategy,
            dropout=TrainConfig().dropout,
        )[0].train()
    set_way(model, "cache" if kind == "half" else kind)  # as many operations; autocast knows no meta device
    layer, last = find_frozen_prefix(model).layer, model.get_base_model().config.depth - 1
    images = torch.empty(1, shape[0], 3, *shape[1], device="meta")
    whole = (
        {"state": blank_state(model, layer, shape, False)} if kind in ("cache", "half", "small") else {"images": images}
    )
    counts = []
    for start in (whole, {"state": blank_state(model, last, shape, layer < last)}):
        with FlopCounterMode(display=False) as counter:
            out = model(**start, heads=("camera", "depth"))
            (out.depth.sum() + out.depth_conf.sum() + sum(pose.sum() for pose in out.pose_enc_list)).backward()
        counts.append(counter.get_total_flops())
    return tuple(counts)


class Resident:
    """The largest resident memory of this process while something runs."""

    def __enter__(self):
        self.peak, self.going = 0, True
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self) -> None:
        process = psutil.Process()
        while self.going:
            self.peak = max(self.peak, process.memory_info().rss)
            time.sleep(0.005)

    def __exit__(self, *_) -> None:
        self.going = False
        self.thread.join()


def memory_of(size: str, shape, strategy: str, kind: str, device: str, precision: str) -> float:
    """Peak GB of two steps, in a process of its own on the CPU."""
    command = [sys.executable, __file__, "--memory", json.dumps([size, shape, strategy, kind, device, precision])]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def measure_memory(size: str, shape, strategy: str, kind: str, device: str, precision: str) -> None:
    """Print the peak of two steps in GB."""
    import ctypes

    with tempfile.TemporaryDirectory() as folder:
        stepper = Stepper(
            new_base(SIZES[size][0], device), strategy, kind, random_sample(shape[0], tuple(shape[1])), device,
            precision, Path(folder), True,
        )
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            stepper.step(), stepper.step()
            print(torch.cuda.max_memory_allocated() / 1e9)
            return
        if stepper.store is not None and stepper.store.freed is not None:
            stepper.store.freed.held = {}  # as where they can be read again
        ctypes.CDLL(None).malloc_trim(0) if sys.platform == "linux" else None
        with Resident() as resident:
            stepper.step(), stepper.step()
        print(resident.peak / 1e9)


def compare(size: str, shape, strategy: str, device: str, precision: str, rounds: int, kinds) -> dict:
    """Seconds and CPU seconds of a step for each kind, interleaved; kinds share the frozen weights."""
    base, sample = new_base(SIZES[size][0], device), random_sample(*shape)
    wall, work = {k: [] for k in kinds}, {k: [] for k in kinds}
    with tempfile.TemporaryDirectory() as folder:
        steppers = {
            kind: Stepper(twin(base), strategy, kind, sample, device, precision, Path(folder), False) for kind in kinds
        }
        for number in range(rounds + 1):
            for kind, stepper in steppers.items():
                began, worked = time.perf_counter(), time.process_time()
                stepper.step()
                if number or not rounds:  # the first round warms up, unless it is the only one
                    wall[kind].append(time.perf_counter() - began)
                    work[kind].append(time.process_time() - worked)
    return {kind: (statistics.median(wall[kind]), statistics.median(work[kind])) for kind in kinds}


def twin(base: VGGT) -> VGGT:
    """A copy that shares the weights."""
    return copy.deepcopy(base, {id(p): p for p in base.parameters()})


def profile(size: str, shape, strategy: str, device: str, precision: str) -> None:
    """Print the operations that take the time of a cached step."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    with tempfile.TemporaryDirectory() as folder:
        stepper = Stepper(
            new_base(SIZES[size][0], device), strategy, "cache", random_sample(*shape), device, precision, Path(folder),
            False,
        )
        stepper.step()
        kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
        with record(activities=kinds) as found:
            stepper.step()
        key = "self_cuda_time_total" if device == "cuda" else "self_cpu_time_total"
        print(found.key_averages().table(sort_by=key, row_limit=14, max_name_column_width=45))


def table(args, shape, strategy: str) -> None:
    """Print a line for each kind."""
    kinds, nothing = args.kinds.split(","), (float("nan"),) * 2
    found = (
        {}
        if args.count or args.no_time
        else compare(args.size, shape, strategy, args.device, args.precision, args.rounds, kinds)
    )
    plain, whole = found.get("plain", nothing), 0
    for kind in kinds:
        (wall, work), count = found.get(kind, nothing), count_step(SIZES[args.size][0], shape, strategy, kind)
        whole = count[0] if kind == "plain" else whole
        peak = (
            ""
            if args.no_memory or args.count
            else f"{memory_of(args.size, shape, strategy, kind, args.device, args.precision):7.2f}"
        )
        print(
            f"{strategy:8}  {shape[0]:6}  {shape[1][0]}x{shape[1][1]:<5} {kind:6} {wall:7.3f}  {work:10.3f}  "
            f"{plain[0] / wall:17.2f}  {plain[1] / work:5.2f}  "
            f"{whole / count[0] or float('nan'):8.2f}  {count[0] / 1e12:10.4f}  {count[1] / count[0]:4.0%}  {peak}",
            flush=True,
        )


def main() -> int:
    """Compare and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--precision", default="auto", choices=("auto", "float32", "bf16"),
        help="of the aggregator; auto: bf16 on a GPU",
    )
    parser.add_argument(
        "--rounds", type=int, default=5,
        help="steps of each kind after a first one that warms up; 0: that one alone counts",
    )
    parser.add_argument("--strategies", default="a,b,c")
    parser.add_argument(
        "--shape", type=shape_of, metavar="FxHxW", help="frames x height x width, instead of those of the size"
    )
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--no-memory", action="store_true", help="measure time only")
    parser.add_argument("--no-time", action="store_true", help="measure memory only")
    parser.add_argument("--count", action="store_true", help="count operations, run nothing")
    parser.add_argument("--profile", metavar="STRATEGY")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.precision = resolve_precision(args.precision, args.device)
    if args.memory:
        measure_memory(*json.loads(args.memory))
        return 0
    if args.profile:
        profile(args.size, args.shape or SIZES[args.size][1][0], args.profile, args.device, args.precision)
        return 0
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    print(f"{args.size} network on {'paper' if args.count else name}, {args.precision}, torch {torch.__version__}")
    print(
        "strategy  frames  size      kind    s/step   CPU s/step  plain/this (time)  (CPU)  by count  TFLOP/step  "
        "heads  peak GB"
    )
    for shape in [args.shape] if args.shape else SIZES[args.size][1]:
        for strategy in args.strategies.split(","):
            table(args, shape, strategy)
    return 0


if __name__ == "__main__":
    sys.exit(main())
