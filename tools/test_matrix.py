"""Run the quick tests with each installed Python, once with pinned and once with the lowest versions.

    python tools/test_matrix.py                    all combinations
    python tools/test_matrix.py 3.12 lowest        those whose names hold these words
    python tools/test_matrix.py --tests "tests/test_geometry.py -q"     other tests

Each combination has its own environment. The lowest versions are those of settings.ini. A missing Python, or a
package without a build for it, is listed and is not a failure. TORCH_ARGS goes to pip for torch alone.
"""
import argparse
import configparser
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
VERSIONS = ("pinned", "lowest")
QUICK = (
    "-q -m 'not slow' tests/test_geometry.py tests/test_numbers.py tests/test_losses.py tests/test_metrics.py "
    "tests/test_adapters.py tests/test_model_goldens.py tests/test_scenes.py"
)


def python_of(version: str) -> str | None:
    """A Python of this version that runs: on the path, this one, or one that pyenv keeps."""
    kept = sorted(Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob(f"versions/{version}*/bin/python"))
    for found in (sys.executable, shutil.which(f"python{version}"), *map(str, kept)):
        said = (
            subprocess.run(
                [found, "-c", "import sys, venv, ensurepip; print(*sys.version_info[:2], sep='.')"],
                capture_output=True,
                text=True,
            )
            if found
            else None
        )
        if said and said.returncode == 0 and said.stdout.strip() == version:
            return found
    return None


def lowest() -> list[str]:
    """The lower ends of the ranges in settings.ini, as pins."""
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    found = [
        re.match(r"([A-Za-z0-9_.-]+)>=([0-9.]+)(;\S+)?$", word) for word in parser["DEFAULT"]["requirements"].split()
    ]
    return [f"{m[1]}~={m[2]}" + ("" if m[2].count(".") > 1 else ".0") + (m[3] or "") for m in found if m]


def environment(python: str, versions: str, folder: Path) -> str:
    """Make an environment with the package in it; returns what went wrong, or nothing."""
    pins = ROOT / "constraints.txt"
    if versions == "lowest":
        pins = folder.parent / f"{folder.name}.txt"
        pins.parent.mkdir(parents=True, exist_ok=True)
        pins.write_text("".join(f"{line}\n" for line in lowest()), encoding="utf-8")
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", "-q", "-c", str(pins)]
    for command in (
        [python, "-m", "venv", "--clear", str(folder)],
        [*pip, *shlex.split(os.environ.get("TORCH_ARGS", "")), "torch"],
        [*pip, "-e", f"{ROOT}[dev]"],
    ):
        done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode:
            return next(
                (line for line in done.stderr.splitlines() if line.startswith("ERROR")), done.stderr.strip()[-300:]
            )
    return ""


def main() -> int:
    """Print a line for each combination; the status is the number of those whose tests failed, or 1 where none could
    run.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--tests", default=QUICK, help="arguments of pytest")
    given = parser.parse_args()
    failed, ran = 0, 0
    for version in PYTHONS:
        for versions in VERSIONS:
            name = f"{version} {versions}"
            if not all(word in name for word in given.words):
                continue
            python, folder = python_of(version), ROOT / "build" / "matrix" / name.replace(" ", "-")
            fault = environment(python, versions, folder) if python else f"there is no Python {version} here"
            if fault:
                print(f"{name:12} not to be had: {fault}", flush=True)
                continue
            done = subprocess.run(
                [str(folder / "bin" / "python"), "-m", "pytest", *shlex.split(given.tests)], cwd=ROOT,
                stdin=subprocess.DEVNULL, capture_output=True, text=True,
            )
            ran, failed = ran + 1, failed + (done.returncode != 0)
            print(
                f"{name:12} {done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr[-300:]}",
                flush=True,
            )
            print(
                "".join(f"    {line}\n" for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))),
                end="",
                flush=True,
            )
    return failed if ran else 1


if __name__ == "__main__":
    sys.exit(main())
