"""`python -m tests.adversary`: every attack, what became of it, and a count.

    python -m tests.adversary                the table
    python -m tests.adversary photo mask     groups whose names hold one of these words
"""
import collections
import sys
import tempfile
from pathlib import Path

from tests.adversary.catalogue import bases, outcomes


def main(words: list[str]) -> int:
    """Print the table; the status is 1 where an outcome is bad."""
    with tempfile.TemporaryDirectory() as room:
        found = []
        for outcome in outcomes(bases(Path(room)), Path(room), words):
            found.append(outcome)
            print(f"{outcome.kind:8} {outcome.attack.title:60} {outcome.text.replace(room, '')}", flush=True)
    counts = collections.Counter(o.kind for o in found)
    print(f"\n{len(found)} attacks: " + ", ".join(f"{n} {kind}" for kind, n in counts.most_common()))
    return int(not found or any(not o.good for o in found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
