"""Presets: each is a valid configuration, for the command line, the doctor and papermill, and stands in the guide."""
import dataclasses
from pathlib import Path

import pytest

from vggt_lora.doctor import Plan
from vggt_lora.settings import command, read_settings
from vggt_lora.training.config import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
PRESETS = sorted((ROOT / "presets").glob("*.yaml"))


def test_there_are_the_five_that_the_guide_names():
    guide = (ROOT / "nbs" / "guide" / "settings.ipynb").read_text(encoding="utf-8")
    assert len(PRESETS) == 5 and all(f"presets/{path.name}" in guide for path in PRESETS)


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_is_a_configuration(path):
    """It says something, changes every setting that it names, and the command line and the doctor read the same."""
    values = read_settings(TrainConfig, str(path))
    config = TrainConfig.from_parameters(values)
    default = TrainConfig()
    assert values and all(getattr(config, name) != getattr(default, name) for name in values)
    seen = []
    assert command(TrainConfig, seen.append, "train", arguments=["--config", str(path), "--data", "my_house"]) == 0
    assert seen == [dataclasses.replace(config, data="my_house")]
    plan = Plan()
    plan.read_papermill(["-f", str(path), "-p", "data", "my_house"])
    assert plan.data == "my_house" and not plan.unread
    assert all(getattr(plan, name) == value for name, value in values.items() if hasattr(plan, name))
    assert path.read_text(encoding="utf-8").count(f"-f presets/{path.name}") == 1
