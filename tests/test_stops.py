"""Stops that reach one of two processes, steps that are bad in one of them, and the small things on which the end of a run depends."""
import dataclasses
import datetime
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
from test_engine import ROOT, run_fit, same, settings, windows_of

from vggt_lora.core import STOP
from vggt_lora.scenes.synthetic import toy_scene
from vggt_lora.train import main
from vggt_lora.training import loop as loop_module
from vggt_lora.training import processes
from vggt_lora.training.checkpoint import content_digest, newest_checkpoint, read_checkpoint
from vggt_lora.training.guard import replay
from vggt_lora.training.loop import learning_rate
from vggt_lora.training.run import without_wall

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
    """The file `stop` asks for the end, and while the first process saves, which takes its time, the second is asked once more."""
    if rank == 0:
        at_call(patch, "_step", 2, (folder / STOP).touch)
        at_call(patch, "save_step", 2, lambda: time.sleep(0.5))
    else:
        at_call(patch, "_save", 2, term)


STOPS = {"step": in_a_step, "validation": in_a_validation, "save": in_a_save}


def attempt(config, rank: int, happen=None, spoil=None) -> dict:
    """One run in this process, and what came of it: its error, how far the disk was at that moment, and all that it had learned."""
    loops, prepare, raised = [], loop_module._prepare, ""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop_module, "_prepare", lambda *given: loops.append(prepare(*given)) or loops[0])
        if happen is not None:
            happen(patch, rank, Path(config.output))
        try:
            run_fit(config, spoil=spoil, writes=rank == 0)
        except loop_module.TrainingError as error:
            raised = f"{type(error).__name__}: {error}"
    loop = loops[0]
    learned = {"weights": {n: p for n, p in loop.model.named_parameters() if p.requires_grad}, "optimizer": loop.optimizer.state_dict(), "guard": loop.guard.state()}
    return {"raised": raised, "saved": newest_checkpoint(Path(config.output) / "checkpoints")[1]["counters"]["step"], "learned": content_digest(learned),
            "steps": [(r["step"], r["lr"], r.get("skipped", "")) for r in loop.run.records if r["split"] == "train"]}


def command(config, rank: int, happen=None) -> int:
    """The command line in this process; returns its exit status."""
    with pytest.MonkeyPatch.context() as patch:
        if happen is not None:
            happen(patch, rank, Path(config.output))
        given = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if getattr(config, f.name) != f.default}
        return main([f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()])


def as_rank(scene: str, folder: str) -> None:
    """All cases, one after the other, in one of the two processes."""
    rank, found = int(os.environ["RANK"]), {}
    processes.PATIENCE = datetime.timedelta(seconds=90)  # a process that waits for one that will not come ends with an error of its own

    def config(name, **changes):
        return settings(scene, Path(folder) / name, save_every=0, **changes)

    found["whole"] = attempt(config("whole"), rank)
    for name, happen in STOPS.items():
        found[name] = attempt(config(name), rank, happen)
        found[f"{name} resumed"] = attempt(config(name, resume=True), rank)
    order = windows_of(config("order"))  # five windows in an epoch: steps of two, two and one, and the second of two is the second process's
    found["one bad"] = attempt(config("one bad"), rank, spoil={order[3]: math.nan})
    found["two bad"] = attempt(config("two bad", max_bad=2), rank, spoil={order[6]: math.nan, order[8]: math.nan})
    found["command"] = {"whole": command(config("whole command", preflight="off"), rank), "stopped": command(config("command", preflight="off"), rank, in_a_step),
                        "resumed": command(config("command", preflight="off", resume=True), rank)}
    (Path(folder) / f"found-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    as_rank(*sys.argv[1:])


# --- several processes ----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    return toy_scene(tmp_path_factory.mktemp("data"), frames=12, size=(84, 112))


@pytest.fixture(scope="module")
def pair(scene, tmp_path_factory):
    """Both processes have done all cases: (folder, what the first found, what the second found). No launcher, so neither is ended for the other's sake."""
    folder = tmp_path_factory.mktemp("pair")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                           "VGGT_LORA_CACHE": str(folder / "cache")}
    started, until = [], time.monotonic() + LIMIT
    try:
        for rank in ("0", "1"):
            with open(folder / f"log-{rank}", "w") as log:
                started.append(subprocess.Popen([sys.executable, __file__, str(scene), str(folder)], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                                env=common | {"RANK": rank, "LOCAL_RANK": rank}, cwd=ROOT))
        codes = [process.wait(max(1, until - time.monotonic())) for process in started]
    finally:
        for process in started:
            process.kill()
    logs = [(folder / f"log-{rank}").read_text() for rank in (0, 1)]
    assert codes == [0, 0], "\n".join(log[-3000:] for log in logs)
    return folder, *(json.loads((folder / f"found-{rank}.json").read_text()) for rank in (0, 1))


@pytest.mark.parametrize("name, word, step", [("step", "Stopped: stopped by SIGTERM after step 2 of 6", 2), ("validation", "Stopped: stopped by SIGTERM after step 3 of 6", 3),
                                              ("save", "Stopped: stopped by SIGTERM after step 2 of 6", 2)])
def test_a_signal_to_one_process_ends_both_saved_and_the_run_goes_on(pair, name, word, step):
    """Neither waits for the other, both raise the same, and none ends before the first has saved."""
    folder, *found = pair
    assert [one[name]["raised"].startswith(word) for one in found] == [True, True], [one[name]["raised"] for one in found]
    assert found[0][name] == found[1][name] and found[0][name]["saved"] == step and "resume=True" in found[0][name]["raised"]
    assert found[0][f"{name} resumed"] == found[1][f"{name} resumed"]
    assert found[0][f"{name} resumed"]["learned"] == found[0]["whole"]["learned"] and not found[0][f"{name} resumed"]["raised"]
    assert without_wall(folder / name / "metrics.jsonl") == without_wall(folder / "whole" / "metrics.jsonl")
    log = (folder / name / "train.log").read_text()
    assert log.count("stopped by SIGTERM") == 1 and "resumed at step" in log


def test_the_command_line_says_that_one_process_was_stopped(pair):
    """Exit status and last line of both processes, and what the second command makes of it."""
    folder, *found = pair
    assert [one["command"] for one in found] == [{"whole": 0, "stopped": 1, "resumed": 0}] * 2
    for rank in (0, 1):
        assert "python -m vggt_lora.train: stopped by SIGTERM after step 2 of 6; continue with resume=True" in (folder / f"log-{rank}").read_text()
    assert without_wall(folder / "command" / "metrics.jsonl") == without_wall(folder / "whole command" / "metrics.jsonl")
    tables = [json.loads((folder / name / "results.json").read_text())["table"] for name in ("command", "whole command")]
    assert tables[0] == tables[1] and tables[0]


def test_a_step_that_is_not_finite_in_one_process_is_skipped_in_both(pair, scene):
    """Weights, moments and schedule stay in step; what each process saw is kept, and the second one's file has the fault."""
    folder, *found = pair
    ours = found[0]["one bad"]
    assert ours == found[1]["one bad"] and not ours["raised"] and ours["learned"] != found[0]["whole"]["learned"]
    assert [step for step, _, skipped in ours["steps"] if skipped] == [2] and "(depth head)" in ours["steps"][1][2]
    assert [rate for _, rate, _ in ours["steps"]] == [learning_rate(s, 6, settings(scene, folder)) for s in range(6)]
    last = read_checkpoint(folder / "one bad" / "checkpoints" / "last.pt")
    assert {float(s["step"]) for s in last["optimizer"]["state"].values()} == {5}
    good, bad = (replay(folder / "one bad", folder / "one bad" / "bad" / f"step-000002{of}.pt") for of in ("", "-1"))
    assert not good[0]["faults"] and math.isfinite(good[0]["loss"]) and bad[0]["faults"] and all(f in ours["steps"][1][2] for f in bad[0]["faults"])


def test_bad_steps_of_one_process_end_both_and_name_head_and_term(pair):
    folder, *found = pair
    ours = found[0]["two bad"]
    assert ours == found[1]["two bad"] and [step for step, _, skipped in ours["steps"] if skipped] == [4, 5]
    for word in ("2 steps in a row were skipped, the last at step 5", "depth_nonfinite_pixels (depth head)", "(camera head)", ".JPG", "a higher max_bad"):
        assert word in ours["raised"], word
    assert sorted(p.name for p in (folder / "two bad" / "bad").iterdir()) == [f"step-00000{step}{of}.pt" for step in (4, 5) for of in ("-1", "")]
