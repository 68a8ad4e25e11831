"""The loop against a twin written by hand, and every setting followed to the place where it acts."""
import dataclasses
import json
import math
import types

import pytest
import torch

from vggt_lora.adapters.adapter import apply_lora, load_adapter
from vggt_lora.datasets.samples import load_sample
from vggt_lora.demo.demo_scenes import toy_scene
from vggt_lora.evaluation.runner import evaluate_windows
from vggt_lora.train import TrainConfig, train
from vggt_lora.training.build import build_model, make_frame_cache, items_of, open_scenes, split_scenes
from vggt_lora.training.loop import fit, held_out_loss
from vggt_lora.training.losses import loss_config, window_loss, LossConfig
from vggt_lora.training.run import RunFolder
from vggt_lora.training.checkpoint import read_checkpoint
from vggt_lora.training.sample_source import SampleSource
from vggt_lora.training.schedule import epoch_order, learning_rate

# all different: no two can be swapped unseen
WEIGHTS = {"camera": 1.5, "depth_conf": 0.5, "depth_reg": 4.0, "depth_grad": 3.0}


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    return toy_scene(tmp_path_factory.mktemp("data"), frames=12, size=(112, 168))


def settings(scene, output, **changes) -> TrainConfig:
    values = {
        "supervision": "laser+sparse", "scale_normalization": "points", "choose_fraction": 0.0,
        "adapter_weights": "last", "metric_for_best_model": "loss", "strategy": "b", "data": str(scene),
        "rehearsal": "", "units_are_metres": "yes", "output": str(output), "epochs": 2, "frames": 4, "image_size": 56,
        "rank": 4, "alpha": 12.0, "dropout": 0.0, "lr": 1e-2, "min_lr": 1e-4, "warmup_ratio": 0.5, "weight_decay": 0.1,
        "max_grad_norm": 0.5, "gradient_accumulation_steps": 3, "depth_min": 0.2, "depth_max": 9.0, "seed": 5,
        **{f"{name}_weight": value for name, value in WEIGHTS.items()},
    }
    return TrainConfig(**{**values, **changes})


def parts(config: TrainConfig):
    """The data of a configuration: (base model, cache, training items, held-out items)."""
    model, scenes = build_model(config), open_scenes(config)
    split, _ = split_scenes(scenes, config)
    return model, make_frame_cache(config, model), items_of(split.train, scenes), items_of(split.val, scenes)


@pytest.fixture(scope="module")
def run(scene, tmp_path_factory):
    return train(settings(scene, tmp_path_factory.mktemp("twin") / "run"))


def records(run, split: str) -> list[dict]:
    return [r for r in map(json.loads, (run.folder / "metrics.jsonl").read_text().splitlines()) if r["split"] == split]


# --- the twin -------------------------------------------------------------------------------------------------------

BY_HAND = LossConfig(**WEIGHTS, depth_range=(0.2, 9.0))


def weighted(terms) -> torch.Tensor:
    return sum(weight * terms[name] for name, weight in WEIGHTS.items())


class HandAdamW:
    """AdamW after Loshchilov and Hutter 2019, algorithm 2, with clipping of the gradient's norm."""

    def __init__(self, parameters, decay, clip):
        self.parameters, self.decay, self.clip, self.step_number = parameters, decay, clip, 0
        self.first, self.second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))

    @torch.no_grad()
    def step(self, gradients, rate) -> float:
        norm = math.sqrt(sum(float((g ** 2).sum()) for g in gradients))
        self.step_number += 1
        for p, g, m, v in zip(self.parameters, gradients, self.first, self.second):
            g = g * min(1, self.clip / (norm + 1e-6))
            m.mul_(0.9).add_(0.1 * g)
            v.mul_(0.999).add_(0.001 * g * g)
            p.mul_(1 - rate * self.decay)
            p.sub_(rate * (m / (1 - 0.9 ** self.step_number)) / ((v / (1 - 0.999 ** self.step_number)).sqrt() + 1e-8))
        return norm


def in_type(sample, dtype):
    """A sample's real numbers in another type."""
    return dataclasses.replace(
        sample,
        **{
            f.name: value.to(dtype)
            for f in dataclasses.fields(sample)
            if isinstance(value := getattr(sample, f.name), torch.Tensor) and value.is_floating_point()
        },
    )


class Typed(SampleSource):
    """A sample source in float64."""

    def load(self, scene, window, order=None, epoch=0):
        sample, state = super().load(scene, window, order, epoch)
        return in_type(sample, torch.float64), state


@torch.no_grad()
def held_out_by_hand(model, items, load) -> float:
    model.eval()
    return sum(float(weighted(window_loss(model, load(*item), BY_HAND, "cpu").terms)) for item in items) / len(items)


@pytest.fixture(scope="module")
def twin(scene, tmp_path_factory):
    return by_hand(settings(scene, tmp_path_factory.mktemp("twin") / "unused"))


def adapted(config, dtype=torch.float32):
    """(model with its adapter, cache, training items, held-out items)."""
    model, cache, items, held_out = parts(config)
    return apply_lora(model, "b", rank=4, alpha=12.0, dropout=0.0, seed=5)[0].to(dtype), cache, items, held_out


def by_hand(config, dtype=torch.float32):
    """The same training once more: gradients summed by hand, AdamW by hand, the schedule as formula."""
    model, cache, items, held_out = adapted(config, dtype)

    def load(scene, window, order=None):
        sample = load_sample(scene, window, cache, order)
        return sample if dtype == torch.float32 else in_type(sample, dtype)

    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = HandAdamW(list(named.values()), decay=0.1, clip=0.5)
    steps, validations, total = [], [held_out_by_hand(model, held_out, load)], 2 * math.ceil(len(items) / 3)
    for epoch in range(2):
        order = epoch_order(len(items), [len(w.frames) for _, w in items], config, epoch)
        model.train()
        for start in range(0, len(order), 3):
            gradients, loss = [torch.zeros_like(p) for p in named.values()], 0.0
            chunk = order[start:start + 3]
            for index, frames in chunk:
                value = weighted(window_loss(model, load(*items[index], frames), BY_HAND, "cpu").terms)
                for sum_, g in zip(gradients, torch.autograd.grad(value, list(named.values()), allow_unused=True)):
                    sum_.add_(0 if g is None else g / len(chunk))
                loss += float(value.detach()) / len(chunk)
            number, warm = len(steps) + 1, total // 2
            rate = (1e-2 * number / warm if number <= warm
                    else 1e-4 + (1e-2 - 1e-4) * (1 + math.cos(math.pi * (number - warm) / (total - warm))) / 2)
            steps.append({"lr": rate, "loss": loss, "grad_norm": optimizer.step(gradients, rate)})
        validations.append(held_out_by_hand(model, held_out, load))
    return types.SimpleNamespace(steps=steps, validations=validations, weights=named, windows=len(items))


def test_the_case_is_hard_enough(run, twin, scene):
    """The last chunk is short, clipping acts, the schedule moves, and the depth range cuts something."""
    assert twin.windows % 3 and twin.windows > 3
    assert all(s["grad_norm"] > 0.5 for s in twin.steps)
    assert len({s["lr"] for s in twin.steps}) >= 3
    model, cache, items, _ = parts(run.config)
    sample = load_sample(*items[0], cache)
    assert sample.metric and (sample.depth[sample.valid] > 9).any()


def test_learning_rate_loss_and_gradient_of_every_step(run, twin):
    measured = records(run, "train")
    assert len(measured) == len(twin.steps)
    for name in ("lr", "loss", "grad_norm"):
        assert [r[name] for r in measured] == pytest.approx([s[name] for s in twin.steps], rel=1e-5), name


def test_the_held_out_curve(run, twin):
    assert [r["loss"] for r in records(run, "val")] == pytest.approx(twin.validations, rel=1e-5)


def test_the_weights_at_the_end_in_float64(scene, tmp_path):
    """Adam divides by the gradient's size: where that is nothing but rounding, so is the step, but a whole one. In
    float64 nothing of it is left, and every weight must agree.
    """
    config = settings(scene, tmp_path / "run")
    model, cache, items, held_out = adapted(config, torch.float64)
    run = RunFolder(config.output)
    fit(model, items, held_out, config, run, Typed(cache))
    run.close()
    exact, weights = (
        by_hand(config, torch.float64),
        read_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")["weights"],
    )
    assert weights.keys() == exact.weights.keys() and all(tensor.dtype == torch.float64 for tensor in weights.values())
    worst = max(float((weights[n] - p.detach()).abs().max()) for n, p in exact.weights.items())
    assert worst < 1e-9, f"the weights differ by up to {worst}; the largest step is {max(s['lr'] for s in exact.steps)}"
    moved = max(
        float((p.detach() - b.detach()).abs().max())
        for p, b in zip(
            exact.weights.values(), (p for p in adapted(config, torch.float64)[0].parameters() if p.requires_grad)
        )
    )
    assert moved > 1e-3, "the training did not move them"


def test_the_weights_at_the_end(run, twin):
    """In float32, through the whole of train(): no weight is off by more than a part of one step. How far rounding
    carries is shown in float64.
    """
    weights = read_checkpoint(run.folder / "checkpoints" / "last.pt")["weights"]
    assert weights.keys() == twin.weights.keys()
    worst = max(float((weights[n] - p.detach()).abs().max()) for n, p in twin.weights.items())
    largest = max(s["lr"] for s in twin.steps)
    assert worst < 0.05 * largest, f"the weights differ by up to {worst}; the largest step is {largest}"


# --- settings -------------------------------------------------------------------------------------------------------

def test_every_loss_setting_reaches_the_loss(scene, tmp_path):
    config = settings(scene, tmp_path)
    wanted = dataclasses.replace(LossConfig(), **WEIGHTS, depth_range=(0.2, 9.0))
    assert dataclasses.asdict(loss_config(config)) == dataclasses.asdict(wanted)
    more = settings(
        scene, tmp_path, point_conf_weight=0.7, point_reg_weight=0.8, point_grad_weight=0.9,
        point_gradient="normal_conf",
    )
    wanted = dataclasses.replace(
        wanted, point_conf=0.7, point_reg=0.8, point_grad=0.9, point_gradient="normal_conf"
    )
    assert dataclasses.asdict(loss_config(more)) == dataclasses.asdict(wanted)


def test_every_adapter_setting_reaches_peft(scene, tmp_path):
    config = settings(
        scene, tmp_path / "run", strategy="custom", target_modules="depth_head.scratch, camera_head",
        full_finetune="depth_head.norm", rank=3, alpha=7.0, dropout=0.25, epochs=1, seed=9,
    )
    adapter = train(config).adapter
    saved = json.loads((adapter / "adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"], saved["lora_dropout"], saved["modules_to_save"]) == (
        3, 7.0, 0.25, ["depth_head.norm"],
    )
    model = load_adapter(build_model(config), adapter)
    scales = {m.scaling["default"] for m in model.modules() if hasattr(m, "scaling")}
    adapted = {n for n, m in model.get_base_model().named_modules() if hasattr(m, "lora_A")}
    assert scales == {7.0 / 3}
    assert adapted and all(n.startswith(("depth_head.scratch", "camera_head")) for n in adapted)
    assert any(n.startswith("depth_head.scratch") for n in adapted) and any(
        n.startswith("camera_head") for n in adapted
    )


def test_the_seed_decides_the_adapter(scene, tmp_path):
    weights = []
    for number, seed in enumerate((1, 1, 2)):
        folder = train(settings(scene, tmp_path / str(number), seed=seed, epochs=1, lr=1e-6, min_lr=0.0)).folder
        weights.append(read_checkpoint(folder / "checkpoints" / "last.pt")["weights"])
    same, other = (all(torch.equal(weights[0][n], w[n]) for n in w) for w in weights[1:])
    assert same and not other


# --- order ----------------------------------------------------------------------------------------------------------

def test_windows_and_frames_are_shuffled_anew_in_every_epoch(scene, tmp_path):
    config = settings(scene, tmp_path, distinct_epochs=None)
    epochs = [epoch_order(20, [6] * 20, config, epoch) for epoch in range(3)]
    for order in epochs:
        assert sorted(i for i, _ in order) == list(range(20)) != [i for i, _ in order]
        assert all(sorted(frames) == list(range(6)) for _, frames in order)
        assert len({tuple(frames) for _, frames in order}) > 10
    assert len({tuple(i for i, _ in order) for order in epochs}) == 3
    assert epochs[1] == epoch_order(20, [6] * 20, config, 1)
    assert epochs[1] != epoch_order(20, [6] * 20, dataclasses.replace(config, seed=6), 1)
    kept = epoch_order(20, [6] * 20, dataclasses.replace(config, shuffle_frames=False), 0)
    assert all(frames == list(range(6)) for _, frames in kept) and [i for i, _ in kept] != list(range(20))


def test_first_frames_come_round_and_the_others_stay_in_order(scene, tmp_path):
    config = settings(scene, tmp_path, distinct_epochs=3)
    epochs = [dict(epoch_order(20, [6] * 20, config, epoch)) for epoch in range(6)]
    assert epochs[:3] == epochs[3:] and len({tuple(frames) for frames in epochs[0].values()}) > 3
    for window in range(20):
        firsts = [epoch[window][0] for epoch in epochs[:3]]
        assert len(set(firsts)) == 3
        assert all(epoch[window][1:] == [i for i in range(6) if i != epoch[window][0]] for epoch in epochs)


@pytest.mark.parametrize("warmup, total", [(0.0, 7), (0.1, 40), (0.5, 4), (0.9, 20)])
def test_schedule_rises_to_the_peak_and_falls_to_the_end(scene, tmp_path, warmup, total):
    config = settings(scene, tmp_path, warmup_ratio=warmup)
    rates = [learning_rate(step, total, config.optim) for step in range(total)]
    top = rates.index(max(rates))
    assert rates[:top + 1] == sorted(rates[:top + 1]) and rates[top:] == sorted(rates[top:], reverse=True)
    assert min(rates) > 0 and rates[-1] == pytest.approx(config.min_lr)
    assert max(rates) == pytest.approx(config.peak_lr) or not warmup


# --- validation -----------------------------------------------------------------------------------------------------

def test_validation_is_without_dropout_and_changes_nothing(scene, tmp_path):
    config = settings(scene, tmp_path, dropout=0.5)
    model, cache, _, held_out = parts(config)
    model, _ = apply_lora(model, "b", rank=4, dropout=0.5, seed=0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    model.train()
    state, stream = {n: p.clone() for n, p in model.state_dict().items()}, torch.get_rng_state()
    first = held_out_loss(model, held_out, cache, loss_config(config), "cpu")
    assert torch.equal(stream, torch.get_rng_state())
    torch.manual_seed(123)
    assert held_out_loss(model, held_out, cache, loss_config(config), "cpu") == first
    assert model.training and all(torch.equal(state[n], p) for n, p in model.state_dict().items())
    assert first["loss"] == pytest.approx(
        held_out_by_hand(model, held_out, lambda *item: load_sample(*item, cache)), rel=1e-6
    )
    model.train()
    with torch.no_grad():  # with dropout the number would be another one
        noisy = [
            float(window_loss(model, load_sample(*held_out[0], cache), loss_config(config), "cpu").total)
            for _ in range(2)
        ]
    assert noisy[0] != noisy[1]


def test_best_is_the_lowest_held_out_loss_and_its_weights(scene, tmp_path):
    """With a learning rate far too high the loss goes up and down; best.pt holds the lowest, last.pt the last."""
    config = settings(
        scene, tmp_path / "run", epochs=5, lr=0.02, max_grad_norm=1e6, gradient_accumulation_steps=1, warmup_ratio=0.0,
        min_lr=0.018,
    )
    model, cache, items, held_out = parts(config)
    model, _ = apply_lora(model, "b", rank=4, alpha=12.0, dropout=0.0, seed=5)
    folder = RunFolder(tmp_path / "run")
    seen = []
    progress = fit(
        model, items, held_out, config, folder, cache, (lambda event, p: seen.append((event, p.step, p.epoch)),)
    )
    folder.close()
    losses = {r["epoch"]: r["loss"] for r in folder.records if r["split"] == "val"}
    values = [losses[e] for e in sorted(losses)]
    assert sorted(losses) == list(range(6)) and values != sorted(values) and values != sorted(values, reverse=True), (
        values
    )
    lowest = min(losses, key=losses.get)
    assert progress.best == losses[lowest] and progress.held_out == losses[5]
    assert max(losses, key=losses.get) != lowest != 5, "the last one is the best: the test would not notice"
    for name, epoch in (("best", lowest), ("last", 5)):
        content = read_checkpoint(tmp_path / "run" / "checkpoints" / f"{name}.pt")
        assert content["counters"]["epoch"] == epoch and content["counters"]["best"] == losses[lowest]
        assert content["counters"]["step"] == epoch * len(items)
        with torch.no_grad():
            for n, p in model.named_parameters():
                if p.requires_grad:
                    p.copy_(content["weights"][n])
        assert held_out_loss(model, held_out, cache, loss_config(config), "cpu")["loss"] == losses[epoch]
    assert [s for s in seen if s[0] == "epoch"] == [("epoch", len(items) * e, e) for e in range(1, 6)]
    assert seen[-1][0] == "end" and sum(s[0] == "step" for s in seen) == 5 * len(items)


# --- what is reported -----------------------------------------------------------------------------------------------

def test_results_are_those_of_the_saved_adapter_and_of_the_bare_base(run):
    config = run.config
    base, cache, _, held_out = parts(config)
    adapted = load_adapter(build_model(config), run.adapter)
    after = held_out_loss(adapted, held_out, cache, loss_config(config), "cpu")["loss"]
    before = held_out_loss(base, held_out, cache, loss_config(config), "cpu")["loss"]
    assert run.results["held_out_loss"]["after"] == pytest.approx(after, rel=1e-6)
    assert run.results["held_out_loss"]["before"] == pytest.approx(before, rel=1e-6)
    rows = {(r["model"], r["alignment"]): r for r in run.results["table"]}
    for name, model in (("base", base), ("adapted", adapted)):
        for row in evaluate_windows({name: model}, held_out, cache, depth_range=(0.2, 9.0)).table():
            if row["frames"]:
                assert rows[name, row["alignment"]]["absrel"] == pytest.approx(row["absrel"], rel=1e-6)
    for (name, alignment), row in rows.items():
        if row["absrel"] is not None:
            assert name == "base" or row["absrel"] != rows["base", alignment]["absrel"]
    assert json.loads((run.folder / "results.json").read_text())["table"] == run.results["table"]
