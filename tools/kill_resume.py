"""Kill a small training run at random instants, resume it each time, and compare its files with those of an undisturbed run.

    python tools/kill_resume.py                 20 kills
    python tools/kill_resume.py --kills 4       a short form, as the tests use it

Every attempt is a process of its own that is ended by SIGKILL. A checkpoint is written after every step, so that many kills fall into the writing of one.
"""
import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from vggt_lora.demo.demo_scenes import toy_scene
from vggt_lora.train import TrainConfig, train
from vggt_lora.training.checkpoint import checkpoint_files
from vggt_lora.training.run import without_wall


def start(config: TrainConfig, log: Path) -> int:
    """Train in a forked process (the imports are made already, no computation is); return its id."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        train(config)
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def settings(scene: Path, output: Path) -> TrainConfig:
    """A run of a few seconds with dropout, several windows per step and a checkpoint after every step."""
    resume = bool(checkpoint_files(output / "checkpoints"))
    return TrainConfig(strategy="a", model="random", data=str(scene), output=str(output), resume=resume, epochs=2, frames=3, image_size=56, rank=2, lr=1e-3, dropout=0.1,
                       save_every=1, device="cpu", frame_cache=False)


def main() -> int:
    """Run the comparison; the exit status is the number of files that differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--scene", type=Path, help="a scene folder; default: a small one is made")
    parser.add_argument("--output", type=Path, help="where the two runs go; default: a temporary folder")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    draw, work = random.Random(given.seed), given.output or Path(tempfile.mkdtemp(prefix="kill_resume_"))
    scene = given.scene or toy_scene(work / "data", frames=12, size=(84, 112))
    whole, cut, log = work / "whole", work / "cut", work / "attempts.log"

    started = time.monotonic()
    assert os.waitpid(start(settings(scene, whole), log), 0)[1] == 0, f"the undisturbed run failed, see {log}"
    seconds = time.monotonic() - started

    kills, inside, done, wrong = 0, 0, 0, []
    while kills < given.kills:
        before, process = records(cut), start(settings(scene, cut), log)
        steps = draw.choice((0, 1, 1, 2, 3))  # new records to wait for; 0: any instant, set-up included
        while steps and records(cut) < before + steps and not ended(process, log):
            time.sleep(0.002)
        time.sleep(draw.uniform(0, seconds if not steps else seconds / 20))
        if ended(process, log):  # too late for a kill: compared, and a new run begins
            wrong += differ(cut, whole)
            cut.rename(work / f"done-{done}")
            done += 1
            continue
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        kills += 1
        inside += records(cut) > before
    assert os.waitpid(start(settings(scene, cut), log), 0)[1] == 0, f"the last attempt failed, see {log}"
    wrong += differ(cut, whole)
    print(f"{kills} kills, {inside} of them after new steps, {done + 1} runs completed; "
          + (f"different: {wrong}" if wrong else "all files are those of the undisturbed run"))
    return len(wrong)


def ended(process: int, log: Path) -> bool:
    """Whether a process has ended; raises AssertionError if it failed."""
    info = os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    assert info is None or info.si_status == 0, f"an attempt failed, see {log}"
    return info is not None


def records(folder: Path) -> int:
    """Lines of a run's metrics.jsonl."""
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def differ(run: Path, whole: Path) -> list[str]:
    """Names of the files of a run that differ from the undisturbed one's."""
    wrong = [n for n in ("adapter/adapter_model.safetensors", "results.json") if (run / n).read_bytes() != (whole / n).read_bytes()]
    return wrong + ["metrics.jsonl"] * (without_wall(run / "metrics.jsonl") != without_wall(whole / "metrics.jsonl"))


if __name__ == "__main__":
    sys.exit(main())
