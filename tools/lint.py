"""Check the generated package, the tests and the tools with ruff, by the rules of ruff.toml.

    python tools/lint.py            exit status 1 if a file breaks a rule that it is not excepted from
    python tools/lint.py --write    rewrite the exceptions in ruff.toml: files that are not clean yet, to shrink

The line `__all__ = ...`, which nbdev wraps by a rule of its own, is not judged by its length.
"""
import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHECKED = ("vggt_lora", "tests", "tools", "benchmarks")
MARK = "# Files that are not clean yet, written by `python tools/lint.py --write`; the list may only shrink.\n"


def findings(*options: str) -> list[dict]:
    """Return what ruff finds: file, line, rule and message."""
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "json", *options, *CHECKED]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise SystemExit(f"ruff could not run: {done.stderr.strip()}")
    return [found for found in json.loads(done.stdout) if not _is_all(found)]


def _is_all(found: dict) -> bool:
    """Tell whether a line is too long because it belongs to `__all__`."""
    if found["code"] != "E501":
        return False
    lines = Path(found["filename"]).read_text(encoding="utf-8").splitlines()[: found["location"]["row"]]
    block = next((line for line in reversed(lines) if not line.startswith(" ")), "")
    return block.startswith("__all__ = ")


def write_exceptions() -> int:
    """Rewrite the exceptions of ruff.toml; returns their number."""
    rules: dict[str, set] = {}
    for found in findings("--config", "lint.per-file-ignores = {}"):
        path = Path(found["filename"]).relative_to(ROOT).as_posix()
        rules.setdefault(path, set()).add(found["code"])
    lines = [f'"{path}" = {json.dumps(sorted(codes))}\n' for path, codes in sorted(rules.items())]
    config = ROOT / "ruff.toml"
    head = config.read_text(encoding="utf-8").partition(MARK)[0]
    config.write_text(head + MARK + "[lint.per-file-ignores]\n" + "".join(lines), encoding="utf-8")
    return len(lines)


def main() -> int:
    """Check, or rewrite the exceptions; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="rewrite the exceptions in ruff.toml")
    if parser.parse_args().write:
        print(f"ruff.toml: {write_exceptions()} files are excepted from a rule")
        return 0
    found = findings()
    for one in found:
        path = Path(one["filename"]).relative_to(ROOT)
        print(f"{path}:{one['location']['row']}: {one['code']} {one['message']}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
