"""Do what the README tells a newcomer on a fresh clone, time each step, and write docs/newcomer.md.

    python tools/newcomer.py [--folder FOLDER] [--torch-args "..."] [--train-args "-p epochs 1"]
                             [--page docs/newcomer.md]

The steps lead from `git clone` of the committed state to the adapted cloud. FOLDER (default: a new temporary one)
holds clone, caches and logs. Given the same FOLDER again, an interrupted run continues after its last complete step.
Only git, make and Python of this machine are used; pip's cache and the project's cache begin empty. A step that
fails, or a broken set-up that passes, ends the run with status 1 and the name of its log.
"""
import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CLONE = "vggt_lora"
KEPT = (
    "PATH",
    "HOME",
    "LANG",
    "LC_ALL",
    "LC_CTYPE",
    "TERM",
    "USER",
    "LOGNAME",
    "TMPDIR",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "http_proxy",
    "https_proxy",
    "no_proxy",
    # of this process; all else a newcomer has not set
    "PIP_INDEX_URL",
    "PIP_EXTRA_INDEX_URL",
    "PIP_CERT",
    "PIP_CONFIG_FILE",
    "SSL_CERT_FILE",
    "REQUESTS_CA_BUNDLE",
)


def time_words(seconds: float) -> str:
    """A duration for people."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def size_words(size: float) -> str:
    """A number of bytes for people, as disks count them."""
    for unit in ("B", "kB", "MB"):
        if size < 999.5:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; links count nothing."""
    if path.is_file():
        return path.stat().st_size
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file() and not p.is_symlink())


def scrubbed(text: str, folder: Path) -> str:
    """A log as it would read anywhere: no path of this machine, no address, no colour."""
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text)
    text = (
        text.replace(str(folder / "cache"), "~/.cache/vggt_lora")
        .replace(f"{folder / CLONE}/", "")
        .replace(str(folder / CLONE), ".")
        .replace(str(folder), "..")
    )
    for place, name in ((str(ROOT), "."), (str(Path.home()), "~"), (tempfile.gettempdir(), "$TMPDIR")):
        text = text.replace(place + "/", name + "/")
    return re.sub(r"[a-z]+://\S+", "<address>", text)


class Journey:
    """The steps in a folder: what is done is remembered in newcomer.json."""

    def __init__(self, folder: Path):
        self.folder, self.book = folder, folder / "newcomer.json"
        self.done = json.loads(self.book.read_text(encoding="utf-8")) if self.book.is_file() else {}
        self.env = {name: os.environ[name] for name in KEPT if name in os.environ} | {
            "VGGT_LORA_CACHE": str(folder / "cache"),
            "PIP_CACHE_DIR": str(folder / "pip"),
        }

    def step(self, name: str, command: str, expect: int = 0, where: str = CLONE) -> dict:
        """Run a command as a newcomer types it, in the clone; returns {command, seconds, lines}. SystemExit where it
        ends otherwise than expected.
        """
        if name in self.done and self.done[name]["command"] == scrubbed(command, self.folder):
            print(f"{name}: done before", flush=True)
            return self.done[name]
        log = self.folder / f"{name}.log"
        print(f"{name}: {command}", flush=True)
        started = time.monotonic()
        with open(log, "wb") as out:
            code = subprocess.run(
                ["sh", "-c", command], cwd=self.folder / where, env=self.env, stdin=subprocess.DEVNULL, stdout=out,
                stderr=subprocess.STDOUT,
            ).returncode
        seconds = time.monotonic() - started
        text = log.read_text(encoding="utf-8", errors="replace")
        if (code == 0) != (expect == 0):
            raise SystemExit(
                f"{name} ended with status {code} after {time_words(seconds)}; {log} ends with:\n{text[-3000:]}"
            )
        print(f"{name}: {time_words(seconds)}", flush=True)
        lines = [line for line in scrubbed(text.replace("\r", "\n"), self.folder).splitlines() if line.strip()]
        self.done[name] = {
            "command": scrubbed(command, self.folder), "seconds": seconds, "lines": lines, "status": code,
        }
        temporary = self.book.with_suffix(".part")
        temporary.write_text(json.dumps(self.done, indent=1), encoding="utf-8")
        temporary.replace(self.book)
        return self.done[name]


def truncated_weights(clone: Path, folder: Path) -> Path:
    """A copy of the small network's file of which half is missing, as a download that broke off leaves it."""
    whole = (clone / "vggt_lora" / "weights" / "tiny.safetensors").read_bytes()
    path = folder / "half.safetensors"
    path.write_bytes(whole[: len(whole) // 2])
    return path


def walk(folder: Path, torch_args: str, train_args: str) -> Journey:
    """All steps."""
    journey, clone = Journey(folder), folder / CLONE
    if "clone" not in journey.done and clone.exists():
        shutil.rmtree(clone)  # a clone that broke off
    journey.step("clone", f"git clone --quiet --no-hardlinks {shlex.quote(ROOT.as_uri())} {CLONE}", where=".")
    made = f' TORCH_ARGS="{torch_args}"' if torch_args else ""
    journey.step("environment", f"make env{made}")
    journey.step("doctor", ".venv/bin/vggt_lora_doctor")
    journey.step("doctor_no_data", ".venv/bin/vggt_lora_doctor --data path/to/facade", expect=1)
    journey.step(
        "doctor_half_weights",
        f".venv/bin/vggt_lora_doctor --model {shlex.quote(os.path.relpath(truncated_weights(clone, folder), clone))}",
        expect=1,
    )
    journey.step("train", "make train" + (f' ARGS="{train_args}"' if train_args else ""))
    journey.step("evaluate", ".venv/bin/papermill nbs/04_evaluate.ipynb outputs/04_evaluate.ipynb")
    return journey


def newest_run(clone: Path) -> Path:
    """The run that the training left; SystemExit where there is none with clouds."""
    runs = sorted(
        (p.parent for p in clone.glob("outputs/*/results.json")), key=lambda p: (p / "results.json").stat().st_mtime
    )
    if not runs:
        raise SystemExit("the training left no run with results under outputs/")
    return runs[-1]


def clouds_of(clone: Path) -> list[tuple[str, int, str]]:
    """(name, bytes, what it holds) of each cloud, read back from the file; SystemExit where a kind is missing or a file
    is damaged.
    """
    found = []
    for path in sorted(p for p in (clone / "outputs").rglob("*") if p.suffix in (".ply", ".glb")):
        data = path.read_bytes()
        if path.suffix == ".ply":
            match = re.search(rb"^element vertex (\d+)\s*$", data[:2000], re.M)
            if not data.startswith(b"ply") or not match:
                raise SystemExit(f"{path} is no PLY file")
            what = f"{int(match[1]):,} points"
        else:
            if data[:4] != b"glTF" or int.from_bytes(data[8:12], "little") != len(data):
                raise SystemExit(f"{path} is no whole GLB file")
            what = "the same, for viewers on the web"
        found.append((path.relative_to(clone).as_posix(), len(data), what))
    if {Path(name).suffix for name, _, _ in found} != {".ply", ".glb"} or not any(
        "adapted" in Path(name).name for name, _, _ in found
    ):
        raise SystemExit(
            f"{clone / 'outputs'} should hold the adapted cloud as PLY and GLB, it holds "
            f"{[name for name, _, _ in found]}"
        )
    return found


def machine(python: Path) -> str:
    """What the times were taken on, in a line, without a name."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = subprocess.run(
        [
            str(python),
            "-c",
            "import platform, torch; print(f'Python {platform.python_version()}, torch {torch.__version__}, ' + "
            "('a GPU' if torch.cuda.is_available() else 'no GPU'))",
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return (
        f"{cores} processor core{'s' if cores != 1 else ''}"
        + (f", {memory / 2**30:.0f} GiB of memory" if memory else "")
        + f", {versions}"
    )


def undated(text: str) -> str:
    """A run's name without the moment of its start."""
    return re.sub(r"[0-9]{8}-[0-9]{6}", "<date>-<time>", text)


def block(lines: list[str], most: int = 40) -> str:
    """Lines of a terminal, quoted."""
    left = (
        [*lines[: most // 2], f"... ({len(lines) - most} lines)", *lines[-(most // 2) :]]
        if len(lines) > most
        else lines
    )
    return "```text\n" + undated("\n".join(left)) + "\n```"


def page(journey: Journey) -> str:
    """docs/newcomer.md."""
    folder, clone = journey.folder, journey.folder / CLONE
    run = newest_run(clone)
    clouds, done = clouds_of(clone), journey.done
    sizes = {
        "clone": size_of(clone / ".git")
        + sum(size_of(clone / p) for p in os.listdir(clone) if p not in (".git", ".venv", "outputs")),
        "environment": size_of(clone / ".venv"),
        "evaluate": sum(size for _, size, _ in clouds),
    }
    sizes["train"] = sum(size_of(p) for p in (clone / "outputs").iterdir() if p.is_dir()) - sizes["evaluate"]
    told = {
        "clone": "get the project",
        "environment": "`.venv` with the tested versions",
        "doctor": "is all there?",
        "doctor_no_data": "the doctor on a path that does not exist",
        "doctor_half_weights": "the doctor on a file of weights that broke off",
        "train": "doctor, demo buildings, adapter, report",
        "evaluate": "base against adapted, and clouds",
    }
    rows = [
        f"| {told[name]} | `{step['command']}` | {time_words(step['seconds'])} | "
        f"{size_words(sizes[name]) if name in sizes else ''} |"
        for name, step in done.items()
        if name in told
    ]
    said = [
        line
        for line in done["train"]["lines"]
        if re.match(r"(epoch +\d|held-out loss|peak learning rate|\d+ windows|untrained adapter|gradients:)", line)
    ]
    report = (run / "report.md").read_text(encoding="utf-8").splitlines()
    verdicts = [line for line in report if line.startswith("**")]
    return (
        "\n\n".join(
            [
                "# A newcomer's log",
                "From `git clone` to the cloud of the adapted network, as the README says, by `make newcomer`: a "
                "fresh clone in an empty folder, empty caches, one command after the other. "
                "The file is written by `tools/newcomer.py` and not by hand. What the machine's own paths were is "
                "written as a newcomer would see them.",
                f"Machine: {machine(clone / '.venv' / 'bin' / 'python')}. The package index was within reach; its "
                "speed is most of the second line. Times are of the wall, one run each.",
                "| what | command | time | on disk |\n|---|---|---|---|\n"
                + "\n".join(rows)
                + f"\n| **all** | | **{time_words(sum(done[n]['seconds'] for n in told if n in done))}** | |",
                "Beside that the demo buildings and what is kept between runs take "
                f"{size_words(size_of(folder / 'cache'))} in `~/.cache/vggt_lora`.",
                "## The doctor on a healthy set-up",
                block(done["doctor"]["lines"]),
                "## The doctor on a broken one",
                "A path that does not exist; the exit status is " + str(done["doctor_no_data"]["status"]) + ":",
                block(done["doctor_no_data"]["lines"]),
                "A file of weights of which half is missing; the exit status is "
                + str(done["doctor_half_weights"]["status"])
                + ":",
                block(done["doctor_half_weights"]["lines"]),
                "## The training",
                "Of what it prints:",
                block(said),
                "The first lines of `report.md` that say what came of it:",
                "\n".join(f"> {line}\n>" for line in verdicts).removesuffix("\n>"),
                "## Where the clouds are",
                "Read back from the files:",
                "| file | size | holds |\n|---|---|---|\n"
                + "\n".join(f"| `{undated(name)}` | {size_words(size)} | {what} |" for name, size, what in clouds),
            ]
        )
        + "\n"
    )


def main(arguments: list[str] | None = None) -> None:
    """Walk, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--folder",
        type=Path,
        help="where clone, caches and logs go; named again, it goes on (default: a new temporary folder, removed at "
             "the end)",
    )
    parser.add_argument(
        "--torch-args",
        default=os.environ.get("TORCH_ARGS", ""),
        help="TORCH_ARGS of `make env` (default: the variable TORCH_ARGS)",
    )
    parser.add_argument("--train-args", default="", help="ARGS of `make train`; the README has none")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "newcomer.md", help="the file to write")
    given = parser.parse_args(arguments)
    folder = (given.folder or Path(tempfile.mkdtemp(prefix="newcomer-"))).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    text = page(walk(folder, given.torch_args, given.train_args))
    for word in (str(folder), str(ROOT), str(Path.home()) + "/"):
        if word in text:
            raise SystemExit(f"the page would name {word}, which is of this machine alone; its steps are in {folder}")
    given.page.parent.mkdir(parents=True, exist_ok=True)
    given.page.write_text(text, encoding="utf-8")
    print(f"{given.page}: written")
    if given.folder is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
