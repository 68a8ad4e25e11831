"""Want: commands that get little of something, or a clock that runs backwards. They survive, or stop in words, and then
end well when there is enough.
"""
import dataclasses
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.torture.death import Death, differences, finish, undisturbed
from tests.torture.jobs import Job, content, half_written

# of Linux' unshare and mount
NEWNS, NEWUSER, BIND, REMOUNT, RDONLY, REC, PRIVATE = 0x20000, 0x10000000, 4096, 32, 1, 16384, 1 << 18


@dataclasses.dataclass(frozen=True)
class Want:
    """Something that a command lacks."""

    name: str
    begin: Callable[[Path], None]  # called in the command's own process with the folder that it writes to
    survived: bool = False  # it has to end as if nothing were missing
    says: tuple[str, ...] = ()  # words of errors that are plain enough, besides the project's own


def mounts() -> Callable:
    """Give this process a view of the file system of its own, and return the system's `mount`; raises OSError where
    that is not allowed.
    """
    import ctypes

    libc, user = ctypes.CDLL(None, use_errno=True), (os.geteuid(), os.getegid())

    def call(function, *arguments):
        if function(*arguments):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    call(libc.unshare, NEWNS | (NEWUSER if user[0] else 0))
    if user[0]:
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user[0]} 1"), ("gid_map", f"0 {user[1]} 1")):
            Path(f"/proc/self/{name}").write_text(text)
    call(libc.mount, b"none", b"/", None, REC | PRIVATE, None)
    return lambda source, target, kind, flags, options=None: call(
        libc.mount, source.encode(), str(target).encode(), kind and kind.encode(), flags, options and options.encode()
    )


def allowed() -> bool:
    """Whether this system lets a process have a view of its own; asked in a copy of this one."""
    number = os.fork()
    if not number:
        try:
            mounts()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitpid(number, 0)[1] == 0


def small_files(out: Path) -> None:
    """No file above 3,000 bytes: the system's own error comes in the middle of a write, as on a full disk."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))


def small_disk(out: Path) -> None:
    """A disk of 64 kB."""
    mounts()("tmpfs", out, "tmpfs", 0, "size=64k")


def read_only(out: Path) -> None:
    """A folder that nobody may write to, root neither."""
    mount = mounts()
    mount(str(out), out, None, BIND)
    mount("none", out, None, BIND | REMOUNT | RDONLY)


def no_shared_memory(out: Path) -> None:
    """/dev/shm of 4 kB, as in a container."""
    mounts()("tmpfs", "/dev/shm", "tmpfs", 0, "size=4k")


def little_memory(out: Path) -> None:
    """No more than 24 MB beyond what the libraries have."""
    import resource

    used = 4096 * int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (used + 24 * 2**20,) * 2)


def clock_backwards(out: Path) -> None:
    """Whoever asks for the time is told that it is an hour earlier than last time."""
    import time

    now = [time.time()]
    time.time = lambda: now.__setitem__(0, now[0] - 3600) or now[0]


def in_one_line(work: Callable) -> None:
    """Work, and say of an error its kind and its words alone: the log may be short of space, too."""
    try:
        work()
    except BaseException as error:
        sys.stderr.write(f"{type(error).__name__}: {' '.join(str(error).split())[:600]}\n")
        sys.stderr.flush()
        os._exit(1)


PLAIN = ("VggtLoraError", "SceneError", "ConfigError", "WeightsError", "DiskError", "CheckpointError", "DownloadError")
WANTS = (
    Want("files of 3 kB at most", small_files),
    Want("a disk of 64 kB", small_disk),
    Want("a read-only folder", read_only),
    Want("no shared memory", no_shared_memory, survived=True),
    Want("24 MB of address space", little_memory, says=("MemoryError", "not enough memory", "alloc")),
    Want("a clock that runs backwards", clock_backwards, survived=True),
)
PRIVILEGED = ("a disk of 64 kB", "a read-only folder", "no shared memory")


def starve(job: Job, base: Path, room: Path, wants: tuple[Want, ...] = WANTS) -> Iterator[Death]:
    """Run a job under every want, judge what it said, and run it again without; the state of each is what it came to.
    """
    expected, permitted = undisturbed(job, base, room), allowed()
    for want in wants:
        if want.name in PRIVILEGED and not permitted:
            yield Death(f"{job.name}: {want.name}", 0.0, "not allowed here", 0)
            continue
        out, log = room / f"{job.name} starved", room / "log.txt"
        out.mkdir(parents=True)
        scarce = dataclasses.replace(
            job, work=lambda base, out, want=want: in_one_line(lambda: (want.begin(out), job.work(base, out)))
        )
        fault, said = finish(scarce, base, out, log), log.read_text(errors="replace").strip().splitlines()[-1:]
        words = said[0] if fault and said else ""
        error = words.split(":")[0]
        faults = [f"half-written: {f}" for f in half_written(out, job, expected)]
        if want.survived and fault:
            faults.append(f"did not survive: {fault}")
        elif fault and error not in PLAIN and not any(kind in words for kind in want.says):
            faults.append(f"not in words: {fault}")
        faults += differences(expected, content(out, job)) if want.survived and not fault else []
        again = finish(job, base, out, log)
        faults += [f"without the want: {again}"] if again else differences(expected, content(out, job))
        shutil.rmtree(out)
        yield Death(f"{job.name}: {want.name}", 0.0, error if fault else "ended well", 0, tuple(faults))
