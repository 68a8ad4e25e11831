"""Trackers: each gets every record once, from the first process; a package that is missing is one line before any work.
"""
import json

import pytest

from vggt_lora.core import ConfigError
from vggt_lora.training.run import curve_name
from vggt_lora.train import TrainConfig, train

SMALL = {
    "epochs": 1,
    "frames": 2,
    "overlap": 0.0,
    "image_size": 56,
    "scenes": "demo_a,demo_held",
    "hold_out": "demo_held",
    "preflight": "off",
}


def test_a_stub_tracker_gets_every_record_once(tmp_path, monkeypatch):
    from accelerate import tracking

    class Stub(tracking.GeneralTracker):
        name, requires_logging_directory, seen, finished = "wandb", False, [], 0

        def __init__(self, run_name, **settings):
            super().__init__()

        @property
        def tracker(self):
            return self

        def store_init_configuration(self, values):
            pass

        def log(self, values, step=None, **settings):
            Stub.seen.append((step, values))

        def finish(self):
            Stub.finished += 1

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Stub)
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: ["tensorboard", "wandb"])
    run = train(TrainConfig(output=str(tmp_path / "run"), report_to="wandb", **SMALL))
    records = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == len(Stub.seen) > 2 and Stub.finished == 1
    for record, (step, values) in zip(records, Stub.seen):
        numbers = {n: v for n, v in record.items() if isinstance(v, (int, float)) and n not in ("step", "epoch")}
        assert step == record["step"] and all(values[curve_name(record["split"], n)] == v for n, v in numbers.items())
    assert not list((run.folder / "tensorboard").iterdir())


def test_a_missing_package_is_one_line_before_any_work(tmp_path):
    for name, words in (("comet_ml", "pip install comet_ml"), ("wandbb", "Did you mean 'wandb'")):
        with pytest.raises(ConfigError, match=words):
            train(TrainConfig(output=str(tmp_path / "run"), report_to=name, **SMALL))
    assert not (tmp_path / "run").exists()
