"""Training windows that vary: points land in real photos, the loop trains on them, and what is measured on stays as it
is.
"""
import dataclasses

import numpy as np
import pytest
import torch

from vggt_lora.adapters.adapter import apply_lora
from vggt_lora.core import ConfigError
from vggt_lora.datasets.samples import FrameCache, Sample, load_sample
from vggt_lora.datasets.windows import Window
from vggt_lora.demo.demo_scenes import toy_scene
from vggt_lora.geometry.cameras import project_points
from vggt_lora.reference_data import real_scene
from vggt_lora.scenes.opening import open_scene
from vggt_lora.training.augment import Variation, crop, cutmix, flip, tilt, turn
from vggt_lora.training.build import build_model
from vggt_lora.training.config import AUGMENTS, TrainConfig
from vggt_lora.training.loop import fit
from vggt_lora.training.losses import loss_config, window_loss
from vggt_lora.training.run import RunFolder

MIRROR = np.diag([-1.0, 1, 1])


@pytest.mark.parametrize("name", ["eth3d_pipes", "strecha_fountain_p11"])
def test_observed_points_of_real_photos_land_where_the_picture_went(name):
    """The photo's own keypoints, moved by hand, against the points projected through the changed cameras."""
    folder = real_scene(name)
    if folder is None:
        pytest.skip("the real scene is absent")
    scene, cache = open_scene(folder), FrameCache(252, supervision="sparse")
    window = Window(scene.name, (0, 1))
    sample, target = load_sample(scene, window, cache), cache.size(scene, 0)
    height, width = target
    angles = np.radians([4.0, -6.0])
    tilted, small = tilt(sample, angles), crop(sample, (height - 56, width - 70))

    def rolled(k, p):
        c, s = np.cos(angles[k]), np.sin(angles[k])
        old, new = sample.K[k].double().numpy(), tilted.K[k].double().numpy()
        x = (p - old[:2, 2]) / old[[0, 1], [0, 1]]
        return x @ np.array([[c, -s], [s, c]]) * new[[0, 1], [0, 1]] + new[:2, 2]

    cases = {
        "as it is": (sample, lambda k, p: p, np.eye(3)),
        "flip": (flip(sample), lambda k, p: np.stack([width - p[:, 0], p[:, 1]], 1), MIRROR),
        "turn": (turn(sample, 1), lambda k, p: np.stack([p[:, 1], width - p[:, 0]], 1), np.eye(3)),
        "tilt": (tilted, rolled, np.eye(3)),
        "crop": (small, lambda k, p: p - (sample.K - small.K)[k, :2, 2].numpy(), np.eye(3)),
    }
    medians = {}
    for what, (changed, move, world) in cases.items():
        distances = []
        for k, index in enumerate(window.frames):
            frame = scene.frames[index]
            seen = cache.plan(scene, index, target).points(frame.observations)
            pixels, z = project_points(
                scene.points.xyz[frame.point_rows] @ world.T,
                changed.world_to_cam[k].numpy(),
                changed.K[k].double().numpy(),
            )
            distances.append(np.linalg.norm(move(k, seen) - pixels, axis=1)[z > 0])
        medians[what] = float(np.median(np.concatenate(distances)))
    assert medians["as it is"] < 0.3  # the reconstruction's own error, in pixels of the network's photo
    for what, median in medians.items():
        assert median == pytest.approx(medians["as it is"], rel=0.15), what


def test_geometry_that_does_not_fit_is_refused():
    scene_like = {
        "images": torch.zeros(1, 3, 28, 42),
        "depth": torch.ones(1, 28, 42),
        "valid": torch.ones(1, 28, 42, dtype=torch.bool),
        "weight": torch.ones(1, 28, 42),
        "labels": torch.zeros(1, 28, 42, dtype=torch.uint8),
        "world_to_cam": torch.eye(4, dtype=torch.float64)[None],
        "K": torch.tensor([[[30.0, 0.5, 21], [0, 30, 14], [0, 0, 1]]]),
        "names": ("a",),
        "scene": "shed",
        "metric": True,
    }
    sample = Sample(**scene_like)
    with pytest.raises(ConfigError, match="shed has cameras with skew"):
        turn(sample, 1)
    with pytest.raises(ConfigError, match="does not fit"):
        crop(sample, (42, 42))
    with pytest.raises(ConfigError, match="does not lie inside"):
        cutmix(sample, sample, (0, 0, 28, 43))
    assert flip(sample).K[0, 0, 1] == -0.5  # a mirrored skew


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    return toy_scene(tmp_path_factory.mktemp("data"), frames=10, size=(84, 126))


def settings(scene, output, **changes) -> TrainConfig:
    values = {
        "scale_normalization": "points", "choose_fraction": 0.0, "adapter_weights": "last",
        "metric_for_best_model": "loss", "data": str(scene), "output": str(output),
        "epochs": 1, "frames": 3, "image_size": 56, "rank": 2, "dropout": 0.0, "model": "random", "frame_cache": False,
        "supervision": "sparse",
    }
    return TrainConfig(**{**values, **changes})


def test_the_loop_trains_on_varied_windows_and_measures_on_plain_ones(scene, tmp_path):
    opened, records = open_scene(scene), {}
    items = [(opened, Window(opened.name, frames)) for frames in ((0, 1), (2, 3), (4, 5))]
    for name, changes in {
        "plain": {},
        "varied": {"augment": ",".join(AUGMENTS)},
    }.items():
        config = settings(scene, tmp_path / name, **changes)
        run = RunFolder(config.output)
        fit(
            apply_lora(build_model(config), "b", rank=2, dropout=0.0, seed=0)[0], items[:2], items[2:], config, run,
            FrameCache(56),
        )
        run.close()
        records[name] = {
            split: [r["loss_depth_reg"] for r in run.records if r["split"] == split] for split in ("train", "val")
        }
    # before the first step: the same window, the same model
    assert records["plain"]["val"][0] == records["varied"]["val"][0]
    assert (
        len(records["plain"]["train"]) == len(records["varied"]["train"]) == 2
        and records["plain"]["train"][0] != records["varied"]["train"][0]
    )


def test_mixtures_take_from_training_windows_alone(scene, monkeypatch):
    monkeypatch.setattr("vggt_lora.training.augment.MIX_PROBABILITY", 1.0)
    config, opened = settings(scene, "nowhere", augment="cutmix,mixup"), open_scene(scene)
    seen = []

    class Watched(FrameCache):
        def get(self, scene, index, target):
            seen.append(index)
            return super().get(scene, index, target)

    items = [(opened, Window(opened.name, frames)) for frames in ((0, 1, 2), (2, 3, 4), (5, 6, 7))]
    variation = Variation(Watched(56), config, items)
    for epoch in range(12):
        variation(*items[0], [1, 0, 2], epoch)
    assert set(seen) == set(range(8))  # the items hold photos 0 to 7 of ten


def test_an_untrained_adapter_is_held_at_no_cost(scene):
    """Before the first step the model is the base: the term that holds its edges is 0, whatever the truth's unit."""
    config = settings(scene, "nowhere", base_gradient_weight=1.0)
    model, _ = apply_lora(build_model(config), "b", rank=2, dropout=0.0, seed=0)
    opened = open_scene(scene)
    sample = load_sample(opened, Window(opened.name, (0, 1, 2)), FrameCache(56))
    for scale in ("base", "points"):
        losses, units = dataclasses.replace(loss_config(config), scale=scale), {}
        for _ in range(2):  # a known length does not spare the base, whose edges are compared
            result = window_loss(model.eval(), sample, losses, "cpu", units=units)
            assert result.terms["base_gradient"].item() < 1e-5 and result.counts["base_gradient_pairs"] > 0
