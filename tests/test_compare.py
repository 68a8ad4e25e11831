"""Comparisons: the parameters, the batch file that Slurm would get, and a page that a real browser shows without asking
for anything else.
"""
import os
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import browser  # noqa: E402
from vggt_lora.commands import EvaluateConfig
from vggt_lora.compare import CompareConfig, compare_runs, read_record
from vggt_lora.comparison.page import comparison_page
from vggt_lora.comparison.launch import executor_for, run_point
from vggt_lora.core import ConfigError
from vggt_lora.evaluation.metrics import EvaluatedFrame
from vggt_lora.evaluation.pictures import save_pictures
from vggt_lora.files.atomic import write_json
from vggt_lora.predict import PredictConfig
from vggt_lora.scenes.reconstruct import ReconstructConfig
from vggt_lora.settings import settings_of
from vggt_lora.train import TrainConfig

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    "config", [TrainConfig, CompareConfig, PredictConfig, ReconstructConfig, EvaluateConfig], ids=lambda c: c.__name__
)
def test_every_setting_is_checked(config):
    """Each refuses a value of another type, a choice that is none, and numbers beyond its range."""
    needed = {"photos": "x", "scene": "y"} if config is ReconstructConfig else {}
    for field in settings_of(config):
        wrong = {str: 7, int: "7", float: "7", bool: "true"}[field.type]
        with pytest.raises(ConfigError, match=f"{field.name} must be {field.type.__name__}( or None)?, got"):
            config(**{**needed, field.name: wrong})
        if field.choices:
            with pytest.raises(ConfigError, match=f"unknown {field.name} 'nonsense'"):
                config(**{**needed, field.name: "nonsense"})
        for beyond in (field.range[0] - 1, field.range[1] + 1) if field.range else ():
            with pytest.raises(ConfigError, match=f"{field.name} must lie between .*, got"):
                config(**{**needed, field.name: beyond})


SBATCH = """#!/bin/sh
for last; do :; done
cp "$last" "$SENT"
echo "Submitted batch job 12"
"""


def test_a_grid_goes_to_slurm_as_one_job_array(tmp_path, monkeypatch):
    """A stand-in for sbatch keeps what it is sent: one array, so many at a time, with the options that were given."""
    for name in ("sbatch", "srun"):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(SBATCH)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SENT", str(tmp_path / "sent.sh"))
    executor = executor_for(
        tmp_path / "runs", "slurm", 2.0, slurm_array_parallelism=3, slurm_partition="gpu", gpus_per_node=1, mem_gb=40
    )
    points = [("train.ipynb", str(tmp_path / "runs" / str(i)), {"seed": i}, {}, str(tmp_path)) for i in range(5)]
    jobs = executor.map_array(run_point, *zip(*points))
    sent = (tmp_path / "sent.sh").read_text()
    for line in ("--array=0-4%3", "--partition=gpu", "--gpus-per-node=1", "--time=120", "--mem=40GB"):
        assert f"#SBATCH {line}" in sent, sent
    assert [job.job_id for job in jobs] == [f"12_{i}" for i in range(5)]


def test_without_slurm_the_error_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="cluster 'slurm'"):
        executor_for(tmp_path, "slurm")


def invented_run(folder: Path, strategy: str, seed: int, factor: float):
    """A run folder with known numbers and names that want to be markup."""
    hard = np.random.default_rng(7).gamma(4, 0.04, 12)
    values = {
        "base": hard,
        "adapted": hard * factor * (1 + 0.05 * np.random.default_rng([seed, ord(strategy)]).standard_normal(12)),
    }
    rows = [
        {
            "model": model, "scene": "<hall>", "photo": f"{i:02}.jpg", "alignment": "median per image",
            "absrel": float(v), "d1": float(1 - v),
        }
        for model, found in values.items()
        for i, v in enumerate(found)
    ]
    write_json(
        folder / "config.json",
        {
            "config": {"strategy": strategy, "seed": seed, "data": "<img src=x onerror=alert(1)>"},
            "environment": {"code": "x"},
        },
    )
    write_json(folder / "results.json", {"protocol": {"truth": "laser"}, "frames": rows, "table": []})
    write_json(folder / "resource_usage.json", {"trainable": 100, "seconds": 10.0})
    (folder / "metrics.jsonl").write_text(
        "".join(f'{{"step": {i}, "split": "{s}", "loss": {1 / (1 + i)}}}\n' for i in range(3) for s in ("train", "val"))
    )
    truth = np.linspace(6, 14, 48)[None, :] * np.ones((32, 1))
    depth = {"base": truth * 2 + 1, "adapted": truth}
    maps = [
        EvaluatedFrame(
            "<hall>", "0.jpg", np.full((32, 48, 3), 0.5), truth, truth > 0, None, None, True, 1.0, None, depth=depth
        )
    ]
    save_pictures(folder / "pictures.npz", maps)
    return read_record(folder)


def test_the_page_in_a_real_browser(tmp_path):
    missing = browser.what_is_missing()
    if missing:
        pytest.skip(missing)
    records = [
        invented_run(tmp_path / f"{s}{seed}", s, seed, factor)
        for s, factor in (("a", 0.7), ("b", 1.0))
        for seed in (0, 1)
    ]
    page = tmp_path / "comparison.html"
    states = {"c": {"state": "failed", "error": "<script>document.title = 'broken'</script>"}}
    page.write_text(comparison_page(compare_runs(records), "Comparison <b>x</b>", states), encoding="utf-8")
    with browser.chromium(tmp_path / "profile") as driver:
        driver.get(page.as_uri())
        assert driver.title == "Comparison <b>x</b>"
        assert "Take strategy=a" in driver.find_element("css selector", ".lead").text
        widths = driver.execute_script(
            "return [...document.images].map(image => image.complete ? image.naturalWidth : 0)"
        )
        assert len(widths) == 3 and min(widths) > 300
        asked = driver.execute_script(
            "return performance.getEntriesByType('resource').map(entry => entry.name).filter(name => "
            "!name.startsWith('data:'))"
        )
        assert asked == [] and driver.execute_script("return document.querySelectorAll('script').length") == 0
        driver.set_window_size(600, 900)  # a narrow window: tables scroll by themselves, the page does not
        assert driver.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
        assert browser.severe_log_lines(driver) == []
        driver.save_screenshot(str(tmp_path / "comparison.png"))
