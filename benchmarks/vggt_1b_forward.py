"""Run a network at its real size, random weights, two small frames, float32 on the CPU; print seconds and peak memory.

    python benchmarks/vggt_1b_forward.py           VGGT-1B, frames of 140 x 182
    python benchmarks/vggt_1b_forward.py omega     VGGT-Ω 1B, frames of 160 x 208

Needs 6 GB of free memory. Exits with status 1 above 8 GB or two minutes.
"""
import resource
import sys
import time

import torch
from vggt_lora.model.vggt import VGGT, VGGTConfig

LARGEST_MEMORY = 8.0  # GB
SHAPES = {"vggt": (VGGTConfig.vggt_1b, (140, 182)), "omega": (VGGTConfig.omega_1b, (160, 208))}
LONGEST = 120.0  # seconds, building and running together


def main(family: str = "vggt") -> int:
    """Build, run once, report."""
    shape, size = SHAPES[family]
    torch.set_num_threads(2)
    torch.manual_seed(0)
    start, worked = time.perf_counter(), time.process_time()
    model = VGGT(shape()).eval()
    built, built_work = time.perf_counter(), time.process_time()
    with torch.no_grad():
        out = model(torch.rand(1, 2, 3, *size))
    done, done_work = time.perf_counter(), time.process_time()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # kB on Linux
    count = sum(parameter.numel() for parameter in model.parameters())
    finite = all(bool(value.isfinite().all()) for value in out.values() if isinstance(value, torch.Tensor))
    print(
        f"parameters {count:,}; built with random weights in {built - start:.1f} s (processor "
        f"{built_work - worked:.1f} s); "
        f"forward {done - built:.1f} s (processor {done_work - built_work:.1f} s on two threads); "
        f"peak memory {peak:.2f} GB; depth {tuple(out.depth.shape)}, finite: {finite}"
    )
    return 0 if finite and peak < LARGEST_MEMORY and done - start < LONGEST else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
