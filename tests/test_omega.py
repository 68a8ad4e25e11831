"""VGGT-Ω beside VGGT: what must hold for both families, by the same test bodies; and what only VGGT-Ω has."""
import dataclasses
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from vggt_lora.adapters.adapter import apply_lora, load_adapter, merge, save_adapter
from vggt_lora.adapters.export import StoredTensors, export_adapter, export_merged
from vggt_lora.adapters.targets import STRATEGIES, matches, resolve_targets
from vggt_lora.core import WeightsError
from vggt_lora.efficiency.feature_store import feature_fingerprint
from vggt_lora.efficiency.frozen_prefix import find_frozen_prefix, free_prefix
from vggt_lora.model.vggt import VGGT, VGGTConfig

FAMILIES = {"vggt": VGGTConfig.golden, "omega": VGGTConfig.omega_golden}


def awake(config, seed=0):
    """Return a network of random weights in which every part does something: fresh LayerScales nearly switch a block
    off.
    """
    torch.manual_seed(seed)
    model = VGGT(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            parameter.fill_(0.3)
        elif name.endswith(("token", "tokens", "bias")):
            parameter.normal_(std=0.3)
        elif "proj_conf" in name:
            parameter.normal_(std=0.1)
    for name, mask in model.named_buffers():
        if name.endswith("bias_mask"):
            model.get_submodule(name.rpartition(".")[0]).bias.mul_(mask)
    return model


def photos(model, frames=3, batch=1):
    side = model.config.patch_size
    return torch.rand(batch, frames, 3, 2 * side, 3 * side, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=FAMILIES)
def model(request):
    return awake(FAMILIES[request.param]())


def test_stop_and_go_from_every_layer(model):
    with torch.no_grad():
        straight = model(photos(model, batch=2))
        for layer in range(-1, model.config.depth):
            state = model.encode(photos(model, batch=2), stop_after=layer)
            again = model(state=state)
            assert all(
                torch.equal(again[name], straight[name])
                for name in straight
                if isinstance(straight[name], torch.Tensor)
            ), layer


def test_later_frames_are_interchangeable(model):
    images = photos(model)
    with torch.no_grad():
        straight, swapped, first = (
            model(images[:, order]).pose_enc[:, order] for order in ([0, 1, 2], [0, 2, 1], [1, 0, 2])
        )
    torch.testing.assert_close(swapped, straight, atol=1e-4, rtol=1e-4)
    assert (first - straight).abs().max() > 1e-3


def test_saved_and_loaded_in_both_layouts(model, tmp_path):
    with torch.no_grad():
        before = model(photos(model)).depth
    folder = model.save_pretrained(tmp_path / "net")
    torch.save({"model": model.state_dict(), "epoch": 3}, tmp_path / "training.pt")
    for path in (folder, tmp_path / "training.pt"):
        loaded = VGGT.from_pretrained(path)
        assert loaded.config.family == model.config.family and loaded.load_report.n_loaded == len(model.state_dict())
        with torch.no_grad():
            assert torch.equal(loaded(photos(model)).depth, before)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_adapter_goes_all_ways(model, tmp_path, strategy):
    """Untrained it changes nothing; trained it is saved, loaded, merged and exported, always with the same outputs; the
    rest of the file stays.
    """
    base = model.save_pretrained(tmp_path / "base")
    images = photos(model)
    with torch.no_grad():
        before = model(images)
        adapted, targets = apply_lora(model, strategy, rank=2, seed=0)
        assert torch.equal(adapted.eval()(images).depth, before.depth)
        assert all("bias" not in name for name, p in adapted.named_parameters() if p.requires_grad)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
        trained = adapted(images).depth
        assert (trained - before.depth).abs().max() > 1e-3
        folder = save_adapter(adapted, tmp_path / "adapter", {"config": {"model": str(base)}})
        again = load_adapter(VGGT.from_pretrained(base), folder)
        assert torch.equal(again(images).depth, trained)
        torch.testing.assert_close(merge(again)(images).depth, trained, rtol=1e-4, atol=1e-5)
    report = export_merged(folder, tmp_path / "merged")
    torch.testing.assert_close(VGGT.from_pretrained(tmp_path / "merged")(images).depth, trained, rtol=1e-4, atol=1e-5)
    assert report.merged == len(targets.named("adapted")) and set(
        load_file(tmp_path / "merged/model.safetensors")
    ) == set(load_file(base / "model.safetensors"))
    export_adapter(folder, tmp_path / "portable")


def test_the_frozen_beginning(model):
    """Strategy b leaves the first half alone; the name of what is kept does not depend on what comes after, adapters
    included.
    """
    half = model.config.depth // 2
    alone = feature_fingerprint(model, half - 1)
    images = photos(model)
    adapted, _ = apply_lora(model, "b", rank=2, seed=0)
    assert find_frozen_prefix(adapted).layer == half - 1
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
        straight, state = adapted(images).depth, model.encode(images, stop_after=half - 1)
        assert feature_fingerprint(adapted, half - 1) == alone != feature_fingerprint(adapted, half - 2)
        freed = free_prefix(adapted, half - 1)
        assert torch.equal(adapted(state=state).depth, straight)
        freed.back()
        assert torch.equal(adapted(images).depth, straight)


# ---------------------------------------------------------------------------------------------------- VGGT-Ω alone


@pytest.mark.parametrize("strategy, trainable", [("a", 1_204_224), ("b", 7_668_224), ("c", 16_122_512)])
def test_strategies_of_the_published_size(strategy, trainable):
    with torch.device("meta"):
        real = VGGT(VGGTConfig.omega_1b())
    targets = resolve_targets(real, STRATEGIES[strategy].scopes(real.config), rank=16)
    assert targets.trainable == trainable
    assert sum(p.numel() for p in real.parameters()) == 1_143_814_185


def test_frame_blocks_are_not_mistaken_for_inter_frame_blocks():
    assert not matches("aggregator.frame_blocks.*", "aggregator.inter_frame_blocks.3.attn.qkv")
    model = awake(VGGTConfig.omega_golden())
    adapted, targets = apply_lora(model, "custom", target_modules="aggregator.frame_blocks.2", rank=2)
    touched = {name.split(".lora_")[0] for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(touched) == 4 == len(targets.named("adapted")) and not any("inter_frame" in name for name in touched)


def test_dora_is_right_on_folded_biases(tmp_path):
    """DoRA computes with the stored bias: on a layer that multiplies by a mask it would be wrong, on a folded one it is
    right.
    """
    state = awake(VGGTConfig.omega_golden()).state_dict()
    for name in [name for name in state if name.endswith("qkv.bias")]:
        state[name] = torch.randn_like(state[name])  # also where the mask is 0, as in published files
    save_file(state, tmp_path / "model.safetensors")
    model = VGGT.from_pretrained(tmp_path)
    images = photos(model)
    adapted, _ = apply_lora(model, "c", rank=2, use_dora=True, seed=0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
        unmerged = adapted.eval()(images).depth
        torch.testing.assert_close(merge(adapted)(images).depth, unmerged, rtol=1e-4, atol=1e-5)


def test_masked_biases(tmp_path):
    """The mask that is stored decides, not the rule; the folded bias acts, the mask is kept; a mask of other values is
    refused.
    """
    model = awake(VGGTConfig.omega_golden())
    state = model.state_dict()
    layer = "aggregator.inter_frame_blocks.2.attn.qkv"
    state[f"{layer}.bias"], state[f"{layer}.bias_mask"] = torch.full((144,), 7.0), torch.zeros(144)
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    loaded = VGGT.from_pretrained(path).state_dict()
    assert torch.equal(loaded[f"{layer}.bias"], torch.zeros(144)) and torch.equal(
        loaded[f"{layer}.bias_mask"], torch.zeros(144)
    )
    for value, words in ((0.5, "other values than 0 and 1"), (math.nan, "not finite")):
        save_file({**state, f"{layer}.bias_mask": torch.full((144,), value)}, path)
        with pytest.raises(WeightsError, match=words):
            VGGT.from_pretrained(path)


def test_a_masked_bias_that_is_trained_in_full_stays_masked():
    model = awake(VGGTConfig.omega_golden())
    layer = "aggregator.frame_blocks.2.attn.qkv"
    adapted, _ = apply_lora(model, "custom", target_modules="dense_head.projects", full_finetune=[layer], rank=2)
    out = adapted.train()(photos(model))
    out.depth.log().mean().backward()
    bias = model.get_submodule(layer).modules_to_save["default"].bias
    queries, keys, values = bias.grad.chunk(3)
    assert torch.equal(keys, torch.zeros_like(keys)) and values.abs().max() > 0 and queries.abs().max() > 0


def test_the_text_head_is_left_out_with_a_word_and_carried_through(tmp_path):
    model = awake(VGGTConfig.omega_golden())
    path = tmp_path / "with_text.safetensors"
    save_file(model.state_dict() | {"text_alignment_head.language_token": torch.ones(1, 1, 96)}, path)
    loaded = VGGT.from_pretrained(path)
    assert loaded.load_report.dropped == {"text_alignment_head": 1} and "left out: 1 of text_alignment_head" in str(
        loaded.load_report
    )
    adapted, _ = apply_lora(loaded, "a", rank=2, seed=0)
    folder = save_adapter(adapted, tmp_path / "adapter", {"config": {"model": str(path)}})
    assert export_merged(folder, tmp_path / "merged").carried == {"text_alignment_head": 1}
    assert "text_alignment_head.language_token" in StoredTensors(tmp_path / "merged/model.pt")


def test_the_published_name_says_how_to_get_access():
    with pytest.raises(WeightsError, match="noncommercial research only: ask for access .* vggt_omega_1b_512.pt"):
        VGGT.from_pretrained("facebook/VGGT-Omega")


def test_register_layers_let_patches_pass():
    """In a register layer a patch of one frame reaches no other frame, but a special token does."""
    model = awake(VGGTConfig.omega_golden())
    special, layer = model.config.patch_start, 1
    tokens = torch.randn(1, 2, special + 6, 48)
    rope = model.aggregator.rope_embed((2, 3), special), None
    with torch.no_grad():
        inside, across = model.aggregator._layer(layer, tokens, rope)
        assert torch.equal(across[:, :, special:], inside[:, :, special:])
        slow = model.aggregator.inter_frame_blocks[layer](
            torch.cat([inside[:, 0, :special], inside[:, 1, :special]], dim=1)
        )
        torch.testing.assert_close(across[:, 1, :special], slow[:, special:], atol=1e-6, rtol=1e-6)


def test_a_configuration_of_unknown_size_is_named():
    from vggt_lora.model.weights import config_from_shapes

    model = awake(VGGTConfig.omega_golden())
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert config_from_shapes(shapes, "file") == VGGTConfig.omega_golden()
    with torch.device("meta"):
        published = VGGT(VGGTConfig.omega_1b()).state_dict()
    assert (
        config_from_shapes({name: tuple(tensor.shape) for name, tensor in published.items()}, "file")
        == VGGTConfig.omega_1b()
    )
    other = VGGT(dataclasses.replace(VGGTConfig.omega_golden(), num_register_tokens=5)).state_dict()
    with pytest.raises(WeightsError, match="VGGT of unknown size"):
        config_from_shapes({name: tuple(tensor.shape) for name, tensor in other.items()}, "file")


def test_card_and_export_name_the_licence(tmp_path):
    from vggt_lora.adapters.hub import model_card

    base = awake(VGGTConfig.omega_golden()).save_pretrained(tmp_path / "base")
    adapted, _ = apply_lora(VGGT.from_pretrained(base), "a", rank=2, seed=0)
    folder = save_adapter(adapted, tmp_path / "adapter", {"config": {"model": str(base)}})
    assert "noncommercial research only" in model_card(folder, "someone/adapter")
    assert "noncommercial research only" in str(export_merged(folder, tmp_path / "merged"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "family, changes",
    [("vggt", {"model": "random", "image_size": 56}), ("omega", {"model": "random-omega", "image_size": 64})],
)
def test_cached_training_equals_uncached(tmp_path, monkeypatch, family, changes):
    """More than 50 steps of strategy b with and without the kept states of the frozen half: every loss is the same."""
    from vggt_lora.demo.demo_scenes import toy_scene
    from vggt_lora.train import train
    from vggt_lora.training.config import TrainConfig
    from vggt_lora.training.run import without_wall

    monkeypatch.setenv("VGGT_LORA_CACHE", str(tmp_path / "cache"))
    scene, losses = toy_scene(tmp_path / "data", frames=12, size=(84, 112)), {}
    for cache in ("off", "float32"):
        config = TrainConfig(
            data=str(scene), output=str(tmp_path / cache), strategy="b", epochs=13, frames=3, rank=2, lr=1e-3,
            supervision="laser+sparse", feature_cache=cache, device="cpu", **changes,
        )
        run = train(config)
        losses[cache] = [
            record["loss"] for record in without_wall(run.folder / "metrics.jsonl") if record["split"] == "train"
        ]
        log = (run.folder / "train.log").read_text()
        assert ("states after layer 2 in float32" in log) == (cache == "float32")
    assert len(losses["off"]) >= 50 and losses["off"] == pytest.approx(losses["float32"], rel=1e-4)
    assert "The base is random" in (run.folder / "report.md").read_text()
