"""The house itself: who may import whom, what is light, what the README and the parameters promise."""
import ast
import dataclasses
import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "vggt_lora"

# The house, from the ground up: a module imports from its own floor's room or from rooms below, never upwards, at the
# top or inside a function.
FLOORS = [
    ["core", "settings", "progress", "reference_data", "threads", "geometry"],
    ["files"],
    ["model", "views", "demo"],
    ["scenes", "adapters"],
    ["stereo", "efficiency"],
    ["supervision"],
    ["datasets"],
    ["training"],
    ["preflight", "pretraining"],
    ["evaluation"],
    ["comparison", "prediction"],
    # the chapters, in their order
    ["data", "depth", "lora", "train", "evaluate", "compare", "predict", "doctor", "download"],
    ["commands"],
]
STEPS = ["data", "depth", "lora", "train", "evaluate", "compare", "predict"]
ROOMS = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# what the modules of the ground floor may import of each other
GROUND = {"settings": {"core"}, "reference_data": {"core"}, "geometry": {"core"}}


def imports(path: Path):
    """(imported module below vggt_lora, whether at the top level) of a module."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    parts = ("vggt_lora", *path.relative_to(PACKAGE).with_suffix("").parts)
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = parts[: len(parts) - node.level]
            yield (
                ".".join((*base, *(node.module or "").split("."))).removeprefix("vggt_lora.").strip("."),
                id(node) in top,
            )
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vggt_lora."):
            yield node.module.removeprefix("vggt_lora."), id(node) in top


def modules():
    return [p for p in sorted(PACKAGE.rglob("*.py")) if p.name not in ("__init__.py", "_modidx.py")]


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def fault_of(path: Path) -> list[str]:
    faults = []
    room = name_of(path).split(".")[0]
    for target, at_top in imports(path):
        other = target.split(".")[0]
        if other == room:
            continue
        if room in STEPS and other in STEPS:
            if STEPS.index(other) > STEPS.index(room):
                faults.append(f"{path.relative_to(ROOT)} imports the later step {target}")
        elif ROOMS[other] > ROOMS[room] or ROOMS[other] == ROOMS[room] and other not in GROUND.get(room, ()):
            faults.append(
                f"{path.relative_to(ROOT)} imports {target}, which stands on floor {ROOMS[other] + 1}, its own is "
                f"{ROOMS[room] + 1}"
            )
        if room in STEPS and other == "views" and at_top:
            faults.append(f"{path.relative_to(ROOT)} imports {target} at the top, a headless run would load it")
    return faults


def circles(graph: dict[str, set]) -> list[str]:
    """Modules that import each other in a loop: what is left when all that import nothing of the rest are taken away,
    again and again.
    """
    left = {name: set(targets) & graph.keys() for name, targets in graph.items()}
    while free := [name for name, targets in left.items() if not targets]:
        for name in free:
            del left[name]
        left = {name: targets - set(free) for name, targets in left.items()}
    return sorted(left)


def test_every_room_stands_on_a_floor():
    assert {name_of(p).split(".")[0] for p in modules()} == set(ROOMS)


def test_no_import_runs_up():
    assert not [fault for path in modules() for fault in fault_of(path)]


def test_no_import_circle():
    graph = {name_of(path): {target for target, _ in imports(path)} for path in modules()}
    assert circles({"a": {"b"}, "b": {"a"}, "c": {"a"}}) and not circles({"a": {"b"}, "b": set()})
    assert not circles(graph)


def test_the_page_about_the_house_names_what_exists():
    """docs/house.md: every room has its row, every file is there, and every other name stands in the file that its line
    begins with.
    """
    text = (ROOT / "docs" / "house.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w/]+(?:/|\.py|\.ipynb))`", text))
    assert {room for room in ROOMS if not {f"{room}/", f"{room}.py"} & named} == set()
    assert [name for name in named if not any((folder / name).exists() for folder in (PACKAGE, ROOT))] == []
    walks = re.findall(r"^\d+\. `(\S+)`: (.+?)(?=^\d+\. |^#|\Z)", text, re.M | re.S)
    assert len(walks) == 25
    for file, sentence in walks:
        files = [file, *(name for name in re.findall(r"`(\S+?)`", sentence) if name.endswith(".py"))]
        source = "".join(
            (PACKAGE / name if name.endswith(".py") else ROOT / name).read_text(encoding="utf-8") for name in files
        )
        for name in re.findall(r"`([A-Za-z_]+)`", sentence):
            assert re.search(rf"\b{name}\b", source), f"docs/house.md: {name} is not in {', '.join(files)}"


# --- words ----------------------------------------------------------------------------------------------------------

RETIRED = (
    "Retreat", "retreat", "obstacle", "BaseGate", "gated_adapter", "halve_frozen", "set_speed", "from_main", "in_turn",
    "put_adapter", "what_is_there", "keep_term", "as_it_began", "LENIENT", "unreached_by_loss", "put_in_place",
    "remove_dead", "let_go", "leads_out", "in_markdown", "given_parameters", "look_up", "pool_front", "splat_nearest",
    "TRAPS", "Glimpse", "glimpse", "faults_of", "answer_of", "prefix_store", "shoot_scene",
)


def written() -> dict[str, str]:
    """What a reader sees, by file: the cells of every notebook, and README in both languages."""
    texts = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in ROOT.glob("README*.md")}
    for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
        if ".ipynb_checkpoints" not in path.parts:
            cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
            texts[str(path.relative_to(ROOT))] = "\n\n".join("".join(cell["source"]) for cell in cells)
    return texts


def test_no_retired_name_is_written():
    found = {(file, word) for file, text in written().items() for word in RETIRED if re.search(rf"\b{word}\b", text)}
    assert not found


def test_no_setting_is_written_by_its_retired_name():
    """As a parameter of papermill, an option of the command, or an argument of TrainConfig; RENAMED is what the
    messages read, too.
    """
    from vggt_lora.core import RENAMED, unknown_name_message
    from vggt_lora.train import TrainConfig

    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    assert set(RENAMED.values()) <= fields and not RENAMED.keys() & fields
    assert "It is called 'scale_normalization' now" in unknown_name_message("setting", "normalise", fields)
    found = []
    for file, text in written().items():
        for old, new in RENAMED.items():
            given = [
                command
                for command in re.findall(r"(?:nbs/03_train\.ipynb|vggt_lora_train)[^\n`]*", text)
                if re.search(rf"(-p |--){old.replace('_', '[-_]')}\b", command)
            ]
            given += re.findall(rf"TrainConfig\([^()]*\b{old}=", text)
            found += [(file, old, new)] if given else []
    assert not found


def test_every_module_that_a_text_names_exists():
    rooms = "|".join(room for rooms in FLOORS for room in rooms if (PACKAGE / room).is_dir())
    missing = set()
    for file, text in written().items():
        for room, name in re.findall(rf"(?:`|vggt_lora\.)({rooms})\.(\w+)\b(?!\()", text):
            places = (PACKAGE / room / f"{name}.py", PACKAGE / room / name)
            if name not in ("txt", "json") and not any(place.exists() for place in places):
                missing.add((file, f"{room}.{name}"))
    assert not missing


def test_the_package_is_light():
    heavy = ["torch", "open3d", "peft", "pycolmap", "matplotlib", "ipywidgets"]
    code = f"import vggt_lora, vggt_lora.core, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_training_and_evaluation_import_no_gui_and_nothing_slow():
    """PEFT and its transformers take longer to import than all the rest together; they wait until an adapter is added.
    """
    heavy = ["open3d", "ipywidgets", "matplotlib", "peft", "transformers", "pycolmap", "scipy"]
    code = (
        f"import vggt_lora.train, vggt_lora.evaluate, vggt_lora.predict, sys; print([m for m in {heavy} if m in "
        "sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def notebook(name: str) -> dict:
    return json.loads((ROOT / "nbs" / name).read_text(encoding="utf-8"))


def parameters_cell(name: str) -> str:
    cells = [c for c in notebook(name)["cells"] if "parameters" in c["metadata"].get("tags", [])]
    assert len(cells) == 1, f"{name}: papermill needs exactly one cell tagged 'parameters'"
    return "".join(cells[0]["source"])


@pytest.mark.parametrize("name", [p.name for p in sorted((ROOT / "nbs").glob("0*.ipynb"))])
def test_numbered_notebooks_can_be_driven_by_papermill(name):
    parameters_cell(name)
    kernel = notebook(name)["metadata"]["kernelspec"]
    assert (kernel["name"], kernel["language"]) == ("python3", "python")


def test_there_are_five_steps():
    names = [p.name for p in sorted((ROOT / "nbs").glob("0*.ipynb"))]
    assert [n[:2] for n in names[:5]] == ["00", "01", "02", "03", "04"]


NOTEBOOKS_WITH_A_CONFIG = {
    "03_train.ipynb": ("vggt_lora.train", "TrainConfig"),
    "05_compare.ipynb": ("vggt_lora.compare", "CompareConfig"),
    "06_predict.ipynb": ("vggt_lora.predict", "PredictConfig"),
}


@pytest.mark.parametrize("name", NOTEBOOKS_WITH_A_CONFIG)
def test_papermill_parameters_are_fields_of_the_config(name):
    """Name, type, default and meaning are those of the field; 03 shows the settings that a first run needs, the others
    all.
    """
    from vggt_lora.settings import settings_of

    module, cls = NOTEBOOKS_WITH_A_CONFIG[name]
    expected = {}
    for s in settings_of(getattr(importlib.import_module(module), cls)):
        expected[s.name] = (s.type.__name__ + (" | None" if s.optional else ""), s.default, s.about)
    cell, given = parameters_cell(name), {}
    about = dict(line.split(":")[0:1] + [line.split("  # ", 1)[1]] for line in cell.splitlines())
    for node in ast.parse(cell).body:
        given[node.target.id] = (ast.unparse(node.annotation), ast.literal_eval(node.value), about[node.target.id])
    assert given == {field: facts for field, facts in expected.items() if field in given or name != "03_train.ipynb"}
    assert name != "03_train.ipynb" or len(given) <= 15


def test_no_parameter_hides_a_name_of_the_module():
    """In a notebook the parameters are global names, like everything that its cells import and define."""
    import vggt_lora.train as module

    fields = {f.name for f in dataclasses.fields(module.TrainConfig)}
    assert not fields & set(vars(module)), "a parameter of this name would replace it in the running notebook"
    for cell in notebook("03_train.ipynb")["cells"]:
        if cell["cell_type"] == "code" and "parameters" not in cell["metadata"].get("tags", []):
            tree = ast.parse("".join(cell["source"]))
            inside = {
                id(n) for d in ast.walk(tree) if isinstance(d, (ast.FunctionDef, ast.ClassDef)) for n in ast.walk(d)
            }
            stored = {
                n.id
                for n in ast.walk(tree)
                if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store) and id(n) not in inside
            }
            assert not fields & stored, "a cell that is run again would take this for a parameter"


# --- README ---------------------------------------------------------------------------------------------------------

def readme_commands() -> list[str]:
    """Every line of the README's sh blocks."""
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


def test_readme_names_the_two_commands_and_papermill():
    commands = readme_commands()
    assert {"make train", "make test"} <= set(commands)
    assert any("papermill nbs/03_train.ipynb outputs/" in c and "-p strategy b" in c for c in commands)


@pytest.mark.parametrize("command", [c for c in readme_commands() if c.startswith("make ")])
def test_readme_make_targets_exist(command):
    done = subprocess.run(["make", "-n", *shlex.split(command)[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
