"""The comparison with the official loop, on a checkout of its layout whose network is this project's own: names, layers
and loss reach each other.
"""
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODEL = """
import dataclasses
from vggt_lora.model.vggt import VGGT as Ours, VGGTConfig

class VGGT(Ours):
    def __init__(self, img_size, patch_size, embed_dim, enable_camera, enable_point, enable_depth, enable_track):
        super().__init__(dataclasses.replace(VGGTConfig.tiny(), point_head=enable_point, track_head=enable_track))
        c = self.config
        assert (img_size, patch_size, embed_dim) == (c.img_size, c.patch_size, c.embed_dim)
        assert enable_camera and enable_depth
"""
LOSS = """
import torch

class MultitaskLoss(torch.nn.Module):
    def __init__(self, camera, depth):
        super().__init__()
        self.weights = camera["weight"], depth["weight"]

    def forward(self, predictions, batch):
        frames = batch["images"].shape[:2]
        assert batch["extrinsics"].shape == (*frames, 3, 4) and batch["intrinsics"].shape == (*frames, 3, 3)
        camera = predictions["pose_enc_list"][-1].abs().mean()
        depth = (predictions["depth"][..., 0] - batch["depths"])[batch["point_masks"]].abs().mean()
        return {"objective": self.weights[0] * camera + self.weights[1] * depth}
"""


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "benchmarks/official_step.py", *arguments], cwd=ROOT, capture_output=True, text=True
    )


@pytest.fixture
def checkout(tmp_path):
    for name, content in {
        "vggt/__init__.py": "", "vggt/models/__init__.py": "", "vggt/models/vggt.py": MODEL, "training/loss.py": LOSS,
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return tmp_path


def test_a_folder_without_the_official_code_is_refused(tmp_path):
    done = run("--official", str(tmp_path))
    assert done.returncode and "give a checkout of https://github.com/facebookresearch/vggt" in done.stderr


@pytest.mark.slow
def test_both_sides_are_measured(checkout):
    done = run(
        "--official", str(checkout), "--size", "tiny", "--shape", "2x28x42", "--device", "cpu", "--strategies",
        "forward,b", "--rounds", "1",
    )
    assert done.returncode == 0, done.stderr
    rows = done.stdout.strip().splitlines()[2:]
    assert [row.split()[0] for row in rows] == ["forward", "b"]
    numbers = [float(n) for row in rows for n in re.findall(r"\d+\.\d+", row)]
    assert len(numbers) == 16 and all(n > 0 for n in numbers)


@pytest.mark.slow
def test_other_numbers_of_the_same_network_are_refused(checkout):
    (checkout / "vggt/models/vggt.py").write_text(MODEL + """
    def forward(self, images):
        found = super().forward(images)
        return found | {"depth": 2 * found["depth"]}
""")
    done = run(
        "--official", str(checkout), "--size", "tiny", "--shape", "2x28x42", "--device", "cpu", "--strategies",
        "forward", "--rounds", "1",
    )
    assert done.returncode and "the two forward passes differ" in done.stderr
