"""Clouds on real photographs, and the whole chain from a depth model to files, on data that others made."""
import pytest
import torch

from vggt_lora.datasets.samples import FrameCache, load_sample
from vggt_lora.datasets.windows import make_windows
from vggt_lora.evaluation.clouds import evaluate_clouds, write_clouds
from vggt_lora.evaluation.runner import trusted_truth, window_scale
from vggt_lora.reference_data import real_scene
from vggt_lora.scenes.opening import open_scene
from vggt_lora.scenes.ply import read_ply


def answering(depth):
    """A model that always gives this depth (S, H, W), in the network's unit."""
    return lambda images, heads: {"depth": torch.as_tensor(depth)[None, ..., None]}


@pytest.mark.parametrize("name, supervision", [("strecha_fountain_p11", "laser"), ("eth3d_pipes", "sparse")])
def test_real_scene_without_scans_is_judged_against_its_own_depth(name, supervision, tmp_path):
    folder = real_scene(name)
    if folder is None:
        pytest.skip(f"{name} is not here")
    scene = open_scene(folder)
    window, cache = make_windows(scene, frames=4)[0], FrameCache(long_side=112, supervision=supervision)
    sample = load_sample(scene, window, cache)
    trusted = trusted_truth(sample)
    truth = torch.where(torch.from_numpy(trusted), sample.depth, torch.zeros(())) / window_scale(sample, trusted)
    wobble = 1 + 0.02 * torch.sin(torch.arange(truth.shape[-1]) / 7.0)
    found = evaluate_clouds(
        {"truth": answering(truth), "wavy": answering(truth * wobble)}, [(scene, window)], cache, ("known scale",),
        progress=False,
    )
    f1 = {m: [r["f1"] for r in found.rows if r["model"] == m] for m in ("truth", "wavy")}
    assert min(f1["truth"]) == 1.0
    assert f1["wavy"] == sorted(f1["wavy"]) and f1["wavy"][0] < 0.9 * f1["wavy"][-1]
    row = found.rows[0]
    assert row["truth"].startswith("fused true depth") and supervision in row["truth"]
    assert (row["unit"], row["relative"] is None) == (("m", True) if scene.metric else ("scene units", False))
    files = write_clouds(found, tmp_path, ("ply",))
    assert len(files) == 4 and len(read_ply(tmp_path / f"{scene.name}_truth.ply")) == trusted.sum()
