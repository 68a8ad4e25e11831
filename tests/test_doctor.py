"""The doctor on a healthy set-up and on broken ones: one line each, with the fix, and an exit status."""
import json
import shutil
import struct
import subprocess
import sys
import types
from importlib import metadata
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vggt_lora import doctor
from vggt_lora.core import WeightsError
from vggt_lora.demo.demo_scenes import toy_scene
from vggt_lora.doctor import Finding, Plan, examine, main
from vggt_lora.model.vggt import VGGT, VGGTConfig

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A folder with one healthy scene."""
    folder = tmp_path_factory.mktemp("scenes")
    toy_scene(folder, frames=4)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    return VGGT(VGGTConfig.golden()).save_pretrained(tmp_path_factory.mktemp("weights") / "net")


@pytest.fixture
def no_views(monkeypatch):
    """Open3D is tried once, in the first test; elsewhere it would only cost time."""
    monkeypatch.setenv("VGGT_LORA_OPEN3D", "off")
    from vggt_lora.views.clouds.renderer import open3d_fault
    open3d_fault.cache_clear()
    yield
    open3d_fault.cache_clear()


def of(what: str, findings: list[Finding]) -> Finding:
    """The one finding about `what` that is worst."""
    return max((f for f in findings if f.what == what), key=lambda f: doctor.STATES.index(f.status))


def test_a_healthy_set_up_in_lines_and_as_json(scenes, tmp_path, capsys):
    """With papermill's own arguments, as `make train` calls it; test_guide.py calls the command itself."""
    words = ["-p", "data", str(scenes), "-p", "output", str(tmp_path / "run"), "-p", "epochs", "3", "-k", "python3"]
    assert main(["--json", "--papermill", *words]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["ok"] and said["plan"]["data"] == str(scenes) and not (tmp_path / "run").exists()
    found = {f["what"]: f for f in said["findings"]}
    assert set(found) == {
        "python", "packages", "notebooks", "torch", "peft", "weights", "memory", "output", "data", "scene", "open3d",
    }
    assert all(f["status"] != "fail" for f in found.values()) and "4 photos" in found["scene"]["found"]
    assert all(bool(f["fix"]) == (f["status"] != "ok") for f in said["findings"])


BROKEN = {
    "no such data": (lambda place: {"data": str(place / "none")}, "data", "is not a folder"),
    "empty data": (lambda place: {"data": ""}, "data", "data is empty"),
    "no such model": (lambda place: {"model": str(place / "none.safetensors")}, "weights", "no weights"),
    "not downloaded": (lambda place: {"model": "nobody/nothing-like-this"}, "weights", "is not on this machine"),
    "unknown strategy": (lambda place: {"strategy": "z"}, "memory", "unknown strategy 'z'"),
    "custom without targets": (lambda place: {"strategy": "custom"}, "memory", "needs target_modules"),
    "output is a file": (lambda place: {"output": str(place / "file")}, "output", "cannot be written"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_wrong_plan_is_one_failing_line_with_a_fix(scenes, tmp_path, no_views, monkeypatch, case):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "file").write_text("x")
    change, what, word = BROKEN[case]
    findings = examine(Plan(**({"data": str(scenes), "model": "random"} | change(tmp_path))))
    finding = of(what, findings)
    assert [f.what for f in findings if f.status == "fail"] == [what], "one fault is said once"
    assert word in finding.found and finding.fix and "\n" not in str(finding)
    assert of("python", findings).status == "ok", "the other checks go on"


@pytest.mark.parametrize(
    "name, fix",
    [
        ("facade_dslr_undistorted.7z", "unpack facade_dslr_undistorted.7z"),
        ("facade.7z.part", "the same vggt_lora_download command goes on"),
        ("", "--list"),
    ],
)
def test_data_that_was_never_unpacked_is_told_from_no_data(tmp_path, name, fix):
    if name:
        (tmp_path / name).write_bytes(b"7z")
    finding = doctor.check_data(Plan(data=str(tmp_path)))[0]
    assert finding.status == "fail" and fix in finding.fix


def test_scenes_that_are_broken_are_named_beside_those_that_are_not(scenes, tmp_path):
    good = next(p for p in scenes.iterdir() if p.is_dir())
    for name in ("good", "no_photo", "cut_photo", "text"):
        shutil.copytree(good, tmp_path / name)
    first = sorted((tmp_path / "no_photo").rglob("*.JPG"))[0]
    first.unlink()
    photo = tmp_path / "cut_photo" / first.relative_to(tmp_path / "no_photo")
    photo.write_bytes(photo.read_bytes()[:2000])
    next((tmp_path / "text").rglob("cameras.txt")).write_text("not a camera\n")
    findings = [f for f in doctor.check_data(Plan(data=str(tmp_path))) if f.what == "scene"]
    assert [f.status for f in findings] == ["fail", "ok", "fail", "fail"] and all(
        f.fix for f in findings if f.status == "fail"
    )
    assert "cut_photo" in findings[0].found and first.name in findings[2].found and "cameras.txt" in findings[3].found


@pytest.mark.parametrize("limit", [doctor.LOADED, 0], ids=["loaded", "header only"])
def test_weights_that_are_not_whole_or_not_these_are_found(weights, tmp_path, monkeypatch, limit):
    """Small files are loaded, large ones judged by their header: both must see the same faults."""
    monkeypatch.setattr(doctor, "LOADED", limit)
    folder = shutil.copytree(weights, tmp_path / "net")
    path, plan = folder / "model.safetensors", Plan(model=str(folder))
    assert doctor.check_weights(plan)[0].status == "ok"
    # a mapped file must not be cut
    whole, tensors = path.read_bytes(), {k: t.clone() for k, t in load_file(path).items()}
    name = "depth_head.norm.bias"
    for content in (whole[:-100], whole[:200], b"", struct.pack("<Q", 10**9) + b"{}"):
        path.write_bytes(content)
        with pytest.raises(WeightsError, match="model.safetensors"):
            doctor.check_weights(plan)
    for changed in (
        {k: v for k, v in tensors.items() if k != name},
        tensors | {"extra": torch.ones(1)},
        tensors | {name: tensors[name].half()},
        tensors | {name: torch.ones(3)},
        {k: v for k, v in tensors.items() if not k.startswith("camera_head")},
    ):
        save_file(changed, path)
        assert doctor.run_check(doctor.check_weights, plan)[0].status == "fail"
    path.unlink()
    torch.save(tensors, folder / "model.pt")
    assert doctor.check_weights(plan)[0].status == "ok"
    (folder / "model.pt").write_bytes((folder / "model.pt").read_bytes()[:-500])
    assert doctor.run_check(doctor.check_weights, plan)[0].status == "fail"


def test_a_disk_that_is_full_and_a_memory_that_is_small(scenes, tmp_path, monkeypatch):
    plan = Plan(data=str(scenes), output=str(tmp_path / "run"), model="facebook/VGGT-1B", strategy="b")
    for free, status in ((10**6, "fail"), (4 * 10**8, "warn"), (10**12, "ok")):
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=free))
        assert doctor.check_output(plan)[0].status == status
    asked = doctor.counted(plan)
    for free, status in ((asked.standing - 1, "fail"), (asked.least - 1, "warn"), (asked.least, "ok")):
        monkeypatch.setattr(doctor, "free_memory", lambda device: (free, "CPU"))
        finding = doctor.check_memory(plan)[0]
        assert (
            finding.status == status
            and "7,717,920 of 1,157,941,492" in finding.found
            and doctor.amount(asked.least) in finding.found
        )


def test_a_folder_without_rights_is_told(tmp_path, monkeypatch):
    """Root may write everywhere, so the refusal is made here."""
    def refuse(**options):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(doctor.tempfile, "NamedTemporaryFile", refuse)
    finding = doctor.check_output(Plan(output=str(tmp_path / "run")))[0]
    assert finding.status == "fail" and "Permission denied" in finding.found and finding.fix


def test_a_package_that_is_missing_or_too_old_is_told(monkeypatch, no_views, scenes):
    honest = metadata.version

    def version(name):
        if name == "peft":
            raise metadata.PackageNotFoundError(name)
        return "0.1" if name == "safetensors" else honest(name)
    monkeypatch.setattr(metadata, "version", version)
    finding = doctor.check_packages(Plan())[0]
    assert (
        finding.status == "fail"
        and "peft is missing" in finding.found
        and "safetensors 0.1 is not >=" in finding.found
        and finding.fix == doctor.INSTALL
    )
    monkeypatch.setitem(sys.modules, "peft", None)  # import now fails as if it were not there
    assert doctor.run_check(doctor.check_peft, Plan())[0].status == "fail"


def test_torch_and_the_gpu_must_fit(monkeypatch):
    cuda = torch.cuda
    monkeypatch.setattr(cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "nvidia_here", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert doctor.check_torch(Plan())[0].status == "warn"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert doctor.check_torch(Plan())[0].status == "fail" and "driver" in doctor.check_torch(Plan())[0].fix
    monkeypatch.setattr(cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "get_device_name", lambda: "GPU of tomorrow")
    monkeypatch.setattr(cuda, "get_device_capability", lambda: (99, 0))
    monkeypatch.setattr(
        torch.Tensor,
        "cuda",
        lambda self: (_ for _ in ()).throw(RuntimeError("CUDA error: no kernel image is available")),
    )
    finding = doctor.check_torch(Plan())[0]
    assert finding.status == "fail" and "sm_990" in finding.found and "no kernel image" in finding.found


def test_a_check_that_breaks_is_a_line_and_the_exit_status_is_one(monkeypatch, capsys):
    def check_stars(plan):
        raise ZeroDivisionError("no stars")
    monkeypatch.setattr(doctor, "CHECKS", (doctor.check_python, check_stars))
    monkeypatch.setattr(doctor, "check_views", lambda plan: [])
    assert main(["--model", "random"]) == 1
    said = capsys.readouterr().out
    assert "fail  stars" in said and "ZeroDivisionError: no stars" in said and "training cannot start" in said


def test_make_train_asks_the_doctor_first():
    done = subprocess.run(["make", "-n", "train", "ARGS=-p strategy c"], cwd=ROOT, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if "vggt_lora_doctor" in line or "papermill nbs/" in line]
    assert ["vggt_lora_doctor --papermill -p strategy c" in lines[0], "papermill nbs/03_train.ipynb" in lines[1]] == [
        True,
        True,
    ]
