"""What `make test` runs: the export check, every notebook, and pytest; it counts, and cannot pass on nothing.

    python tests/run_all.py            all
    python tests/run_all.py --quick    without pytest's slow tests
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


def run(title: str, command: list[str], **environment: str) -> tuple[int, str]:
    """Run one stage from the repository root, showing and keeping its output."""
    print(f"\n== {title}", flush=True)
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True, errors="replace", env={**os.environ, **environment})
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    code = process.wait()
    print(f"== {title}: exit {code}, {time.monotonic() - started:.0f} s", flush=True)
    return code, "".join(lines)


def watched(log: Path) -> dict[str, str]:
    """The environment in which every process writes down what it asks of other machines."""
    return {"VGGT_LORA_ASKED": str(log), "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT / "tests" / "watch"), os.environ.get("PYTHONPATH")]))}


def notebooks() -> set[str]:
    """The notebooks that nbdev_test has to run: all of them but drafts."""
    return {str(p.relative_to(ROOT)) for p in (ROOT / "nbs").rglob("*.ipynb")
            if not any(part.startswith(("_", ".")) for part in p.relative_to(ROOT / "nbs").parts)}


def main() -> int:
    """Run all stages and print what passed; the exit status is the number of failed stages."""
    failed = []
    export, _ = run("export check", [sys.executable, "-m", "pytest", "-q", "tests/test_export.py"])
    if export:
        failed.append("export check")

    # Figures without a screen; one thread for each of the two workers, or they would wait for each other. Whatever they ask of other machines is written down.
    asked = Path(tempfile.mkdtemp()) / "asked.txt"
    code, text = run("notebooks", [str(BIN / "nbdev_test"), "--n_workers", "2", "--do_print", "--timing"], MPLBACKEND="agg", OMP_NUM_THREADS="1", **watched(asked))
    if asked.exists():
        failed.append("connections")
        print(f"notebooks asked other machines:\n{asked.read_text()}")
    # nbdev says "Completed" of a notebook that failed, too
    done, broken = ({str(Path(m).resolve().relative_to(ROOT)) for m in re.findall(pattern, text, re.M)}
                    for pattern in (r"^- Completed (\S+\.ipynb)", r"Error in (\S+\.ipynb)"))
    done -= broken
    expected = notebooks()
    if code or not expected or done != expected:
        failed.append("notebooks")
        print(f"notebooks not completed: {sorted(expected - done)}")
    print(f"notebooks: {len(done & expected)} of {len(expected)} completed")

    extra = ["-m", "not slow"] if "--quick" in sys.argv else []
    # Two workers; the tests of one file stay together, because they share what is expensive to set up.
    code, text = run("pytest", [sys.executable, "-m", "pytest", "-q", "-rs", "-n", "2", "--dist", "loadfile", "--ignore=tests/test_export.py", *extra, "tests"],
                     OMP_NUM_THREADS="1")
    if code:
        failed.append("pytest")
    tests = sum(int(n) for n in re.findall(r"(\d+) passed", text))
    lost = sum(int(n) for n in re.findall(r"(\d+) (?:failed|errors?)\b", text.strip().splitlines()[-1] if text.strip() else ""))
    skipped = sum(int(n) for n in re.findall(r"(\d+) skipped", text))

    print(f"\nfailed stages: {', '.join(failed) or 'none'}")
    bad = lost + len(expected - done) + (1 if export else 0)
    print(f"{tests + len(done & expected) + (0 if export else 1)} passed, {max(bad, len(failed))} failed, {skipped} skipped")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
