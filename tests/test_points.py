"""The point loss in a run: what it adds, what it leaves alone, and where it is refused."""
import dataclasses
import json

import pytest
import torch

from vggt_lora.core import ConfigError
from vggt_lora.datasets.samples import load_sample
from vggt_lora.demo.demo_scenes import toy_scene
from vggt_lora.efficiency.frozen_prefix import dense_heads
from vggt_lora.evaluate import evaluate, largest_difference
from vggt_lora.lora import export_merged, model_card
from vggt_lora.model.vggt import VGGT, VGGTConfig
from vggt_lora.train import resumed_config, read_config, train
from vggt_lora.training import loop as loop_module
from vggt_lora.training.build import build_model, make_frame_cache, items_of, open_scenes, split_scenes
from vggt_lora.training.config import TrainConfig
from vggt_lora.training.losses import LossConfig, prepare_batch
from vggt_lora.training.run import without_wall

# all different: no two can be swapped unseen
POINTS = {"point_conf_weight": 0.5, "point_reg_weight": 3.0, "point_grad_weight": 2.0, "point_gradient": "grad"}


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    return toy_scene(tmp_path_factory.mktemp("data"), frames=12, size=(84, 112))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A small network with a point head, on disk."""
    torch.manual_seed(0)
    return VGGT(dataclasses.replace(VGGTConfig.tiny(), point_head=True)).save_pretrained(
        tmp_path_factory.mktemp("weights") / "pointed"
    )


def settings(scene, weights, output, **changes) -> TrainConfig:
    values = {
        "supervision": "laser+sparse", "scale_normalization": "points", "choose_fraction": 0.0,
        "adapter_weights": "last", "metric_for_best_model": "loss", "strategy": "b", "model": str(weights),
        "data": str(scene), "output": str(output), "epochs": 1, "frames": 3, "image_size": 56, "rank": 2, "lr": 1e-3,
        "device": "cpu",
    }
    return TrainConfig(**{**values, **changes})


@pytest.fixture(scope="module")
def run(scene, weights, tmp_path_factory):
    return train(settings(scene, weights, tmp_path_factory.mktemp("points") / "run", **POINTS))


@pytest.fixture(scope="module")
def plain(scene, weights, tmp_path_factory):
    """The same run without the point loss."""
    return train(settings(scene, weights, tmp_path_factory.mktemp("plain") / "run"))


def steps(run, split="train") -> list[dict]:
    return [r for r in run.records if r["split"] == split]


def test_a_run_records_the_terms_and_its_adapter_is_measured_from_the_file(run):
    for record in [*steps(run), *steps(run, "val")]:
        assert (
            all(record[f"loss_point_{name}"] != 0 for name in ("conf", "reg", "grad"))
            and record["count_point_pixels_used"] > 0
        )
    assert all(r["grad_norm_point_head"] > 0 for r in steps(run))
    assert steps(run, "val")[-1]["loss"] < steps(run, "val")[0]["loss"]
    assert "point_head" in run.adapter.joinpath("adapter_config.json").read_text()
    assert largest_difference(evaluate(run.folder).table(), run.results["table"]) == 0


def test_before_the_first_step_points_only_add_to_the_loss(run, plain):
    ours, theirs = steps(run, "val")[0], steps(plain, "val")[0]
    added = sum(POINTS[f"point_{name}_weight"] * ours[f"loss_point_{name}"] for name in ("conf", "reg", "grad"))
    assert ours["loss"] == pytest.approx(theirs["loss"] + added, rel=1e-6)
    assert {n: v for n, v in theirs.items() if n not in ("loss", "wall")} == {
        n: ours[n] for n in theirs if n not in ("loss", "wall")
    }
    assert (
        not any("point" in n for r in plain.records for n in r)
        and "point_head" not in plain.adapter.joinpath("adapter_config.json").read_text()
    )


def test_the_truth_of_points_is_depth_lifted_into_the_first_camera(scene, weights, tmp_path):
    """By hand: pixel centres through K, into the world, into the first camera, over the mean distance."""
    config = settings(scene, weights, tmp_path, **POINTS)
    model, scenes = build_model(config), open_scenes(config)
    sample = load_sample(*items_of(split_scenes(scenes, config)[0].train, scenes)[0], make_frame_cache(config, model))
    truth, _ = prepare_batch(
        {n: getattr(sample, n) for n in ("K", "world_to_cam", "depth", "valid", "weight")}, LossConfig(depth_range=None)
    )
    rows, columns = torch.meshgrid(
        *(torch.arange(n, dtype=torch.float64) for n in sample.depth.shape[-2:]), indexing="ij"
    )
    rays = torch.stack([columns + 0.5, rows + 0.5, torch.ones_like(rows)], -1)
    cameras = sample.world_to_cam.double()
    lifted = torch.stack(
        [
            (z.double()[..., None] * (rays @ K.double().inverse().T) - pose[:3, 3]) @ pose[:3, :3]
            for z, K, pose in zip(sample.depth, sample.K, cameras)
        ]
    )
    lifted = lifted @ cameras[0, :3, :3].T + cameras[0, :3, 3]
    used = truth["valid"][0]
    lifted = lifted / lifted[used].norm(dim=-1).mean()
    torch.testing.assert_close(truth["world_points"][0][used].double(), lifted[used], rtol=1e-3, atol=1e-4)


def test_points_alone_teach_the_layers_of_the_aggregator(scene, weights, tmp_path):
    alone = dict.fromkeys(("camera_weight", "depth_conf_weight", "depth_reg_weight", "depth_grad_weight"), 0.0)
    found = train(
        settings(
            scene, weights, tmp_path / "run", strategy="b", heads="camera", supervision="completed", rehearsal="",
            **alone, **POINTS | {"point_gradient": "normal_conf"},
        )
    )
    assert {n for n in steps(found)[0] if n.startswith("loss_")} == {
        "loss_point_conf",
        "loss_point_reg",
        "loss_point_grad",
    }
    assert all(
        r[f"grad_norm_{part}"] > 0 for r in steps(found) for part in ("frame_blocks", "global_blocks", "point_head")
    )
    assert not any("grad_norm_depth_head" in r for r in steps(found))


@pytest.mark.parametrize(
    "changes",
    [{"feature_cache": "off"}, {"gradient_checkpointing": True, "frames_chunk": 1}],
    ids=lambda c: next(iter(c)),
)
def test_choices_of_time_and_memory_change_no_number(scene, weights, tmp_path, run, changes):
    other = train(settings(scene, weights, tmp_path / "run", **POINTS, **changes))
    for ours, theirs in zip(without_wall(other.records), without_wall(run.records), strict=True):
        for name, value in theirs.items():
            if name.startswith(("loss", "grad_norm")):
                assert ours[name] == pytest.approx(value, rel=2e-4), name


def test_out_of_memory_makes_both_dense_heads_take_smaller_pieces(scene, weights, tmp_path, run, monkeypatch):
    whole, left, models = loop_module.window_loss, [1], []

    def fails(model, *rest):
        result = whole(model, *rest)
        if torch.is_grad_enabled() and left and models:
            left.pop()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        models.append(model)
        return result

    monkeypatch.setattr(loop_module, "window_loss", fails)
    found = train(settings(scene, weights, tmp_path / "run", preflight="off", **POINTS))
    assert "dense heads now take 1 frame at once" in (found.folder / "train.log").read_text()
    assert [(h.recompute, h.frames_chunk) for h in dense_heads(models[0]).values()] == [(True, 1)] * 2
    assert [r["loss"] for r in found.records] == pytest.approx([r["loss"] for r in run.records], rel=1e-3)


def test_a_run_from_before_the_weights_is_resumed(plain, tmp_path):
    new = {f"point_{n}" for n in ("conf_weight", "reg_weight", "grad_weight", "gradient")}
    about = json.loads((plain.folder / "config.json").read_text())
    about["config"] = {n: v for n, v in about["config"].items() if n not in new}
    (tmp_path / "config.json").write_text(json.dumps(about))
    resumed_config(dataclasses.replace(plain.config, resume=True), read_config(tmp_path))
    with pytest.raises(ConfigError, match="point_reg_weight was 0.0, now 1.0"):
        resumed_config(dataclasses.replace(plain.config, resume=True, point_reg_weight=1.0), read_config(tmp_path))


def test_the_adapter_leaves_merged_and_its_card_says_which_heads(run, tmp_path):
    merged = export_merged(run, tmp_path / "merged")
    changed = {n.split(".")[0] for n in VGGT.from_pretrained(merged.folder).state_dict()}
    assert "point_head" in changed and not merged.carried.get("point_head")
    assert "point_head=True, track_head=False" in model_card(run)


def test_weights_without_a_point_head_and_unknown_weights_are_refused_by_name(scene, tmp_path):
    with pytest.raises(
        ConfigError,
        match="point_conf_weight, point_reg_weight or point_grad_weight is above 0, but tiny has no point head",
    ):
        train(settings(scene, "tiny", tmp_path / "run", point_reg_weight=1.0))
    assert not (tmp_path / "run").exists()
    for wrong, words in [
        ({"point_grad_weight": -1.0}, "point_grad_weight must lie between 0"),
        ({"point_reg_weight": float("nan")}, "point_reg_weight must lie"),
        ({"points_weight": 1.0}, "unknown parameter 'points_weight'"),
        ({"point_gradient": "edges"}, "point_gradient"),
    ]:
        with pytest.raises(ConfigError, match=words):
            TrainConfig.from_parameters(wrong)
