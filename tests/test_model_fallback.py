"""The model against a few numbers that travel with the project, for checkouts without the official reference folder.

tests/data/model_golden.safetensors holds, copied, the official code's inputs, weights and outputs of single modules
(rotary embedding, position table, blocks, norms with small inputs, residual unit, fusion block, embeddings,
activations). For the wiring as a whole it holds a certified fingerprint: outputs and gradient norms of this project's
own model with weights by formula, recorded by tests/data/make_model_golden.py at a state of the code where the model
met every official golden number, which that script checks before it records.
"""
import hashlib
import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from vggt_lora.model.camera_head import activate_pose
from vggt_lora.model.dpt_head import FusionBlock, activate_map, uv_axes, add_uv
from vggt_lora.model.layers import Block, rope_table, rotate
from vggt_lora.model.vggt import VGGT, VGGTConfig
from vggt_lora.model.vit import resize_position_table

DATA = Path(__file__).parent / "data"
spec = importlib.util.spec_from_file_location("make_model_golden", DATA / "make_model_golden.py")
maker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(maker)


@pytest.fixture(scope="module")
def golden():
    return load_file(DATA / "model_golden.safetensors")


@pytest.fixture(scope="module")
def official(golden):
    return {name.removeprefix("official."): tensor for name, tensor in golden.items() if name.startswith("official.")}


def agree(got, truth):
    """Compare at the tolerance that the official single-module numbers state."""
    torch.testing.assert_close(got, truth, rtol=0, atol=2e-6 + 2e-6 * truth.abs().max().item())


def filled(module, official, prefix):
    """Load the copied official weights below a prefix into a module."""
    prefix = f"weights.{prefix}"
    module.load_state_dict({name[len(prefix):]: tensor for name, tensor in official.items() if name.startswith(prefix)})
    return module


def test_rotary_embedding(official):
    agree(rotate(official["rope.tokens"], rope_table(official["rope.positions"], 16)), official["rope.out"])


def test_position_table(official):
    table = official["weights.aggregator.patch_embed.pos_embed"]
    sizes = [name.split(".")[1] for name in official if name.startswith("pos_embed.")]
    assert len(sizes) == 6
    for size in sizes:
        height, width = map(int, size.split("x"))
        agree(resize_position_table(table, (height // 14, width // 14)), official[f"pos_embed.{size}"])


@torch.no_grad()
def test_blocks_and_norms(official):
    vit_block = filled(Block(64, 4, eps=1e-6), official, "aggregator.patch_embed.blocks.0.")
    agree(vit_block(official["dino_block0.in"]), official["dino_block0.out"])
    block = filled(Block(64, 4, qk_norm=True), official, "aggregator.frame_blocks.0.")
    rope = rope_table(official["frame_block0.positions"], 16)
    agree(block(official["frame_block0.in"], rope), official["frame_block0.out"])
    agree(block.attn.q_norm(official["q_norm.in"]), official["q_norm.out"])


@torch.no_grad()
def test_final_norm_of_the_vit(official):
    """Inputs are small here, so that the norm's epsilon shows."""
    norm = VGGT(VGGTConfig.golden()).aggregator.patch_embed.norm
    agree(filled(norm, official, "aggregator.patch_embed.norm.")(official["dino_norm.in"]), official["dino_norm.out"])


def test_epsilon_of_every_norm():
    """1e-6 inside the ViT, 1e-5 everywhere else (spec 3); a wrong one changes outputs only where inputs are small."""
    norms = {
        name: module for name, module in VGGT(VGGTConfig.golden()).named_modules() if isinstance(module, nn.LayerNorm)
    }
    assert len(norms) > 40
    assert {name: norm.eps for name, norm in norms.items()} == {
        name: 1e-6 if name.startswith("aggregator.patch_embed.") else 1e-5 for name in norms}


@torch.no_grad()
def test_adaptive_norm_of_the_camera_head():
    """The norm without weights has 1e-6: silence everything else, and its output is what the trunk is given."""
    torch.manual_seed(0)
    head = VGGT(VGGTConfig.golden()).camera_head
    head.token_norm, width = nn.Identity(), head.token_norm.normalized_shape[0]
    head.poseLN_modulation = nn.Identity()
    head.embed_pose = nn.Linear(9, 3 * width)
    nn.init.zeros_(head.embed_pose.weight)
    head.embed_pose.bias.copy_(torch.cat([torch.zeros(2 * width), torch.ones(width)]))  # shift 0, scale 0, gate 1
    given = []
    head.trunk.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    tokens = 1e-3 * torch.randn(1, 2, 3, width)
    head(tokens, iterations=1)
    small = tokens[:, :, 0].double()
    centred = small - small.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() + small
    torch.testing.assert_close(given[0].double(), expected, rtol=1e-5, atol=1e-6)


def test_keys_shapes_and_dtypes_of_the_published_network():
    """A digest of the published state dict's keys, so that a renamed key is seen without the official list."""
    with torch.device("meta"):
        state = VGGT(VGGTConfig.vggt_1b()).state_dict()
    text = "".join(
        f"{name} {list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}\n"
        for name, tensor in sorted(state.items())
    )
    assert len(state) == 1797
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "8eb5c8992c20c260c989197623730e23345bd9f37ede00b56126964bf238176e"
    )


@torch.no_grad()
def test_fusion_block(official):
    fusion = filled(FusionBlock(32), official, "depth_head.scratch.refinenet1.")
    agree(fusion.resConfUnit1(official["residual_conv_unit.in"]), official["residual_conv_unit.out"])
    agree(fusion(official["fusion_x2.in0"], official["fusion_x2.in1"]), official["fusion_x2.out"])


def test_uv_embedding(official):
    names = [name.removeprefix("uv.") for name in official if name.startswith("uv.")]
    assert len(names) == 4
    for name in names:
        cells, aspect = name.split(".", 1)
        width, height = map(int, cells.split("x"))
        y, x = uv_axes((height, width), float(aspect))
        agree(torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], dim=-1), official[f"uv.{name}"])
        agree(
            10 * add_uv(torch.zeros(1, 24, height, width), float(aspect))[0].permute(1, 2, 0),
            official[f"uv_embed24.{name}"],
        )


def test_activations(official):
    raw = official["activate.in4"]
    for got, name in zip((*activate_map(raw, "inv_log"), *activate_map(raw[:, :2], "exp")),
                         ("inv_log.pts", "expp1.conf", "exp.depth", "exp.conf")):
        agree(got, official[f"activate.{name}"])
    agree(activate_pose(official["activate_pose.in"]), official["activate_pose.out"])


def test_certified_fingerprint(golden):
    prints = maker.fingerprint()
    recorded = {name: tensor for name, tensor in golden.items() if name.startswith("print.")}
    assert prints.keys() == recorded.keys()
    for name, truth in recorded.items():
        # other processors sum in another order: a few 1e-6 of the largest value; a wrong detail is 100 times that
        tolerance = 3e-5 * truth.abs().max().item()
        torch.testing.assert_close(prints[name], truth, rtol=0, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


def test_formula_is_the_same_everywhere():
    assert [round(float(value) * 2**23) for value in maker.formula("a", (4,))] == [
        6874749, -3997712, -5315066, -3922058,
    ]
