"""`python -m tests.adversary`: every attack, what became of it, and a count.

    python -m tests.adversary                the table
    python -m tests.adversary photo mask     groups whose names hold one of these words
    python -m tests.adversary --write docs/adversary.md     all, and the counts by family written down
"""
import argparse
import collections
import sys
import tempfile
import time
from pathlib import Path

from tests.adversary.attack import GOOD, Outcome
from tests.adversary.catalogue import bases, outcomes
from vggt_lora.files.atomic import write_text

DEFECTS = Path(__file__).with_name("defects.md")  # written by hand
WORDS = {
    "refused": "one of the project's own errors, whose message names the file or the parameter",
    "told": "the result differs, and what is said beside it (notes, counts) differs too",
    "mended": "the result is that of undamaged input, and it was said that something was wrong",
    "same": "the result is that of undamaged input: the damage is none",
    "data": "the damage cannot be told from other honest numbers, as the attack says beforehand",
    "bad": "all else: a bare traceback, a silent difference, a hang, a flood of memory",
}


def report(found: list[Outcome], seconds: float) -> str:
    """The counts by family on one page of Markdown, and the list of defects."""
    kinds, by_group = (*GOOD, "bad"), collections.defaultdict(collections.Counter)
    for outcome in found:
        by_group[outcome.attack.group][outcome.kind] += 1
    total = collections.Counter(o.kind for o in found)

    def row(name, counts):
        return (
            f"| {name} | {sum(counts.values())} | "
            + " | ".join(str(counts[k] or "") if k != "bad" else str(counts[k]) for k in kinds)
            + " |"
        )

    lines = [
        "# Adversary",
        "",
        "Wrong input by the hundred: something good is damaged, it is used as a user would use it, and what is said "
        "is judged. The attacks are listed by name in "
        "`tests/adversary`; each begins from a fresh copy.",
        "",
        "- `python -m tests.adversary`: every attack with its message; with words, the groups whose names hold one of "
        "them.",
        "- `python -m tests.adversary --write docs/adversary.md`: this page, all but the list of defects, which is "
        "`tests/adversary/defects.md`.",
        "- `python -m tests.torture --write docs/torture.md`: kill -9 and two at once, see [torture.md](torture.md).",
        "- `pytest tests/test_adversary.py tests/test_hostile.py tests/test_numbers.py tests/test_twice.py "
        "tests/test_torture.py`: all of it in short, as `make test` and `make test-slow` run it.",
        "",
        "An outcome is one of these:",
        "",
        *[f"- **{kind}**: {words}." for kind, words in WORDS.items()],
        "",
        f"Written on {time.strftime('%Y-%m-%d')} in {seconds:.0f} s: {len(found)} attacks, {total['bad']} bad.",
        "",
        "| family | attacks | " + " | ".join(kinds) + " |",
        "|---|---:|" + "---:|" * len(kinds),
        *[row(name, counts) for name, counts in sorted(by_group.items())],
        row("**all**", total),
        "",
    ]
    bad = [o for o in found if not o.good]
    lines += ["## Bad", "", *[f"- {o.attack.title}: {o.text}" for o in bad], ""] if bad else []
    return "\n".join(lines) + "\n" + DEFECTS.read_text(encoding="utf-8")


def main(arguments: list[str]) -> int:
    """Print the table; the status is 1 where an outcome is bad."""
    parser = argparse.ArgumentParser(prog="python -m tests.adversary", description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="only groups whose names hold one of these")
    parser.add_argument("--write", type=Path, help="file for the counts; of all attacks")
    given, started, found = parser.parse_args(arguments), time.monotonic(), []
    if given.write and given.words:
        parser.error("--write takes all attacks")
    with tempfile.TemporaryDirectory() as room:
        for outcome in outcomes(bases(Path(room)), Path(room), given.words):
            found.append(outcome)
            print(f"{outcome.kind:8} {outcome.attack.title:60} {outcome.text.replace(room, '')}", flush=True)
    counts = collections.Counter(o.kind for o in found)
    print(f"\n{len(found)} attacks: " + ", ".join(f"{n} {kind}" for kind, n in counts.most_common()))
    if given.write:
        write_text(given.write, report(found, time.monotonic() - started))
    return int(not found or any(not o.good for o in found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
