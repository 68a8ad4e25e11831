"""Predictions as a user makes them: the files are read back by others' code, and wrong input says what is wrong."""
import dataclasses
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vggt_lora.core import ConfigError, SceneError, WeightsError
from vggt_lora.predict import PredictConfig, main, predict
from vggt_lora.scenes.opening import open_scene

sys.path.insert(0, str(Path(__file__).parent))
import browser  # noqa: E402

SMALL = {"model": "tiny", "image_size": 112}


def quiet(*args):
    pass


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder with six photos of a demo building, numbered as a phone does."""
    from vggt_lora.scenes.opening import find_scenes

    folder = tmp_path_factory.mktemp("phone")
    for number, frame in enumerate(open_scene(find_scenes("demo")[0]).frames[:6]):
        shutil.copy(frame.image_path, folder / f"IMG_{number + 8}.JPG")
    return folder


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    return predict(
        PredictConfig(photos="demo", output=str(tmp_path_factory.mktemp("known") / "out"), frames=6, **SMALL), quiet
    )


@pytest.fixture(scope="module")
def free(photos, tmp_path_factory):
    return predict(
        PredictConfig(photos=str(photos), output=str(tmp_path_factory.mktemp("free") / "out"), frames=4, **SMALL), quiet
    )


@pytest.mark.parametrize("which", ["known", "free"])
def test_the_colmap_model_is_exact_and_opens_as_a_scene(which, request):
    import pycolmap

    found = request.getfixturevalue(which)
    model = pycolmap.Reconstruction(found.folder / "sparse")
    assert model.num_reg_images() == len(found.photos) and model.num_points3D() > 1000
    model.update_point_3d_errors()
    assert max(point.error for point in model.points3D.values()) < 0.1
    assert model.compute_mean_track_length() > 1
    scene = open_scene(found.folder)
    assert scene.metric is (which == "known")
    cameras = {
        camera["image"].removeprefix("images/"): camera
        for camera in json.loads((found.folder / "cameras.json").read_text())["cameras"]
    }
    for frame in scene.frames:
        camera = cameras[frame.name]
        assert (
            np.abs(frame.world_to_cam - camera["world_to_cam"]).max() < 1e-6
            and np.abs(frame.K - camera["K"]).max() < 1e-6
        )
        kept = np.load(found.folder / camera["depth"])
        assert kept["depth"].shape == frame.size and kept["confidence"].dtype == np.float32
        with Image.open(found.folder / camera["depth"].replace(".npz", ".png")) as image:
            png = np.asarray(image).astype(np.float64) * float(image.text["depth_scale"])
        assert np.abs(png - kept["depth"]).max() <= kept["depth"].max() / 65535


def test_natural_order_of_the_photos(free):
    assert free.photos.names == tuple(f"IMG_{n}.JPG" for n in range(8, 14))


def test_ply_and_glb_hold_the_same_points(known):
    import trimesh

    ply = trimesh.load(known.folder / "cloud.ply")
    glb = trimesh.load_scene(known.folder / "cloud.glb")
    turn, name = glb.graph[glb.graph.nodes_geometry[0]]
    assert len(ply.vertices) == len(glb.geometry[name].vertices) == len(known.clouds["network"])
    assert np.abs(np.asarray(ply.vertices) - np.asarray(glb.geometry[name].vertices)).max() < 1e-6
    assert np.array_equal(np.asarray(ply.colors)[:, :3], np.asarray(glb.geometry[name].colors)[:, :3])


def test_depth_files_project_onto_each_other_where_they_agree(known):
    """Points of the model that two photos observe have both photos' depth, read from the files."""
    import pycolmap

    model, depths = pycolmap.Reconstruction(known.folder / "sparse"), {}
    off = []
    for point in list(model.points3D.values())[:2000]:
        for element in point.track.elements:
            image = model.images[element.image_id]
            name = f"{known.folder}/depth/{image.name[:-4]}.npz"
            depths.setdefault(name, np.load(name)["depth"])
            column, row = np.floor(image.points2D[element.point2D_idx].xy).astype(int)
            z = (image.cam_from_world() * point.xyz)[2]
            off.append(abs(depths[name][row, column] / z - 1))
    assert len(off) > 2000 and max(off) < 0.011


def test_known_cameras_bring_the_depth_to_metres(known):
    """Measured against the laser depth of the building, which the fit has not seen: the scale is right within 15 %."""
    from vggt_lora.datasets.samples import FrameCache

    scene, cache = known.photos.scene, FrameCache(112, "aspect", "laser")
    ratios = []
    for i in range(len(scene)):
        truth = cache.get(scene, i, known.geometry.depth.shape[1:]).depth
        ratios.append(known.geometry.depth[i][truth.valid] / truth.depth[truth.valid])
    assert 0.85 < np.median(np.concatenate(ratios)) < 1.15
    assert known.facts["models"]["network"]["cameras_against_known"]["rotation_median"] > 0


def test_the_cloud_is_scored_against_the_laser_by_the_code_of_notebook_04(known):
    rows = known.facts["cloud_scores"]
    assert [row["threshold"] for row in rows] == [0.05, 0.1] and 0 < rows[0]["f1"] < rows[1]["f1"] < 1
    assert (
        np.isfinite(known.clouds["network"].error).any() and "cloud against the laser scans" in known.page.read_text()
    )


def test_a_broken_photo_is_left_out_and_named(photos, tmp_path):
    folder = tmp_path / "mixed"
    shutil.copytree(photos, folder)
    (folder / "IMG_9.JPG").write_bytes((folder / "IMG_9.JPG").read_bytes()[:2000])
    (folder / "IMG_11.HEIC").write_bytes(b"")
    with Image.open(folder / "IMG_10.JPG") as lying:
        lying.transpose(Image.Transpose.ROTATE_90).save(folder / "IMG_10.JPG")  # upright among lying ones
    said = []
    found = predict(PredictConfig(photos=str(folder), output=str(tmp_path / "out"), **SMALL), said.append)
    assert list(found.facts["left_out"]) == ["IMG_9.JPG", "other formats"]
    assert any("left out: IMG_9.JPG" in line for line in said)
    assert any("passed over: 1 .HEIC" in line for line in said)
    assert "IMG_9.JPG" in found.page.read_text() and len(found.photos) == 5
    upright = found.photos.names.index("IMG_10.JPG")
    assert not found.photos.inside[upright].all() and found.photos.inside[upright - 1].all()
    depth = np.load(found.folder / "depth" / "IMG_10.npz")["depth"]
    assert ((depth == 0) == ~found.photos.inside[upright]).all()


def test_one_photo_is_a_prediction_without_a_scale(photos, tmp_path):
    found = predict(PredictConfig(photos=str(photos), only="IMG_8.JPG", output=str(tmp_path / "out"), **SMALL), quiet)
    assert len(found.photos) == 1 and "One photo: the depth has no scale" in found.page.read_text()


def test_what_is_wrong_is_said_and_nothing_is_left(photos, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out"

    def fails(error, words, **settings):
        with pytest.raises(error, match=words):
            predict(PredictConfig(**{"photos": str(photos), "output": str(out), **SMALL, **settings}), quiet)
        assert not out.exists()

    fails(SceneError, "holds no photo", photos=str(tmp_path / "empty"))
    fails(SceneError, "no such folder", photos=str(tmp_path / "absent"))
    fails(SceneError, "holds no photo 'x.jpg'", only="x.jpg")
    fails(WeightsError, "no weights", model="absent/a/b")
    fails(ConfigError, "has no adapter", with_base=True)
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    fails(ConfigError, "free some space")
    monkeypatch.undo()
    monkeypatch.setattr("vggt_lora.prediction.network.free_memory", lambda device: (40_000_000, "CPU"))
    fails(ConfigError, "needs about .* GB of memory")
    monkeypatch.undo()
    (out / "mine").mkdir(parents=True)
    with pytest.raises(ConfigError, match="holds other files"):
        predict(PredictConfig(photos=str(photos), output=str(out), **SMALL), quiet)
    assert main(["--photos", str(tmp_path / "empty"), "--model", "tiny"]) == 1
    assert "holds no photo" in capsys.readouterr().err


def test_a_run_whose_base_is_absent_says_how_to_give_it(photos, tmp_path):
    from vggt_lora.adapters.adapter import apply_lora, save_adapter
    from vggt_lora.model.vggt import VGGT

    adapted, _ = apply_lora(VGGT.from_pretrained("tiny"), "b", rank=2)
    folder = save_adapter(adapted, tmp_path / "adapter", {"config": {"model": str(tmp_path / "gone")}})
    settings = {
        "photos": str(photos), "model": str(folder), "output": str(tmp_path / "out"), "image_size": 56,
        "only": "IMG_8.JPG, IMG_9.JPG",
    }
    with pytest.raises(WeightsError, match="give its place with base="):
        predict(PredictConfig(**settings), quiet)
    both = predict(PredictConfig(**settings, base="tiny", with_base=True), quiet)
    assert list(both.solved) == ["adapted", "base"] and (both.folder / "base" / "cameras.json").is_file()
    # the adapter is untrained: both are the same, also after the alignment
    one, other = (s.geometry for s in both.solved.values())
    assert np.abs(one.depth / other.depth - 1).max() < 1e-3


def test_an_adapter_on_the_hub_is_used_by_its_name(photos, tmp_path, monkeypatch):
    """The hub's client is stood in for: what was pushed is a PEFT folder, and one of its files says so."""
    import huggingface_hub

    from vggt_lora.adapters.adapter import apply_lora, save_adapter
    from vggt_lora.model.vggt import VGGT

    adapted, _ = apply_lora(VGGT.from_pretrained("tiny"), "b", rank=2)
    folder, asked = save_adapter(adapted, tmp_path / "adapter", {"config": {"model": "tiny"}}), []
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda repo, name: asked.append((repo, name)) or str(folder / name)
    )
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **more: str(folder))
    found = predict(
        PredictConfig(
            photos=str(photos), model="somebody/houses", only="IMG_8.JPG, IMG_9.JPG", output=str(tmp_path / "out"),
            image_size=56,
        ),
        quiet,
    )
    assert (
        asked == [("somebody/houses", "adapter_config.json")]
        and found.facts["adapted"]
        and found.facts["model"] == "somebody/houses"
    )


@pytest.mark.slow
def test_a_prediction_goes_on_after_a_kill_and_is_not_overwritten(photos, tmp_path, monkeypatch):
    import vggt_lora.prediction.solve as module

    config = PredictConfig(photos=str(photos), output=str(tmp_path / "out"), frames=3, loop=False, **SMALL)
    real, calls = module.predict_window, []

    def killed(*args, **more):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **more)

    monkeypatch.setattr(module, "predict_window", killed)
    with pytest.raises(KeyboardInterrupt):
        predict(config, quiet)
    assert not (tmp_path / "out").exists()
    resumed = predict(config, quiet)
    assert len(calls) == 3 + len(resumed.solved["network"].windows) - 2, "finished windows were predicted again"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    whole = predict(dataclasses.replace(config, output=str(tmp_path / "other")), quiet)
    assert np.array_equal(whole.geometry.depth, resumed.geometry.depth)
    with pytest.raises(ConfigError, match="replace=True"):
        predict(config, quiet)
    assert predict(dataclasses.replace(config, replace=True), quiet).page.is_file()


@pytest.mark.slow
def test_memory_is_predicted(tmp_path):
    """Against what the process really takes, for the largest window that is quick."""
    import subprocess

    # VmHWM is this process's own; getrusage starts at the peak of the process that started it.
    peak = "int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1])"
    code = (
        "import torch\nfrom vggt_lora.prediction.network import load_network, forward_bytes\nm = "
        "load_network('tiny')\nimages = torch.rand(1, 8, 3, 392, 518)\n"
        "m.model(images[:, :1, :, :56, :56], heads=('camera', 'depth'))\n"
        f"start = {peak}\n"
        "with torch.no_grad(): m.model(images, heads=('camera', 'depth'))\n"
        f"print(({peak} - start) * 1024 / forward_bytes(m.config, 8, (392, 518))[1])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0.5 < float(done.stdout) < 1.3, done.stdout


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    missing = browser.what_is_missing()
    if missing:
        pytest.skip(missing)
    with browser.chromium(tmp_path_factory.mktemp("profile") / "p") as driver:
        yield driver


@pytest.mark.slow
def test_the_page_turns_by_mouse_from_a_disk_without_a_network(known, chromium, tmp_path):
    """Opened by file://: a drag changes the picture, the wheel comes nearer, other colours are drawn, a click on a
    camera finds its photo.
    """
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.actions.wheel_input import ScrollOrigin
    from selenium.webdriver.support.ui import Select

    shots = Path(__file__).resolve().parent.parent / "outputs" / "browser"
    shots.mkdir(parents=True, exist_ok=True)
    chromium.get(known.page.as_uri())
    canvas = chromium.find_element("css selector", "#cloud canvas")
    start = browser.photographed(chromium, canvas)
    assert (np.abs(start - [244, 246, 248]).sum(-1) > 30).mean() > 0.05, "next to nothing is drawn"
    assert browser.drag_changes(chromium, canvas, (0, 0)) == 0
    assert browser.drag_changes(chromium, canvas, (180, 60)) > 0.05
    chromium.save_screenshot(str(shots / "predict_turned.png"))
    turned = browser.photographed(chromium, canvas)
    ActionChains(chromium).scroll_from_origin(ScrollOrigin.from_element(canvas), 0, -400).perform()
    nearer = browser.photographed(chromium, canvas)
    assert browser.share_changed(turned, nearer) > 0.05
    Select(chromium.find_element("css selector", "select[aria-label='colour by']")).select_by_visible_text("confidence")
    assert browser.share_changed(nearer, browser.photographed(chromium, canvas)) > 0.05
    chromium.find_element("xpath", "//button[text()='from the start']").click()
    browser.click_on_camera(chromium, canvas, 3)
    browser.wait_for(
        chromium, lambda d: d.find_elements("css selector", "figure.chosen"), "the photo of the clicked camera"
    )
    browser.wait_for(
        chromium,
        lambda d: (
            abs(d.execute_script("return document.querySelector('figure.chosen').getBoundingClientRect().top")) < 900
        ),
        "its place on the page",
    )
    chromium.save_screenshot(str(shots / "predict_photo.png"))
    assert (
        chromium.find_element("css selector", "figure.chosen").get_attribute("id")
        == f"photo-{chromium.execute_script('return window.cloud.state.chosen')}"
    )
    assert [entry for entry in chromium.get_log("browser") if entry["level"] == "SEVERE"] == []
