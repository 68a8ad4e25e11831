"""What all tests share."""
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


@pytest.fixture(scope="session", autouse=True)
def drawn_figures():
    """Let runs in this process draw no figures, which cost as much as the steps of a small run; gives what draws them."""
    train = sys.modules.get("vggt_lora.train")
    if train is None:  # no file of tests imports it: nothing is worth seconds of imports
        yield None
        return
    draw = train.save_figures
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "save_figures", lambda run, maps: None)
        yield draw


@pytest.fixture
def figures(drawn_figures, monkeypatch):
    """Let the runs of a test draw their figures, as a user's runs do."""
    if drawn_figures:
        monkeypatch.setattr("vggt_lora.train.save_figures", drawn_figures)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: proves hardening; left out by `make test`, run by `make test-slow`")


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(item.path).stem in HARDENING:
            item.add_marker(pytest.mark.slow)
