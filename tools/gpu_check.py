"""Check everything that only a GPU can show, in at most ten minutes, and write a page: `make gpu-check`.

    python tools/gpu_check.py                      all parts; the page is outputs/gpu-check/index.html
    python tools/gpu_check.py --only kernels,steps some of them
    python tools/gpu_check.py --minutes 20         no part begins later than this

Without CUDA the parts run on the stand-in of tests/gpu.py at small sizes, and the page says so: it then proves that
the check itself works, and measures nothing. The network has random weights in the shape of VGGT-1B; no part
fetches anything. The exit status is the number of parts that failed.
"""
import argparse
import contextlib
import copy
import dataclasses
import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import vggt_lora  # noqa: E402, F401  before torch: it sets how its threads wait
import pytest  # noqa: E402
import torch  # noqa: E402
import train_step  # noqa: E402
from tests import gpu as stand_in  # noqa: E402
from vggt_lora import train as training  # noqa: E402
from vggt_lora.adapters.adapter import apply_lora  # noqa: E402
from vggt_lora.demo.demo_scenes import toy_scene  # noqa: E402
from vggt_lora.files.atomic import write_json, write_text  # noqa: E402
from vggt_lora.model.vggt import VGGTConfig  # noqa: E402
from vggt_lora.training.losses import loss_config, window_loss  # noqa: E402
from vggt_lora.views import page  # noqa: E402

REAL = torch.cuda.is_available()
MODES = {"fast": {}, "small": {"gradient_checkpointing": True, "frames_chunk": 1}}
KINDS = {"fast": "cache", "small": "small"}  # of benchmarks/train_step.py
LIMITS = {"float32": 2e-3, "bf16": 5e-2}  # relative; a GPU's convolutions round to TF32, bf16 has 8 bits
LEARNING = {"supervision": "laser+sparse", "scale_normalization": "points", "choose_fraction": 0.0,
            "adapter_weights": "last", "metric_for_best_model": "loss", "lr": 1e-3}


@dataclasses.dataclass(frozen=True)
class Scale:
    """What is run: VGGT-1B on a GPU, the tiny network on the stand-in."""

    network: VGGTConfig
    shapes: tuple[tuple[int, tuple[int, int]], ...]  # photos, (height, width)
    tokens: int  # of the attention that is compared
    wide: int  # long side of the run that runs out of memory, px
    tests: tuple[str, ...]


SCALE = Scale(VGGTConfig.vggt_1b(track_head=False), ((8, (518, 518)), (8, (350, 518))), 4096, 280,
              ("tests/test_gpu.py", "tests/test_train.py"))
SMALL = Scale(VGGTConfig.tiny(), ((3, (56, 84)), (3, (56, 56))), 64, 112, ("tests/test_gpu.py",))


@dataclasses.dataclass
class Row:
    """One line of the page."""

    what: str
    result: str
    passed: bool = True
    # the command of a row of the hardware table in nbs/guide/measurements.ipynb; empty where it is none
    hardware: str = ""


# --- parts ------------------------------------------------------------------------------------------------------------

def tests(scale: Scale, folder: Path) -> Iterator[Row]:
    """Run the tests of whole runs on a GPU; on a card, the tests of the main job too, which then train there."""
    for name in scale.tests:
        command = [sys.executable, "-m", "pytest", "-q", "-x", name]
        done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        lines = done.stdout.strip().splitlines()
        yield Row(name, lines[-1] if lines else done.stderr[-200:], done.returncode == 0)


def layers(tokens: int) -> dict[str, tuple[Callable, tuple[int, ...]]]:
    """Name the four kernels of a step, with the shape of their input."""
    linear = torch.nn.Sequential(torch.nn.Linear(256, 1024), torch.nn.GELU(), torch.nn.Linear(1024, 256))

    class Attention(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.scaled_dot_product_attention(x, x.roll(1, 2), x.roll(2, 2))

    return {"attention": (Attention(), (1, 4, tokens, 64)), "linear and GELU": (linear, (1, tokens, 256)),
            "LayerNorm": (torch.nn.LayerNorm(256), (1, tokens, 256)),
            "convolution": (torch.nn.Conv2d(64, 64, 3, padding=1), (2, 64, 32, 32))}


def answer(layer: torch.nn.Module, x: torch.Tensor, device: str, precision: str) -> list[torch.Tensor]:
    """Return a layer's output and the gradient of its input."""
    layer, x = copy.deepcopy(layer).to(device), x.clone().to(device).requires_grad_()
    with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
        out = layer(x)
    (gradient,) = torch.autograd.grad(out.float().square().sum(), x)
    return [out.detach().float().cpu(), gradient.float().cpu()]


def off(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> list[float]:
    """Return the length of the difference of each tensor, as a share of the tensor's own."""
    return [float((a - b).norm() / b.norm().clamp_min(1e-12)) for a, b in zip(found, wanted)]


def step_on(device: str, precision: str) -> list[torch.Tensor]:
    """Return the loss of one window on the tiny network and the gradient of each trained parameter."""
    model = apply_lora(train_step.new_base(VGGTConfig.tiny(), "cpu"), "b", seed=0, dropout=0.0)[0].to(device).train()
    with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
        loss = window_loss(
            model, train_step.random_sample(3, (56, 84)), loss_config(training.TrainConfig(strategy="b")), device
        ).total
    loss.backward()
    return [loss.detach().float().cpu(), *(p.grad.float().cpu() for p in model.parameters() if p.grad is not None)]


def kernels(scale: Scale, folder: Path) -> Iterator[Row]:
    """Compare the kernels of a step, and a whole step, with the CPU in float32."""
    torch.manual_seed(0)
    for name, (layer, shape) in layers(scale.tokens).items():
        x = torch.randn(shape)
        wanted = answer(layer, x, "cpu", "float32")
        for precision, limit in LIMITS.items():
            error = max(off(answer(layer, x, "cuda", precision), wanted))
            yield Row(
                f"{name}, forward and backward, {precision}", f"off by {error:.1e} (limit {limit:.0e})", error <= limit
            )
    wanted = step_on("cpu", "float32")
    for precision, limit in LIMITS.items():
        loss, *gradients = off(step_on("cuda", precision), wanted)
        middle = statistics.median(gradients)  # gradients near zero may differ by more
        said = (
            f"loss off by {loss:.1e}, gradients by {middle:.1e} in the median of {len(gradients)} tensors (limit "
            f"{2 * limit:.0e})"
        )
        yield Row(f"a whole step, {precision}", said, max(loss, middle) <= 2 * limit)


def steps(scale: Scale, folder: Path) -> Iterator[Row]:
    """Measure seconds and memory of a step for each strategy."""
    base = train_step.new_base(scale.network, "cpu")
    for frames, size in scale.shapes:
        sample = train_step.random_sample(frames, size)
        for mode, kind in KINDS.items():
            seconds, peaks = [], []
            for strategy in "abc":
                place = folder / f"{strategy}-{mode}-{size[0]}"
                stepper = train_step.Stepper(
                    copy.deepcopy(base).to("cuda"), strategy, kind, sample, "cuda", "bf16", place, True
                )
                stepper.step()
                gc.collect()
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                began = time.perf_counter()
                for _ in range(5 if REAL else 1):
                    stepper.step()
                seconds.append((time.perf_counter() - began) / (5 if REAL else 1))
                peaks.append(torch.cuda.max_memory_allocated() / 1e9)
                del stepper
                gc.collect()
            what = f"a step in bf16, {frames} photos of {size[1]} × {size[0]}, {mode} mode, strategies a, b, c"
            numbers = f"{', '.join(f'{s:.2f}' for s in seconds)} s; {', '.join(f'{p:.2f}' for p in peaks)} GB"
            yield Row(what, numbers, hardware="make gpu-check")


@contextlib.contextmanager
def base_of(network: VGGTConfig) -> Iterator[None]:
    """Let a run begin with random weights in a shape of its own, and be measured on them."""
    def build(config):
        return train_step.new_base(dataclasses.replace(network, point_head=False), "cpu")

    with pytest.MonkeyPatch.context() as patch:
        for module in ("vggt_lora.train", "vggt_lora.evaluation.outcome"):
            patch.setattr(f"{module}.build_model", build)
        yield


def preflight(scale: Scale, folder: Path) -> Iterator[Row]:
    """Compare what the preflight of a run predicts with what the run held."""
    frames, size = scale.shapes[0]
    scene = toy_scene(folder / "scene", frames=3 * frames, size=tuple(side // 2 for side in size))
    for mode, settings in MODES.items():
        config = training.TrainConfig(
            **LEARNING, **settings, strategy="b", model="random", data=str(scene), output=str(folder / mode), epochs=1,
            frames=frames, image_size=max(size), device="cuda",
        )
        with base_of(scale.network):
            run = training.train(config)
        found = json.loads((run.folder / "preflight.json").read_text(encoding="utf-8"))
        error, held = found["error"]["peak"], found["measured"]["peak"] / 1e9
        yield Row(
            f"peak memory of a run, strategy b, {mode} mode", f"{held:.2f} GB, predicted {error:+.1%}",
            abs(error) <= 0.1, "make gpu-check",
        )


def small_run(scene: Path, output: Path, **changes) -> training.TrainConfig:
    """A run of a few steps on the tiny network."""
    return training.TrainConfig(
        **{
            **LEARNING, "strategy": "b", "model": "random", "data": str(scene), "output": str(output), "device": "cuda",
            "epochs": 3, "frames": 3, "image_size": 56, "rank": 4, "dropout": 0.1, "save_every": 1, "preflight": "off",
            **changes,
        }
    )


def start(config: training.TrainConfig, file: Path) -> subprocess.Popen:
    """Train in a process of its own."""
    write_json(file, dataclasses.asdict(config))
    with open(file.with_suffix(".log"), "a") as log:
        return subprocess.Popen(
            [sys.executable, __file__, "--train", str(file)], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )


def losses(output: Path) -> list[float]:
    """Read the losses that a run has recorded."""
    file = output / "metrics.jsonl"
    return [json.loads(line)["loss"] for line in file.read_text().splitlines()] if file.exists() else []


def kill(scale: Scale, folder: Path) -> Iterator[Row]:
    """Kill a run after two records, resume it, and compare it with an undisturbed one."""
    scene = toy_scene(folder / "scene", frames=12, size=(84, 112))
    whole, cut = small_run(scene, folder / "whole"), small_run(scene, folder / "cut")
    if start(whole, folder / "whole.json").wait():
        raise RuntimeError((folder / "whole.log").read_text()[-600:])
    process = start(cut, folder / "cut.json")
    while process.poll() is None and len(losses(folder / "cut")) < 2:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed_at = len(losses(folder / "cut"))
    if start(dataclasses.replace(cut, resume=True), folder / "cut.json").wait():
        raise RuntimeError((folder / "cut.log").read_text()[-600:])
    a, b = losses(folder / "whole"), losses(folder / "cut")
    error = max((abs(x - y) / abs(x) for x, y in zip(a, b)), default=1.0)
    same = len(a) == len(b) and killed_at < len(a) and error < 1e-2
    yield Row(
        "SIGKILL and resume",
        f"killed at record {killed_at} of {len(a)}; losses differ by {error:.1e} at most (limit 1e-02)",
        same,
    )


def limit_memory(count: float | None) -> None:
    """Let this process hold so many bytes on the GPU; None: all."""
    if REAL:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(1.0, count / total) if count else 1.0)
    else:
        stand_in.MEMORY.limit = int(count or 1 << 60)


def out_of_memory(scale: Scale, folder: Path) -> Iterator[Row]:
    """Take memory away from a run until a step does not fit: it has to go on in smaller pieces."""
    scene = toy_scene(folder / "scene", frames=12, size=(scale.wide // 2, scale.wide))
    wide = {"epochs": 1, "frames": 8, "image_size": scale.wide, "train_fraction": 0.7, "feature_cache": "off"}
    run = training.train(small_run(scene, folder / "free", **wide))
    peak = 1e6 * json.loads((run.folder / "resource_usage.json").read_text(encoding="utf-8"))["gpu_memory_mb"]
    for share in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4):
        gc.collect()
        limit_memory(share * peak)
        output = folder / f"{share}"
        try:
            training.train(small_run(scene, output, **wide))
            said = ""
        except vggt_lora.core.VggtLoraError as error:
            said = str(error)
        finally:
            limit_memory(None)
        if said or "the step is repeated" in (output / "train.log").read_text(encoding="utf-8"):
            yield Row(
                "a step runs out of memory",
                said or f"goes on in smaller pieces with {share:.0%} of {peak / 1e6:.0f} MB",
                not said,
            )
            return
    yield Row("a step runs out of memory", "no limit made a step too large", False)


PARTS = {
    "kernels": kernels, "steps": steps, "preflight": preflight, "kill": kill, "out_of_memory": out_of_memory,
    "tests": tests,
}


# --- the page ---------------------------------------------------------------------------------------------------------

def machine() -> str:
    """Say on what this ran."""
    if not REAL:
        return "a STAND-IN for a GPU (tests/gpu.py) at small sizes: no number here is a GPU's"
    properties = torch.cuda.get_device_properties(0)
    return f"{properties.name}, {properties.total_memory / 1e9:.0f} GB"


def write_page(output: Path, found: dict[str, list[Row]]) -> None:
    """Write index.html, hardware.md in the form of the README's table, and results.json."""
    head = f"{machine()}; torch {torch.__version__}, CUDA {torch.version.cuda}"
    sections = []
    for name, rows in found.items():
        lines = [[row.what, row.result, "passed" if row.passed else "FAILED"] for row in rows]
        marks = [None if row.passed else "failed" for row in rows]
        sections.append(
            page.section(f"{name}: {PARTS[name].__doc__}", page.table(["what", "result", ""], lines, classes=marks))
        )
    write_text(output / "index.html", page.page("GPU check", page.tag("p", head), *sections))
    measured = [row for rows in found.values() for row in rows if row.hardware]
    table = ["| what | measured by | result |", "|---|---|---|"]
    table += [f"| {row.what}, on {machine()} | `{row.hardware}` | {row.result} |" for row in measured]
    write_text(output / "hardware.md", "\n".join([*table, ""]))
    rows = {name: [dataclasses.asdict(row) for row in rows] for name, rows in found.items()}
    write_json(output / "results.json", {"machine": head, "stand_in": not REAL, "parts": rows})


def work(name: str, scale: Scale, log: Path, report: Callable[[Row], None]) -> None:
    """Run one part, what its runs say into a log; whatever it raises becomes a failed row."""
    try:
        with (
            tempfile.TemporaryDirectory() as folder, open(log, "a") as said, contextlib.redirect_stdout(said),
            contextlib.redirect_stderr(said),
        ):
            for row in PARTS[name](scale, Path(folder)):
                report(row)
    except Exception as error:  # a part that fails must not keep the others from running
        report(Row(name, f"{type(error).__name__}: {error}"[-600:], False))


@contextlib.contextmanager
def device() -> Iterator[None]:
    """The GPU, or what stands in for it."""
    with contextlib.ExitStack() as stack:
        if not REAL:
            stack.enter_context(stand_in.standing_in(stack.enter_context(pytest.MonkeyPatch.context())))
        yield


def run_parts(given: argparse.Namespace) -> dict[str, list[Row]]:
    """Run the parts that were asked for while there is time; print each row, write the page after each part."""
    began, found = time.monotonic(), {}
    given.output.mkdir(parents=True, exist_ok=True)
    for name in given.only.split(","):
        rows = found.setdefault(name, [])

        def report(row: Row, name: str = name, rows: list = rows) -> None:
            rows.append(row)
            print(
                f"{'ok' if row.passed else 'FAILED':7}{name}: {row.what}: {row.result}", file=sys.__stdout__, flush=True
            )

        if time.monotonic() - began > 60 * given.minutes:
            report(Row(name, f"not begun: {given.minutes:g} minutes are over", False))
        else:
            # those begin processes of their own
            with device() if name not in ("tests", "kill") else contextlib.nullcontext():
                work(name, SCALE if REAL else SMALL, given.output / "runs.log", report)
        gc.collect()
        write_page(given.output, found)
    return found


def main() -> int:
    """Run the parts; return how many rows failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, joined by commas (default: all)")
    parser.add_argument("--minutes", type=float, default=10, help="no part begins later than this (default: 10)")
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "gpu-check")
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.train:
        with device():
            training.train(training.TrainConfig(**json.loads(given.train.read_text(encoding="utf-8"))))
        return 0

    print(machine(), flush=True)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["VGGT_LORA_CACHE"] = cache  # nothing made up may stay
        found = run_parts(given)
    print(f"written to {given.output / 'index.html'}")
    return sum(not row.passed for rows in found.values() for row in rows)


if __name__ == "__main__":
    sys.exit(main())
