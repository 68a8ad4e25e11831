"""The frame store from outside: same numbers as without it, nothing decoded twice, nothing kept that is out of date,
damage seen, kills and rivals survived.
"""
import dataclasses
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vggt_lora.core import ConfigError, SceneError
from vggt_lora.datasets import samples, frame_store as store
from vggt_lora.datasets.frame_store import VERSION, FrameStore, entry_key
from vggt_lora.datasets.samples import FrameCache, load_sample
from vggt_lora.datasets.windows import Window, make_windows
from vggt_lora.demo.demo_scenes import demo_scenes, toy_scene
from vggt_lora.evaluate import evaluate, largest_difference
from vggt_lora.files.atomic import write_text
from vggt_lora.scenes.masks import label_files
from vggt_lora.scenes.opening import open_scene
from vggt_lora.supervision.sources import DEPTH_SOURCES
from vggt_lora.train import TrainConfig, train
from vggt_lora.training.build import build_model, make_frame_cache

ROOT = Path(__file__).resolve().parent.parent
SIZE, UNMASKED = 112, 7


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A whole scene of our own to spoil: laser, scans, meshes, masks, both calibrations."""
    source, folder = demo_scenes(progress=False)[0], tmp_path_factory.mktemp("demo") / "demo"
    shutil.copytree(source, folder)
    open_scene(folder).frames[UNMASKED].mask_path.unlink()
    scene = open_scene(folder)
    assert (
        scene.frames[0].mask_path is not None
        and scene.frames[0].depth_path is not None
        and (folder / "occlusion").is_dir()
    )
    return scene


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return open_scene(toy_scene(tmp_path_factory.mktemp("toy"), frames=8, size=(112, 168)))


def items(scene, frames=4):
    return [(scene, window) for window in make_windows(scene, frames)]


def few(scene, count=3):
    """The scene's first frames as one window."""
    return [(scene, Window(scene.name, tuple(range(count))))]


def scans_only(scene):
    """The same scene without ground truth depth: the laser is then read from scans and meshes."""
    return dataclasses.replace(scene, frames=tuple(dataclasses.replace(f, depth_path=None) for f in scene.frames))


def differences(one, other) -> list[str]:
    """Fields in which two samples differ, in a bit or a type."""
    found = []
    for field in dataclasses.fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        same = (
            torch.equal(a, b) and a.dtype == b.dtype and a.stride() == b.stride()
            if isinstance(a, torch.Tensor)
            else a == b
        )
        found += [] if same else [field.name]
    return found


def refuse(*arguments, **options):
    raise AssertionError("something was decoded or projected")


# --- the same numbers, without decoding -----------------------------------------------------------------------------

@pytest.mark.parametrize("supervision, mode, variant", [
    ("sparse", "aspect", "ground truth"), ("laser", "crop", "ground truth"), ("laser+sparse", "aspect", "ground truth"),
    ("sparse+laser", "pad", "ground truth"), ("laser", "aspect", "scans"), ("laser+sparse", "crop", "scans"),
])
def test_samples_are_the_same_to_the_bit_and_nothing_is_decoded_again(
    demo, tmp_path, monkeypatch, supervision, mode, variant
):
    scene = scans_only(demo) if variant == "scans" else demo
    (_, window), = few(scene)
    direct = FrameCache(SIZE, mode, supervision)
    wanted = [load_sample(scene, window, direct), load_sample(scene, window, direct, order=[2, 0, 1])]
    FrameStore(SIZE, mode, supervision, folder=tmp_path).prepare([(scene, window)], progress=False)
    monkeypatch.setattr(samples, "load_image", refuse)
    monkeypatch.setattr(Image, "open", refuse)
    for name in DEPTH_SOURCES:
        monkeypatch.setitem(DEPTH_SOURCES, name, named_like(DEPTH_SOURCES[name]))
    found = FrameStore(SIZE, mode, supervision, folder=tmp_path)
    assert found.prepare([(scene, window)], progress=False).reused == 3
    assert not differences(wanted[0], load_sample(scene, window, found))
    assert not differences(wanted[1], load_sample(scene, window, found, order=[2, 0, 1]))
    for index in window.frames:
        target = found.size(scene, window.frames[0])
        assert list(found.get(scene, index, target).depth.counts.items()) == list(
            direct.get(scene, index, target).depth.counts.items()
        )
    if supervision != "sparse":
        assert wanted[0].valid.float().mean() > 0.02  # there was something to compare
    with pytest.raises(AssertionError, match="decoded"):
        FrameStore(SIZE, mode, supervision, folder=tmp_path / "other").prepare([(scene, window)], progress=False)


def named_like(source):
    """A function that refuses to work under the name of a depth source, so that the names of entries stay."""
    def refusing(*arguments, **options):
        raise AssertionError("something was decoded or projected")
    refusing.__module__, refusing.__qualname__ = source.__module__, source.__qualname__
    return refusing


def test_training_and_evaluation_give_the_same_numbers_with_and_without(toy, tmp_path, monkeypatch):
    monkeypatch.setenv("VGGT_LORA_CACHE", str(tmp_path / "cache"))
    settings = {
        "data": str(toy.root), "supervision": "sparse", "choose_fraction": 0.0, "epochs": 1, "frames": 4,
        "model": "random", "image_size": 56, "rank": 4, "lr": 1e-3,
    }
    without = train(TrainConfig(output=str(tmp_path / "without"), frame_cache=False, **settings))
    assert not (tmp_path / "cache" / "frames").exists()
    config = TrainConfig(output=str(tmp_path / "stored"), **settings)
    made = make_frame_cache(config, build_model(config), items=items(toy))
    assert "0 frames reused, 8 made" in made.about() and "MB" in made.about()
    monkeypatch.setattr(samples, "load_image", refuse)
    stored = train(config)
    for name in ("results.json", "adapter/adapter_model.safetensors"):
        assert (without.folder / name).read_bytes() == (stored.folder / name).read_bytes(), name
    # all but the clock
    records = [
        [{k: v for k, v in record.items() if k != "wall"} for record in run.records] for run in (without, stored)
    ]
    assert records[0] == records[1] and len(records[0]) > 2
    assert largest_difference(evaluate(stored.folder).table(), without.results["table"]) == 0
    logs = [(run.folder / "train.log").read_text() for run in (without, stored)]
    assert f"frames ({config.supervision}) are decoded" in logs[0] and "8 frames reused, 0 made" in logs[1]


def test_the_store_is_light_to_import():
    code = (
        "import vggt_lora.datasets.frame_store, sys; print([m for m in ('torch', 'open3d', 'pycolmap', 'matplotlib') "
        "if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


# --- what an entry depends on ---------------------------------------------------------------------------------------

def keys(scene, supervision, *settings) -> list[str]:
    cache = FrameCache(*(settings or (SIZE,)), supervision=supervision)
    return [
        entry_key(scene, f, cache.plan(scene, i, cache.size(scene, i)), supervision) for i, f in enumerate(scene.frames)
    ]


def concerned(scene, supervision, change) -> set[int]:
    """Frames whose entry is out of date after the change; `change` returns a scene or None for the same one."""
    before = keys(scene, supervision)
    return {i for i, (a, b) in enumerate(zip(before, keys(change() or scene, supervision))) if a != b}


def one_more_byte(path):
    path.write_bytes(path.read_bytes() + b" ")


ALL = set(range(12))
FILES = {
    "photo": (lambda s: s.frames[3].image_path, {"sparse": {3}, "laser": {3}, "scans": {3}}),
    "mask": (lambda s: s.frames[3].mask_path, {"sparse": {3}, "laser": {3}, "scans": {3}}),
    "depth": (lambda s: s.frames[3].depth_path, {"sparse": set(), "laser": {3}, "scans": set()}),
    "labels": (lambda s: label_files(s, s.frames[3])["windows"], {"sparse": {3}, "laser": {3}, "scans": {3}}),
    # None: those with a mask
    "cameras of the originals": (
        lambda s: s.jpg_cameras / "cameras.txt",
        {"sparse": None, "laser": ALL, "scans": None},
    ),
    "scan": (
        lambda s: sorted((s.root / "dslr_scan_eval").glob("*.ply"))[0],
        {"sparse": set(), "laser": set(), "scans": ALL},
    ),
    "alignment": (
        lambda s: s.root / "dslr_scan_eval" / "scan_alignment.mlp",
        {"sparse": set(), "laser": set(), "scans": ALL},
    ),
    "mesh": (lambda s: s.root / "occlusion" / "surface_mesh.ply", {"sparse": set(), "laser": set(), "scans": ALL}),
}


@pytest.mark.parametrize("what", FILES)
def test_a_changed_file_concerns_those_frames_that_read_it(demo, what):
    path, expected = FILES[what][0](demo), FILES[what][1]
    original = path.read_bytes()
    try:
        for source, frames in expected.items():
            scene = scans_only(demo) if source == "scans" else demo
            masked = {i for i, f in enumerate(scene.frames) if f.mask_path is not None}
            assert masked == ALL - {UNMASKED}
            path.write_bytes(original)
            supervision = "laser" if source == "scans" else source
            found = concerned(scene, supervision, lambda: one_more_byte(path))
            assert found == (masked if frames is None else frames), (what, source)
            path.write_bytes(original)
    finally:
        path.write_bytes(original)


def with_frame(scene, index, **changes):
    return dataclasses.replace(
        scene, frames=tuple(dataclasses.replace(f, **changes) if i == index else f for i, f in enumerate(scene.frames))
    )


def with_points(scene, **changes):
    return dataclasses.replace(scene, points=dataclasses.replace(scene.points, **changes))


def test_cameras_points_and_settings_concern_those_that_use_them(demo, tmp_path):
    frame = demo.frames[5]
    pose = frame.world_to_cam.copy()
    pose[0, 3] += 1e-12
    neighbours = {i for i, f in enumerate(demo.frames) if np.isin(f.point_rows, frame.point_rows).any()}
    assert concerned(demo, "laser", lambda: with_frame(demo, 5, world_to_cam=pose)) == {5}
    assert (
        {5}
        < concerned(
            demo,
            "sparse",
            lambda: with_frame(demo, 5, world_to_cam=frame.world_to_cam + [[0, 0, 0, 0.1], [0] * 4, [0] * 4, [0] * 4]),
        )
        <= neighbours
    )
    row = demo.points.track_length.argmin()
    seen = {i for i, f in enumerate(demo.frames) if row in f.point_rows}
    xyz = demo.points.xyz.copy()
    xyz[row] += 1
    assert 0 < len(seen) < 6 and concerned(demo, "sparse", lambda: with_points(demo, xyz=xyz)) == seen
    assert concerned(demo, "laser", lambda: with_points(demo, xyz=xyz)) == set()
    worst = demo.points.error.argmax()  # a larger error leaves the median as it is
    for field in ("error", "track_length"):
        values = getattr(demo.points, field).copy()
        values[worst] += 1
        assert concerned(demo, "sparse", lambda: with_points(demo, **{field: values})) == {
            i for i, f in enumerate(demo.frames) if worst in f.point_rows
        }, field
    assert concerned(demo, "laser", lambda: with_frame(demo, 5, K=frame.K * [[1 + 1e-12], [1], [1]])) == {5}
    # the weights' yardstick is the scene's
    assert concerned(demo, "sparse", lambda: with_points(demo, error=demo.points.error * 2)) == ALL
    own = tmp_path / "own.png"
    Image.fromarray(np.full(frame.size, 255, np.uint8)).save(own)
    assert concerned(demo, "sparse", lambda: with_frame(demo, 5, photo_mask_path=own)) == {5}
    plans = [
        keys(demo, "sparse", *settings)[0]
        for settings in ((SIZE,), (SIZE + 14,), (SIZE, "crop"), (SIZE, "pad"), (SIZE, "squash"))
    ]
    assert len(set(plans)) == 5
    few_keys = [keys(demo, name)[0] for name in ("sparse", "laser", "laser+sparse", "sparse+laser")]
    assert len(set(few_keys)) == 4 and keys(demo, "laser + sparse")[0] == few_keys[2]


def test_an_own_source_counts_by_its_text_and_the_whole_scene(toy, tmp_path, monkeypatch):
    """Nothing is known of what it reads: any change in the scene's folder makes its entries anew, and it is not called
    from several threads.
    """
    plan = FrameCache(SIZE).plan(toy, 0, (70, 112))
    names = []
    for number in (1, 2):
        (tmp_path / f"own_{number}.py").write_text(f"def source(scene, frame, size, plan=None):\n    return {number}\n")
        monkeypatch.syspath_prepend(tmp_path)
        module = __import__(f"own_{number}")
        module.source.__module__ = "own"
        monkeypatch.setitem(DEPTH_SOURCES, "own", module.source)
        names.append(entry_key(toy, toy.frames[0], plan, "own"))
    assert names[0] != names[1]
    note = toy.root / "note.txt"
    note.write_text("read by the source, for all we know")
    assert entry_key(toy, toy.frames[0], plan, "own") != names[1]
    note.unlink()
    assert entry_key(toy, toy.frames[0], plan, "own") == names[1]
    assert FrameStore(SIZE, supervision="own", folder=tmp_path, workers=4).workers == 1
    assert FrameStore(SIZE, supervision="sparse", folder=tmp_path, workers=4).workers == 4


OPENED = """
import sys
from vggt_lora.datasets.frame_store import entry_key
from vggt_lora.datasets.samples import FrameCache
from vggt_lora.scenes.opening import open_scene
import dataclasses
root, supervision, scans, what = sys.argv[1:]
scene = open_scene(root)
if scans == "scans":
    scene = dataclasses.replace(scene, frames=tuple(dataclasses.replace(f, depth_path=None) for f in scene.frames))
cache = FrameCache(112, supervision=supervision)
target = cache.size(scene, 0)
opened = set()
sys.addaudithook(lambda event, arguments: opened.add(str(arguments[0])) if event == "open" else None)
if what == "key":
    entry_key(scene, scene.frames[0], cache.plan(scene, 0, target), supervision)
else:
    cache.load(scene, 0, target)
print("\\n".join(sorted(name for name in opened if name.startswith(root))))
"""


@pytest.mark.parametrize("supervision, scans", [("laser+sparse", "ground truth"), ("laser", "scans")])
def test_no_source_reads_a_file_that_its_entry_does_not_depend_on(demo, supervision, scans):
    """The files that Python opens while a frame is made, against those that are opened for its name."""
    opened = {}
    for what in ("key", "frame"):
        done = subprocess.run(
            [sys.executable, "-c", OPENED, str(demo.root), supervision, scans, what], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
        opened[what] = set(done.stdout.split())
    assert len(opened["frame"]) >= 4, opened
    assert opened["frame"] <= opened["key"], opened["frame"] - opened["key"]


# --- damage ---------------------------------------------------------------------------------------------------------

def entry_of(folder, scene, index) -> Path:
    cache = FrameStore(SIZE, folder=folder)
    key = entry_key(scene, scene.frames[index], cache.plan(scene, index, cache.size(scene, 0)), "sparse")
    return cache.folder / f"{key}.safetensors"


def flipped(place):
    def damage(content, other):
        at = int(place * len(content)) if place < 1 else int(place)
        return content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1:]
    return damage


DAMAGE = {
    "zero bytes": (lambda content, other: b"", "is empty"),
    "one byte": (lambda content, other: content[:1], "damaged or cut short"),
    "half": (lambda content, other: content[: len(content) // 2], "damaged or cut short|checksum differs"),
    "last byte missing": (lambda content, other: content[:-1], "damaged or cut short|checksum differs"),
    "a byte of the photo flipped": (flipped(0.97), "checksum differs"),
    "a byte of the depth flipped": (flipped(0.2), "checksum differs"),
    "a byte of the header flipped": (flipped(40), "damaged|checksum|holds another frame|version"),
    "the header's length flipped": (flipped(2), "damaged or cut short"),
    "another version": (
        lambda content, other: content.replace(b'{\\"version\\": %d,' % VERSION, b'{\\"version\\": 9,'),
        f"is of version 9, expected {VERSION}",
    ),
    "another frame's entry": (lambda content, other: other, "holds another frame"),
    "something else": (lambda content, other: b"\xff\xd8\xff" * 5000, "damaged or cut short"),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_entry_is_noticed_named_and_made_anew(toy, tmp_path, what):
    damage, says = DAMAGE[what]
    FrameStore(SIZE, folder=tmp_path).prepare(items(toy), progress=False)
    path, content = entry_of(tmp_path, toy, 2), entry_of(tmp_path, toy, 2).read_bytes()
    bad = damage(content, entry_of(tmp_path, toy, 3).read_bytes())
    assert bad != content
    path.write_bytes(bad)
    again = FrameStore(SIZE, folder=tmp_path)
    with pytest.warns(UserWarning, match=f"{path.name}: .*({says})") as said:
        report = again.prepare(items(toy), progress=False)
    assert len(said) == 1 and (report.reused, report.made, len(report.damaged)) == (7, 1, 1)
    assert "because the entry was damaged" in again.about()
    assert path.read_bytes() == content


def test_damage_is_noticed_without_prepare_too(toy, tmp_path):
    FrameStore(SIZE, folder=tmp_path).prepare(few(toy), progress=False)
    path = entry_of(tmp_path, toy, 1)
    path.write_bytes(path.read_bytes()[:-9] + b"x" * 9)
    with pytest.warns(UserWarning, match="checksum differs"):
        sample = load_sample(*few(toy)[0], FrameStore(SIZE, folder=tmp_path))
    assert not differences(sample, load_sample(*few(toy)[0], FrameCache(SIZE)))


def edited_maker(monkeypatch, module: str, old: str, new: str) -> str:
    """The key's part for the code, as it would be with a module of the package edited."""
    path, read = Path(store.__file__).parent.parent / module, Path.read_text
    assert old in path.read_text(encoding="utf-8")

    def read_edited(self, *arguments, **options):
        text = read(self, *arguments, **options)
        return text.replace(old, new) if self == path else text

    with monkeypatch.context() as changed:
        changed.setattr(Path, "read_text", read_edited)
        return store.maker.__wrapped__("laser+sparse+anchored")


@pytest.mark.parametrize("module, old, new, same", [
    ("demo/demo_scenes.py", "Return the folder of the default scenes", "Return where the default scenes lie", True),
    ("demo/building.py", "import numpy as np", "import numpy as np\nCHANGED = 1", True),
    ("supervision/sparse.py", "Project the frame's own visible", "Project the frame's visible", True),
    ("scenes/images.py", "import numpy as np", "import numpy as np  # for arrays", True),
    ("scenes/images.py", "import numpy as np", "import numpy as np\nCHANGED = 1", False),
    ("geometry/cameras.py", "import numpy as np", "import numpy as np\nCHANGED = 1", False),
    ("supervision/anchored.py", "stiffness: float = 0.1", "stiffness: float = 0.2", False),
])
def test_an_edited_docstring_keeps_the_keys_and_an_edited_line_does_not(monkeypatch, module, old, new, same):
    now = store.maker.__wrapped__("laser+sparse+anchored")
    assert (edited_maker(monkeypatch, module, old, new) == now) is same


def test_the_work_of_other_code_is_neither_used_nor_touched(toy, tmp_path, monkeypatch):
    FrameStore(SIZE, folder=tmp_path).prepare(few(toy), progress=False)
    monkeypatch.setattr(store, "maker", lambda supervision: "f" * 64)
    newer = FrameStore(SIZE, folder=tmp_path)
    assert newer.prepare(few(toy), progress=False).made == 3
    assert "by other versions, which may be deleted" in newer.about()
    assert len(list(tmp_path.glob("v*/*.safetensors"))) == 6


def test_the_command_keeps_what_was_wanted_last_and_touches_nothing_but_entries(toy, tmp_path, capsys):
    FrameStore(SIZE, folder=tmp_path).prepare(items(toy), progress=False)
    entries = [entry_of(tmp_path, toy, index) for index in range(8)]
    for age, path in enumerate(entries):
        os.utime(path, (1000 + age,) * 2)
    size, strangers = (
        entries[0].stat().st_size,
        [tmp_path / "model.safetensors", entries[0].parent / "model.safetensors", tmp_path / f"{'a' * 64}.safetensors"],
    )
    for path in strangers:
        path.write_bytes(bytes(10 ** 6))
    assert store.main(["--folder", str(tmp_path)]) == 0 and all(path.exists() for path in entries)
    assert f"holds 8 frames, {8 * size / 1e9:.3f} GB" in capsys.readouterr().out
    FrameStore(SIZE, folder=tmp_path).prepare(few(toy, 2), progress=False)  # the two oldest are wanted again
    (entries[0].parent / ".old.safetensors.x.tmp.safetensors").write_bytes(b"half")
    os.utime(entries[0].parent / ".old.safetensors.x.tmp.safetensors", (1000,) * 2)
    assert store.main(["--folder", str(tmp_path), "--prune", str(3.5 * size / 1e9)]) == 0
    assert [index for index in range(8) if entries[index].exists()] == [0, 1, 7]
    said = capsys.readouterr().out
    assert (
        "removed 5 least recently used frames" in said
        and "1 half-written" in said
        and all(path.exists() for path in strangers)
    )
    for wrong in ("-1", "nan", "inf", "many"):
        with pytest.raises(SystemExit) as stopped:
            store.main(["--folder", str(tmp_path), "--prune", wrong])
        assert stopped.value.code == 2 and "expected a number from 0" in capsys.readouterr().err
    assert sum(path.exists() for path in entries) == 3
    assert FrameStore(SIZE, folder=tmp_path).prepare(items(toy), progress=False).made == 5


def test_broken_photos_are_all_named_and_the_rest_is_kept(toy, tmp_path):
    scene = open_scene(shutil.copytree(toy.root, tmp_path / "scene"))
    broken = [scene.frames[i].image_path for i in (1, 6)]
    for path in broken:
        path.write_bytes(path.read_bytes()[:-len(path.read_bytes()) // 3])
    frames = FrameStore(SIZE, folder=tmp_path / "frames")
    with pytest.raises(SceneError) as caught:
        frames.prepare(items(scene), progress=False)
    assert all(str(path) in str(caught.value) for path in broken) and "damaged or cut short" in str(caught.value)
    assert frames.report.made == 6 and not list(frames.folder.glob(".*"))
    for path in broken:
        shutil.copy(toy.root / path.relative_to(scene.root), path)
    again = FrameStore(SIZE, folder=tmp_path / "frames").prepare(items(scene), progress=False)
    assert (again.reused, again.made) == (6, 2)


def test_a_photo_that_changes_while_it_is_read_is_not_kept(toy, tmp_path, monkeypatch):
    scene = open_scene(shutil.copytree(toy.root, tmp_path / "scene"))

    def slow(path, plan, read=samples.load_image):
        data = read(path, plan)
        one_more_byte(path)
        return data

    monkeypatch.setattr(samples, "load_image", slow)
    frames = FrameStore(SIZE, folder=tmp_path / "frames")
    with pytest.raises(SceneError, match="changed while it was read"):
        frames.get(scene, 0, frames.size(scene, 0))
    assert not list((tmp_path / "frames").rglob("*.safetensors"))


def test_a_folder_that_cannot_be_written_says_what_to_do(toy, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match="VGGT_LORA_CACHE.*frame_cache=False"):
        FrameStore(SIZE, folder=tmp_path / "file").prepare(few(toy), progress=False)


# --- kills and rivals -----------------------------------------------------------------------------------------------

BUILD = """
import os, signal, sys, time
from vggt_lora.datasets import samples, frame_store as store
from vggt_lora.datasets.windows import make_windows
from vggt_lora.scenes.opening import open_scene
root, folder, moment, count = sys.argv[1:]
calls = 0

def dying(name, function):
    def called(*arguments, **options):
        global calls
        calls += name == moment
        if name == moment and calls == int(count):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return called

import safetensors.numpy
samples.load_image = dying("decoding", samples.load_image)
safetensors.numpy.save_file = dying("writing", safetensors.numpy.save_file)
os.fsync = dying("written", os.fsync)
os.replace = dying("renaming", os.replace)
if moment == "together":
    while time.time() < float(count):
        time.sleep(0.001)
scene = open_scene(root)
windows = [(scene, w) for w in make_windows(scene, 4)]
print(store.FrameStore(112, folder=folder, workers=2).prepare(windows, progress=False))
"""


def build(toy, folder, moment="", count="0") -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", BUILD, str(toy.root), str(folder), moment, str(count)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def contents(folder) -> dict:
    return {
        path.name: path.read_bytes() for path in Path(folder).rglob("*.safetensors") if not path.name.startswith(".")
    }


@pytest.fixture(scope="module")
def undisturbed(toy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    FrameStore(SIZE, folder=folder).prepare(items(toy), progress=False)
    return contents(folder)


@pytest.mark.slow
@pytest.mark.parametrize("moment, count", [("decoding", 4), ("writing", 3), ("written", 5), ("renaming", 3)])
def test_killed_for_good_the_next_run_makes_what_is_missing(toy, tmp_path, undisturbed, moment, count):
    process = build(toy, tmp_path, moment, count)
    process.communicate()
    assert process.returncode == -9
    left = contents(tmp_path)
    assert len(left) < 8 and left.items() <= undisturbed.items()  # what has its final name is whole
    leftovers = list(tmp_path.rglob(".*.tmp*"))
    for path in leftovers:
        os.utime(path, (time.time() - 7200,) * 2)
    young = tmp_path / next(tmp_path.iterdir()).name / ".a-rival-is-writing.safetensors.x.tmp.safetensors"
    young.write_bytes(b"half")
    again = FrameStore(SIZE, folder=tmp_path)
    report = again.prepare(items(toy), progress=False)
    assert (report.reused, report.made, report.damaged) == (len(left), 8 - len(left), [])
    assert contents(tmp_path) == undisturbed
    assert not any(path.exists() for path in leftovers) and young.exists()
    assert leftovers or moment in ("decoding", "writing"), "it was to be killed in the middle of a file"


@pytest.mark.slow
def test_two_processes_at_once_do_not_harm_each_other(toy, tmp_path, undisturbed):
    start = time.time() + 3
    rivals = [build(toy, tmp_path, "together", start) for _ in range(2)]
    for rival in rivals:
        _, errors = rival.communicate()
        assert rival.returncode == 0, errors
    assert contents(tmp_path) == undisturbed
    assert not list(tmp_path.rglob(".*.tmp*"))


def test_files_written_by_several_threads_keep_the_user_s_permissions(tmp_path, monkeypatch):
    """The mask of permissions is one for all threads and is read by setting it: without a lock a thread may read the 0
    of another and leave it behind.
    """
    real, before = os.umask, os.umask(0o022)

    def slow(mask):
        held = real(mask)
        time.sleep(0.005)
        return held

    try:
        monkeypatch.setattr(os, "umask", slow)
        threads = [threading.Thread(target=write_text, args=(tmp_path / f"{n}.txt", "x")) for n in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        after = real(0o022)
        assert after == 0o022
        assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o644}
    finally:
        real(before)
