"""The refusal of a run that does not fit and the settings it proposes, and that a preflight leaves no trace."""
import dataclasses
import json

import pytest
import torch

from vggt_lora.adapters.adapter import apply_lora
from vggt_lora.core import ConfigError
from vggt_lora.datasets.samples import FrameCache
from vggt_lora.datasets.windows import Window
from vggt_lora.demo.demo_scenes import toy_scene
from vggt_lora.preflight.memory_profile import extrapolate
from vggt_lora.preflight.preflight import PreflightReport, _leaving, budgeted, preflight, refuse_or_warn
from vggt_lora.training.build import build_model, items_of, open_scenes, split_scenes
from vggt_lora.training.config import TrainConfig
from vggt_lora.training.feature_cache import asked, cached_source, plan_cache, predict
from vggt_lora.training.loop import fit
from vggt_lora.training.run import RunFolder, without_wall


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    return toy_scene(tmp_path_factory.mktemp("data"), frames=8, size=(84, 112))


def settings(scene, output, **changes) -> TrainConfig:
    values = {
        "supervision": "laser+sparse", "scale_normalization": "points", "choose_fraction": 0.0,
        "adapter_weights": "last", "metric_for_best_model": "loss", "strategy": "b", "model": "random",
        "data": str(scene), "output": str(output), "epochs": 1, "frames": 3, "image_size": 56, "rank": 2, "lr": 1e-3,
        "device": "cpu", "frame_cache": False,
    }
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
    with budgeted(budget, record) as clock:
        sample_source = cached_source(
            model, frames, config, train, held_out, lambda text: None, lambda: build_model(config).state_dict(),
            folder=folder,
        )
        fit(model, train, held_out, config, record, sample_source, (clock,))
    record.close()
    return model, record.records


def test_training_is_bit_for_bit_the_same_after_a_preflight(scene, tmp_path, monkeypatch):
    monkeypatch.setattr("vggt_lora.preflight.preflight.machine_is_busy", lambda: "")  # a busy one predicts no seconds
    with_one, records = run(settings(scene, tmp_path / "one"), tmp_path / "cache1", True)
    without, expected = run(settings(scene, tmp_path / "two"), tmp_path / "cache2", False)
    assert without_wall(records) == without_wall(expected) and records
    theirs = without.state_dict()
    assert all(
        torch.equal(tensor.nan_to_num(), theirs[name].nan_to_num()) for name, tensor in with_one.state_dict().items()
    )
    found = json.loads((tmp_path / "one" / "preflight.json").read_text())
    assert found["measured"]["peak"] > 0 and abs(found["error"]["peak"]) < 1
    assert {"step", "epoch"} <= found["measured"].keys() & found["error"].keys() and found["said"].count(
        "were predicted"
    ) == 3
    assert not (tmp_path / "two" / "preflight.json").exists()


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
    from vggt_lora.preflight import preflight as module

    def law(model, sample, config, store=None, most=6):
        head = module.network(model).depth_head
        each = 20 if head.recompute else 100
        return module.Point(
            len(sample.names),
            {"train": 10**9 + each * 10**6 * len(sample.names), "validate": 10**9},
            {"train": 0.1, "validate": 0.1},
        )

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
    assert not tight.fits and tight.proposal == {"gradient_checkpointing": True}
    with pytest.raises(ConfigError, match="gradient_checkpointing=True would fit"):
        refuse_or_warn(tight, "refuse", lambda text: None)
    said = []
    assert refuse_or_warn(tight, "warn", said.append) is tight and "WARNING" in said[-1]
    assert ask(dataclasses.replace(config, **tight.proposal), 300 * 10**6).fits
    very = ask(config, 120 * 10**6)
    assert (
        very.proposal["gradient_checkpointing"]
        and very.proposal["frames"] < 6
        and very.proposal["gradient_accumulation_steps"] > 1
    )
    assert ask(dataclasses.replace(config, **very.proposal), 120 * 10**6).fits
    none = ask(config, 10 * 10**6)
    assert not none.fits and not none.proposal and "smaller image_size" in none.refusal()


def test_memory_that_runs_out_in_the_preflight_itself_ends_in_a_refusal(scene, tmp_path, monkeypatch):
    from vggt_lora.preflight import preflight as module

    def fails(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(module, "measure_window", fails)
    config = settings(scene, tmp_path / "run")
    found = preflight(*ready(config), config, folder=tmp_path / "cache")
    assert not found.fits and found.refusal() and isinstance(found, PreflightReport)


def test_attention_that_writes_its_matrix_is_seen():
    assert extrapolate([1, 2, 3], [11, 14, 19], 10) == pytest.approx(110)


@pytest.fixture
def by_law(monkeypatch):
    """Memory and seconds by a law of the pixels, so that nothing depends on this machine: 1 MB and 1 us for each, 100
    MB and a second besides.
    """
    from vggt_lora.preflight import preflight as module

    def law(model, sample, config, store=None, most=6):
        pixels = sample.images[:, 0].numel()
        return module.Point(
            len(sample.names),
            {"train": 10**9 + 10**8 + 10**6 * pixels, "validate": 10**9},
            {"train": 1 + 1e-6 * pixels, "validate": 0.5},
        )

    monkeypatch.setattr(module, "measure_window", law)
    monkeypatch.setattr(module, "settle", lambda device: 10**9)
    monkeypatch.setattr(module, "SLACK", 0.0)


def test_frozen_weights_are_summed_once(scene, tmp_path, monkeypatch):
    """As in train(): the preflight's plan and the cache's ask for the same fingerprint."""
    from vggt_lora.adapters import adapter

    counted, real = [], adapter.bit_sum
    monkeypatch.setattr(adapter, "bit_sum", lambda flat: counted.append(flat.data_ptr()) or real(flat))
    config = settings(scene, tmp_path / "run", dropout=0.0)
    model, train, held_out, frames = ready(config)
    counted.clear()
    with adapter.summed_once():
        preflight(model, train, held_out, frames, config, folder=tmp_path / "cache")
        first = len(counted)
        cached_source(model, frames, config, train, held_out, lambda text: None, folder=tmp_path / "cache")
    assert len(counted) == first > 0


def test_doctor_and_preflight_name_the_same_number(scene, tmp_path, by_law, monkeypatch):
    from vggt_lora import doctor

    monkeypatch.setattr(doctor, "free_memory", lambda device: (10**12, "CPU"))
    config = settings(scene, tmp_path / "run")
    found = preflight(*ready(config), config, folder=tmp_path / "cache")
    plan = doctor.Plan(
        data=str(scene), model="random", strategy=config.strategy, rank=config.rank, frames=config.frames,
        image_size=config.image_size,
    )
    assert doctor.counted(plan).least == found.counted > 0
    assert doctor.amount(found.counted) in doctor.check_memory(plan)[0].found


def test_a_run_on_the_cpu_asks_the_host_although_there_is_a_gpu(monkeypatch):
    """A GPU with a thousand terabytes beside a host with less: what may be held is the host's."""
    from vggt_lora import doctor
    from vggt_lora.preflight import preflight as module

    for name, value in {
        "is_available": True, "is_bf16_supported": True, "mem_get_info": (10**15, 10**15), "memory_reserved": 7,
        "memory_allocated": 2,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    assert module.free_memory("cuda") == (10**15, "GPU") and module._room("cuda", 100, None) == 10**15 + 105
    free, where = module.free_memory("cpu")
    assert where == "CPU" and 0 < free < 10**15 and module._room("cpu", 0, None) < 10**15
    found = {device: doctor.check_memory(doctor.Plan(device=device))[0].found for device in ("auto", "cpu")}
    assert "1,000,000 GB free (GPU)" in found["auto"] and "free (CPU)" in found["cpu"]
    counted = {device: doctor.counted(doctor.Plan(device=device)).least for device in ("auto", "cpu")}
    assert counted["auto"] < counted["cpu"]  # bf16 on the GPU, float32 beside it


def test_the_plan_is_what_the_cache_holds(scene, tmp_path):
    """A limit below the last layer takes an earlier layer and not a store that fills up."""
    one = settings(scene, tmp_path / "run", feature_cache="float32", augment="flip", epochs=4, strategy="a")

    def filled(config, name):
        model, train, held_out, frames = ready(config)
        budget = preflight(model, train, held_out, frames, config, free=10**12, folder=tmp_path / f"{name}-before")
        plan = plan_cache(model, train, held_out, frames, config, True, tmp_path / f"{name}-plan")[0]
        leaving = _leaving(model, plan, config)
        store = cached_source(
            model, frames, config, train, held_out, lambda text: None, lambda: build_model(config).state_dict(),
            folder=tmp_path / name,
        ).store
        assert (budget.cache_bytes, budget.cache_entries) == (plan.bytes, plan.entries)
        assert 0 < store.report.used < plan.bytes + 700 * plan.entries, "more than the headers"
        assert not store.full and store.freed.bytes == leaving > 0
        return plan

    roomy = filled(one, "roomy")
    tight = filled(dataclasses.replace(one, feature_cache_gb=0.9 * roomy.bytes / 1e9), "tight")
    assert tight.layer < roomy.layer and tight.bytes < roomy.bytes


def test_a_photo_of_two_windows_is_kept_once_for_each_draw(scene, tmp_path):
    """Patch tokens are of a photo: once, but anew for each window and epoch where its colours are drawn."""
    one = settings(scene, tmp_path / "run", epochs=4)
    found = open_scenes(one)[0]
    train, frames = [(found, Window(found.name, (0, 1, 2))), (found, Window(found.name, (1, 2, 3)))], FrameCache(56)
    counts = {}
    for augment in ("", "colour"):
        wanted = asked(train, [], frames, dataclasses.replace(one, augment=augment), bool(augment))
        counts[augment] = predict(build_model(one), -1, "float32", wanted)[0]
    assert counts == {"": 4, "colour": 2 * 4 * 3}
