"""Write docs/coverage.md: how many lines of the package the tests and chapters run, and what the lines are that they do not.

    python tools/coverage_page.py docs/coverage.md      after `coverage combine`; `make coverage` does it all
"""
import ast
import datetime
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from vggt_lora.files.atomic import write_text

ROOT = Path(__file__).resolve().parent.parent
KINDS = {
    "refusal": "Raising an error of the project's own, or answering one of the system's or of a library (a full disk, another process that was faster, a package that is missing). "
               "The attacks and kills of [adversary.md](adversary.md) and [torture.md](torture.md) make many of these happen in other places, or in processes whose end loses the count.",
    "GPU": "Runs only where CUDA is.",
    "other": "Neither. They are listed below.",
}


def kinds_of(file: Path, missing: list[int]) -> dict[int, str]:
    """Say of each line which kind it is of."""
    text = file.read_text(encoding="utf-8")
    spans = [(node.lineno, node.end_lineno) for node in ast.walk(ast.parse(text)) if isinstance(node, (ast.Raise, ast.ExceptHandler))]
    lines = text.splitlines()
    return {n: "GPU" if "cuda" in lines[n - 1] else "refusal" if any(first <= n <= last for first, last in spans) else "other" for n in missing}


def page(report: dict) -> str:
    """The report of `coverage json` as Markdown."""
    totals, counts, others = report["totals"], dict.fromkeys(KINDS, 0), []
    for name, file in sorted(report["files"].items()):
        lines, kinds = (ROOT / name).read_text(encoding="utf-8").splitlines(), kinds_of(ROOT / name, file["missing_lines"])
        for kind in kinds.values():
            counts[kind] += 1
        rest = [n for n, kind in kinds.items() if kind == "other"]
        others += [f"| `{name.removeprefix('vggt_lora/')}:{n}` | `` {lines[n - 1].strip()[:110].replace('|', chr(92) + '|')} `` |" for n in rest if n - 1 not in rest]  # a run of lines by its first
    return "\n".join([
        "# Coverage", "",
        f"Of {totals['num_statements']:,} statements of the package, {totals['covered_lines']:,} are run by the tests: **{totals['percent_covered']:.1f} %**. "
        f"Written by `make coverage` on {datetime.date.today()}.", "",
        "Counted is what pytest runs, in the processes that it starts too, and what the chapters run: nbdev_test executes the source of a module inside its notebook, so `tools/run_chapters.py` "
        "executes the same cells with the line numbers that they have in the module. `.coveragerc` says what is left out: how an object is shown, and code behind `if torch.cuda.is_available`.", "",
        "| kind of line that was not run | lines | |", "|---|---:|---|", *(f"| {kind} | {counts[kind]} | {words} |" for kind, words in KINDS.items()), "",
        "## The others", "", "Each run of lines by its first.", "", "| where | line |", "|---|---|", *others, ""])


def main(path: str) -> int:
    """Write the page."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "coverage", "json", "-q", "-o", f"{folder}/coverage.json"], cwd=ROOT, check=True)
        write_text(ROOT / path, page(json.loads(Path(folder, "coverage.json").read_text(encoding="utf-8"))))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
