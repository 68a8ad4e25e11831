"""Record tests/data/model_golden.safetensors, the small file that test_model_fallback.py checks the model against.

The file holds two kinds of numbers:

* ``official.*``: inputs, weights and outputs of single modules of the official VGGT code (commit 44b3afbd, float32,
CPU),
  copied from the reference folder. They are numbers of random weights, neither code nor trained weights.
* ``print.*``: a *certified fingerprint* of the network as a whole. The official outputs for a whole network come with 6
MB of
  random weights, too much to copy. Instead the weights follow a formula in integers (`formula`), the same on every
  machine, and the outputs are those of THIS project's model, recorded at a state of the code where it met every
  official golden number, forward and backward. So a fingerprint that differs means that the wiring has changed since
  then.

This script refuses to record unless every test of test_model_goldens.py and test_model_gradients.py ran and passed:

    python tests/data/make_model_golden.py
"""
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from vggt_lora.files.atomic import atomic_path
from vggt_lora.model.vggt import VGGT, VGGTConfig
from vggt_lora.reference_data import reference

FILE = Path(__file__).with_name("model_golden.safetensors")
TESTS = ("test_model_goldens.py", "test_model_gradients.py")
# batch of 2 with a resized position table; and the stored grid
CASES = {"x": (2, 3, 3, 28, 42), "y": (1, 2, 3, 70, 70)}
MICRO = (
    "rope.", "uv.", "uv_embed24.", "pos_embed.", "activate.", "activate_pose.", "q_norm.", "dino_norm.",
    "residual_conv_unit.", "fusion_x2.", "dino_block0.", "frame_block0.",
)
WEIGHTS = ("aggregator.patch_embed.pos_embed", "aggregator.patch_embed.norm.", "aggregator.patch_embed.blocks.0.",
           "aggregator.frame_blocks.0.", "depth_head.scratch.refinenet1.")


def formula(
    name: str,  # gives each tensor its own numbers
    shape: tuple[int, ...],  # of the result
) -> torch.Tensor:
    """Return numbers in [-1, 1), float32: a hash of name and index in 64-bit integers, exact on every machine."""
    count = int(np.prod(shape))
    with np.errstate(over="ignore"):
        mixed = np.arange(count, dtype=np.uint64) + np.uint64(zlib.crc32(name.encode())) * np.uint64(0x9E3779B97F4A7C15)
        for factor in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB):
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(factor)
    fraction = (mixed >> np.uint64(40)).astype(np.float64) / 2**23 - 1  # 24 bits: exact in float32
    return torch.from_numpy(fraction.astype(np.float32)).reshape(shape)


def formula_weights(
    expected: dict[str, torch.Tensor],  # state dict whose names and shapes count
) -> dict[str, torch.Tensor]:
    """Return weights of a size that keeps every part of the network awake: nothing zero, nothing saturated."""
    weights = {}
    for name, tensor in expected.items():
        numbers = formula(name, tuple(tensor.shape)).double()
        if name.endswith(".gamma"):
            numbers = 0.3 + 0.2 * numbers
        elif name.endswith(".weight") and tensor.ndim == 1:
            numbers = 1 + 0.3 * numbers
        elif name.endswith(".weight"):
            gain = 1.5 if tensor.ndim == 2 else 1.8
            numbers = numbers * gain / (tensor.numel() / tensor.shape[0]) ** 0.5
        else:  # biases, tokens, position table
            numbers = 0.3 * numbers
        weights[name] = numbers.float()
    return weights


def fingerprint() -> dict[str, torch.Tensor]:
    """Return the outputs of the formula network, and the gradient norms of its parts."""
    with torch.device("meta"):
        model = VGGT(VGGTConfig.golden())
    model.load_state_dict(formula_weights(model.state_dict()), strict=True, assign=True)
    prints = {}
    for case, shape in CASES.items():
        model.zero_grad()
        out = model((formula(f"images {case}", shape) + 1) / 2)
        prints |= {f"print.{case}.pose_enc_list": torch.stack(out.pose_enc_list).detach()}
        for name in ("depth", "depth_conf", "world_points", "world_points_conf"):
            prints[f"print.{case}.{name}"] = out[name].detach()[:, :, ::3, 1::3].contiguous()
        (
            sum(pose.square().mean() for pose in out.pose_enc_list)
            + out.depth.log().square().mean()
            + out.depth_conf.mean()
            + out.world_points.square().mean()
            + out.world_points_conf.mean()
        ).backward()
        for part in ("aggregator", "camera_head", "depth_head", "point_head"):
            norms = [p.grad.norm() for p in model.get_submodule(part).parameters() if p.grad is not None]
            prints[f"print.{case}.gradient.{part}"] = torch.stack(norms).norm()
    return prints


def copied() -> dict[str, torch.Tensor]:
    """Return the official numbers that are small enough to copy, under `official.`."""
    micro, state = load_file(reference("tiny_micro.safetensors")), load_file(reference("tiny_state_dict.safetensors"))
    chosen = {name: tensor for name, tensor in micro.items() if name.startswith(MICRO)}
    chosen |= {f"weights.{name}": tensor for name, tensor in state.items() if name.startswith(WEIGHTS)}
    return {f"official.{name}": tensor for name, tensor in chosen.items()}


def main() -> None:
    """Check the model against everything official, then record."""
    if reference("tiny_outputs.safetensors") is None:
        sys.exit("not recorded: the official reference numbers are absent, so nothing can be certified")
    tests = [str(FILE.parents[1] / name) for name in TESTS]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests], capture_output=True, text=True
    )
    print(result.stdout[-500:])
    if result.returncode != 0 or "passed" not in result.stdout or "skipped" in result.stdout:
        sys.exit("not recorded: the model does not meet every official golden number")
    numbers = {**copied(), **fingerprint()}
    if not all(tensor.isfinite().all() for tensor in numbers.values()):
        sys.exit("not recorded: some numbers are not finite")
    with atomic_path(FILE) as temporary:
        save_file(numbers, temporary, metadata={"format": "pt"})
    print(f"{FILE.name}: {FILE.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
