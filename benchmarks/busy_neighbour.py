"""A training step with and without another program on the same cores, for both ways in which torch's threads can wait.

    python benchmarks/busy_neighbour.py                # tiny network, on all cores of this process
    python benchmarks/busy_neighbour.py --steps 20 --shape 4x154x224

spinning   OMP_WAIT_POLICY=ACTIVE: a thread asks again and again whether the others are done
sleeping   OMP_WAIT_POLICY=PASSIVE: what the package sets when it is imported

The neighbour is one process a core that only computes. Each measurement is a process of its own; the seconds are the
median of the steps. A step that gets half of each core should take twice as long, not more.
"""
import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from vggt_lora.threads import cpu_share, machine_is_busy  # noqa: E402

WAYS = {"spinning": "ACTIVE", "sleeping": "PASSIVE"}


@contextlib.contextmanager
def neighbour(count: int) -> Iterator[None]:
    """Let so many processes compute meanwhile."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def measure(shape: tuple[int, tuple[int, int]], steps: int) -> float:
    """Return the median of the seconds of a step in this process."""
    import train_step

    base = train_step.new_base(train_step.SIZES["tiny"][0], "cpu")
    with tempfile.TemporaryDirectory() as folder:
        stepper = train_step.Stepper(
            base, "b", "cache", train_step.random_sample(*shape), "cpu", "float32", Path(folder), False
        )
        stepper.step()
        seconds = []
        for _ in range(steps):
            began = time.perf_counter()
            stepper.step()
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def in_a_process(policy: str, threads: int, shape: str, steps: int) -> float:
    """Return the seconds of a step in a process whose threads wait in this way."""
    command = [sys.executable, __file__, "--shape", shape, "--steps", str(steps), "--one"]
    environment = os.environ | {"OMP_WAIT_POLICY": policy, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout)


def main() -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="4x154x224", metavar="FxHxW", help="frames x height x width")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        frames, *size = map(int, given.shape.split("x"))
        print(json.dumps(measure((frames, tuple(size)), given.steps)))
        return 0
    threads = cpu_share()
    print(
        f"{threads} threads, {given.shape}"
        + (f"; {machine_is_busy()}, so no row is alone" if machine_is_busy() else "")
    )
    print("threads   alone s  with a neighbour s  ratio")
    for way, policy in WAYS.items():
        alone = in_a_process(policy, threads, given.shape, given.steps)
        with neighbour(threads):
            beside = in_a_process(policy, threads, given.shape, given.steps)
        print(f"{way:8} {alone:8.2f}  {beside:18.2f}  {beside / alone:5.1f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
