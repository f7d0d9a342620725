"""Options and fixtures that all tests share."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where the material outside the repository lies."""
    parser.addoption("--shared", default="../shared", help="folder with real clips and annotations")
    parser.addoption("--goldens", default="tests/parity/goldens", help="folder with the reference values")


@pytest.fixture(scope="session")
def shared(request: pytest.FixtureRequest) -> Path:
    """The folder of ``--shared``; the test is skipped where it does not exist."""
    folder = REPOSITORY / request.config.getoption("--shared")
    if not folder.is_dir():
        pytest.skip(f"--shared {folder} does not exist")
    return folder


@pytest.fixture(scope="session")
def goldens(request: pytest.FixtureRequest) -> Path:
    """The folder of ``--goldens``."""
    return REPOSITORY / request.config.getoption("--goldens")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What a test logged of a name that is not UTF-8, as text that a worker of pytest-xdist can send."""
    report = yield
    report.sections = [(name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections]
    return report
