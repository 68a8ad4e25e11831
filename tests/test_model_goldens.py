"""Every recorded number of the official model code, at the tolerance that the reference states.

Needs the reference folder (see `vggt_lora.reference_data`); skipped with a message where it is absent. What a
stranger's checkout can prove without it is in test_model_fallback.py.
"""
import json

import pytest
import torch
from safetensors.torch import load_file
from vggt_lora.model.camera_head import activate_pose
from vggt_lora.model.dpt_head import activate_map, uv_axes, add_uv
from vggt_lora.model.layers import rope_table, rotate
from vggt_lora.model.vggt import VGGT, VGGTConfig
from vggt_lora.model.vit import resize_position_table
from vggt_lora.reference_data import reference

pytestmark = pytest.mark.skipif(
    reference("tiny_outputs.safetensors") is None,
    reason="the official reference numbers (shared/reference) are absent; test_model_fallback.py checks a few copied "
           "ones",
)

TOLERANCES = {"depth": 2e-4, "world_points": 2e-4, "depth_conf": 5e-5, "world_points_conf": 5e-5}


@pytest.fixture(scope="module")
def golden():
    return load_file(reference("tiny_outputs.safetensors"))


@pytest.fixture(scope="module")
def micro():
    return load_file(reference("tiny_micro.safetensors"))


@pytest.fixture(scope="module")
def model():
    return VGGT.from_pretrained(reference("tiny_state_dict.safetensors"))


def record(module, names):
    """Collect a copy of the outputs of submodules during a forward pass."""
    seen, handles = {}, []
    for name in names:
        def hook(_, inputs, output, name=name):
            seen.setdefault(name, []).append(output.detach().clone())
        handles.append(module.get_submodule(name).register_forward_hook(hook))
    return seen, handles


def test_golden_config_is_the_recorded_one():
    nested = json.loads(reference("tiny_config.json").read_text())["config"]
    vit, camera, depth = nested["patch_embed"], nested["camera_head"], nested["depth_head"]
    config = VGGTConfig(
        img_size=nested["img_size"],
        patch_size=nested["patch_size"],
        embed_dim=nested["embed_dim"],
        depth=nested["depth"],
        num_heads=nested["num_heads"],
        mlp_ratio=nested["mlp_ratio"],
        num_register_tokens=nested["num_register_tokens"],
        rope_base=float(nested["rope_freq"]),
        vit_depth=vit["depth"],
        vit_num_heads=vit["num_heads"],
        camera_trunk_depth=camera["trunk_depth"],
        camera_num_heads=camera["num_heads"],
        camera_iterations=camera["num_iterations"],
        track_head=False,
        dpt_features=depth["features"],
        dpt_out_channels=depth["out_channels"],
        dpt_layers=depth["intermediate_layer_idx"],
    )
    assert config == VGGTConfig.golden()


def test_real_keys_shapes_and_dtypes():
    with torch.device("meta"):
        state = VGGT(VGGTConfig.vggt_1b()).state_dict()
    content = json.loads(reference("vggt_1b_state_dict.json").read_text())
    official = next(
        v for v in content.values() if isinstance(v, dict) and isinstance(v.get("aggregator.camera_token"), dict)
    )
    ours = {name: {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")} for name, t in state.items()}
    assert len(ours) == 1797 and ours == official


@pytest.mark.parametrize("case", "abcd")
def test_outputs(model, golden, case):
    checked = []

    def agree(got, name, tolerance):
        torch.testing.assert_close(got, golden[name], rtol=0, atol=tolerance, msg=lambda m: f"{name}: {m}")
        checked.append(name)

    internals = sorted(
        name.removeprefix(f"{case}.depth_head.") for name in golden if name.startswith(f"{case}.depth_head.")
    )
    seen, handles = record(model.depth_head, internals)
    more, more_handles = record(model, ["aggregator.patch_embed"])
    images = golden[f"{case}.images"]
    with torch.no_grad():
        out = model(images)
        state = model.aggregator(images, keep=(0, 1, 2, 3))
    for handle in handles + more_handles:
        handle.remove()
    agree(more["aggregator.patch_embed"][0], f"{case}.patch_tokens", 2e-5)
    for layer in range(4):
        agree(state.outputs[layer], f"{case}.tokens.{layer}", 2e-5)
    for step, pose in enumerate(out.pose_enc_list):
        agree(pose, f"{case}.pose_enc_list.{step}", 2e-5)
    for name, tolerance in TOLERANCES.items():
        agree(out[name], f"{case}.{name}", tolerance)
    for name in internals:
        agree(seen[name][0], f"{case}.depth_head.{name}", 2e-5)
    assert sorted([*checked, f"{case}.images"]) == sorted(name for name in golden if name.startswith(f"{case}.")), (
        "a golden was left out"
    )


def micro_outputs(model, micro):
    """Compute every output in the micro file, by its name there."""
    aggregator, camera, depth = model.aggregator, model.camera_head, model.depth_head
    rope = {name: rope_table(micro[f"{name}.positions"], 16)
            for name in ("rope", "frame_block0", "global_block1", "frame_block0_attn")}
    yield "rope.out", rotate(micro["rope.tokens"], rope["rope"])
    for name in (name for name in micro if name.startswith("pos_embed.")):
        height, width = map(int, name.split(".")[1].split("x"))
        yield name, resize_position_table(aggregator.patch_embed.pos_embed, (height // 14, width // 14))
    yield "dino_block0.out", aggregator.patch_embed.blocks[0](micro["dino_block0.in"])
    yield "frame_block0.out", aggregator.frame_blocks[0](micro["frame_block0.in"], rope["frame_block0"])
    yield "global_block1.out", aggregator.global_blocks[1](micro["global_block1.in"], rope["global_block1"])
    yield (
        "frame_block0_attn.out",
        aggregator.frame_blocks[0].attn(micro["frame_block0_attn.in"], rope["frame_block0_attn"]),
    )
    yield "dino_norm.out", aggregator.patch_embed.norm(micro["dino_norm.in"])
    yield "q_norm.out", aggregator.frame_blocks[0].attn.q_norm(micro["q_norm.in"])
    yield "trunk_block0.out", camera.trunk[0](micro["trunk_block0.in"])
    yield "trunk_norm.out", camera.trunk_norm(micro["trunk_norm.in"])
    yield "camera_head.out", torch.stack(camera(micro["camera_head.in"]))
    yield "camera_head.out_6_iterations", torch.stack(camera(micro["camera_head.in"], iterations=6))
    yield "camera_head_small.out", torch.stack(camera(micro["camera_head_small.in"]))
    yield "activate_pose.out", activate_pose(micro["activate_pose.in"])
    values, confidence = depth({i: micro[f"depth_head_small.tokens.{i}"] for i in range(4)}, (56, 84))
    yield "depth_head_small.out", torch.cat([values, confidence[..., None]], dim=-1)
    yield "residual_conv_unit.out", depth.scratch.refinenet1.resConfUnit1(micro["residual_conv_unit.in"])
    yield "fusion_x2.out", depth.scratch.refinenet1(micro["fusion_x2.in0"], micro["fusion_x2.in1"])
    yield "fusion4_to_7x11.out", depth.scratch.refinenet4(micro["fusion4_to_7x11.in0"], size=(7, 11))
    for name in (name.removeprefix("uv.") for name in micro if name.startswith("uv.")):
        cells, aspect = name.split(".", 1)
        width, height = map(int, cells.split("x"))
        y, x = uv_axes((height, width), float(aspect))
        yield f"uv.{name}", torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], dim=-1)
        yield f"uv_embed24.{name}", 10 * add_uv(torch.zeros(1, 24, height, width), float(aspect))[0].permute(1, 2, 0)
    raw = micro["activate.in4"]
    yield "activate.inv_log.pts", activate_map(raw, "inv_log")[0]
    yield "activate.expp1.conf", activate_map(raw, "inv_log")[1]
    yield "activate.exp.depth", activate_map(raw[:, :2], "exp")[0]
    yield "activate.exp.conf", activate_map(raw[:, :2], "exp")[1]


def test_micro(model, micro):
    inputs = (".in", ".in0", ".in1", ".in4", ".positions", "rope.tokens")
    expected = {name for name in micro if not name.endswith(inputs) and ".tokens." not in name}
    checked = set()
    with torch.no_grad():
        for name, got in micro_outputs(model, micro):
            tolerance = 2e-6 + 2e-6 * micro[name].abs().max().item()
            torch.testing.assert_close(
                got, micro[name], rtol=0, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
            )
            checked.add(name)
    assert checked == expected and len(checked) == 35
