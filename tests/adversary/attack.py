"""One attack: damage something good, use it, and judge what was said.

An outcome is good in five ways. `refused`: one of the project's own errors, whose message names the file or the
parameter. `told`: the result differs, and so does what is said beside it (notes, counts). `mended`: the result is that
of the undamaged input, and it was said that something was wrong. `same`: likewise, without a word. `data`: the damage
cannot be told from other honest numbers (only where the attack says so beforehand). All else is bad: a bare traceback,
a silent difference, a hang, a flood of memory.
"""
import dataclasses
import hashlib
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np

from vggt_lora.core import VggtLoraError

GOOD = ("refused", "told", "mended", "same", "data")
SECONDS, MEGABYTES = 60, 600  # more than this is a hang, or a flood


@dataclasses.dataclass(frozen=True)
class Attack:
    """Something done to good input, and the use that is made of it afterwards."""

    group: str
    name: str
    # receives a fresh copy, changes it and returns what a message has to name (one of several)
    damage: Callable[[Path], object]
    use: Callable[[Path], tuple]  # receives the copy and returns (result, what was said beside it)
    data: bool = False  # the damage may look like other honest numbers

    @property
    def title(self) -> str:
        """Group and name."""
        return f"{self.group}: {self.name}"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of an attack."""

    attack: Attack
    kind: str  # one of GOOD, or "bad"
    text: str  # the message, or why it is bad

    @property
    def good(self) -> bool:
        """Whether a user was told, or nothing was wrong."""
        return self.kind in GOOD


class Hang(BaseException):
    """Time is up."""


def digest(*values) -> str:
    """Hash arrays, numbers and texts."""
    found = hashlib.sha256()
    for value in values:
        if isinstance(value, np.ndarray):
            found.update(f"{value.dtype}{value.shape}".encode() + np.ascontiguousarray(value).tobytes())
        else:
            found.update(repr(value).encode())
    return found.hexdigest()


def copy_of(
    base: Path,
    target: Path,
) -> Path:
    """Copy a folder by hard links; who changes a file replaces it."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(base, target, copy_function=os.link, symlinks=True)
    return target


def write(path: Path, content: bytes | str) -> str:
    """Replace a file (not its twin in the base) and return its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink() or path.exists():
        path.unlink()
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path.name


def one_line(text: object) -> str:
    """A text on one line, short enough for a table."""
    text = " ".join(str(text).split())
    return text if len(text) <= 230 else text[:227] + "..."


def _up(number, frame):
    raise Hang


def run(
    attack: Attack,
    base: Path,  # folder of good input
    room: Path,  # where the copy goes
    expected: tuple,  # (result, said) of the good input under the same use
) -> Outcome:
    """Carry out one attack and judge it."""
    folder = copy_of(base, room / "copy")
    names = attack.damage(folder)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    old = signal.signal(signal.SIGALRM, _up)
    signal.alarm(SECONDS)
    try:
        result, said = attack.use(folder)
    except VggtLoraError as error:
        named = [n for n in ([names] if isinstance(names, str) else names) if n in str(error)]
        kind, text = ("refused", error) if named else ("bad", f"the message does not name {names}: {error}")
    except Hang:
        kind, text = "bad", f"no end after {SECONDS} s"
    except Exception as error:
        kind, text = "bad", f"{type(error).__name__}: {error}"
    else:
        if result == expected[0] and said == expected[1]:
            kind, text = "same", "read as if nothing had happened"
        elif result == expected[0]:
            kind, text = "mended", "; ".join(str(s) for s in said if s not in expected[1])
        elif said != expected[1]:
            kind, text = (
                "told",
                "; ".join(str(s) for s in said if s not in expected[1])
                or f"said {len(expected[1])} things, now {len(said)}",
            )
        elif attack.data:
            kind, text = "data", "read as other numbers"
        else:
            kind, text = "bad", "another result, and not a word about it"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    if grown > MEGABYTES:
        kind, text = "bad", f"needed {grown:.0f} MB; {text}"
    return Outcome(attack, kind, one_line(text))
