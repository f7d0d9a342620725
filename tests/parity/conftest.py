"""Reference values by file and case; an array that no test read fails the run, and so does a file without any case.

A test marked `@pytest.mark.golden("merv_fusion", cases=r"(xattn_\\w+)/out")` runs once for every file of that prefix in
the folder of `--goldens` and every case that the pattern finds among the file's keys, with the arguments `golden` and
`case` (without `cases`: `golden` alone). So other files of the same family, of other sizes, are tested too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[2]
OPENED = pytest.StashKey[dict[Path, "Golden"]]()
TESTED = pytest.StashKey[dict[Path, bool]]()


class Golden:
    """The arrays of one file; notes which of them were read.

    Attributes:
        unread: names of arrays that nobody has asked for.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with np.load(path) as file:
            self.arrays = {name: file[name] for name in file.files}
        self.unread = set(self.arrays)

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrays)

    def __getitem__(self, name: str) -> torch.Tensor:
        """An array as a tensor: float32, or int64 where it holds whole numbers or truth values."""
        self.unread.discard(name)
        array = self.arrays[name]
        return torch.from_numpy(np.array(array, np.float32 if array.dtype.kind == "f" else np.int64))

    def exact(self, name: str) -> torch.Tensor:
        """An array of decisions in float64, as it was computed."""
        self.unread.discard(name)
        return torch.from_numpy(np.array(self.arrays[name], np.float64))

    def number(self, name: str) -> float | int:
        """A setting: an array of one number."""
        return self[name].item()

    def under(self, prefix: str) -> dict[str, torch.Tensor]:
        """{rest of the name: tensor} of all arrays whose names start so: weights, for `load_state_dict`."""
        return {name.removeprefix(prefix): self[name] for name in self.arrays if name.startswith(prefix)}


def pytest_configure(config: pytest.Config) -> None:
    """The marker, and where opened files are kept."""
    config.addinivalue_line("markers", "golden(prefix, cases=None, but=()): runs on reference files of that prefix")
    config.stash[OPENED], config.stash[TESTED] = {}, {}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for every file and case."""
    marker = metafunc.definition.get_closest_marker("golden")
    if marker is None:
        return
    folder = REPOSITORY / metafunc.config.getoption("--goldens")
    but = marker.kwargs.get("but", ())
    files = [path for path in sorted(folder.glob(f"{marker.args[0]}*.npz")) if not path.name.startswith(tuple(but))]
    cases = marker.kwargs.get("cases")
    tested = metafunc.config.stash[TESTED]
    tested.update({path: cases is None or tested.get(path, False) for path in files})
    if cases is None:
        metafunc.parametrize("golden", [pytest.param(path, id=path.stem) for path in files], indirect=True)
        return
    rows = []
    for path in files:
        with np.load(path) as file:
            found = (re.fullmatch(cases, name) for name in file.files)
            cases_of_file = dict.fromkeys(match[1] for match in found if match)
        rows += [(path, case) for case in cases_of_file]
        tested[path] |= bool(cases_of_file)
    parameters = [pytest.param(path, case, id=f"{path.stem}-{case}") for path, case in rows]
    metafunc.parametrize(("golden", "case"), parameters, indirect=["golden"])


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """The file that this test was made for; opened once."""
    opened = request.config.stash[OPENED]
    if request.param not in opened:
        opened[request.param] = Golden(request.param)
    return opened[request.param]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the run where an opened file holds arrays that no test compared; not where single tests were picked."""
    if any("::" in argument for argument in session.config.args):
        return
    for path, opened in session.config.stash[OPENED].items():
        if opened.unread:
            names = ", ".join(sorted(opened.unread))
            print(f"\nerror: {path.name}: no test read {names}")
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
    for path, tested in session.config.stash[TESTED].items():
        if not tested:
            print(f"\nerror: {path.name}: no test found a case in it")
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
