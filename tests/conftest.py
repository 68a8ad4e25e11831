"""What all tests share."""
import dataclasses
import sys
from pathlib import Path

import pytest

import vggt_lora  # noqa: F401  before any test imports torch: it sets how torch's threads wait

# What proves hardening runs in `make test-slow`. Single tests of other files carry the mark themselves.
HARDENING = {
    "test_adversary": "wrong input by the hundred",
    "test_browser_cloud": "a real browser",
    "test_browser_names": "a real browser",
    "test_browser_notebooks": "every notebook in a real browser",
    "test_gpu": "whole runs on a stand-in for a GPU",
    "test_hostile": "files and names that attack",
    "test_stops": "two processes, of which one is stopped",
    "test_torture": "sudden death and scarcity",
    "test_twice": "everything twice, in processes of their own",
    "test_wheel": "the package built, and installed without the checkout",
}


# Files whose tests take more than a minute, the longest first.
LONGEST = (
    "test_chapters", "test_browser_notebooks", "test_gpu", "test_stops", "test_torture", "test_engine",
    "test_papermill", "test_train", "test_adversary", "test_twice", "test_loop", "test_wheel", "test_adapters",
    "test_dense", "test_demo_buildings",
)


@pytest.fixture(scope="session", autouse=True)
def light_runs():
    """Let runs in this process draw no figures and measure no memory beforehand: each costs more than the steps of a
    small run. Gives both functions as they are; None where no file of tests imports them."""
    train = sys.modules.get("vggt_lora.train")
    if train is None:  # nothing is worth seconds of imports
        yield None
        return
    draw, fit = train.save_figures, train._fit

    def fit_at_once(ready, config, *more):
        return fit(ready, dataclasses.replace(config, preflight="off"), *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "save_figures", lambda run, maps: None)
        patch.setattr(train, "_fit", fit_at_once)
        yield draw, fit


@pytest.fixture
def figures(light_runs, monkeypatch):
    """Let the runs of a test draw their figures, as a user's runs do."""
    monkeypatch.setattr("vggt_lora.train.save_figures", light_runs[0])


@pytest.fixture
def preflights(light_runs, monkeypatch):
    """Let the runs of a test measure memory beforehand, as a user's runs do."""
    monkeypatch.setattr("vggt_lora.train._fit", light_runs[1])


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: proves hardening; left out by `make test`, run by `make test-slow`")


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(item.path).stem in HARDENING:
            item.add_marker(pytest.mark.slow)
    names = [Path(item.path).stem for item in items]
    order = {name: LONGEST.index(name) if name in LONGEST else len(LONGEST) for name in names}
    items.sort(key=lambda item: order[Path(item.path).stem])  # stable: within a file nothing moves
