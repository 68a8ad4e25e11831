"""The engine under the things that happen to a training run: kills, bad steps, memory and disks that are full, several
processes, signals.
"""
import dataclasses
import errno
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from vggt_lora.adapters.adapter import apply_lora
from vggt_lora.core import STOP, ConfigError, TrainingError
from vggt_lora.datasets.samples import FrameCache
from vggt_lora.demo.demo_scenes import toy_scene
from vggt_lora.model.vggt import VGGT, VGGTConfig
from vggt_lora.train import train
from vggt_lora.training import loop as loop_module, losses as losses_module
from vggt_lora.training.build import build_model, items_of, open_scenes, split_scenes
from vggt_lora.training.checkpoint import DiskError, checkpoint_files, newest_checkpoint, read_checkpoint
from vggt_lora.training.config import TrainConfig
from vggt_lora.training.loop import fit
from vggt_lora.training.oom_recovery import OomRecovery
from vggt_lora.training.run import RunFolder, without_wall
from vggt_lora.training.run_state import Stopped
from vggt_lora.training.sample_source import SampleSource
from vggt_lora.views.widgets.run import read_metrics, watch_run

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    return toy_scene(tmp_path_factory.mktemp("data"), frames=12, size=(84, 112))


def settings(scene, output, **changes) -> TrainConfig:
    values = {
        "supervision": "laser+sparse", "scale_normalization": "points", "choose_fraction": 0.0,
        "adapter_weights": "last", "metric_for_best_model": "loss", "strategy": "a", "model": "random",
        "data": str(scene), "output": str(output), "epochs": 2, "frames": 3, "image_size": 56, "rank": 2, "lr": 1e-3,
        "dropout": 0.1, "device": "cpu", "save_every": 2,
    }
    return TrainConfig(**{**values, **changes})


MODELS = {"vggt": {}, "omega": {"model": "random-omega", "image_size": 64}}  # what the two families need of settings


class Spoiled(SampleSource):
    """A sample source that multiplies the photos of some training windows by a number, for instance NaN."""

    def __init__(self, cache, spoil: dict):
        super().__init__(cache)
        self.spoil = spoil  # (epoch, frames of the window) -> factor

    def load(self, scene, window, order=None, epoch=0):
        sample, state = super().load(scene, window, order, epoch)
        if order is not None and (key := (epoch, window.frames)) in self.spoil:
            sample = dataclasses.replace(sample, images=sample.images * self.spoil[key])
        return sample, state


def run_fit(config, hooks=(), spoil=None, writes=True):
    """fit on its own, without the gate and the evaluation: (run, progress, model); of several processes only the first
    one writes.
    """
    base, scenes = build_model(config), open_scenes(config)
    split, _ = split_scenes(scenes, config)
    adapted, _ = apply_lora(
        base, config.strategy, rank=config.rank, alpha=config.alpha, dropout=config.dropout, seed=config.seed,
        use_dora=config.use_dora, use_rslora=config.use_rslora, heads=config.trained_heads,
        target_modules=config.names("target_modules"),
    )
    folder = Path(config.output)
    counters = (
        newest_checkpoint(folder / "checkpoints")[1]["counters"] if config.resume else {"step": None, "records": None}
    )
    run = RunFolder(folder, counters["step"], counters["records"], writes)
    run.write("config.json", {"config": dataclasses.asdict(config)})
    sample_source = Spoiled(
        FrameCache(config.image_size, supervision=config.supervision, patch=base.config.patch_size), spoil or {}
    )
    try:
        progress = fit(
            adapted, items_of(split.train, scenes), items_of(split.val, scenes), config, run, sample_source, hooks
        )
    finally:
        run.close()
    return run, progress, adapted


def windows_of(config) -> list:
    """(epoch, frames) of every training step, in order."""
    scenes = open_scenes(config)
    items = items_of(split_scenes(scenes, config)[0].train, scenes)
    return [
        (epoch, items[i][1].frames)
        for epoch in range(config.epochs)
        for i, _ in loop_module.epoch_order(len(items), [3] * len(items), config, epoch)
    ]


@pytest.fixture(scope="module")
def whole(scene, tmp_path_factory):
    """The run that nothing happened to."""
    return run_fit(settings(scene, tmp_path_factory.mktemp("whole") / "run"))


def weights(run: RunFolder) -> dict:
    return read_checkpoint(run.folder / "checkpoints" / "last.pt")["weights"]


def same(run, whole) -> None:
    """Records and weights are those of the run that nothing happened to."""
    assert without_wall(run.metrics_path) == without_wall(whole.metrics_path)
    ours, theirs = weights(run), weights(whole)
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs) and ours.keys() == theirs.keys()


# --- interruption ---------------------------------------------------------------------------------------------------

def curves(folder: Path) -> dict:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    return {
        tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in board.Tags()["scalars"] if "wall" not in tag
    }


class Killed(Exception):
    pass


def kill_at(step):
    def hook(event, progress):
        if event == "step" and progress.step == step:
            raise Killed
    return hook


@pytest.mark.parametrize(
    "family, damage", [("vggt", "none"), ("vggt", "cut"), ("vggt", "changed"), ("omega", "none"), ("omega", "cut")]
)
def test_resume_inside_an_epoch_and_from_the_checkpoint_before_a_damaged_one(scene, tmp_path, whole, family, damage):
    config = settings(scene, tmp_path / "run", **MODELS[family])
    if family != "vggt":
        whole = run_fit(dataclasses.replace(config, output=str(tmp_path / "whole")))
    with pytest.raises(Killed):
        run_fit(config, (kill_at(5),))
    newest, *others = checkpoint_files(tmp_path / "run" / "checkpoints")
    content = newest.read_bytes()
    if damage == "cut":
        newest.write_bytes(content[: len(content) // 2])
    if damage == "changed":
        at = content.find(next(iter(read_checkpoint(newest)["weights"].values())).numpy().tobytes())
        newest.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
    run, _, _ = run_fit(dataclasses.replace(config, resume=True))
    same(run, whole[0])
    assert curves(run.folder) == curves(whole[0].folder)
    log = (run.folder / "train.log").read_text()
    assert ("was set aside" in log) == (damage != "none") and (
        f"from {(newest if damage == 'none' else others[0]).name}" in log
    )


def test_curves_of_a_run_that_goes_on_within_a_second_stay_in_order(tmp_path, monkeypatch):
    """TensorBoard sorts its files by name, which ends with a number that is not padded: 10 comes before 9."""
    from tensorboard.summary.writer import event_file_writer

    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(9))
    for keep, steps in ((None, (1, 2)), (2, (3, 4))):
        run = RunFolder(tmp_path, keep)
        for step in steps:
            run.record(step=step, split="train", loss=float(step))
        run.close()
    assert curves(tmp_path)["train/loss"] == [(step, float(step)) for step in (1, 2, 3, 4)]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_the_step_and_says_how_to_go_on(scene, tmp_path, whole, number):
    config, handlers = (
        settings(scene, tmp_path / "run", save_every=None),
        [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)],
    )
    with pytest.raises(Stopped, match=f"{number.name} after step 3 of .*resume=True"):
        run_fit(config, (lambda event, p: os.kill(os.getpid(), number) if event == "step" and p.step == 3 else None,))
    assert handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    assert newest_checkpoint(tmp_path / "run" / "checkpoints")[1]["counters"]["step"] == 3
    same(run_fit(dataclasses.replace(config, resume=True))[0], whole[0])


def test_a_hook_stops_after_the_step_measures_and_the_run_can_go_on(scene, tmp_path, whole):
    config = settings(scene, tmp_path / "run", save_every=None)
    run, progress, _ = run_fit(config, (lambda event, p: setattr(p, "stop", event == "step" and p.step == 3),))
    assert progress.step == 3 and run.records[-1]["split"] == "val" and run.records[-1]["stopped"]
    same(run_fit(dataclasses.replace(config, resume=True))[0], whole[0])


def test_the_file_stop_ends_a_run_without_hooks_as_a_hook_does(scene, tmp_path, whole, monkeypatch):
    config, step, steps = settings(scene, tmp_path / "run", save_every=None), loop_module._step, []

    def ask(loop, chunk):
        step(loop, chunk)
        steps.append(loop.progress.step)
        if steps == [1, 2, 3]:
            (tmp_path / "run" / STOP).touch()

    monkeypatch.setattr(loop_module, "_step", ask)
    run, progress, _ = run_fit(config)
    assert progress.step == 3 and run.records[-1]["stopped"] and not (run.folder / STOP).exists()
    (run.folder / STOP).touch()  # pressed too late: it was meant for the run that has ended
    same(run_fit(dataclasses.replace(config, resume=True))[0], whole[0])


@pytest.mark.slow
def test_a_watching_notebook_stops_a_run_started_from_a_shell(scene, tmp_path):
    """The button of watch_run, and a process of its own in which nobody draws."""
    folder = tmp_path / "run"
    config = {
        "strategy": "a", "model": "random", "data": scene, "output": folder, "epochs": 500, "frames": 3,
        "image_size": 56, "rank": 2, "device": "cpu", "preflight": "off",
    }
    log = open(tmp_path / "log", "w")
    process = subprocess.Popen(
        [sys.executable, "-m", "vggt_lora.train", *(f"--{n.replace('_', '-')}={v}" for n, v in config.items())],
        stdout=log,
        stderr=log,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    try:
        until = time.monotonic() + 300
        while not any(r["split"] == "train" for r in read_metrics(folder)):
            assert process.poll() is None and time.monotonic() < until, (tmp_path / "log").read_text()[-1500:]
            time.sleep(0.1)
        watch = watch_run(folder, interactive=False)
        watch.stop()
        assert process.wait(300) == 0, (tmp_path / "log").read_text()[-1500:]
    finally:
        process.kill()
        log.close()
    assert (
        "stopped on request after step" in (folder / "train.log").read_text()
        and (folder / "adapter").is_dir()
        and not (folder / STOP).exists()
    )
    assert not watch.refresh() and watch.step < 500 and watch.words().startswith("stopped at ")


def in_validation(monkeypatch, epoch: int, act) -> None:
    """Let something happen in the middle of the validation after an epoch; 0: of the one before training."""
    measure, calls = loop_module.held_out_loss, []

    def interrupted(*arguments):
        calls.append(0)
        if len(calls) == epoch + 1:
            act()
        return measure(*arguments)

    monkeypatch.setattr(loop_module, "held_out_loss", interrupted)


@pytest.mark.slow
@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_a_validation_stops_the_run_too(scene, tmp_path, whole, monkeypatch, number, epoch):
    """It comes when no step runs: the run must neither go on nor be taken for finished, and no epoch may count twice
    for the patience.
    """
    config, events, step = settings(scene, tmp_path / "run", save_every=None), [], epoch * whole[1].step // 2
    with monkeypatch.context() as patch:
        in_validation(patch, epoch, lambda: os.kill(os.getpid(), number))
        with pytest.raises(Stopped, match=f"{number.name} after step {step} of .*resume=True"):
            run_fit(config, (lambda event, p: events.append(event),))
    assert "end" not in events and events.count("step") == step
    counters = newest_checkpoint(tmp_path / "run" / "checkpoints")[1]["counters"]
    assert (counters["step"], counters["epoch"], counters["position"], counters["stale"]) == (step, epoch, 0, 0)
    same(run_fit(dataclasses.replace(config, resume=True))[0], whole[0])


def test_a_signal_in_the_last_validation_comes_too_late(scene, tmp_path, whole, monkeypatch):
    in_validation(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    same(run_fit(settings(scene, tmp_path / "run"))[0], whole[0])


def test_a_hook_that_stops_after_an_epoch_says_so(scene, tmp_path, whole):
    """The validation has measured these weights already: no second record of them."""
    config = settings(scene, tmp_path / "run", save_every=None)
    run, progress, _ = run_fit(config, (lambda event, p: setattr(p, "stop", event == "epoch" and p.epoch == 1),))
    assert (
        progress.epoch == 1
        and progress.stale == 0
        and [r["epoch"] for r in run.records if r["split"] == "val"] == [0, 1]
    )
    assert (
        f"stopped on request after step {progress.step} of {progress.total_steps}, held-out {progress.held_out:.4f}"
        in (run.folder / "train.log").read_text()
    )
    same(run_fit(dataclasses.replace(config, resume=True))[0], whole[0])


def test_only_the_last_checkpoints_stay(whole):
    names = sorted(p.name for p in (whole[0].folder / "checkpoints").iterdir())
    assert len([n for n in names if n.startswith("step-")]) == 3 and {"last.pt", "best.pt"} <= set(names)


# --- bad steps ------------------------------------------------------------------------------------------------------

def test_a_step_that_is_not_finite_is_skipped(scene, tmp_path):
    config = settings(scene, tmp_path / "run", epochs=1, dropout=0.3)
    order = windows_of(config)
    run, _, model = run_fit(config, spoil={order[2]: math.nan})
    train = [r for r in run.records if r["split"] == "train"]
    assert (
        [r["step"] for r in train if "skipped" in r] == [3]
        and "(depth head)" in train[2]["skipped"]
        and "(camera head)" in train[2]["skipped"]
    )
    # the schedule went on
    rates = [loop_module.learning_rate(s, len(train), config.optim) for s in range(len(train))]
    assert [r["lr"] for r in train] == rates
    optimizer = read_checkpoint(run.folder / "checkpoints" / "last.pt")["optimizer"]
    assert {float(s["step"]) for s in optimizer["state"].values()} == {len(train) - 1}


def test_bad_steps_in_a_row_end_the_run_and_name_head_and_term(scene, tmp_path):
    config = settings(scene, tmp_path / "run", epochs=2, max_skipped_steps=2)
    with pytest.raises(
        TrainingError,
        match=r"2 steps in a row .*step 4.*depth_nonfinite_pixels \(depth head\).*a higher max_skipped_steps",
    ):
        run_fit(config, spoil=dict.fromkeys(windows_of(config)[2:4], math.nan))
    run, progress, _ = run_fit(
        dataclasses.replace(config, max_skipped_steps=3, resume=True),
        spoil=dict.fromkeys(windows_of(config)[2:4], math.nan),
    )
    # the advice was good
    assert progress.step == progress.total_steps and [r["step"] for r in run.records if "skipped" in r] == [3, 4]


def spoil_validations(monkeypatch, bad) -> None:
    """Let one pixel that the depth head predicts be NaN, in the first window of the validations with these numbers; 0:
    the one before training.
    """
    measure, loss, seen = loop_module.held_out_loss, losses_module.training_loss, [-1, 0]

    def counted(*arguments):
        seen[:] = seen[0] + 1, 0
        return measure(*arguments)

    def spoiled(predictions, batch, losses):
        if not torch.is_grad_enabled():
            seen[1] += 1
            if seen[0] in bad and seen[1] == 1:
                row, y, x = batch["valid"][0].nonzero()[0].tolist()
                predictions["depth"][0, row, y, x] = math.nan
        return loss(predictions, batch, losses)

    monkeypatch.setattr(loop_module, "held_out_loss", counted)
    monkeypatch.setattr(losses_module, "training_loss", spoiled)


def test_a_validation_that_is_not_finite_is_recorded_and_the_run_goes_on(scene, tmp_path, whole, monkeypatch):
    """Nothing else changes: not the steps, not the other validations; it is never the best, and counts for the
    patience.
    """
    spoil_validations(monkeypatch, {1})
    events, config = [], settings(scene, tmp_path / "run", adapter_weights="best")
    run, progress, _ = run_fit(config, (lambda event, p: events.append((event, p.stale, p.best)),))
    ours, theirs = without_wall(run.metrics_path), without_wall(whole[0].metrics_path)
    at = next(i for i, r in enumerate(theirs) if r["split"] == "val" and r["epoch"] == 1)
    assert ours[:at] == theirs[:at] and ours[at + 1 :] == theirs[at + 1 :]
    assert (
        ours[at]["loss"] is None
        and "depth_nonfinite_pixels (depth head) on " in ours[at]["not_finite"]
        and ".JPG" in ours[at]["not_finite"]
    )
    assert (
        ours[at]["not_finite"] in (run.folder / "train.log").read_text() and "NaN" not in run.metrics_path.read_text()
    )
    assert next((stale, best) for event, stale, best in events if event == "epoch") == (1, theirs[0]["loss"]) and (
        progress.stale,
        progress.best,
    ) == (0, theirs[-1]["loss"])
    assert [step for step, _ in curves(run.folder)["val/loss"]] == [0, progress.step]


def test_validations_that_stay_not_finite_end_by_patience_with_the_best_weights(scene, tmp_path, monkeypatch):
    spoil_validations(monkeypatch, range(2, 9))
    run, progress, model = run_fit(settings(scene, tmp_path / "run", epochs=8, patience=2, adapter_weights="best"))
    best = read_checkpoint(run.folder / "checkpoints" / "best.pt")
    assert progress.epoch == 3 and progress.held_out == math.inf and best["counters"]["epoch"] == 1
    assert all(torch.equal(p.detach(), best["weights"][n]) for n, p in model.named_parameters() if p.requires_grad)


def test_a_base_that_is_not_finite_is_refused_before_the_first_step(scene, tmp_path, monkeypatch):
    spoil_validations(monkeypatch, {0})
    with pytest.raises(
        TrainingError, match=r"before any training .* not finite: depth_nonfinite_pixels \(depth head\) on .*\.JPG"
    ):
        run_fit(settings(scene, tmp_path / "run"))


# --- memory and disk ------------------------------------------------------------------------------------------------

def test_out_of_memory_is_answered_by_smaller_pieces_and_the_run_goes_on(scene, tmp_path, monkeypatch):
    config, left = settings(scene, tmp_path / "run", dropout=0.0, epochs=1), [0, 0, 1, 1, 0]
    plain, _, _ = run_fit(dataclasses.replace(config, output=str(tmp_path / "plain")))
    backward = loop_module.window_loss

    def fails(model, sample, *rest):
        result = backward(model, sample, *rest)
        if torch.is_grad_enabled() and left and left.pop(0):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return result

    monkeypatch.setattr(loop_module, "window_loss", fails)
    run, progress, model = run_fit(config)
    log = (run.folder / "train.log").read_text()
    assert (
        log.count("out of memory: dense heads now take 1 frame at once") == 1
        and log.count("all blocks now recompute") == 1
    )
    assert model.get_base_model().depth_head.recompute and model.get_base_model().depth_head.frames_chunk == 1
    ours, theirs = (without_wall(r.records) for r in (run, plain))
    assert [r["loss"] for r in ours] == pytest.approx([r["loss"] for r in theirs], rel=1e-4)
    assert [r["grad_norm"] for r in ours if "lr" in r] == pytest.approx(
        [r["grad_norm"] for r in theirs if "lr" in r], rel=1e-3
    )
    assert newest_checkpoint(run.folder / "checkpoints")[1]["counters"]["oom_recovery"] == [
        {"chunk": 1, "head": True, "blocks": True}
    ]


def test_frames_at_once_that_were_set_become_fewer_too_and_an_error_without_words_is_one():
    model = VGGT(VGGTConfig.golden())
    model.depth_head.frames_chunk, seen, said = 4, [], []
    group, outputs = (
        model.depth_head._group,
        {layer: torch.randn(1, 8, 5 + 6, 128) for layer in model.config.dpt_layers},
    )
    model.depth_head._group = lambda levels, size: (seen.append(levels[0].shape[1]), group(levels, size))[1]

    def work():
        seen.clear()
        with torch.no_grad():
            model.depth_head(outputs, (28, 42))
        if max(seen) > 1:
            raise MemoryError
        return list(seen)

    assert OomRecovery(model, 8, said.append).attempt(work) == [1] * 8
    assert [line.split(";")[0] for line in said] == [
        f"out of memory: dense heads now take {n} at once" for n in ("2 frames", "1 frame")
    ]


@pytest.mark.slow
@pytest.mark.parametrize("real", [True, False], ids=["tmpfs", "simulated"])
def test_a_full_disk_leaves_the_last_checkpoint_whole(scene, tmp_path, whole, monkeypatch, real):
    place = tmp_path / "disk"
    place.mkdir()
    size = sum(p.stat().st_size for p in checkpoint_files(whole[0].folder / "checkpoints")[:1])
    if real and (
        os.geteuid()
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={4 * size + 200_000}", "none", str(place)], capture_output=True
        ).returncode
    ):
        pytest.skip("a small tmpfs cannot be mounted here")
    try:
        config = settings(scene, place / "run", save_every=1, keep_checkpoints=50, epochs=2)
        if not real:
            def full(self, content):
                if len(checkpoint_files(place / "run" / "checkpoints")) >= 4:
                    raise OSError(errno.ENOSPC, "No space left on device", str(self))
                return original(self, content)

            original = Path.write_bytes
            monkeypatch.setattr(Path, "write_bytes", full)
        with pytest.raises(DiskError, match="is whole; free some space and continue with resume=True"):
            run_fit(config)
        monkeypatch.undo()
        path, content, faults = newest_checkpoint(place / "run" / "checkpoints")
        assert not faults and content["counters"]["step"] > 0 and not list(path.parent.glob(".*"))
        if real:  # space is freed, the run goes on
            subprocess.run(["mount", "-o", "remount,size=64m", str(place)], check=True)
        run, _, _ = run_fit(dataclasses.replace(config, resume=True))
        same(run, whole[0])
    finally:
        if real:
            subprocess.run(["umount", str(place)], capture_output=True)


# --- several processes ----------------------------------------------------------------------------------------------

LAUNCHERS = {
    "torchrun": [
        "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", "{port}", "-m",
    ],
    # with --cpu it would start one process where there is no mpirun; --multi_gpu starts them all, also where a
    # setting says device=cpu; what else is said here may not change the run
    "accelerate launch": [
        "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision",
        "fp16", "--dynamo_backend", "inductor", "--main_process_port", "{port}", "--module",
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher, family", [("torchrun", "vggt"), ("accelerate launch", "omega")])
def test_two_processes_of_a_launcher_step_as_one_that_accumulates_twice_as_much(scene, tmp_path, launcher, family):
    """The guide's command with two gloo processes on the CPU: first loss, first gradients, all metrics, and one set of
    files.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        words = [word.format(port=free.getsockname()[1]) for word in LAUNCHERS[launcher]]
    common = settings(
        scene, tmp_path / "one", dropout=0.0, epochs=1, save_every=1, keep_checkpoints=9, max_grad_norm=1e6,
        gradient_accumulation_steps=2, **MODELS[family],
    )
    train(common)
    config = dataclasses.replace(common, output=str(tmp_path / "two"), gradient_accumulation_steps=1)
    given = [
        f"--{f.name}={getattr(config, f.name)}"
        for f in dataclasses.fields(config)
        if getattr(config, f.name) != f.default
    ]
    done = subprocess.run(
        [sys.executable, "-m", *words, "vggt_lora.train", *given],
        env=os.environ
        | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "3"},
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    one, two = (read_checkpoint(checkpoint_files(tmp_path / name / "checkpoints")[-2]) for name in ("one", "two"))
    assert (
        one["counters"]["step"] == two["counters"]["step"] == 1
        and two["counters"]["processes"] == 2
        and len(two["random"]) == 2
    )
    # after one step AdamW's first moment is a tenth of the gradient
    for number, moments in one["optimizer"]["state"].items():
        gradient = moments["exp_avg"]
        torch.testing.assert_close(
            two["optimizer"]["state"][number]["exp_avg"], gradient, rtol=1e-5,
            atol=1e-6 * float(gradient.abs().max()) + 1e-12,
        )
    assert any(moments["exp_avg"].any() for moments in one["optimizer"]["state"].values())
    ours, theirs = (without_wall(tmp_path / n / "metrics.jsonl") for n in ("two", "one"))
    assert [r.keys() for r in ours] == [r.keys() for r in theirs] and len(ours) > 3
    for a, b in zip(ours, theirs):
        assert {k: v for k, v in a.items() if isinstance(v, (int, str))} == {
            k: v for k, v in b.items() if isinstance(v, (int, str))
        }
        assert {k: v for k, v in a.items() if isinstance(v, float)} == pytest.approx(
            {k: v for k, v in b.items() if isinstance(v, float)}, rel=1e-3, abs=1e-9
        )
    assert ours[0] == theirs[0] and ours[1]["loss"] == pytest.approx(theirs[1]["loss"], rel=1e-6)
    assert json.loads((tmp_path / "two" / "results.json").read_text())["table"]
    unused = [
        line.split("accelerate's ")[1].split("=")[0]
        for line in (tmp_path / "two" / "train.log").read_text().splitlines()
        if "is not used: this run has" in line
    ]
    assert unused == [
        "gradient_accumulation_steps",
        *([] if launcher == "torchrun" else ["dynamo_backend", "mixed_precision"]),
    ]
    budget = json.loads((tmp_path / "two" / "preflight.json").read_text())["predicted"]
    assert budget["processes"] == 2 and budget["steps"] == sum(r["split"] == "train" for r in ours)


# --- settings -------------------------------------------------------------------------------------------------------

def test_patience_and_keep_best(scene, tmp_path):
    config = settings(
        scene, tmp_path / "run", epochs=8, lr=0.008, min_lr=0.006, warmup_ratio=0.0, max_grad_norm=1e6,
        skip_grad_factor=None, patience=2, adapter_weights="best", save_every=None,
    )
    run, progress, model = run_fit(config)
    losses = [r["loss"] for r in run.records if r["split"] == "val"]
    assert progress.epoch < 8 and progress.stale == 2 and min(losses) == losses[-3] == progress.best
    best = read_checkpoint(run.folder / "checkpoints" / "best.pt")
    assert all(torch.equal(p.detach(), best["weights"][n]) for n, p in model.named_parameters() if p.requires_grad)
    again, progress, _ = run_fit(dataclasses.replace(config, resume=True))
    assert without_wall(again.records) == without_wall(run.records)  # nothing is left to do


@pytest.mark.parametrize(
    "heads, terms", [("camera", {"loss_camera"}), ("depth", {"loss_depth_conf", "loss_depth_reg", "loss_depth_grad"})]
)
def test_one_head_alone(scene, tmp_path, heads, terms):
    config = settings(scene, tmp_path / "run", strategy="c", heads=heads, epochs=1)
    calls = []
    run, _, model = run_fit(config)
    for name in ("camera_head", "depth_head"):
        getattr(model.get_base_model(), name).register_forward_hook(lambda *_, name=name: calls.append(name))
    scenes = open_scenes(config)
    items = items_of(split_scenes(scenes, config)[0].val, scenes)
    loop_module.held_out_loss(
        model, items[:1], FrameCache(56, supervision=config.supervision), loop_module.loss_config(config), "cpu"
    )
    assert set(calls) == {f"{heads}_head"}
    train = [r for r in run.records if r["split"] == "train"]
    found = {n for n in train[0] if n.startswith("loss_") and not n.startswith("loss_camera_")}
    assert found == terms and f"grad_norm_{heads}_head" in train[0]
    assert not any(
        p.requires_grad
        for n, p in model.named_parameters()
        if f"{'depth' if heads == 'camera' else 'camera'}_head" in n
    )


@pytest.mark.parametrize(
    "changes", [{"use_rslora": True, "loraplus_lr_ratio": 16.0}, {"use_dora": True}], ids=lambda c: next(iter(c))
)
def test_every_variant_trains_and_its_adapter_measures_the_same(scene, tmp_path, changes):
    from vggt_lora.evaluate import evaluate, largest_difference
    from vggt_lora.train import train

    run = train(settings(scene, tmp_path / "run", epochs=1, **changes))
    saved = json.loads((run.adapter / "adapter_config.json").read_text())
    assert (saved["use_rslora"], saved["use_dora"]) == ("use_rslora" in changes, "use_dora" in changes)
    assert run.results["held_out_loss"]["after"] < run.results["held_out_loss"]["before"]
    assert largest_difference(evaluate(run.folder).table(), run.results["table"]) == 0


def test_what_every_step_says(whole):
    steps = [r for r in whole[0].records if r["split"] == "train"]
    for r in steps:
        assert {"lr", "grad_norm", "grad_norm_depth_head", "coverage", "wall"} <= r.keys() and 0 < r["coverage"] <= 1
        assert r["grad_norm"] == pytest.approx(r["grad_norm_depth_head"], rel=1e-5)  # strategy a trains nothing else
        assert {"seconds", "windows_per_s", "resident_gb"} == r["wall"].keys()
    tags = curves(whole[0].folder)
    assert [step for step, _ in tags["train/grad_norm_depth_head"]] == [r["step"] for r in steps]


def test_settings_that_contradict_each_other(scene, tmp_path):
    with pytest.raises(ConfigError, match="does not train; choose"):
        run_fit(settings(scene, tmp_path / "run", strategy="a", heads="camera"))
