"""`python -m tests.torture`: commands killed at random instants, and before their writes, and started again.

    python -m tests.torture --short              a few kills of the quick commands, and each begun twice at once, and
                                                 under every want
    python -m tests.torture --write docs/torture.md   100 kills at random instants and about 200 before writes, with the
                                                      result written down
    python -m tests.torture training store       commands with these names
"""
import argparse
import collections
import os
import sys
import tempfile
import time
from pathlib import Path

# before torch: a copied process must not miss threads that it believes to have
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.torture.death import Death, kill_before_writes, pair, torture  # noqa: E402
from tests.torture.jobs import JOBS, QUICK, SHARED, make_base  # noqa: E402
from tests.torture.scarcity import WANTS, starve  # noqa: E402
from vggt_lora.files.atomic import write_text  # noqa: E402

# 100
KILLS = {
    "demo": 16, "store": 18, "dense depth": 12, "checkpoints": 16, "training": 16, "prefix": 10, "export": 8,
    "comparison": 4,
}
# about 200: a command may have fewer
WRITES = {"demo": 16, "store": 20, "dense depth": 16, "checkpoints": 60, "training": 60, "prefix": 12, "export": 16}
PARTS = ("kills", "writes", "pairs", "wants")
SHORT_WRITES = ("checkpoints",)
STARVED = ("store", "export")  # in the short form


def load() -> None:
    """Load what the jobs need, once: they are copies of this process."""
    import matplotlib
    import pycolmap  # noqa: F401
    import scipy.ndimage  # noqa: F401
    import torch

    import vggt_lora.adapters.export  # noqa: F401
    import vggt_lora.compare  # noqa: F401
    import vggt_lora.train  # noqa: F401
    import vggt_lora.training.feature_cache  # noqa: F401

    matplotlib.use("agg")
    torch.set_num_threads(1)


def report(parts: dict[str, list[Death]], command: str, seconds: float) -> str:
    """The result on one page of Markdown."""
    found, written, pairs, wants = (parts[part] for part in PARTS)
    lines = [
        "# Torture",
        "",
        "Each command below was killed with SIGKILL at a random instant of its undisturbed run, with all the "
        "processes that it had started. Every file that then had its final "
        "name was opened and had to be whole. The same command was started again, and what it left was compared with "
        "two undisturbed runs, byte by byte (records without their "
        "clocks; checkpoints by their tensors). Remainders are hidden temporary files that the second run did not "
        "remove.",
        "",
        f"Written by `{command}` on {time.strftime('%Y-%m-%d')} in {seconds:.0f} s, on the CPU.",
        "",
        *table_of(found, "instants"),
    ]
    if written:
        lines += [
            "## Before a write",
            "",
            "The same, but the command killed itself before it made, renamed, linked, opened for writing or removed a "
            "certain file or folder of its own: "
            "half of the instants are before its last such acts, which no later one mends, the others were drawn.",
            "",
            *table_of(written, "writes"),
        ]
    if pairs:
        lines += [
            "## Two at once",
            "",
            "Each command was begun twice at the same moment in one folder. Both end well, or one is turned away with "
            "words; what is left was compared with what "
            "one process leaves alone.",
            "",
            "| command | both ended well | one was turned away | other bytes, or a crash | remainders |",
            "|---|---:|---:|---:|---:|",
        ]
        lines += [
            f"| {d.job} | {d.state == 'both':d} | {d.state == 'turned away':d} | {not d.good:d} | {d.left:d} |"
            for d in pairs
        ] + [""]
    if wants:
        by_job = collections.defaultdict(dict)
        for death in wants:
            by_job[death.job.split(": ")[0]][death.job.split(": ")[1]] = death.state if death.good else "**bad**"
        lines += [
            "## Scarcity",
            "",
            "Each command was started where something is missing. It has to survive, or to stop with an error in "
            "words and leave nothing half-written; started again without "
            "the want it has to end with the bytes of an undisturbed run. Without shared memory, and under a clock "
            "that runs backwards, it has to end with these bytes at once. An "
            "error is the project's own, or Python's MemoryError.",
            "",
            "| command | " + " | ".join(w.name for w in WANTS) + " |",
            "|---|" + "---|" * len(WANTS),
        ]
        lines += [
            f"| {job} | " + " | ".join(states.get(w.name, "") for w in WANTS) + " |" for job, states in by_job.items()
        ] + [""]
    bad = [d for d in (*found, *written, *pairs, *wants) if not d.good]
    lines += (
        ["## What went wrong", "", *[f"- {d.job} at {d.instant:.1%}: {'; '.join(d.faults)}" for d in bad], ""]
        if bad
        else []
    )
    return "\n".join(lines)


def table_of(deaths: list[Death], what: str) -> list[str]:
    """Kills by command, as lines of Markdown."""
    by_job = collections.defaultdict(list)
    for death in deaths:
        by_job[death.job].append(death)
    return [
        f"| command | {what} | killed before the end | ended with other bytes, or not at all | remainders |",
        "|---|---:|---:|---:|---:|",
        *[
            f"| {job} | {len(of_job)} | {sum(d.state == 'killed' for d in of_job)} | "
            f"{sum(not d.good for d in of_job)} | {sum(d.left for d in of_job)} |"
            for job, of_job in by_job.items()
        ],
        "",
        f"{len(deaths)} {what}, {sum(not d.good for d in deaths)} bad.",
        "",
    ]


def main(arguments: list[str]) -> int:
    """Print what became of every kill; the status is 1 where one was bad, or where there was none."""
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(JOBS)}")
    parser.add_argument("--short", action="store_true", help="a few kills of the quick commands")
    parser.add_argument("--kills", type=int, help="at random instants of each command")
    parser.add_argument("--writes", type=int, help="before a write of each command")
    parser.add_argument("--only", choices=PARTS, help="one of the four parts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, help="file for the result")
    given = parser.parse_args(arguments)
    names, started = given.names or (QUICK if given.short else list(JOBS)), time.monotonic()
    shared = [n for n in given.names or SHARED if n in SHARED and not (given.short and n == "comparison")]
    written = [n for n in given.names or (SHORT_WRITES if given.short else WRITES) if n in WRITES]
    starved = given.names or (STARVED if given.short else SHARED[:-1])
    found: dict[str, list[Death]] = {part: [] for part in PARTS}

    def keep(part: str, deaths, room: str) -> None:
        for death in deaths:
            found[part].append(death)
            when = {
                "kills": f"{death.instant:6.1%} ", "writes": f"{death.instant:6.1%} of its writes, ",
                "pairs": "twice at once, ", "wants": "",
            }[part]
            print(
                f"{'good' if death.good else 'BAD':4} {death.job:12} {when}{death.state}, {death.left} left "
                f"{'; '.join(death.faults).replace(room, '')}",
                flush=True,
            )
        if given.write:  # after every command, for the whole takes a while
            write_text(
                given.write, report(found, f"python -m tests.torture {' '.join(arguments)}", time.monotonic() - started)
            )

    with tempfile.TemporaryDirectory() as room:
        os.environ["VGGT_LORA_CACHE"] = f"{room}/cache"  # nothing of the user's own is read or written
        load()
        base, place = (
            make_base(Path(room) / "base", network="export" in (*names, *shared, *starved)),
            Path(room) / "room",
        )
        for name in names if given.only in (None, "kills") else ():
            keep(
                "kills",
                torture(JOBS[name], base, place, given.kills or (2 if given.short else KILLS[name]), given.seed),
                room,
            )
        for name in written if given.only in (None, "writes") else ():
            keep(
                "writes",
                kill_before_writes(
                    JOBS[name], base, place, given.writes or (12 if given.short else WRITES[name]), given.seed
                ),
                room,
            )
        for name in shared if given.only in (None, "pairs") else ():
            keep("pairs", [pair(JOBS[name], base, place)], room)
        for name in starved if given.only in (None, "wants") else ():
            keep("wants", starve(JOBS[name], base, place), room)
    all_of_it = [death for deaths in found.values() for death in deaths]
    print(
        f"{', '.join(f'{len(deaths)} {part}' for part, deaths in found.items())}, "
        f"{sum(not d.good for d in all_of_it)} bad, {time.monotonic() - started:.0f} s"
    )
    return int(not all_of_it or any(not d.good for d in all_of_it))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
