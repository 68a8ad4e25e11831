"""What all tests share."""


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; left out by `python tests/run_all.py --quick`")
