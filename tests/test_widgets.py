"""Widgets where a notebook cannot test them: the stop button in a kernel that is busy, and a training that is watched.
"""
import dataclasses
import os
import queue
import sys
import time
from pathlib import Path

import pytest

CELL = """\
import sys, time
from types import SimpleNamespace
from vggt_lora.views.widgets.run import LiveView

live = LiveView(interactive=True)
live.begin(FOLDER)
print("button", live.widget.button.comm.comm_id, flush=True)
progress = SimpleNamespace(step=0, total_steps=400, loss=1.0, held_out=1.0, stop=False)
while progress.step < progress.total_steps and not progress.stop:
    time.sleep(0.05)
    progress.step += 1
    live("step", progress)
live("end", progress)
print("ended after", progress.step, live.widget.button.description, flush=True)
"""


def reply_to(get, message: str, timeout: float = 60) -> dict:
    """The reply to a request among whatever else comes."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        try:
            found = get(timeout=1)
        except queue.Empty:
            continue
        if found["parent_header"].get("msg_id") == message:
            return found
    raise AssertionError(f"no reply to {message}")


def printed(client, word: str, timeout: float = 120) -> str:
    """The line with `word` that the kernel prints; an error of the cell ends the wait."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        try:
            message = client.get_iopub_msg(timeout=1)
        except queue.Empty:
            continue
        assert message["msg_type"] != "error", "\n".join(message["content"]["traceback"])
        if message["msg_type"] == "stream":
            for line in message["content"]["text"].splitlines():
                if line.startswith(word):
                    return line
    raise AssertionError(f"the kernel never printed {word!r}")


def test_the_stop_button_works_while_the_cell_runs(tmp_path):
    """As JupyterLab does it: the click travels to a subshell, for the kernel's own thread is busy with the cell."""
    pytest.importorskip("ipywidgets")
    manager_class = pytest.importorskip("jupyter_client").KernelManager
    manager = manager_class(kernel_name="python3")
    manager.start_kernel(env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, cwd=str(tmp_path))
    client = manager.client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=60)
        request = client.session.msg("create_subshell_request")
        client.control_channel.send(request)
        content = reply_to(client.get_control_msg, request["header"]["msg_id"])["content"]
        if content.get("status") != "ok":
            pytest.skip("this ipykernel has no subshells (version 7 has); the file `stop` ends a run there")
        client.execute(CELL.replace("FOLDER", repr(str(tmp_path))))
        comm = printed(client, "button").split()[1]
        click = client.session.msg(
            "comm_msg", {"comm_id": comm, "data": {"method": "custom", "content": {"event": "click"}}}
        )
        click["header"]["subshell_id"] = content["subshell_id"]
        client.shell_channel.send(click)
        words = printed(client, "ended after").split()
        assert 0 < int(words[2]) < 400 and words[3] == "saved"
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def test_a_training_that_is_watched_is_the_same_and_stops_when_asked(tmp_path):
    """Looking changes no number up to the wish to stop, which ends the run early with an adapter on disk."""
    from vggt_lora.train import TrainConfig, train
    from vggt_lora.views.widgets.run import LiveView, read_metrics

    pytest.importorskip("ipywidgets")
    config = TrainConfig(
        model="random", strategy="a", scenes="demo_held", epochs=4, image_size=56, frames=4, overlap=0.0,
        train_fraction=0.6, frame_cache=False, output=str(tmp_path / "plain"),
    )
    plain = train(config)
    live, looks, peek = LiveView(seconds=0, interactive=True), [], None
    live._looking, peek = -1e9, live.peek  # look after every epoch, however long it takes
    live.peek = lambda: (peek(), looks.append(live.look))
    watched = train(
        dataclasses.replace(config, output=str(tmp_path / "watched")),
        hooks=[
            live,
            lambda event, progress: live.widget.button.click() if event == "epoch" and progress.epoch == 2 else None,
        ],
    )
    ours, theirs = (
        [
            {k: v for k, v in record.items() if k != "wall"}
            for record in read_metrics(run.folder)
            if not record.get("stopped")
        ]
        for run in (watched, plain)
    )
    assert 0 < len(ours) < len(theirs) and ours == theirs[: len(ours)]
    # before, after two epochs, at the end
    assert len(looks) >= 4 and all(look is not None for look in looks), live.note
    assert (looks[0]["depth"] != looks[-1]["depth"]).any() and (looks[0]["photo"] == looks[-1]["photo"]).all()
    assert (
        live.ended
        and 0 < live.step < live.total
        and live.widget.bar.value == live.step
        and live.widget.button.description == "saved"
    )
    assert "stopped at" in live.words() and live.widget.image.value[:4] == b"\x89PNG"
    assert (Path(watched.folder) / "adapter").is_dir() and not (Path(watched.folder) / "stop").exists()
