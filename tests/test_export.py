"""The package is what the notebooks say: a fresh export equals the committed modules, and every notebook is clean."""
import ast
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """A copy of the sources, cleaned and exported anew."""
    folder = tmp_path_factory.mktemp("fresh")
    for name in ("settings.ini", "setup.py", "README.md"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "nbs", folder / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    (folder / "vggt_lora").mkdir()
    shutil.copy(ROOT / "vggt_lora" / "__init__.py", folder / "vggt_lora")
    for command in ("nbdev_clean", "nbdev_export"):
        done = subprocess.run(
            [str(BIN / command)], cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
        assert done.returncode == 0, done.stderr
    return folder


def modules(root: Path) -> dict[str, str]:
    return {str(p.relative_to(root)): p.read_text(encoding="utf-8") for p in sorted((root / "vggt_lora").rglob("*.py"))}


def test_modules_are_the_export_of_the_notebooks(fresh):
    wanted, found = modules(fresh), modules(ROOT)
    assert wanted.keys() == found.keys(), "left-over or missing modules; run nbdev_export"
    stale = [name for name in wanted if wanted[name] != found[name]]
    assert not stale, f"edited by hand or not exported: {stale}; run nbdev_export"


def test_notebooks_are_clean(fresh):
    dirty = [
        str(p.relative_to(ROOT))
        for p in sorted((ROOT / "nbs").rglob("*.ipynb"))
        if ".ipynb_checkpoints" not in p.parts
        and p.read_text(encoding="utf-8") != (fresh / p.relative_to(ROOT)).read_text(encoding="utf-8")
    ]
    assert not dirty, f"run nbdev_clean: {dirty}"


def test_no_exported_cell_was_dropped(fresh):
    """nbdev leaves a function with a syntax error out of __all__ without a word: every module must parse and list its
    names.
    """
    for name, text in modules(ROOT).items():
        tree = ast.parse(text, name)
        defined = {
            n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith("_")
        }
        listed = next((set(ast.literal_eval(n.value)) for n in tree.body if isinstance(n, ast.Assign) and
                       any(getattr(t, "id", "") == "__all__" for t in n.targets)), set())
        assert defined <= listed, f"{name}: {sorted(defined - listed)} missing from __all__"


def test_no_first_cell_is_taken_for_settings():
    """nbdev reads list items with a colon in a notebook's first markdown cell as YAML: it warns, or takes them for the
    page's settings.
    """
    from nbdev.frontmatter import FrontmatterProc
    from nbdev.process import NBProcessor

    notebooks = [p for p in sorted((ROOT / "nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts]
    assert len(notebooks) > 40
    for path in notebooks:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            processor = NBProcessor(path, procs=FrontmatterProc)
            processor.process()
        assert set(processor.nb.frontmatter_) == {"title", "description", "output-file"}, path
