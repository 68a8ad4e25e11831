"""Gradients of the full objective with respect to all 346 trained tensors of the tiny model, against the official ones.

Losses see targets that the official code normalised, so this tests the model's backward pass and the loss terms, and
not the normalisation (tests/test_losses.py does). Skipped with a message where the reference is absent.
"""
import json

import pytest
import torch
from safetensors.torch import load_file
from vggt_lora.model.vggt import VGGT
from vggt_lora.reference_data import reference
from vggt_lora.training.losses import camera_loss, depth_loss, point_loss

pytestmark = pytest.mark.skipif(
    reference("tiny_grads.safetensors") is None,
    reason="the official reference numbers (shared/reference) are absent; no gradient can be compared")


@pytest.fixture(scope="module")
def data():
    return load_file(reference("train_losses.safetensors"))


def objective(out, data):
    """Return the official objective (spec 13.3: camera 5, depth 1, points 1 with normals) and its parts."""
    valid = data["raw.point_masks"]
    camera = camera_loss(
        out.pose_enc_list, data["norm.extrinsics"], data["raw.intrinsics"], valid, (56, 84), rule="first", min_valid=100
    )
    options = {"min_valid": 100, "confidence_on_invalid": True}
    depth = depth_loss(out.depth, out.depth_conf, data["norm.depths"], valid, gradient="grad", **options)
    points = point_loss(
        out.world_points, out.world_points_conf, data["norm.world_points"], valid, gradient="normal", **options
    )
    parts = {"loss_camera": camera.total}
    parts |= {f"loss_{name}_depth": term for name, term in depth.terms.items()}
    parts |= {f"loss_{name}_point": term for name, term in points.terms.items()}
    return 5 * camera.total + depth.total + points.total, parts


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients(data, checkpointing):
    golden = load_file(reference("tiny_grads.safetensors"))
    scalars = json.loads(reference("train_losses.json").read_text())["scalars"]
    model = VGGT.from_pretrained(reference("tiny_state_dict.safetensors")).train()
    model.set_gradient_checkpointing(checkpointing)
    total, parts = objective(model(load_file(reference("tiny_outputs.safetensors"))["b.images"]), data)
    total.backward()

    prefix = "step.camera+depth+point."
    assert total.item() == pytest.approx(scalars[f"{prefix}objective"], rel=1e-5)
    for name, value in parts.items():
        assert value.item() == pytest.approx(scalars[prefix + name], rel=1e-5), name

    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == golden.keys() and len(gradients) == 346
    worst = 0.0
    for name, truth in golden.items():
        allowed = 1e-4 * truth.abs().max().item() + 1e-4
        share = (gradients[name] - truth).abs().max().item() / allowed
        assert share <= 1, f"{name}: off by {share:.2f} of what is allowed"
        worst = max(worst, share)
    print(f"346 gradients, worst at {worst:.2f} of its tolerance")
    for part in ("aggregator", "camera_head", "depth_head", "point_head"):
        norm = torch.stack([g.norm() for name, g in gradients.items() if name.startswith(f"{part}.")]).norm().item()
        assert norm == pytest.approx(scalars[f"grad_norm.{part}"], rel=1e-4)
