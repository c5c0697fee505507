"""What every test shares: one thread, fixed seeds, uninitialised memory that is NaN, hypothesis profiles."""

import os
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from dials import SEQUENCES, STRANGERS
from hypothesis import HealthCheck, settings
from interpreter import DEVICE

with warnings.catch_warnings():  # of libraries that transformers imports where they are installed
    warnings.simplefilter("ignore")
    import transformers.cache_utils  # noqa: F401

_slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
_common = {"deadline": None, "suppress_health_check": _slow, "derandomize": True, "database": None}
settings.register_profile("default", max_examples=30, **_common)
settings.register_profile("ci", max_examples=200, **_common)


@pytest.fixture
def device() -> torch.device:
    """Where a kernel test runs: tensors that it makes are there."""
    with torch.device(DEVICE) as device:
        yield device


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--sequences",
        type=int,
        default=int(os.environ.get("KVIST_SEQUENCES", SEQUENCES)),
        help="sequences that the state machine runs, over all methods; may be millions (also: KVIST_SEQUENCES)",
    )
    parser.addoption(
        "--strangers",
        type=int,
        default=int(os.environ.get("KVIST_STRANGERS", STRANGERS)),
        help="changed files that are opened, over all doors; may be a million (also: KVIST_STRANGERS)",
    )
    parser.addoption(
        "--families",
        default="some",
        choices=("some", "all"),
        help="families of models that the sweep runs: one of each kind, or all that transformers has, with their table",
    )


def pytest_terminal_summary(terminalreporter) -> None:
    """The sweep's table, where all of it ran."""
    if terminalreporter.config.getoption("--families") != "all":
        return
    done = [report for name in ("passed", "failed", "skipped") for report in terminalreporter.stats.get(name, [])]
    rows = [str(value) for report in done for key, value in report.user_properties if key == "row"]
    for line in ("| family | what is done: what becomes of it |", "|:--|:--|", *sorted(rows)):
        terminalreporter.write_line(line)


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    if not config.getoption("--hypothesis-profile", None):
        settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.fixture
def sequences(request: pytest.FixtureRequest) -> int:
    """How many sequences the state machine is to run in all."""
    return request.config.getoption("--sequences")


@pytest.fixture
def strangers(request: pytest.FixtureRequest) -> int:
    """How many changed files are opened in all."""
    return request.config.getoption("--strangers")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def uninitialised_is_nan():
    """`torch.empty` gives NaN (or the largest integer), so that reading room nobody wrote to shows."""
    deterministic, fills = (
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fills
    torch.use_deterministic_algorithms(deterministic)
