"""What `make test` and `make test-slow` run; it counts, and cannot pass on nothing.

    python tests/run_all.py            the export check, every notebook, and pytest without the mark `slow`, which runs
                                       the numbered notebooks too, made small
    python tests/run_all.py --slow     the notebooks that have cells marked `#| slow`, and pytest with the mark
"""
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
CHAPTERS = "0*_*.ipynb"  # run by tests/test_chapters.py with small settings: their own take minutes


def run(title: str, command: list[str], **environment: str) -> tuple[int, str]:
    """Run one stage from the repository root, showing and keeping its output."""
    print(f"\n== {title}", flush=True)
    started = time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", env={**os.environ, **environment},
    )
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    code = process.wait()
    print(f"== {title}: exit {code}, {time.monotonic() - started:.0f} s", flush=True)
    return code, "".join(lines)


def watched(log: Path) -> dict[str, str]:
    """The environment in which every process writes down what it asks of other machines."""
    return {
        "VGGT_LORA_ASKED": str(log),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT / "tests" / "watch"), os.environ.get("PYTHONPATH")])),
    }


def notebooks(slow: bool = False) -> set[str]:
    """The notebooks that nbdev_test has to run: all but drafts and chapters, or those of them that have slow cells."""
    found = set()
    for path in (ROOT / "nbs").rglob("*.ipynb"):
        name = path.relative_to(ROOT / "nbs")
        draft = any(part.startswith(("_", ".")) for part in name.parts)
        if (
            not draft
            and not name.match(CHAPTERS)
            and (not slow or re.search(r'"#\|\s*slow\b', path.read_text(encoding="utf-8")))
        ):
            found.add(str(path.relative_to(ROOT)))
    return found


def run_notebooks(expected: set[str], *options: str) -> tuple[set[str], list[str]]:
    """Run notebooks by nbdev_test; return those that were completed, and the stages that failed."""
    failed = []
    # Figures without a screen; one thread for each of the two workers, or they would wait for each other. Whatever they
    # ask of other machines is written down.
    asked = Path(tempfile.mkdtemp()) / "asked.txt"
    command = [str(BIN / "nbdev_test"), "--n_workers", "2", "--do_print", "--timing", *options]
    code, text = run("notebooks", command, MPLBACKEND="agg", OMP_NUM_THREADS="1", **watched(asked))
    if asked.exists():
        failed.append("connections")
        print(f"notebooks asked other machines:\n{asked.read_text()}")
    # nbdev says "Completed" of a notebook that failed, too
    done, broken = ({str(Path(m).resolve().relative_to(ROOT)) for m in re.findall(pattern, text, re.M)}
                    for pattern in (r"^- Completed (\S+\.ipynb)", r"Error in (\S+\.ipynb)"))
    done = (done - broken) & expected
    if code or not expected or done != expected:
        failed.append("notebooks")
        print(f"notebooks not completed: {sorted(expected - done)}")
    print(f"notebooks: {len(done)} of {len(expected)} completed")
    return done, failed


def main() -> int:
    """Run all stages and print what passed; the exit status is the number of failed stages."""
    slow = "--slow" in sys.argv
    failed, export, done = [], 0, set()
    if not slow:
        export, _ = run("export check", [sys.executable, "-m", "pytest", "-q", "tests/test_export.py"])
        failed += ["export check"] if export else []

    expected, options = notebooks(slow), ["--skip_file_re", r"^(0\d_|[_.])"]
    if slow:
        names = "|".join(re.escape(Path(name).name) for name in sorted(expected))
        options = ["--flags", "slow", "--file_re", f"^({names})$"]
    if expected or not slow:
        done, faults = run_notebooks(expected, *options)
        failed += faults

    # Two workers, three for the slow part, which often waits for other processes; the tests of one file stay together,
    # because they share what is expensive to set up, and the files that take longest come first (conftest.py), so that
    # no worker waits for the other's last file.
    workers, mark = ("3", "slow") if slow else ("2", "not slow")
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-n", workers, "--dist", "loadfile",
               "--no-loadscope-reorder", "--durations", "20", "-m", mark, "--ignore=tests/test_export.py", "tests"]
    code, text = run("pytest", command, OMP_NUM_THREADS="1")
    if code:
        failed.append("pytest")
    tests = sum(int(n) for n in re.findall(r"(\d+) passed", text))
    lost = sum(
        int(n) for n in re.findall(r"(\d+) (?:failed|errors?)\b", text.strip().splitlines()[-1] if text.strip() else "")
    )
    skipped = sum(int(n) for n in re.findall(r"(\d+) skipped", text))

    print(f"\nfailed stages: {', '.join(failed) or 'none'}")
    bad = lost + len(expected - done) + (1 if export else 0)
    passed = tests + len(done) + (0 if export or slow else 1)
    print(f"{passed} passed, {max(bad, len(failed))} failed, {skipped} skipped")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
