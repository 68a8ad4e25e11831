"""Stops that reach one of two processes, steps that are bad in one of them, and the small things on which the end of a
run depends.
"""
import contextlib
import dataclasses
import datetime
import errno
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from test_engine import LAUNCHERS, ROOT, run_fit, settings, spoil_validations, windows_of

from vggt_lora import train as train_module
from vggt_lora.training import start as start_module
from vggt_lora.core import STOP, ConfigError, VggtLoraError
from vggt_lora.datasets.samples import FrameCache
from vggt_lora.demo.demo_scenes import toy_scene
from vggt_lora.model.vggt import VGGT, VGGTConfig
from vggt_lora.train import main, train
from vggt_lora.preflight.adapter_check import first_frames, check_loss_reaches_adapter
from vggt_lora.training import loop as loop_module, distributed as processes
from vggt_lora.training.build import build_model, items_of, open_scenes, add_adapter, split_scenes
from vggt_lora.training.checkpoint import (
    content_digest, load_checkpoint, newest_checkpoint, random_state, read_checkpoint, save_checkpoint,
    set_random_state,
)
from vggt_lora.training.oom_recovery import OomRecovery
from vggt_lora.training.run import without_wall
from vggt_lora.training.schedule import learning_rate

LIMIT = 300  # s that two processes have for all their cases


# --- what the two processes do: this file is their program ----------------------------------------------------------

def term() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def at_call(patch, name: str, number: int, act, counts=lambda: True) -> None:
    """Let something happen just before a function of the loop is called for the n-th time, from 1."""
    real, calls = getattr(loop_module, name), []

    def called(*arguments, **more):
        if counts():
            calls.append(0)
            if len(calls) == number:
                act()
        return real(*arguments, **more)

    patch.setattr(loop_module, name, called)


def in_a_step(patch, rank, folder) -> None:
    """The second process is asked to end inside its second step."""
    if rank == 1:
        at_call(patch, "window_loss", 2, term, torch.is_grad_enabled)


def in_a_validation(patch, rank, folder) -> None:
    """The second process is asked to end inside the validation after the first epoch."""
    if rank == 1:
        at_call(patch, "held_out_loss", 2, term)


def in_a_save(patch, rank, folder) -> None:
    """The file `stop` asks for the end, and while the first process saves, which takes its time, the second is asked
    once more.
    """
    if rank == 0:
        at_call(patch, "_step", 2, (folder / STOP).touch)
        at_call(patch, "save_step", 2, lambda: time.sleep(0.5))
    else:
        at_call(patch, "_save", 2, term)


def in_little_memory(patch, rank, folder) -> None:
    """The second process lacks memory in its second step, which is made again, and is asked to end in its third, the
    fourth of all.
    """
    if rank == 1:
        at_call(
            patch, "window_loss", 2, raises(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")),
            torch.is_grad_enabled,
        )
        at_call(patch, "window_loss", 4, term, torch.is_grad_enabled)


STOPS = {"step": in_a_step, "validation": in_a_validation, "save": in_a_save, "memory": in_little_memory}


def attempt(config, rank: int, happen=None, spoil=None) -> dict:
    """One run in this process, and what came of it: its error, how far the disk was at that moment, and all that it had
    learned.
    """
    loops, prepare, raised = [], loop_module._prepare, ""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop_module, "_prepare", lambda *given: loops.append(prepare(*given)) or loops[0])
        if happen is not None:
            happen(patch, rank, Path(config.output))
        try:
            run_fit(config, spoil=spoil, writes=rank == 0)
        except VggtLoraError as error:
            raised = f"{type(error).__name__}: {error}"
    loop = loops[0]
    learned = {
        "weights": {n: p for n, p in loop.model.named_parameters() if p.requires_grad},
        "optimizer": loop.optimizer.state_dict(),
        "guard": loop.guard.state(),
    }
    return {
        "raised": raised,
        "saved": newest_checkpoint(Path(config.output) / "checkpoints")[1]["counters"]["step"],
        "learned": content_digest(learned),
        "steps": [(r["step"], r["lr"], r.get("skipped", "")) for r in loop.run.records if r["split"] == "train"],
    }


def on_another_machine(folders: list[str]) -> None:
    """From now on this process cannot read what lies in these folders, nor write there."""
    def seen(event: str, arguments: tuple) -> None:
        if event in ("open", "os.listdir", "os.scandir", "os.mkdir", "os.rename", "os.remove") and any(
            str(arguments[0]).startswith(folder) for folder in folders
        ):
            raise FileNotFoundError(f"{arguments[0]} is not on this machine")
    sys.addaudithook(seen)


def other_base(patch, rank, folder) -> None:
    """The second process has read a base that differs in one number."""
    def built(config):
        model = build_model(config)
        if rank == 1:
            next(model.parameters()).data.view(-1)[0] += 1
        return model
    patch.setattr(train_module, "build_model", built)


def no_scenes(patch, rank, folder) -> None:
    """The second process's machine has not the photos."""
    if rank == 1:
        patch.setattr(start_module, "open_scenes", raises(ConfigError("data: photos is not a folder")))


def no_memory(patch, rank, folder) -> None:
    """The second process has never enough memory for a step."""
    if rank == 1:
        at_call(
            patch, "_backward", 3,
            lambda: patch.setattr(loop_module, "window_loss", raises(torch.OutOfMemoryError("CUDA out of memory."))),
        )


def no_memory_to_validate(patch, rank, folder) -> None:
    """The second process has never enough memory for the validation after the first epoch."""
    if rank == 1:
        at_call(
            patch, "held_out_loss", 2,
            lambda: patch.setattr(loop_module, "window_loss", raises(torch.OutOfMemoryError("CUDA out of memory."))),
        )


def no_disk(patch, rank, folder) -> None:
    """The disk is full when the first process saves the first epoch."""
    if rank == 0:
        at_call(patch, "save_step", 2, raises(OSError(errno.ENOSPC, "No space left on device", "step-00000003.pt")))


def raises(error: BaseException):
    def work(*arguments, **more):
        raise error
    return work


ENDS = {"memory": no_memory, "validation": no_memory_to_validate, "disk": no_disk}


def command(config, rank: int, happen=None) -> int:
    """The command line in this process; returns its exit status."""
    with pytest.MonkeyPatch.context() as patch:
        if happen is not None:
            happen(patch, rank, Path(config.output))
        given = {
            f.name: getattr(config, f.name) for f in dataclasses.fields(config) if getattr(config, f.name) != f.default
        }
        return main([f"--{name}={value}" for name, value in given.items()])


def as_rank(scene: str, folder: str) -> None:
    """All cases, one after the other, in one of the two processes."""
    rank, found = int(os.environ["RANK"]), {}
    # a process that waits for one that will not come ends with an error of its own
    processes.PATIENCE = datetime.timedelta(seconds=90)

    def config(name, **changes):
        return settings(scene, Path(folder) / name, save_every=None, **changes)

    found["whole"] = attempt(config("whole"), rank)
    for name, happen in STOPS.items():
        found[name] = attempt(config(name), rank, happen)
        found[f"{name} resumed"] = attempt(config(name, resume=True), rank)
    # five windows in an epoch: steps of two, two and one, and the second of two is the second process's
    order = windows_of(config("order"))
    found["one bad"] = attempt(config("one bad"), rank, spoil={order[3]: math.nan})
    found["two bad"] = attempt(
        config("two bad", max_skipped_steps=2), rank, spoil={order[6]: math.nan, order[8]: math.nan}
    )
    found["other"] = {
        "settings": command(config("other", lr=1e-3 * (1 + rank)), rank),
        "base": command(config("other"), rank, other_base),
        "taken": command(config("whole"), rank),
    }
    found["scenes"] = command(config("no scenes"), rank, no_scenes)
    for name, happen in ENDS.items():
        found[f"no {name}"] = attempt(config(f"no {name}"), rank, happen)
    if rank == 1:
        on_another_machine([str(Path(folder) / name) for name in ("whole command", "command")])
    sure = {"preflight": "off", "adapter_weights": "best"}
    found["command"] = {
        "whole": command(config("whole command", **sure), rank),
        "stopped": command(config("command", **sure), rank, in_a_step),
        "resumed": command(config("command", **sure, resume=True), rank),
    }
    (Path(folder) / f"found-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    as_rank(*sys.argv[1:])


# --- several processes ----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    return toy_scene(tmp_path_factory.mktemp("data"), frames=12, size=(84, 112))


@pytest.fixture(scope="module")
def pair(scene, tmp_path_factory):
    """Both processes have done all cases: (folder, what the first found, what the second found). No launcher, so
    neither is ended for the other's sake.
    """
    folder = tmp_path_factory.mktemp("pair")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = os.environ | {
        "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "VGGT_LORA_CACHE": str(folder / "cache"),
    }
    started, until = [], time.monotonic() + LIMIT
    try:
        for rank in ("0", "1"):
            with open(folder / f"log-{rank}", "w") as log:
                started.append(
                    subprocess.Popen(
                        [sys.executable, __file__, str(scene), str(folder)], stdin=subprocess.DEVNULL, stdout=log,
                        stderr=log, env=common | {"RANK": rank, "LOCAL_RANK": rank}, cwd=ROOT,
                    )
                )
        codes = [process.wait(max(1, until - time.monotonic())) for process in started]
    finally:
        for process in started:
            process.kill()
    logs = [(folder / f"log-{rank}").read_text() for rank in (0, 1)]
    assert codes == [0, 0], "\n".join(log[-3000:] for log in logs)
    return folder, *(json.loads((folder / f"found-{rank}.json").read_text()) for rank in (0, 1))


@pytest.mark.parametrize(
    "name, word, step",
    [
        ("step", "Stopped: stopped by SIGTERM after step 2 of 6", 2),
        ("validation", "Stopped: stopped by SIGTERM after step 3 of 6", 3),
        ("save", "Stopped: stopped by SIGTERM after step 2 of 6", 2),
    ],
)
def test_a_signal_to_one_process_ends_both_saved_and_the_run_goes_on(pair, name, word, step):
    """Neither waits for the other, both raise the same, and none ends before the first has saved."""
    folder, *found = pair
    assert [one[name]["raised"].startswith(word) for one in found] == [True, True], [
        one[name]["raised"] for one in found
    ]
    assert (
        found[0][name] == found[1][name]
        and found[0][name]["saved"] == step
        and "resume=True" in found[0][name]["raised"]
    )
    assert found[0][f"{name} resumed"] == found[1][f"{name} resumed"]
    assert (
        found[0][f"{name} resumed"]["learned"] == found[0]["whole"]["learned"]
        and not found[0][f"{name} resumed"]["raised"]
    )
    assert without_wall(folder / name / "metrics.jsonl") == without_wall(folder / "whole" / "metrics.jsonl")
    log = (folder / name / "train.log").read_text()
    assert log.count("stopped by SIGTERM") == 1 and "resumed at step" in log


def test_memory_that_one_process_lacks_is_on_record_and_each_goes_on_as_it_was(pair):
    """The second process writes no log: the first takes its note over. After the stop it goes on with fewer frames at
    once, and the first as before.
    """
    folder, *found = pair
    assert [one["memory"]["raised"].split(";")[0] for one in found] == [
        "Stopped: stopped by SIGTERM after step 4 of 6"
    ] * 2
    assert found[0]["memory resumed"] == found[1]["memory resumed"] and not found[0]["memory resumed"]["raised"]
    log = (folder / "memory" / "train.log").read_text()
    assert (
        log.count("process 2 of 2: out of memory: dense heads now take 1 frame at once; the step is repeated")
        == log.count("out of memory")
        == 1
    )
    assert read_checkpoint(folder / "memory" / "checkpoints" / "last.pt")["counters"]["oom_recovery"] == [
        {"chunk": 3, "head": False, "blocks": False},
        {"chunk": 1, "head": True, "blocks": False},
    ]
    ours, theirs = ([r["loss"] for r in without_wall(folder / name / "metrics.jsonl")] for name in ("memory", "whole"))
    assert ours == pytest.approx(theirs, rel=1e-3)  # dropout draws its numbers piece by piece


def test_processes_that_have_not_the_same_in_hand_end_before_any_work(pair):
    """Both say the same, and neither waits for the other: not where settings or bases differ, and not where only the
    first could know.
    """
    folder, *found = pair
    assert [one["other"] for one in found] == [{"settings": 1, "base": 1, "taken": 1}] * 2 and not (
        folder / "other"
    ).exists()
    for rank in (0, 1):
        said = (folder / f"log-{rank}").read_text()
        assert said.count("the processes of a run disagree: lr is 0.002 in process 2 and 0.001 in process 1\n") == 1
        assert (
            said.count("the processes of a run disagree: the checksum of the base is ") == 1
            and said.count("holds a run already; give resume=True") == 1
        )


@pytest.mark.parametrize(
    "name, words, whose",
    [
        ("no memory", "TrainingError: out of memory even with one frame at once", 2),
        ("no validation", "TrainingError: out of memory even with", 2),
        ("no disk", "DiskError: no space to write", 1),
    ],
)
def test_an_error_of_one_process_is_the_others_end_too(pair, name, words, whose):
    """The other would wait for it, a day by the clock: it ends at once, in the same words, and the last checkpoint is
    as good as ever.
    """
    folder, *found = pair
    assert [one[name]["raised"].startswith(words) for one in found] == [True, True], [
        one[name]["raised"] for one in found
    ]
    told = found[2 - whose][name]["raised"]  # by the process that it did not happen to
    assert f"(in process {whose} of 2)" in told or "DiskError" in told
    assert [one["scenes"] for one in found] == [1, 1]
    said = [(folder / f"log-{rank}").read_text() for rank in (0, 1)]
    assert (
        "vggt_lora.train: data: photos is not a folder (in process 2 of 2)\n" in said[0]
        and "vggt_lora.train: data: photos is not a folder\n" in said[1]
    )


def test_the_command_line_says_that_one_process_was_stopped(pair):
    """Exit status and last line of both processes, and what the second command makes of it; the second process is on a
    machine that has not the run's disk.
    """
    folder, *found = pair
    assert [one["command"] for one in found] == [{"whole": 0, "stopped": 1, "resumed": 0}] * 2
    for rank in (0, 1):
        assert (
            "python -m vggt_lora.train: stopped by SIGTERM after step 2 of 6; continue with resume=True"
            in (folder / f"log-{rank}").read_text()
        )
    assert without_wall(folder / "command" / "metrics.jsonl") == without_wall(
        folder / "whole command" / "metrics.jsonl"
    )
    tables = [
        json.loads((folder / name / "results.json").read_text())["table"] for name in ("command", "whole command")
    ]
    assert tables[0] == tables[1] and tables[0]


def test_a_step_that_is_not_finite_in_one_process_is_skipped_in_both(pair, scene):
    """Weights, moments and schedule stay in step."""
    folder, *found = pair
    ours = found[0]["one bad"]
    assert ours == found[1]["one bad"] and not ours["raised"] and ours["learned"] != found[0]["whole"]["learned"]
    assert [step for step, _, skipped in ours["steps"] if skipped] == [2] and "(depth head)" in ours["steps"][1][2]
    optim = settings(scene, folder).optim
    assert [rate for _, rate, _ in ours["steps"]] == [learning_rate(s, 6, optim) for s in range(6)]
    last = read_checkpoint(folder / "one bad" / "checkpoints" / "last.pt")
    assert {float(s["step"]) for s in last["optimizer"]["state"].values()} == {5}


def test_bad_steps_of_one_process_end_both_and_name_head_and_term(pair):
    folder, *found = pair
    ours = found[0]["two bad"]
    assert ours == found[1]["two bad"] and [step for step, _, skipped in ours["steps"] if skipped] == [4, 5]
    for word in (
        "2 steps in a row were skipped, the last at step 5", "depth_nonfinite_pixels (depth head)", "(camera head)",
        ".JPG", "a higher max_skipped_steps",
    ):
        assert word in ours["raised"], word


def test_processes_wait_for_each_other_for_a_day(monkeypatch):
    """What torch is asked for when they meet: one may fill a cache or measure for hours while the others wait."""
    from accelerate.state import AcceleratorState

    class Met(Exception):
        pass

    def meet(**given):
        asked.update(given)
        raise Met

    asked = {}
    monkeypatch.setattr(torch.distributed, "init_process_group", meet)
    for name, value in {
        "RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": 1,
    }.items():
        monkeypatch.setenv(name, str(value))
    try:
        with pytest.raises(Met):
            processes.Distributed(settings("unused", "unused"))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert (asked["timeout"], asked["backend"]) == (datetime.timedelta(days=1), "gloo")


# --- a launcher, a terminal ----------------------------------------------------------------------------------------

def begun(
    folder: Path, scene, words: list[str], records: int = 10, changes: dict = {"epochs": 500}, meanwhile=lambda: None,
    **how,
):
    """The command in a process of its own, in the midst of a run; and what it has written down."""
    config = settings(scene, folder / "run", **{"save_every": None, "preflight": "off"} | changes)
    given = [
        f"--{f.name}={getattr(config, f.name)}"
        for f in dataclasses.fields(config)
        if getattr(config, f.name) != f.default
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", *words, "vggt_lora.train", *given], cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, **how,
    )
    metrics, until = folder / "run" / "metrics.jsonl", time.monotonic() + LIMIT
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= records):
        assert process.poll() is None and time.monotonic() < until
        meanwhile()
        time.sleep(0.01)
    return process, metrics


def torchrun() -> list[str]:
    """The launcher's words, with a port that is free."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return [word.format(port=free.getsockname()[1]) for word in LAUNCHERS["torchrun"]]


def all_is_saved(folder: Path, name: str) -> None:
    """The newest checkpoint is of the last step on record, and the log says so once."""
    records = without_wall(folder / "run" / "metrics.jsonl")
    steps = max(r["step"] for r in records)
    assert newest_checkpoint(folder / "run" / "checkpoints")[1]["counters"]["step"] == steps > 4
    assert (folder / "run" / "train.log").read_text().count(f"stopped by {name} after step {steps} of") == 1


def test_a_launcher_that_is_told_to_end_waits_until_all_is_saved(scene, tmp_path):
    """Its processes do not hear a terminal's signals: it passes on what it hears itself."""
    with open(tmp_path / "said", "w") as said:
        process, _ = begun(
            tmp_path, scene, torchrun(), stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(LIMIT) != 0
    all_is_saved(tmp_path, "SIGINT")
    assert "python -m vggt_lora.train: stopped by SIGINT after step" in (tmp_path / "said").read_text()


def test_one_of_two_processes_is_killed_and_the_run_goes_on(pair, scene, tmp_path):
    """SIGKILL to the second process after its third step or later: the launcher ends the first, and both go on, told no
    more than where, to what two undisturbed processes come to.
    """
    sure, quiet = (
        {"preflight": "off", "adapter_weights": "best", "epochs": 2},
        {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL},
    )
    process, metrics = begun(tmp_path, scene, torchrun(), 5, sure, **quiet)
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # one that has just ended
            if child.environ().get("RANK") == "1":
                child.kill()
    assert process.wait(LIMIT) != 0
    # all else is taken from there
    words = [*torchrun(), "vggt_lora.train", "--resume=True", f"--output={tmp_path / 'run'}", "--device=cpu"]
    assert (
        subprocess.call(
            [sys.executable, "-m", *words], cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, timeout=LIMIT, **quiet,
        )
        == 0
    )
    folder, *_ = pair
    assert without_wall(metrics) == without_wall(folder / "whole command" / "metrics.jsonl")
    ours, theirs = (
        json.loads((run / "results.json").read_text())["table"] for run in (tmp_path / "run", folder / "whole command")
    )
    assert ours == theirs


def test_a_run_whose_terminal_is_gone_saves_and_ends(scene, tmp_path):
    """A connection breaks: SIGHUP, and every further word to the terminal is an error."""
    import fcntl
    import pty
    import termios

    def read() -> None:  # or what is said would fill the terminal, and the run would wait
        with contextlib.suppress(BlockingIOError):
            while os.read(ours, 4096):
                pass

    try:
        ours, theirs = pty.openpty()
    except OSError as error:
        pytest.skip(f"this machine has no terminals to give: {error}")
    os.set_blocking(ours, False)
    process, _ = begun(
        tmp_path, scene, [], meanwhile=read, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(theirs)
    os.close(ours)
    process.wait(LIMIT)
    all_is_saved(tmp_path, "SIGHUP")


def test_a_run_goes_on_when_who_read_along_has_ended_and_when_nohup_is_asked(scene, tmp_path):
    """As in `nohup python -m vggt_lora.train | head`: neither is the end of it."""
    process, metrics = begun(
        tmp_path, scene, [], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    process.stdout.close()
    process.send_signal(signal.SIGHUP)
    before, until = len(metrics.read_text().splitlines()), time.monotonic() + LIMIT
    while len(metrics.read_text().splitlines()) < before + 20:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    process.kill()
    process.wait(LIMIT)


# --- random streams and memory ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("kept, now", [(3, 1), (1, 3), (0, 2), (2, 0)])
def test_random_streams_come_back_on_as_many_gpus_as_there_are(monkeypatch, kept, now):
    """Those of GPUs that are gone are left out, GPUs that came keep their own, and the host's streams come back all the
    same.
    """
    def to_gpu(stream, number):
        assert number < now, "torch would say: invalid device"
        given[number] = stream.item()

    given, state = {}, random_state() | {"cuda": [torch.tensor(10 + number) for number in range(kept)]}
    drawn = [draw() for draw in (torch.rand(()).item, np.random.rand)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: now > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: now)
    monkeypatch.setattr(torch.cuda, "set_rng_state", to_gpu)
    set_random_state(state)
    assert given == {number: 10 + number for number in range(min(kept, now))}
    assert [draw() for draw in (torch.rand(()).item, np.random.rand)] == drawn


def test_a_process_that_is_new_to_a_resumed_run_has_random_numbers_of_its_own(tmp_path):
    """One was there when it was saved, three go on: each with its own stream, and the same ones if they go on once
    more.
    """
    net = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(net.parameters())
    save_checkpoint(tmp_path / "one.pt", net, optimizer, step=1)
    wanted = torch.rand(())

    def drawn(rank: int) -> torch.Tensor:
        load_checkpoint(tmp_path / "one.pt", net, optimizer, rank)
        return torch.rand(())

    found = [drawn(rank).item() for rank in (0, 1, 2)]
    assert found[0] == wanted.item() and len(set(found)) == 3 and found == [drawn(rank).item() for rank in (0, 1, 2)]


LACKING = {
    "torch's kind": raises(
        torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 9.50 GiB of which 1.00 GiB "
            "is free."
        )
    ),
    "torch's kind without words": raises(torch.OutOfMemoryError()),
    "CUDA": raises(
        RuntimeError(
            "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call"
        )
    ),
    "cuBLAS": raises(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")),
    "cuBLAS without a handle": raises(
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`")
    ),
    "cuDNN 8": raises(RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")),
    "cuDNN 9": raises(RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED")),
    "cuDNN 9, host": raises(RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED")),
    "cuDNN's plans": raises(RuntimeError("GET was unable to find an engine to execute this computation")),
    "torch on the CPU": lambda: torch.empty(2**57, dtype=torch.uint8),  # the real words
    "numpy": lambda: np.empty(2**57, dtype=np.uint8),
    "oneDNN": raises(RuntimeError("could not create a primitive")),
}
UNRELATED = [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x5 and 6x7)"),
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
    RuntimeError("expected contiguous memory format"),
    OSError(28, "No space left on device"),
    ValueError("out of memory"),
    IndexError("index 7 is out of bounds"),
]


@pytest.fixture(scope="module")
def network():
    return VGGT(VGGTConfig.golden())


@pytest.mark.parametrize("lacks", LACKING.values(), ids=LACKING)
def test_an_allocator_that_gives_up_is_answered(network, lacks):
    left, said = [lacks, lambda: "done"], []
    assert OomRecovery(network, 4, said.append).attempt(lambda: left.pop(0)()) == "done"
    assert len(said) == 1 and said[0].startswith("out of memory: ")


@pytest.mark.parametrize("error", UNRELATED, ids=str)
def test_another_error_is_not_taken_for_lack_of_memory(network, error):
    """It comes out as it is, at once: a step made again would hide it."""
    calls, said = [], []
    with pytest.raises(type(error)) as found:
        OomRecovery(network, 4, said.append).attempt(lambda: calls.append(0) or raises(error)())
    assert found.value is error and len(calls) == 1 and not said


# --- before and after the steps --------------------------------------------------------------------------------------

def test_a_trained_part_that_the_loss_does_not_reach_is_named(scene, tmp_path):
    """All of it is counted, one tensor is named, and the model is left as it was."""
    config = settings(scene, tmp_path / "run", strategy="c")
    model, scenes = add_adapter(build_model(config), config)[0], open_scenes(config)
    sample = first_frames(items_of(split_scenes(scenes, config)[0].train, scenes), FrameCache(config.image_size))
    head = model.get_base_model().depth_head
    before = head.recompute, head.frames_chunk, model.training, content_digest(random_state())
    for part, weights in {
        "camera_head": ("camera_weight",),
        "depth_head": ("depth_conf_weight", "depth_reg_weight", "depth_grad_weight"),
    }.items():
        deaf = [n for n, p in model.named_parameters() if p.requires_grad and f".{part}." in n]
        with pytest.raises(ConfigError) as error:
            check_loss_reaches_adapter(model, sample, dataclasses.replace(config, **dict.fromkeys(weights, 0.0)))
        assert (
            f"no gradient reaches {len(deaf)} of the tensors that strategy c trains, for instance {deaf[0]};"
            in str(error.value)
            and deaf
        )
    check_loss_reaches_adapter(model, sample, config)
    assert (head.recompute, head.frames_chunk, model.training, content_digest(random_state())) == before
    assert all(p.grad is None for p in model.parameters())


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """Frame store and cache of a test's own, empty."""
    monkeypatch.setenv("VGGT_LORA_CACHE", str(tmp_path / "cache"))


def test_the_trained_network_leaves_memory_before_its_file_is_measured(scene, tmp_path, caches, monkeypatch):
    """No number of it is held while base and copy are, neither by itself nor by its optimiser; the file is there by
    then.
    """
    prepare, measure, models, optimizers, seen = loop_module._prepare, train_module.measure, [], [], []

    def keep(*given):
        loop = prepare(*given)
        models.append(loop.model)
        optimizers.append(weakref.ref(loop.optimizer))
        return loop

    def look(folder, *rest):
        seen.append(
            (
                {t.device.type for t in (*models[0].parameters(), *models[0].buffers())},
                optimizers[0](),
                (folder / "adapter_model.safetensors").is_file(),
            )
        )
        return measure(folder, *rest)

    monkeypatch.setattr(loop_module, "_prepare", keep)
    monkeypatch.setattr(train_module, "measure", look)
    run = train(settings(scene, tmp_path / "run", epochs=1, preflight="off"))
    assert seen == [({"meta"}, None, True)] and run.results["table"]


def test_a_time_of_use_that_cannot_be_written_ends_no_run(scene, tmp_path, caches, monkeypatch):
    """Entries of another's, or on a disk that is only read: the numbers are there, and both stores give them."""
    def refuse(path, *_, **__):
        asked.append(Path(path).parent)
        raise PermissionError(1, "Operation not permitted", str(path))

    asked, whole = [], train(settings(scene, tmp_path / "whole", epochs=1, preflight="off"))
    monkeypatch.setattr(os, "utime", refuse)
    run = train(settings(scene, tmp_path / "run", epochs=1, preflight="off"))
    assert {"frames", "prefix"} <= {part for folder in asked for part in folder.relative_to(tmp_path / "cache").parts}
    assert without_wall(run.records) == without_wall(whole.records)
    log = (run.folder / "train.log").read_text()
    assert "12 frames reused, 0 made" in log and "6 entries reused, 0 made" in log


def test_a_run_whose_last_weights_have_no_finite_loss_says_so(scene, tmp_path, monkeypatch):
    """With adapter_weights="last" they are what is saved and measured: a warning in the log, in the results and on both
    pages tells why, and where better ones are.
    """
    spoil_validations(monkeypatch, {1})
    run = train(settings(scene, tmp_path / "run", epochs=1, preflight="off"))
    loss = run.results["held_out_loss"]
    assert (
        loss["after"] is None
        and loss["best"] == loss["before"] == newest_checkpoint(run.folder / "checkpoints")[1]["counters"]["best"]
    )
    said = run.results["warnings"][0]
    for word in (
        "not finite: depth_nonfinite_pixels (depth head) on ", ".JPG", "best.pt has those after epoch 0",
        f"{loss['best']:.4f}", "adapter_weights='best'",
    ):
        assert word in said, word
    log = (run.folder / "train.log").read_text()
    assert f"WARNING: {said}" in log and "goes on" not in log
    assert "**Warning:** the held-out loss of the saved weights is not finite" in (run.folder / "report.md").read_text()
    assert "Warning: the held-out loss of the saved weights is not finite" in (run.folder / "report.html").read_text()
