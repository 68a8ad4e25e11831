"""Compare trainings from a cache in bfloat16, and from a cache with random errors of that size, with float32.

    python benchmarks/cache_rounding.py               # strategies b and c, 50 steps each, four layers; two minutes
    python benchmarks/cache_rounding.py --strategies c --noises 8

Every training has the same adapters, windows and order, and reads a cache in float32. "bf16" keeps the cache in
bfloat16. "noise" multiplies every number of every entry by 1 + u, with u uniform in +-2**-9, half of the largest error
of rounding to bfloat16. Printed is the relative difference of losses from the undisturbed training, at the first step,
the largest, the median, and at the last step, for the steps and for the held-out windows. Nothing is asserted.
"""
import argparse
import contextlib
import copy
import io
import tempfile
from pathlib import Path

import numpy as np
import torch

from vggt_lora.adapters.adapter import apply_lora
from vggt_lora.datasets.samples import FrameCache
from vggt_lora.datasets.splits import split_windows
from vggt_lora.demo.demo_scenes import toy_scene
from vggt_lora.efficiency.feature_store import FeatureStore
from vggt_lora.model.vggt import VGGT, VGGTConfig
from vggt_lora.scenes.opening import open_scene
from vggt_lora.training.config import TrainConfig
from vggt_lora.training.feature_cache import cached_source
from vggt_lora.training.loop import fit
from vggt_lora.training.run import RunFolder

ROUNDING = 2.0**-9  # rounding to bfloat16 changes a number by up to twice this, relative


def noisy(compute, seed: int):
    """The frozen layers' output, changed at random."""
    def changed(store, images):
        generator = torch.Generator().manual_seed(seed)
        return {
            name: t * (1 + ROUNDING * (2 * torch.rand(t.shape, generator=generator) - 1))
            for name, t in compute(store, images).items()
        }
    return changed


def losses(work: Path, base: VGGT, items: dict, strategy: str, name: str, steps: int, seed: int | None = None) -> dict:
    """Train from a cache in float32, from one in bfloat16 (name "bf16"), or from one changed at random (with a seed);
    losses by split.
    """
    config = TrainConfig(
        strategy=strategy, epochs=-(-steps // len(items["train"])), frames=4, rank=2, lr=2e-3, distinct_epochs=2,
        image_size=56, feature_cache="bf16" if name == "bf16" else "float32",
    )
    model, run = (
        apply_lora(copy.deepcopy(base), strategy, rank=2, seed=0, dropout=0.1)[0],
        RunFolder(work / f"{strategy}-{name}"),
    )
    compute = FeatureStore.compute
    FeatureStore.compute = compute if seed is None else noisy(compute, seed)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            sample_source = cached_source(
                model, FrameCache(56), config, items["train"], items["val"], lambda line: None,
                folder=work / f"cache-{strategy}-{name}",
            )
            fit(model, items["train"], items["val"], config, run, sample_source)
    finally:
        FeatureStore.compute = compute
        run.close()
    return {split: np.array([r["loss"] for r in run.records if r["split"] == split]) for split in ("train", "val")}


def main() -> None:
    """Train, and print a line for each training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategies", nargs="+", default=["b", "c"])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--noises", type=int, default=3)
    args = parser.parse_args()
    torch.manual_seed(0)
    base = VGGT(VGGTConfig.golden()).requires_grad_(False)
    for name, parameter in base.named_parameters():
        if name.endswith("gamma"):
            parameter.data.fill_(0.3)  # fresh layers are nearly the identity, and would hide a difference
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        scene = open_scene(toy_scene(work / "data", frames=12, size=(112, 168)))
        split = split_windows([scene], frames=4)
        items = {part: [(scene, window) for window in getattr(split, part)] for part in ("train", "val")}
        print("strategy  cache    losses   first     largest   median    last")
        for strategy in args.strategies:
            straight = losses(work, base, items, strategy, "float32", args.steps)
            for name, seed in [("bf16", None)] + [(f"noise {n}", n) for n in range(1, args.noises + 1)]:
                found = losses(work, base, items, strategy, name, args.steps, seed)
                for part, kind in (("train", "steps"), ("val", "held out")):
                    far = np.abs(found[part] / straight[part] - 1)
                    print(
                        f"{strategy:8}  {name:7}  {kind:8} {far[0]:.1e}   {far.max():.1e}   {np.median(far):.1e}   "
                        f"{far[-1]:.1e}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
