"""The main job as a user meets it: every strategy learns on held-out frames, the adapter is what was measured."""
import dataclasses
import errno
import json
from pathlib import Path

import pytest
import torch

from vggt_lora.adapters.adapter import load_adapter
from vggt_lora.core import ConfigError, TrainingError
from vggt_lora.datasets.splits import LeakError
from vggt_lora.demo.demo_scenes import toy_scene
from vggt_lora.evaluate import evaluate, largest_difference
from vggt_lora.pretraining.rehearsal import make_rehearsal
from vggt_lora.reference_data import real_scene
from vggt_lora.train import TrainConfig, read_config, train
from vggt_lora.preflight.adapter_check import small_photos
from vggt_lora.training.build import build_model, make_frame_cache, items_of, open_scenes, split_scenes
from vggt_lora.training.checkpoint import CheckpointError, DiskError, checkpoint_files
from vggt_lora.training.loop import held_out_loss
from vggt_lora.training.checkpoint import read_checkpoint
from vggt_lora.training.losses import loss_config
from vggt_lora.training.run import without_wall


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    return toy_scene(tmp_path_factory.mktemp("data"), frames=12, size=(112, 168))


def quick(scene, output, **changes) -> TrainConfig:
    settings = {
        "strategy": "b", "model": "random", "data": str(scene), "output": str(output), "epochs": 2, "frames": 4,
        "image_size": 56, "rank": 4, "lr": 1e-3, "supervision": "laser+sparse", "scale_normalization": "points",
        "choose_fraction": 0.0, "adapter_weights": "last", "metric_for_best_model": "loss",
    }
    return TrainConfig(**{**settings, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"strategy": "a"},
        {"strategy": "b"},
        {"strategy": "c"},
        {
            "strategy": "custom",
            "target_modules": "aggregator.global_blocks.3, depth_head.scratch",
            "full_finetune": "depth_head.norm",
        },
        {"strategy": "b", "gradient_accumulation_steps": 3, "image_mode": "crop"},
        {"strategy": "b", "image_mode": "pad"},
    ],
    ids=lambda c: "-".join(map(str, c.values())),
)
def test_every_strategy_learns_and_its_file_reproduces_the_numbers(scene, tmp_path, changes):
    run = train(quick(scene, tmp_path / "run", **changes))
    loss = run.results["held_out_loss"]
    assert loss["after"] < loss["before"]
    assert largest_difference(evaluate(run.folder).table(), run.results["table"]) == 0
    changed = (
        [r for r in run.results["table"] if r["model"] == "adapted"],
        [r for r in run.results["table"] if r["model"] == "base"],
    )
    assert any(a["absrel"] != b["absrel"] for a, b in zip(*changed)), "the adapter changes nothing"
    assert all(
        row["protocol"]
        for name in ("table", "frames", "cameras", "regions", "claims", "confidence")
        for row in run.results[name]
    )
    assert {"drift", "warnings"} <= set(run.results)
    with pytest.raises(LeakError, match="were training photos of this run"):
        evaluate(run, scene)  # all photos of the scene, and so those of the training


@pytest.mark.parametrize(
    "fault, kind, words",
    [
        (OSError(errno.EFBIG, "File too large"), DiskError, "no space to write .*nothing was saved yet"),
        (RuntimeError("could not create a primitive"), TrainingError, "not enough memory .*take fewer frames"),
        (RuntimeError("can't start new thread"), TrainingError, "not enough memory"),
    ],
)
def test_too_little_disk_or_memory_before_the_first_step_is_said_in_words(
    scene, tmp_path, monkeypatch, fault, kind, words
):
    def fails(*_, **__):
        raise fault

    monkeypatch.setattr("vggt_lora.train.build_model", fails)
    with pytest.raises(kind, match=words):
        train(quick(scene, tmp_path / "run"))


@pytest.mark.parametrize(
    "size, proved", [((350, 518), (70, 112)), ((518, 518), (112, 112)), ((56, 84), (56, 84)), ((14, 980), (14, 112))]
)
def test_the_base_is_proved_on_small_photos_in_whole_patches(size, proved):
    photos = small_photos(torch.rand(2, 3, *size), 14)
    assert tuple(photos.shape) == (2, 3, *proved) and 0 <= photos.min() <= photos.max() <= 1


@pytest.mark.parametrize("name", ["strecha_fountain_p11", "sceaux_castle", "eth3d_pipes"])
def test_real_photographs(name, tmp_path):
    if real_scene(name) is None:
        pytest.skip(f"{name} is not at hand (VGGT_LORA_SHARED)")
    run = train(quick(real_scene(name), tmp_path / "run", image_size=112, frames=8))
    assert run.results["held_out_loss"]["after"] < run.results["held_out_loss"]["before"]
    config = json.loads((run.folder / "config.json").read_text())
    assert config["split"]["shared"] == 0


def test_the_official_loader_of_peft_opens_the_adapter(scene, tmp_path):
    from peft import PeftModel

    run = train(quick(scene, tmp_path / "run"))
    images = torch.rand(1, 2, 3, 56, 84, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(build_model(run.config), run.adapter).eval()(images)["depth"]
        ours = evaluate_model(run)(images)["depth"]
    assert torch.equal(loaded, ours)


def evaluate_model(run):
    from vggt_lora.lora import load_adapter

    return load_adapter(build_model(run.config), run.adapter)


@pytest.mark.parametrize("keep", ["best", "last"])
def test_a_run_that_was_stopped_reports_the_loss_of_the_weights_it_kept(scene, tmp_path, monkeypatch, keep):
    """Stopped in the middle of an epoch, where the loss is lower than any before: with adapter_weights="best" those
    weights are given up.
    """
    def stop(event, progress):
        progress.stop |= event == "step" and progress.epoch == 1 and progress.position == 2

    monkeypatch.setattr("vggt_lora.training.build.FEWEST_JUDGES", 1)  # two photos of this small scene choose
    run = train(quick(scene, tmp_path / "run", adapter_weights=keep, choose_fraction=0.15), hooks=[stop])
    stopped, loss = run.records[-1], run.results["held_out_loss"]
    assert stopped["stopped"] and stopped["loss"] < min(r["loss"] for r in run.records[:-1] if r["split"] == "val"), (
        "the case shows nothing"
    )
    model, scenes = load_adapter(build_model(run.config), run.adapter), open_scenes(run.config)
    items = items_of(split_scenes(scenes, run.config)[0].choose, scenes)
    measured = held_out_loss(model, items, make_frame_cache(run.config, model), loss_config(run.config), "cpu")["loss"]
    assert loss["after"] == loss["best"] == pytest.approx(measured, rel=1e-6) and (
        loss["after"] == stopped["loss"]
    ) == (keep == "last")
    assert f"{loss['after']:.4f} with the adapter" in (run.folder / "report.md").read_text()


def test_an_adapter_whose_held_out_loss_is_not_finite_is_reported_as_such(scene, tmp_path, figures):
    """The worst case: the last weights overflow the depth head, and they are those to be kept."""
    def spoil(event, progress):
        if event == "step" and progress.step == progress.total_steps:
            with torch.no_grad():
                next(p for n, p in model[0].named_parameters() if p.requires_grad and "depth_head" in n).fill_(1e38)

    model = []
    spoil.begin = lambda folder, look: model.append(look.model)
    run = train(quick(scene, tmp_path / "run", strategy="c"), hooks=[spoil])
    loss = json.loads((run.folder / "results.json").read_text(), parse_constant=lambda name: pytest.fail(name))[
        "held_out_loss"
    ]
    assert loss["after"] is None and loss["best"] <= loss["before"]
    assert (
        ", not finite with the adapter" in (run.folder / "report.md").read_text()
        and (run.folder / "figures" / "losses.png").is_file()
        and (run.folder / "report.html").is_file()
    )


# --- resume (kills: tests/test_engine.py) ---------------------------------------------------------------------------

def test_a_resumed_run_needs_no_more_than_its_folder_and_says_what_is_not_as_it_was(scene, tmp_path):
    config = quick(scene, tmp_path / "run", epochs=1)
    first = train(config)
    path = tmp_path / "run" / "config.json"
    about = json.loads(path.read_text())
    about["environment"] |= {"threads": 99, "packages": about["environment"]["packages"] | {"torch": "0.1"}}
    path.write_text(json.dumps(about))
    again = train(TrainConfig(resume=True, output=str(tmp_path / "run"), device="cpu"))
    assert (
        dataclasses.replace(again.config, resume=False, device=config.device) == config
        and again.results["table"] == first.results["table"]
    )
    log = (tmp_path / "run" / "train.log").read_text().split("resumed at step")[0]
    assert (
        f"threads is {torch.get_num_threads()!r} here, where the run began it was 99" in log
        and f"torch is {torch.__version__!r} here" in log
    )
    assert "settings of this run: " in log and "numpy is" not in log and "rank=4" in log


def test_more_epochs_extend_a_run_that_has_ended(scene, tmp_path):
    first = train(quick(scene, tmp_path, epochs=1))
    longer = train(TrainConfig(output=str(tmp_path), resume=True, epochs=3))
    assert (first.records[-1]["epoch"], longer.records[-1]["epoch"]) == (1, 3)
    assert longer.records[-1]["step"] == 3 * first.records[-1]["step"]
    assert "epochs is 3 from here on, the run began with 1" in (tmp_path / "train.log").read_text()
    assert read_config(tmp_path).epochs == 3  # which the next resume goes on with


def test_resume_refuses_other_settings_and_damaged_checkpoints(scene, tmp_path):
    config = quick(scene, tmp_path / "run", epochs=1)
    train(config)
    with pytest.raises(ConfigError, match="holds a run already"):
        train(config)
    with pytest.raises(ConfigError, match="rank was 4, now 8"):
        train(dataclasses.replace(config, rank=8, resume=True))
    checkpoints = checkpoint_files(tmp_path / "run" / "checkpoints")
    for path in checkpoints:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match="cannot be read"):
        train(dataclasses.replace(config, resume=True))
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    for path in (*checkpoints, tmp_path / "run" / "checkpoints" / "last.pt"):
        path.unlink()
    with pytest.raises(ConfigError, match="holds no run to resume"):
        train(dataclasses.replace(config, resume=True))


def test_a_run_given_up_for_its_gradients_goes_on_as_its_error_says(scene, tmp_path):
    """What is written stays, and what follows is that of a run that was never given up."""
    config = quick(scene, tmp_path / "run", epochs=4, skip_grad_factor=1.0001, max_skipped_steps=1, frame_cache=False)
    with pytest.raises(TrainingError, match="times its median.*resume=True.*skip_grad_factor=None"):
        train(config)
    with pytest.raises(ConfigError, match="lr was 0.001, now 0.0001"):
        train(dataclasses.replace(config, lr=1e-4, resume=True))
    run = train(dataclasses.replace(config, skip_grad_factor=None, resume=True))
    assert "skip_grad_factor is None from here on, the run began with 1.0001" in (run.folder / "train.log").read_text()
    assert without_wall(run.records) == without_wall(
        train(dataclasses.replace(config, skip_grad_factor=None, output=str(tmp_path / "never"))).records
    )


# --- rehearsal -------------------------------------------------------------------------------------------------------

def test_what_is_rehearsed_moves_less_and_a_resumed_run_rehearses_the_same(scene, tmp_path):
    """With photos of another place, on the tiny base: a random one knows nothing that it could keep."""
    def stop(event, progress):
        progress.stop |= event == "step" and progress.step == 3

    elsewhere = toy_scene(tmp_path / "elsewhere", frames=12, size=(112, 168), seed=3)
    settings = {"model": "tiny", "strategy": "a", "rehearsal": str(elsewhere / "images"), "lr": 3e-3}
    whole = train(quick(scene, tmp_path / "whole", **settings))
    train(quick(scene, tmp_path / "cut", **settings), hooks=[stop])
    cut = train(TrainConfig(resume=True, output=str(tmp_path / "cut"), device="cpu"))
    assert without_wall(cut.records)[-1] == without_wall(whole.records)[-1]
    assert all("loss_rehearsal" in r for r in whole.records if r["split"] == "train")
    moved = whole.results["rehearsal"]["moved"]
    assert f"Elsewhere: depth there is {100 * moved:.1f} % from the base's" in (whole.folder / "report.md").read_text()
    free = train(quick(scene, tmp_path / "free", **settings | {"rehearsal": ""}))
    adapted = load_adapter(build_model(whole.config), free.adapter)
    assert 0 < moved < 0.7 * make_rehearsal(adapted, whole.config).moved(adapted)


def test_a_photo_that_judges_is_not_rehearsed(scene, tmp_path):
    with pytest.raises(LeakError, match="which judges this run; leave it out"):
        train(quick(scene, tmp_path / "run", model="tiny", rehearsal=str(scene / "images")))


# --- what must not happen -------------------------------------------------------------------------------------------

def without_last(scene: Path, folder: Path, count: int) -> Path:
    """A copy of a scene that lost its last photos."""
    import shutil

    import pycolmap

    copy = folder / scene.name
    shutil.copytree(scene, copy)
    model = copy / "dslr_calibration_undistorted"
    reconstruction = pycolmap.Reconstruction(str(model))
    for image_id in sorted(reconstruction.reg_image_ids(), key=lambda i: reconstruction.image(i).name)[-count:]:
        (copy / "images" / reconstruction.image(image_id).name).unlink()
        reconstruction.deregister_frame(reconstruction.image(image_id).frame_id)
    reconstruction.write_text(str(model))
    return copy


def test_a_scene_that_changed_cannot_move_training_photos_into_validation(scene, tmp_path):
    config = quick(scene, tmp_path / "run", epochs=1)
    train(config)
    smaller = without_last(scene, tmp_path / "smaller", 2)
    (tmp_path / "run" / "config.json").write_text(
        (tmp_path / "run" / "config.json").read_text().replace(str(scene), str(smaller))
    )
    changed = dataclasses.replace(config, data=str(smaller))
    with pytest.raises(LeakError, match="were training photos of this run"):
        train(dataclasses.replace(changed, resume=True))
    with pytest.raises(LeakError, match="were training photos of this run"):
        evaluate(tmp_path / "run")
    with pytest.raises(LeakError, match="were training photos of this run"):
        evaluate(tmp_path / "run", dataclasses.replace(config, train_fraction=0.3))


def test_settings_that_cannot_work_stop_before_the_folder_is_taken(scene, tmp_path):
    output = tmp_path / "run"
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no CUDA device"):
            train(quick(scene, output, device="cuda"))
    with pytest.raises(ConfigError, match="no gradient reaches"):
        train(quick(scene, output, strategy="c", camera_weight=0.0))
    with pytest.raises(ConfigError, match="no gradient reaches"):
        train(quick(scene, output, strategy="a", depth_conf_weight=0.0, depth_reg_weight=0.0, depth_grad_weight=0.0))
    assert not output.exists()
    train(quick(scene, output, epochs=1))


def test_two_runs_in_one_process_may_differ_in_precision(scene, tmp_path):
    train(quick(scene, tmp_path / "one", epochs=1, precision="float32"))
    run = train(quick(scene, tmp_path / "two", epochs=1, precision="bf16"))
    assert run.results["protocol"]["precision"] == "bf16"


def test_by_default_photos_choose_that_neither_train_nor_judge(tmp_path):
    """The base is anchored to the points, and the best weights are those with the least depth error on the photos that
    choose.
    """
    house = toy_scene(tmp_path / "data", frames=24, size=(56, 84))
    config = TrainConfig(
        model="random", data=str(house), output=str(tmp_path / "run"), epochs=3, frames=4, image_size=56, rank=4,
        lr=1e-3, train_fraction=0.75, choose_fraction=0.25, device="cpu",
    )
    run = train(config)
    photos = json.loads((run.folder / "split.json").read_text())
    assert [len(photos[side]) for side in ("train", "choose", "val")] == [12, 6, 6]
    assert len({digest for side in photos.values() for digest in side.values()}) == 24
    scores = [record["absrel"] for record in run.records if record["split"] == "val"]
    assert read_checkpoint(run.folder / "checkpoints" / "best.pt")["counters"]["epoch"] == scores.index(min(scores))
    coverage = json.loads((run.folder / "coverage.json").read_text())[0]
    assert coverage["supervision"] == "sparse+anchored" and coverage["by_source"]["anchored"] > 0.5
    assert run.results["protocol"]["truth"] == "sparse"
