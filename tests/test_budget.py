"""The refusal of a run that does not fit and the settings it proposes, and that a preflight leaves no trace."""
import dataclasses
import json

import pytest
import torch

from vggt_lora.adapters.adapter import apply_lora
from vggt_lora.core import ConfigError
from vggt_lora.scenes.samples import FrameCache
from vggt_lora.scenes.synthetic import toy_scene
from vggt_lora.training.budget import Budget, budgeted, extrapolate, preflight, refused
from vggt_lora.training.config import TrainConfig
from vggt_lora.training.loop import fit
from vggt_lora.training.prefix import cached_feed
from vggt_lora.training.run import RunFolder, without_wall
from vggt_lora.training.setup import build_model, items_of, open_scenes, split_scenes


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    return toy_scene(tmp_path_factory.mktemp("data"), frames=8, size=(84, 112))


def settings(scene, output, **changes) -> TrainConfig:
    values = {"strategy": "b", "model": "random", "data": str(scene), "output": str(output), "epochs": 1, "frames": 3, "image_size": 56, "rank": 2,
              "lr": 1e-3, "device": "cpu", "store": False}
    return TrainConfig(**{**values, **changes})


def ready(config):
    """(model, train, held_out, frames) of a run."""
    base, scenes = build_model(config), open_scenes(config)
    split, _ = split_scenes(scenes, config)
    model, _ = apply_lora(base, config.strategy, rank=config.rank, dropout=config.dropout, seed=config.seed)
    return model, items_of(split.train, scenes), items_of(split.val, scenes), FrameCache(config.image_size)


def run(config, folder, check: bool):
    """A run with or without a preflight; returns (model, records)."""
    model, train, held_out, frames = ready(config)
    record = RunFolder(config.output)
    budget = preflight(model, train, held_out, frames, config, folder=folder) if check else None
    with budgeted(budget, record):
        feed = cached_feed(model, frames, config, train, held_out, lambda text: None, lambda: build_model(config).state_dict(), folder=folder)
        fit(model, train, held_out, config, record, feed)
    record.close()
    return model, record.records


def test_training_is_bit_for_bit_the_same_after_a_preflight(scene, tmp_path):
    with_one, records = run(settings(scene, tmp_path / "one"), tmp_path / "cache1", True)
    without, expected = run(settings(scene, tmp_path / "two"), tmp_path / "cache2", False)
    assert without_wall(records) == without_wall(expected) and records
    theirs = without.state_dict()
    assert all(torch.equal(tensor.nan_to_num(), theirs[name].nan_to_num()) for name, tensor in with_one.state_dict().items())
    found = json.loads((tmp_path / "one" / "budget.json").read_text())
    assert found["measured"]["peak"] > 0 and abs(found["error"]["peak"]) < 1
    assert not (tmp_path / "two" / "budget.json").exists()


def test_gradients_and_random_streams_survive(scene, tmp_path):
    config = settings(scene, tmp_path / "run")
    model, train, held_out, frames = ready(config)
    parameter = next(p for p in model.parameters() if p.requires_grad)
    parameter.grad = gradient = torch.full_like(parameter, 3.0)
    model.eval()
    before = torch.get_rng_state()
    preflight(model, train, held_out, frames, config, folder=tmp_path / "cache")
    assert torch.equal(before, torch.get_rng_state()) and not model.training
    assert parameter.grad is gradient and bool((gradient == 3).all())
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_run_that_does_not_fit_is_refused_with_settings_that_fit(tmp_path, monkeypatch):
    """Memory by a law that is known, so that nothing depends on this machine."""
    from vggt_lora.training import budget as module

    def law(model, sample, config, store=None):
        head = module.network(model).depth_head
        each = 20 if head.recompute else 100
        return module.Point(len(sample.names), {"train": 10**9 + each * 10**6 * len(sample.names), "validate": 10**9}, {"train": 0.1, "validate": 0.1})

    monkeypatch.setattr(module, "measure_window", law)
    monkeypatch.setattr(module, "settle", lambda device: 10**9)
    scene = toy_scene(tmp_path / "data", frames=8, size=(84, 112))
    config = settings(scene, tmp_path / "run", frames=6)
    model, train, held_out, frames = ready(config)

    def ask(settings, free):
        return preflight(model, *ready(settings)[1:3], frames, settings, free=free, folder=tmp_path / "cache")

    roomy = ask(config, 5 * 10**9)
    assert roomy.fits and not roomy.proposal and not roomy.refusal()
    tight = ask(config, 300 * 10**6)
    assert not tight.fits and tight.proposal == {"checkpointing": True}
    with pytest.raises(ConfigError, match="checkpointing=True would fit"):
        refused(tight, "refuse", lambda text: None)
    said = []
    assert refused(tight, "warn", said.append) is tight and "WARNING" in said[-1]
    assert ask(dataclasses.replace(config, **tight.proposal), 300 * 10**6).fits
    very = ask(config, 120 * 10**6)
    assert very.proposal["checkpointing"] and very.proposal["frames"] < 6 and very.proposal["accumulate"] > 1
    assert ask(dataclasses.replace(config, **very.proposal), 120 * 10**6).fits
    none = ask(config, 10 * 10**6)
    assert not none.fits and not none.proposal and "smaller image_size" in none.refusal()


def test_memory_that_runs_out_in_the_preflight_itself_ends_in_a_refusal(scene, tmp_path, monkeypatch):
    from vggt_lora.training import budget as module

    def fails(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(module, "measure_window", fails)
    config = settings(scene, tmp_path / "run")
    found = preflight(*ready(config), config, folder=tmp_path / "cache")
    assert not found.fits and found.refusal() and isinstance(found, Budget)


def test_attention_that_writes_its_matrix_is_seen():
    assert extrapolate([1, 2, 3], [11, 14, 19], 10) == pytest.approx(110)
