"""Sudden death, scarcity and two users at once, in short; `make torture` is the long form."""
import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.torture.death import differences
from tests.torture.jobs import JOBS, half_written, make_base
from vggt_lora.core import ConfigError
from vggt_lora.files.atomic import atomic_path, write_json

ROOT = Path(__file__).resolve().parent.parent


def call(code: str, *arguments, **environment) -> subprocess.CompletedProcess:
    """Run Python code in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True,
        text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("torture"))


# --- sudden death ---------------------------------------------------------------------------------------------------

def test_killed_starved_or_begun_twice_commands_end_with_the_same_bytes():
    done = subprocess.run(
        [sys.executable, "-m", "tests.torture", "--short", "--kills", "1"], cwd=ROOT, stdin=subprocess.DEVNULL,
        capture_output=True, text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "4 kills, 12 writes, 6 pairs, 12 wants, 0 bad" in done.stdout


def test_the_judge_sees_half_a_file_and_a_difference(tmp_path):
    job = JOBS["training"]
    (tmp_path / "adapter").mkdir()
    (tmp_path / "results.json").write_text('{"a": 1')
    (tmp_path / "adapter" / "x.npz").write_bytes(b"PK")
    (tmp_path / ".hidden.json").write_text("{")
    (tmp_path / "train.log").write_text("a li")
    assert [f.split(" ")[0] for f in half_written(tmp_path, job, {})] == ["adapter/x.npz", "results.json"]
    assert differences({"a": 1, "b": 2}, {"b": 3, "c": 4}) == ["a is missing", "b differs", "c is too much"]


# --- what a kill leaves in a run's folder, and who may write there --------------------------------------------------

def test_a_run_folder_has_one_writer_and_a_dead_one_does_not_count(tmp_path, monkeypatch):
    from vggt_lora.training import run
    from vggt_lora.training.run import RunFolder, hold

    held = RunFolder(tmp_path / "run")
    held.record(step=1, split="train", loss=1.0)
    monkeypatch.setattr(run, "hold", lambda folder: hold(folder, 0.1))
    code = (
        "import sys; from vggt_lora.training.run import RunFolder, hold; from vggt_lora.training import run; run.hold "
        "= lambda f: hold(f, 0.1); RunFolder(sys.argv[1])"
    )
    other = call(code, tmp_path / "run")
    assert other.returncode and "another process is writing this run" in other.stderr
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1  # it was not emptied
    held.close()
    dead = call(
        "import sys, os, signal; from vggt_lora.training.run import RunFolder; RunFolder(sys.argv[1]); "
        "os.kill(os.getpid(), signal.SIGKILL)",
        tmp_path / "run",
    )
    assert dead.returncode == -9
    (tmp_path / "run" / "checkpoints" / ".last.pt.abc.tmp.pt").write_bytes(b"half")
    (tmp_path / "run" / ".adapter.abc").mkdir()
    (tmp_path / "run" / ".adapter.abc" / "adapter_config.json").write_text("{")
    again = RunFolder(tmp_path / "run")
    assert [p.name for p in sorted((tmp_path / "run").rglob(".*"))] == [".run.lock"]
    again.close()


def test_a_run_that_another_process_finished_meanwhile_is_not_overwritten(tmp_path):
    from vggt_lora.training.run import RunFolder

    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "run" / "checkpoints" / "step-00000001.pt").write_bytes(b"x")
    with pytest.raises(ConfigError, match="holds a run already"):
        RunFolder(tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == "{}\n"


def test_a_point_is_finished_when_its_notebook_ended(tmp_path):
    """Killed between the results and the pictures, or between a checkpoint and its second name, it goes on."""
    import dataclasses

    from vggt_lora.comparison.grid import grid_points
    from vggt_lora.comparison.launch import parameters_of, state_of

    point = grid_points("seed=0")[0]
    (tmp_path / "checkpoints").mkdir()
    write_json(tmp_path / "config.json", {"config": dataclasses.asdict(point.config)})
    assert (state_of(tmp_path, point.config), parameters_of(point, tmp_path)["resume"]) == ("new", False)
    (tmp_path / "checkpoints" / "step-00000001.pt").write_bytes(b"x")
    assert (state_of(tmp_path, point.config), parameters_of(point, tmp_path)["resume"]) == ("interrupted", True)
    write_json(tmp_path / "results.json", {})
    assert state_of(tmp_path, point.config) == "interrupted"
    write_json(tmp_path / "state.json", {"state": "finished"})
    assert state_of(tmp_path, point.config) == "finished"


def test_pruning_leaves_what_another_process_is_writing(tmp_path):
    from vggt_lora.datasets.frame_store import FrameStore
    from vggt_lora.files.cache import entry_files

    store = FrameStore(56, folder=tmp_path)
    store.folder.mkdir()
    (store.folder / f"{'0' * 64}.safetensors").write_bytes(bytes(10))
    with atomic_path(store.folder / f"{'1' * 64}.safetensors") as temporary:
        temporary.write_bytes(bytes(10))
        assert store.prune(0) == (1, 10) and not entry_files(store.root)
    assert (store.folder / f"{'1' * 64}.safetensors").stat().st_size == 10


def test_a_kill_reaches_children_with_sessions_of_their_own(tmp_path):
    """As a kernel below papermill below submitit: a child that left its session, and one whose parent is gone."""
    from tests.torture.death import begin, end_family
    from tests.torture.jobs import Job

    code = (
        "import os, sys, time\nif os.fork(): os._exit(0)\nos.setsid()\nopen(sys.argv[1], "
        "'w').write(str(os.getpid()))\ntime.sleep(600)"
    )

    def work(base, out):
        subprocess.run([sys.executable, "-c", code, str(out / "pid")], start_new_session=True)
        time.sleep(600)
    number = begin(Job("family", work), tmp_path, tmp_path, tmp_path / "log")
    while not (tmp_path / "pid").is_file() or not (tmp_path / "pid").read_text():
        time.sleep(0.02)
    child = int((tmp_path / "pid").read_text())
    assert {number, child} <= set(end_family(number))
    os.waitpid(number, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


# --- scarcity -------------------------------------------------------------------------------------------------------

def test_on_a_full_disk_the_last_good_file_stays(tmp_path):
    """A limit on the size of files stands for the disk: the error is the system's own, in the middle of a write."""
    write_json(tmp_path / "kept.json", {"good": 1})
    code = ("import resource, signal, sys; from vggt_lora.files.atomic import write_json\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
            "write_json(sys.argv[1], list(range(10000)))")
    done = call(code, tmp_path / "kept.json")
    assert done.returncode and "File too large" in done.stderr
    assert (tmp_path / "kept.json").read_text() == '{\n  "good": 1\n}\n' and [p.name for p in tmp_path.iterdir()] == [
        "kept.json"
    ]


def test_without_room_a_scene_is_not_made(base, tmp_path):
    """Started with a limit on file sizes, it stops with the project's own error; other commands have their turn in the
    torture's short form.
    """
    (tmp_path / "out").mkdir()
    code = (
        "import sys; from pathlib import Path; from tests.torture.jobs import JOBS; from tests.torture.scarcity "
        "import in_one_line, small_files\n"
        "small_files(None)\nin_one_line(lambda: JOBS['demo'].work(Path(sys.argv[1]), Path(sys.argv[2])))"
    )
    done = call(code, base, tmp_path / "out")
    assert done.returncode == 1 and "SceneError" in done.stderr and "cannot be written" in done.stderr, done.stderr[
        -1500:
    ]
    assert not half_written(tmp_path / "out", JOBS["demo"], {})
    JOBS["demo"].work(base, tmp_path / "out")


def test_an_output_that_cannot_be_written_is_refused_before_any_work(tmp_path):
    from vggt_lora.training.config import TrainConfig
    from vggt_lora.training.run import run_path

    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="is a file"):
        run_path(TrainConfig(output=str(tmp_path / "file" / "run")))
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="not writable"):
        run_path(TrainConfig(output=str(tmp_path / "run")))
    tmp_path.chmod(0o700)


def test_little_address_space_is_an_error_and_no_crash(base):
    """A scene is read in a process that may take little memory: either it fits, or Python or the project says that it
    does not.
    """
    code = (
        "import resource, sys; from pathlib import Path; from vggt_lora.scenes.opening import open_scene; from "
        "vggt_lora.core import VggtLoraError\n"
        "from vggt_lora.scenes.images import load_image, plan_image\n"
        "def read(): scene = open_scene(Path(sys.argv[1])); return [load_image(f.image_path, plan_image(f.size, 84)) "
        "for f in scene.frames]\n"
        "read()  # the libraries are loaded\n"
        "used = int(next(l for l in open('/proc/self/status') if l.startswith('VmSize')).split()[1]) * 1024\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**20 * int(sys.argv[2]),) * 2)\n"
        "try: read()\n"
        "except (MemoryError, VggtLoraError) as error: print(type(error).__name__); sys.exit(3)\n"
    )
    for megabytes in (0, 2, 64):
        assert call(code, base / "small_house", megabytes).returncode in (0, 3)
    assert call(code, base / "small_house", 512).returncode == 0


def test_a_clock_that_goes_backwards_changes_nothing(base, tmp_path, monkeypatch):
    """Every call is an hour before the last one: a store is filled, young temporary files stay, a second pass finds all
    frames.
    """
    from vggt_lora.scenes.opening import open_scene
    from vggt_lora.datasets.frame_store import FrameStore
    from vggt_lora.files.cache import remove_leftovers
    from vggt_lora.datasets.windows import Window

    now = [time.time()]
    monkeypatch.setattr(time, "time", lambda: now.__setitem__(0, now[0] - 3600) or now[0])
    scene = open_scene(base / "small_house")
    window = [(scene, Window(scene.name, tuple(range(len(scene)))))]
    first = FrameStore(56, folder=tmp_path)
    assert first.prepare(window, progress=False).made == len(scene)
    (first.folder / ".x.tmp").write_bytes(b"")
    assert remove_leftovers(first.folder) == 0 and (first.folder / ".x.tmp").exists()
    again = FrameStore(56, folder=tmp_path).prepare(window, progress=False)
    assert (again.made, again.reused) == (0, len(scene))


def test_a_worker_that_dies_ends_the_point_with_its_name(tmp_path):
    """A process of a comparison that is killed from outside is a failure with words, and leaves no lock behind."""
    from vggt_lora.comparison.launch import executor_for, outcome

    job = executor_for(tmp_path, "local").submit(end_myself)
    state = outcome(job, tmp_path)
    assert state["state"] == "failed" and "ended without a result" in state["error"]


def end_myself():
    """Die as under the system's memory killer."""
    os.kill(os.getpid(), 9)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_errors_of_the_disk_while_renaming_leave_the_old_file(number, tmp_path, monkeypatch):
    write_json(tmp_path / "a.json", 1)

    def fails(*arguments):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError):
        write_json(tmp_path / "a.json", 2)
    monkeypatch.undo()
    assert (tmp_path / "a.json").read_text() == "1\n" and len(list(tmp_path.iterdir())) == 1
