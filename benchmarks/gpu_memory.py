"""Count tensor by tensor what a GPU would hold, on a machine without one.

    python benchmarks/gpu_memory.py                                  # VGGT-1B shape, 8 frames of 518 x 518, all kinds;
                                                                     # minutes, and one network in float32
    python benchmarks/gpu_memory.py --kinds small --strategies a,b   # some of them
    python benchmarks/gpu_memory.py --runs 2>runs.log                # whole runs of train(), fast and small mode,
                                                                     # beside the prediction of their preflight

The kinds are those of benchmarks/train_step.py. The GPU is the stand-in of tests/gpu.py, without numbers: every
operation of a real step is asked for its results' shapes, and each storage counts from its creation until nothing
refers to it; bf16 as on a GPU. Not counted: the work space of cuBLAS and cuDNN, fragments between blocks, and the CUDA
context.

peak        the largest sum during two steps, as train_step.py gives it
start       the sum before them: remaining weights, optimiser, adapter
gate        before a run: a backward pass of the loss on two photos (the exactness of the base is proved on the CPU)
training    from the filling of the cache to the last validation, and its prediction by the preflight
measuring   the finished adapter's comparison with its base, and its prediction by the preflight
"""
import argparse
import contextlib
import dataclasses
import gc
import json
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import train_step  # noqa: E402
from tests.gpu import standing_in  # noqa: E402
from vggt_lora import train as training  # noqa: E402
from vggt_lora.demo.demo_scenes import toy_scene  # noqa: E402
from vggt_lora.training import loop  # noqa: E402

MODES = {"fast": {}, "small": {"gradient_checkpointing": True, "frames_chunk": 1}}


def steps(memory, size: str, shape, strategy: str, kind: str) -> None:
    """Print a line: two steps of one kind."""
    with tempfile.TemporaryDirectory() as folder:
        stepper = train_step.Stepper(
            train_step.new_base(train_step.SIZES[size][0], "cuda"), strategy, kind, train_step.random_sample(*shape),
            "cuda", "bf16", Path(folder), True,
        )
        gc.collect()
        memory.peak = start = memory.now
        stepper.step(), stepper.step()
        print(
            f"{strategy:8}  {shape[0]:6}  {shape[1][0]}x{shape[1][1]:<5} {kind:6} {start / 1e9:9.2f}  "
            f"{memory.peak / 1e9:8.2f}",
            flush=True,
        )
    del stepper
    gc.collect()


def whole_run(memory, patch, size: str, shape, strategy: str, mode: str, folder: Path) -> None:
    """Print a line: a run of one epoch on made-up numbers."""
    peaks = {}

    def measured(name: str, work):
        def run(*args, **kwargs):
            memory.peak = memory.now
            try:
                return work(*args, **kwargs)
            finally:
                peaks[name] = memory.peak
        return run

    def base(config):
        return train_step.new_base(dataclasses.replace(train_step.SIZES[size][0], point_head=False), "cpu")

    with patch.context() as own:
        own.setenv("VGGT_LORA_CACHE", str(folder / "cache"))  # nothing made up may stay
        for module in ("vggt_lora.train", "vggt_lora.evaluation.outcome"):
            own.setattr(f"{module}.build_model", base)
        own.setattr(loop, "nonfinite_terms", lambda result: [])  # made-up counts of what is not finite
        own.setattr("vggt_lora.adapters.adapter.fingerprint", lambda *_, **__: "made up")
        for name in ("build_checked_adapter", "measure"):
            own.setattr(training, name, measured(name, getattr(training, name)))
        scene = toy_scene(folder / "scene", frames=3 * shape[0], size=tuple(side // 2 for side in shape[1]))
        config = training.TrainConfig(
            strategy=strategy, model="random", data=str(scene), output=str(folder / "run"), epochs=1, frames=shape[0],
            image_size=max(shape[1]), train_fraction=0.6, device="cuda", lr=1e-4, **MODES[mode],
        )
        with contextlib.redirect_stdout(sys.stderr):  # what a run says
            run = training.train(config)
    budget = json.loads((run.folder / "preflight.json").read_text(encoding="utf-8"))
    held, predicted = budget["measured"]["peak"], budget["predicted"]
    print(
        f"{strategy:8}  {mode:5}  {peaks['build_checked_adapter'] / 1e9:6.2f}  {held / 1e9:9.2f}  "
        f"{predicted['peak'] / 1e9:9.2f} ({predicted['peak'] / held - 1:+.1%})"
        f"  {peaks['measure'] / 1e9:9.2f}  {predicted['evaluation'] / 1e9:9.2f} "
        f"({predicted['evaluation'] / peaks['measure'] - 1:+.1%})",
        flush=True,
    )


def main() -> int:
    """Count and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=train_step.SIZES, default="1b")
    parser.add_argument(
        "--shape", type=train_step.shape_of, default=(8, (518, 518)), metavar="FxHxW", help="frames x height x width"
    )
    parser.add_argument("--strategies", default="a,b,c")
    parser.add_argument("--kinds", default=",".join(train_step.KINDS))
    parser.add_argument("--runs", action="store_true", help="whole runs in place of steps")
    args = parser.parse_args()
    patch = pytest.MonkeyPatch()
    with standing_in(patch, numbers=False) as memory:
        if args.runs:
            print("strategy  mode   gate GB  training   predicted           measuring  predicted")
        else:
            print("strategy  frames  size      kind    start GB   peak GB")
        for strategy in args.strategies.split(","):
            for name in MODES if args.runs else args.kinds.split(","):
                if not args.runs:
                    steps(memory, args.size, args.shape, strategy, name)
                    continue
                with tempfile.TemporaryDirectory() as folder:
                    whole_run(memory, patch, args.size, args.shape, strategy, name, Path(folder))
                gc.collect()
    return 0


if __name__ == "__main__":
    sys.exit(main())
