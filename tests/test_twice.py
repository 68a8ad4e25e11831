"""The same seed gives the same bytes, in another process with another order of sets; and nothing of it opens a
connection.
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.torture.jobs import JOBS, content, final_names
from vggt_lora.training.run import without_wall

ROOT = Path(__file__).resolve().parent.parent
LINE = """
import json, sys
asked = []
def watch(event, arguments):
    if event in ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request"):
        caller = sys._getframe(1).f_code
        if caller.co_name == "_has_ipv6" and "urllib3" in caller.co_filename:
            return  # at import urllib3 binds a port of its own machine and lets it go, to see whether there is IPv6
        asked.append([event, repr(arguments[1:] if event.startswith(("socket.c", "socket.b")) else arguments)])
sys.addaudithook(watch)
import dataclasses
from pathlib import Path
from tests.torture import jobs
base, out = Path(sys.argv[1]), Path(sys.argv[2])
jobs.make_base(base)
jobs.store(base, out / "store")
jobs.train(base, out / "run", epochs=2, preflight="off")
from vggt_lora.evaluate import evaluate
found = evaluate(out / "run")
from vggt_lora.datasets.splits import split_windows
from vggt_lora.datasets.windows import make_windows
from vggt_lora.scenes.opening import open_scene
scene = open_scene(base / "small_house")
(out / "windows.txt").write_text(repr(split_windows([scene], 2, 0.5, 0.5)) + repr(make_windows(scene, 3, 0.5)))
(out / "evaluation.json").write_text(json.dumps([found.rows, found.table(), found.cameras()], default=str))
print(json.dumps(asked))
"""


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Two processes that do all of it, each in a folder of its own: [(base, out, connections)]."""
    found = []
    for seed in ("1", "2"):
        room = tmp_path_factory.mktemp("twice")
        done = subprocess.run(
            [sys.executable, "-c", LINE, str(room / "base"), str(room / "out")],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env={
                **os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1", "VGGT_LORA_CACHE": str(room / "cache"),
                "CUDA_VISIBLE_DEVICES": "",
            },
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found.append((room / "base", room / "out", json.loads(done.stdout.splitlines()[-1])))
    return found


def test_no_connection_is_opened_by_training_and_evaluation(both):
    assert [asked for *_, asked in both] == [[], []]


def test_the_watch_sees_a_connection():
    code = (
        LINE.split("import dataclasses")[0]
        + "import socket\ntry: socket.create_connection(('127.0.0.1', 9), 0.2)\nexcept OSError: "
          "pass\nprint(json.dumps(asked))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "socket.connect" in {event for event, _ in json.loads(done.stdout)}


def test_scene_store_windows_and_evaluation_are_the_same(both):
    (one_base, one, _), (two_base, two, _) = both
    assert content(one_base, JOBS["demo"]) == content(two_base, JOBS["demo"]) != {}
    assert content(one / "store", JOBS["store"]) == content(two / "store", JOBS["store"]) != {}
    for name in ("windows.txt", "evaluation.json"):
        assert (one / name).read_text() == (two / name).read_text(), name


def portable(path: Path, base: Path, out: Path) -> bytes:
    return path.read_bytes().replace(str(base).encode(), b"BASE").replace(str(out).encode(), b"OUT")


def test_training_results_and_report_are_the_same(both):
    """All files of a run but those that tell the time; records without their clocks."""
    (one_base, one, _), (two_base, two, _) = both
    assert without_wall(one / "run" / "metrics.jsonl") == without_wall(two / "run" / "metrics.jsonl")
    job, told = (
        JOBS["training"],
        ("preflight.json", "config.json", "resource_usage.json", "report.html", "train.log", "metrics.jsonl"),
    )
    first, second = (final_names(out / "run", job) for out in (one, two))
    names = [n for n in first if not n.startswith(("tensorboard", "checkpoints")) and n not in told]
    assert {
        "results.json", "report.md", "split.json", "model.txt", "adapter/adapter_model.safetensors",
        "adapter/vggt_lora.json", "figures/losses.png",
    } <= set(names)
    assert first.keys() - {n for n in first if n.startswith("tensorboard")} == second.keys() - {
        n for n in second if n.startswith("tensorboard")
    }
    differ = [n for n in names if portable(first[n], one_base, one) != portable(second[n], two_base, two)]
    assert not differ
    config = json.loads((one / "run" / "config.json").read_text())
    assert "same bytes" in config["reproducible"]
