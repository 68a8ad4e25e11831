"""Whole runs on a GPU that stands in (tests/gpu.py): nothing mixes the sides, memory is what was predicted, and what
does not fit finds a way that does.
"""
import ast
import dataclasses
import gc
import json
import re

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from benchmarks import train_step
from tests.gpu import GPU, OnGPU, standing_in
from vggt_lora.adapters.adapter import apply_lora
from vggt_lora.adapters.base_check import BaseCheck
from vggt_lora.core import ConfigError
from vggt_lora.demo.demo_scenes import toy_scene
from vggt_lora.evaluate import evaluate, largest_difference
from vggt_lora.model.vggt import VGGTConfig
from vggt_lora.train import TrainConfig, train
from vggt_lora.training.run import without_wall

pytestmark = pytest.mark.usefixtures("preflights")


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    return toy_scene(tmp_path_factory.mktemp("data"), frames=12, size=(112, 168))


@pytest.fixture
def gpu(monkeypatch):
    with standing_in(monkeypatch) as memory:
        yield memory
        gc.collect()
        left = memory.now
    assert not left, f"{left} bytes stay on the GPU"


def settings(scene, output, **changes) -> TrainConfig:
    return TrainConfig(
        **{
            "supervision": "laser+sparse", "scale_normalization": "points", "choose_fraction": 0.0,
            "adapter_weights": "last", "metric_for_best_model": "loss", "strategy": "b", "model": "random",
            "data": str(scene), "output": str(output), "device": "cuda", "epochs": 1, "frames": 4, "image_size": 56,
            "rank": 4, "lr": 1e-3, **changes,
        }
    )


MIXED = {
    "sum": lambda on, off: on + off, "product": lambda on, off: on @ off.T,
    "joined": lambda on, off: torch.cat([off, on]), "in place": lambda on, off: off.add_(on),
    "mask": lambda on, off: off[on > 0], "where": lambda on, off: on.where(on > 0, off),
}
CONVERTED = {"numpy": lambda on, off: on.numpy(), "asarray": lambda on, off: np.asarray(on)}
REFUSED = {
    **{name: (work, "two devices") for name, work in MIXED.items()},
    **{name: (work, "can't convert") for name, work in CONVERTED.items()},
    "generator": (lambda on, off: torch.randn(3, device="cuda", generator=torch.Generator()), "generator"),
}


@pytest.mark.parametrize("wrong, words", REFUSED.values(), ids=REFUSED)
def test_the_stand_in_refuses_what_a_gpu_refuses(gpu, wrong, words):
    with pytest.raises((RuntimeError, TypeError), match=words):
        wrong(torch.rand(2, 3, device="cuda"), torch.rand(2, 3))


def test_the_stand_in_computes_what_the_cpu_computes(gpu):
    """A layer that is moved, recomputed and stepped: the same numbers, on the other side, and the same objects."""
    here, there = (torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)) for _ in range(2))
    there.load_state_dict(here.state_dict())
    known, x, gradients = list(there.parameters()), torch.rand(3, 4), []
    there.to("cuda")
    assert (
        all(a is b for a, b in zip(known, there.parameters()))
        and known[0].device == GPU
        and isinstance(known[0], OnGPU)
    )
    for model, device in ((here, "cpu"), (there, "cuda")):
        optimizer, x.grad = torch.optim.AdamW(model.parameters(), fused=True), None
        checkpoint(model, x.requires_grad_().to(device), use_reentrant=False).pow(2).sum().backward()
        optimizer.step()
        gradients.append(x.grad)
    assert (
        all(torch.equal(a, b.cpu()) for a, b in zip(here.parameters(), there.parameters()))
        and known[0].grad.device == GPU
    )
    assert torch.equal(*gradients) and not isinstance(gradients[1], OnGPU)
    with torch.autocast("cuda", torch.bfloat16):
        # a norm gives float32 on a GPU
        assert there[0](x.to("cuda")).dtype == torch.bfloat16 and there(x.to("cuda")).dtype == torch.float32


def test_the_stand_in_counts_and_runs_out(gpu):
    kept = torch.empty(1000, device="cuda")
    assert gpu.now == 4096
    view, other = kept[:10], kept.bfloat16()
    assert gpu.now == 4096 + 2048
    del kept, other
    assert gpu.now == 4096, "a view holds what it shows"
    gpu.limit = 8000
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        view + torch.empty(1000, device="cuda")


def peak_of_steps(memory, kind: str, strategy: str, folder) -> int:
    """The most that lies on the GPU in two steps of benchmarks/train_step.py."""
    stepper = train_step.Stepper(
        train_step.new_base(VGGTConfig.golden(), "cuda"), strategy, kind, train_step.random_sample(3, (56, 84)), "cuda",
        "bf16", folder, True,
    )
    gc.collect()
    memory.peak = memory.now
    assert np.isfinite(stepper.step()) and np.isfinite(stepper.step())
    return memory.peak


@pytest.mark.parametrize("kind, strategy", [("cache", "a"), ("small", "c")])
def test_without_numbers_it_counts_the_same(monkeypatch, tmp_path, kind, strategy):
    """What benchmarks/gpu_memory.py says of a network that is too large to be computed here."""
    found = []
    for numbers in (True, False):
        with monkeypatch.context() as patch, standing_in(patch, numbers=numbers) as memory:
            found.append(peak_of_steps(memory, kind, strategy, tmp_path / str(numbers)))
            gc.collect()
            assert not memory.now
    assert found[0] == found[1] > 3_000_000


SPARING = {"gradient_checkpointing": True, "frames_chunk": 1, "head_precision": "bf16"}


@pytest.mark.parametrize(
    "changes",
    [
        {
            "strategy": "a", **SPARING, "base_gradient_weight": 0.1, "agreement_weight": 0.1,
            "scale_normalization": "base",
        },
        {
            "strategy": "c", "dropout": 0.1, "augment": "crop,colour,flip,turn,tilt,mixup,cutmix",
            "distinct_epochs": 2, "epochs": 2,
        },
        {
            "strategy": "custom", "target_modules": "aggregator.global_blocks.3, depth_head.scratch",
            "full_finetune": "depth_head.norm", "use_dora": True, "feature_cache": "off", "precision": "float32",
        },
        {
            "strategy": "b", "point_conf_weight": 1.0, "point_grad_weight": 1.0, "gradient_accumulation_steps": 3,
            "supervision": "sparse",
        },
    ],
    ids=lambda c: "-".join(map(str, c.values()))[:40],
)
def test_a_whole_run_stays_on_its_side_and_within_its_prediction(gpu, scene, tmp_path, changes):
    held = {}

    def end(event, progress):
        if event == "end":
            held["training"], gpu.peak = gpu.peak, gpu.now

    run = train(settings(scene, tmp_path / "run", **changes), hooks=(end,))
    held["evaluation"] = gpu.peak
    loss = run.results["held_out_loss"]
    assert np.isfinite([loss["before"], loss["after"]]).all() and loss["after"] != loss["before"]
    budget = json.loads((run.folder / "preflight.json").read_text())
    assert (
        budget["predicted"]["peak"] == pytest.approx(held["training"], rel=0.1)
        and budget["predicted"]["evaluation"] > 0.9 * held["evaluation"]
    ), (budget, held)
    assert all(r["wall"]["gpu_peak_gb"] > 0 for r in run.records if "wall" in r)
    assert run.results["protocol"]["precision"] == changes.get("precision", "bf16")


def test_the_proof_before_a_run_recomputes(monkeypatch):
    """Its gradients pass the whole network; without recomputing they would need more than a sparing run."""
    images, peaks = torch.rand(1, 2, 3, 154, 224), []
    with standing_in(monkeypatch, numbers=False) as memory:
        base = train_step.new_base(VGGTConfig.tiny(), "cuda")
        gate = BaseCheck(base, images.to("cuda"))
        adapted, targets = apply_lora(base, "c")
        for work in (
            lambda: gate.check(adapted.to("cuda"), targets),
            lambda: adapted(images.to("cuda"))["depth"].sum().backward(),
        ):
            gc.collect()
            memory.peak = start = memory.now
            work()
            peaks.append(memory.peak - start)
    assert peaks[0] < 0.5 * peaks[1], peaks


def test_a_run_goes_on_as_if_it_had_not_stopped(gpu, scene, tmp_path):
    """Weights, moments and random streams leave the device and come back: four steps at once, or two of them later."""
    config = settings(scene, tmp_path / "whole", dropout=0.1, preflight="off")
    whole = train(config)

    def stop(event, progress):
        progress.stop |= progress.step == 2

    part = dataclasses.replace(config, output=str(tmp_path / "part"))
    train(part, hooks=(stop,))
    assert without_wall(train(dataclasses.replace(part, resume=True)).records) == without_wall(whole.records)


def test_what_comes_after_a_run_stays_on_its_side_too(gpu, scene, tmp_path, monkeypatch):
    """A step is skipped, the run is evaluated again with clouds, and the adapter's numbers are those of the
    run.
    """
    from vggt_lora.training import loop

    found = iter([[], ["made up (depth head)"]])
    monkeypatch.setattr(loop, "nonfinite_terms", lambda result: next(found, []))
    run = train(settings(scene, tmp_path / "run"))
    assert sum("skipped" in record for record in run.records) == 1
    again = evaluate(run.folder, clouds=True)
    assert largest_difference(again.table(), run.results["table"]) == 0 and again.clouds.rows


def wide(scene, output, **changes) -> TrainConfig:
    """A run in which activations weigh more than the network."""
    return settings(
        scene, output, **{"frames": 8, "image_size": 112, "train_fraction": 0.7, "feature_cache": "off", **changes}
    )


def test_what_does_not_fit_is_refused_and_the_proposal_fits(gpu, scene, tmp_path):
    gpu.limit = 36_000_000  # the comparison at the end too has to take few frames at once
    with pytest.raises(ConfigError, match="would fit") as refusal:
        train(wide(scene, tmp_path / "refused"))
    gc.collect()
    assert not gpu.now, "an error that is kept, as Jupyter keeps it, holds no network"
    proposal = {
        name: ast.literal_eval(value)
        for name, value in re.findall(r"(\w+)=(\w+)", str(refusal.value).split(" would fit")[0])
    }
    assert proposal
    run = train(wide(scene, tmp_path / "proposed", **proposal))
    assert "out of memory" not in (run.folder / "train.log").read_text()
    assert abs(json.loads((run.folder / "preflight.json").read_text())["error"]["peak"]) < 0.1


def test_memory_that_runs_out_costs_a_smaller_chunk_and_not_the_run(gpu, scene, tmp_path):
    gpu.limit = 55_000_000
    run = train(wide(scene, tmp_path / "warned", preflight="warn"))
    said = (run.folder / "train.log").read_text()
    assert "WARNING" in said and "the step is repeated" in said
    assert np.isfinite(run.results["held_out_loss"]["after"]) and not any("skipped" in r for r in run.records)
