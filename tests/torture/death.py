"""Kill -9: a job in a process of its own, ended at a random instant or before one of its writes, started again, and
held against one that ran undisturbed.
"""
import contextlib
import dataclasses
import itertools
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.torture.jobs import Job, content, half_written

LIMIT = 1800  # s; a job that takes longer hangs
# variable that all descendants of a job inherit, in whatever session and under whatever parent
MARK = "VGGT_LORA_TORTURE"


@dataclasses.dataclass(frozen=True)
class Death:
    """One kill and what came of it."""

    job: str
    instant: float  # share of the undisturbed time, or of the writes, at which the signal was sent
    state: str  # "killed", or "done" if the job was faster
    left: int  # hidden files that nobody uses, left by the kill and still there at the end
    faults: tuple[str, ...] = ()

    @property
    def good(self) -> bool:
        """Whether nothing was lost."""
        return not self.faults


def begin(job: Job, base: Path, out: Path, log: Path) -> int:
    """Start a job in a copy of this process, whose libraries are loaded already; returns its number."""
    sys.stdout.flush()
    number = os.fork()
    if number:
        return number
    status = 1
    try:
        os.setsid()
        os.environ[MARK] = str(os.getpid())
        with open(log, "w") as said:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            try:
                job.work(base, out)
                status = 0
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
    finally:
        os._exit(status)


def family(number: int) -> list:
    """A process and all that it has started: its children, theirs, and those that have lost their parent or have a
    session of their own.
    """
    import psutil

    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, OSError):
            if process.pid == number or process.environ().get(MARK) == str(number):
                found |= {p.pid: p for p in (process, *process.children(recursive=True))}
    return list(found.values())


def end_family(number: int) -> list[int]:
    """SIGKILL to a process and to all that it has started, as a power cut would; those it starts meanwhile too. Returns
    their numbers.
    """
    import psutil

    known = {}
    while new := [
        p for p in family(number) if p.pid not in known and p.is_running() and p.status() != psutil.STATUS_ZOMBIE
    ]:
        for process in new:
            known[process.pid] = process
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
    psutil.wait_procs([p for pid, p in known.items() if pid != number], timeout=30)
    return list(known)


def wait(number: int, seconds: float) -> int | None:
    """Exit status of a child, negative for a signal; None if it still runs after so many seconds."""
    until = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(number, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= until:
            return None
        time.sleep(min(0.002, max(0, until - time.monotonic())))


def finish(job: Job, base: Path, out: Path, log: Path) -> str:
    """Run a job to its end; returns why it failed, or nothing."""
    number = begin(job, base, out, log)
    status = wait(number, LIMIT)
    if status is None:
        end_family(number)
        os.waitpid(number, 0)
        return f"no end after {LIMIT} s"
    return "" if status == 0 else f"status {status}: {' '.join(log.read_text().strip().splitlines()[-1:])[-300:]}"


_KNOWN: dict[tuple, dict] = {}  # (room, job) -> what it leaves


def undisturbed(job: Job, base: Path, room: Path) -> dict:
    """What a job leaves that nobody disturbs; run once. Raises AssertionError where it fails."""
    if (room, job.name) not in _KNOWN:
        out = room / f"{job.name} alone"
        out.mkdir(parents=True)
        fault = finish(job, base, out, room / "log.txt")
        assert not fault, f"{job.name}: {fault}"
        _KNOWN[room, job.name] = content(out, job)
        shutil.rmtree(out)
    return _KNOWN[room, job.name]


# what a second process may be told instead of a result
TURNED_AWAY = ("another process", "holds a run already", "exists already")


def pair(job: Job, base: Path, room: Path) -> Death:
    """The same job twice at once in one folder: each ends well or is turned away in words, and what is left equals what
    one leaves alone.
    """
    expected, out, faults = undisturbed(job, base, room), room / f"{job.name} shared", []
    out.mkdir(parents=True)
    logs = [room / f"log {i}.txt" for i in range(2)]
    numbers = [begin(job, base, out, log) for log in logs]
    ends = [wait(number, LIMIT) for number in numbers]
    for number, end, log in zip(numbers, ends, logs):
        words = " ".join(log.read_text().strip().splitlines()[-1:])
        if end is None:
            end_family(number)
            os.waitpid(number, 0)
        if end != 0 and not any(told in words for told in TURNED_AWAY):
            faults.append(f"one of two: status {end}: {words[-300:]}")
    if 0 not in ends:
        faults.append("neither of two came to an end")
    faults += [f"half-written: {f}" for f in half_written(out, job, expected)] + differences(
        expected, content(out, job)
    )
    left = hidden(out)
    shutil.rmtree(out)
    return Death(job.name, 0.0, "turned away" if any(ends) else "both", left, tuple(faults))


def hidden(out: Path) -> int:
    """Number of files that begin with a dot, or lie in such a folder; a lock is no remainder, and neither is the log of
    an attempt.
    """
    parts = [path.relative_to(out).parts for path in out.rglob("*") if path.is_file()]
    return sum(
        any(p.startswith(".") for p in names) and not names[-1].endswith(".lock") and ".jobs" not in names
        for names in parts
    )


def differences(expected: dict, found: dict) -> list[str]:
    """What two folders do not have in common."""
    names = sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
    return [
        f"{n} {'differs' if n in expected and n in found else 'is missing' if n in expected else 'is too much'}"
        for n in names
    ]


def torture(
    job: Job,
    base: Path,  # shared input
    room: Path,
    kills: int,
    seed: int = 0,
) -> Iterator[Death]:
    """Kill a job so many times, each in a new folder; undisturbed runs before show that it ends with the same bytes
    twice.
    """
    stream, times, expected = random.Random(f"{seed} {job.name}"), [], []
    for name in ("first", "second"):
        out = room / f"{job.name} {name}"
        out.mkdir(parents=True)
        started = time.monotonic()
        fault = finish(job, base, out, room / "log.txt")
        times.append(time.monotonic() - started)
        expected.append(content(out, job))
        shutil.rmtree(out)
        if fault or not expected[-1]:
            yield Death(job.name, 1.0, "done", 0, (fault or "it wrote nothing",))
            return
    if expected[0] != expected[1]:
        yield Death(job.name, 1.0, "done", 0, tuple(differences(*expected)))
        return
    _KNOWN[room, job.name] = expected[0]
    for _ in range(kills):
        instant = stream.random()
        yield kill_once(job, base, room, instant, instant * times[1], expected[0])


def kill_once(
    job: Job, base: Path, room: Path, instant: float, seconds: float, expected: dict, doomed: Job | None = None
) -> Death:
    """Start (`doomed` instead, which kills itself), kill after so many seconds, look, start again, compare."""
    out, log = room / f"{job.name} killed", room / "log.txt"
    out.mkdir(parents=True)
    number = begin(doomed or job, base, out, log)
    status = wait(number, seconds)
    end_family(number)  # of a process that has killed itself, those that it had started
    if status is None:
        os.waitpid(number, 0)
    faults = [f"half-written: {f}" for f in half_written(out, job, expected)]
    fault = finish(job, base, out, log)
    faults += [f"the second run: {fault}"] if fault else differences(expected, content(out, job))
    left = hidden(out)
    shutil.rmtree(out)
    return Death(job.name, instant, "killed" if status in (None, -signal.SIGKILL) else "done", left, tuple(faults))


# --- before a write ---------------------------------------------------------------------------------------------------

# events of Python's audit, before they happen
WRITES = ("os.rename", "os.link", "os.symlink", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "open")


def at_writes(out: Path, call: Callable[[], None]) -> None:
    """From now on call before whatever this process does to files of a folder, until its end: a random instant seldom
    falls between two writes, and there orders go wrong.
    """
    root, own = str(out), os.getpid()

    def seen(event: str, arguments: tuple) -> None:
        if (
            event not in WRITES
            or os.getpid() != own
            or event == "open"
            and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        ):
            return
        if any(isinstance(a, (str, os.PathLike)) and os.fspath(a).startswith(root) for a in arguments[:2]):
            call()
    sys.addaudithook(seen)


def kill_before_writes(job: Job, base: Path, room: Path, most: int, seed: int = 0) -> Iterator[Death]:
    """Kill a job before so many of its writes: half of them its last, which no later one mends, the others drawn."""
    expected, numbers, counted = undisturbed(job, base, room), itertools.count(1), room / "writes.txt"

    def count(base: Path, out: Path) -> None:
        at_writes(out, lambda: counted.write_text(str(next(numbers))))
        job.work(base, out)

    def doomed(base: Path, out: Path) -> None:
        at_writes(out, lambda: os.kill(os.getpid(), signal.SIGKILL) if next(numbers) == fatal else None)
        job.work(base, out)

    out = room / f"{job.name} counted"
    out.mkdir(parents=True)
    fault = finish(dataclasses.replace(job, work=count), base, out, room / "log.txt")
    shutil.rmtree(out)
    total = int(counted.read_text())
    counted.unlink()
    if fault:
        yield Death(job.name, 1.0, "done", 0, (fault,))
        return
    last = range(max(0, total - most // 2), total)
    drawn = random.Random(f"{seed} {job.name} writes").sample(range(last.start), min(last.start, most - len(last)))
    for before in (*sorted(drawn), *last):
        fatal = before + 1
        yield kill_once(job, base, room, before / total, LIMIT, expected, dataclasses.replace(job, work=doomed))
