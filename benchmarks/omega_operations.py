"""Count VGGT-Ω's operations for 8 frames of 512 x 512, and what each strategy's cached states save.

    python benchmarks/omega_operations.py

On the meta device: no weights, no photos. A multiply-add counts as 2.
"""
import torch
from torch.utils.flop_counter import FlopCounterMode
from vggt_lora.adapters.adapter import apply_lora
from vggt_lora.efficiency.frozen_prefix import find_frozen_prefix
from vggt_lora.model.vggt import VGGT, VGGTConfig

FRAMES, SIDE = 8, 512


def operations(run) -> float:
    """Return the operations of a call, in units of 10^12."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 1e12


@torch.no_grad()
def main() -> None:
    """Count part by part, then per strategy."""
    def build() -> VGGT:
        with torch.device("meta"):
            return VGGT(VGGTConfig.omega_1b()).requires_grad_(False)

    model, images = build(), torch.empty(1, FRAMES, 3, SIDE, SIDE, device="meta")
    aggregator, state = model.aggregator, model.encode(images)
    start = model.encode(images, stop_after=-1)
    rope, tokens = aggregator._rope(start)[0], start.tokens
    across = {}
    for layer, block in enumerate(aggregator.across_blocks):
        seen = model.config.patch_start if layer in model.config.register_layers else tokens.shape[2]
        across[layer] = operations(lambda block=block, seen=seen: block(tokens[:, :, :seen].flatten(1, 2)))
    parts = {
        "ViT": operations(lambda: aggregator.patches(images)),
        "frame blocks": sum(
            operations(lambda block=block: block(tokens.flatten(0, 1), rope)) for block in aggregator.frame_blocks
        ),
        "inter-frame blocks": sum(across.values()),
        "dense head": operations(lambda: model.dense_head(state.outputs, (SIDE, SIDE))),
        "camera head": operations(lambda: model.camera_head(state.outputs[model.config.depth - 1])),
    }
    total = operations(lambda: model(images))
    print(
        f"{FRAMES} frames of {SIDE} x {SIDE}: {total:.2f} T; "
        + ", ".join(f"{name} {count:.3f}" for name, count in parts.items())
    )
    for strategy in "abc":
        adapted, _ = apply_lora(build(), strategy, rank=16)
        last = find_frozen_prefix(adapted).layer
        kept = model.encode(images, stop_after=last)
        rest = operations(lambda kept=kept: model(state=kept))
        print(
            f"strategy {strategy}: kept after layer {last}, saves {total - rest:.2f} T of a forward pass, "
            f"{100 * (total - rest) / total:.0f} %"
        )


if __name__ == "__main__":
    main()
