"""The list of sabotages fits the tree, and a broken line is broken in a copy alone."""

from __future__ import annotations

import sys
from dataclasses import replace

from sabotage.run import ROOT, Sabotage, Tree, faults, read, table

ONE = Sabotage(
    file="mmllm/contract/arguments.py",
    find='"yes": True, "no": False',
    replace='"yes": True, "no": True',
    breaks="no means yes",
    tests=("tests/contract/test_arguments.py",),
)


def test_every_line_is_there_to_be_broken():
    sabotages = read()
    assert faults(sabotages) == []
    assert len({(one.file, one.find, one.replace) for one in sabotages}) == len(sabotages) >= 110


def test_every_folder_of_code_is_broken():
    broken = {one.folder for one in read()}
    files = [
        path for top in ("mmllm", "encoders", "connectors", "train", "eval") for path in (ROOT / top).rglob("*.py")
    ]
    folders = {str(path.parent.relative_to(ROOT)) for path in files if path.name != "__init__.py"}
    assert folders <= broken


def test_a_list_that_has_rotted_is_told():
    rotten = [
        replace(ONE, find="no such text"),
        replace(ONE, find="value"),
        replace(ONE, replace=ONE.find),
        replace(ONE, replace="(((("),
        replace(ONE, tests=("tests/contract/test_arguments.py::test_nothing",)),
    ]
    said = ["stands 0 times", "times in it: 'value'", "nothing is changed", "no Python any more", "no such test"]
    assert faults([ONE]) == []
    for one, words in zip(rotten, said, strict=True):
        (fault,) = faults([one])
        assert words in fault


def test_a_line_is_broken_in_the_copy_alone(tmp_path):
    before = (ROOT / ONE.file).read_text()
    tree = Tree.copy(ROOT, tmp_path, sys.executable)
    test = tree.path / "tests/contract/test_broken.py"
    test.write_text(
        "from mmllm.contract import arguments\nimport mmllm.train\n\n\n"
        "def test_imported_from_here():\n"
        f"    assert arguments.__file__ == {str(tree.path / ONE.file)!r}\n"
        f"    assert list(mmllm.train.__path__) == [{str(tree.path / 'train')!r}]\n"
        "    assert arguments.parse('no', bool, 'key') is False\n"
    )
    target = ["tests/contract/test_broken.py"]
    try:
        green, said = tree.run(target)
        assert green, said
        with tree.broken(ONE):
            green, said = tree.run(target)
        assert not green and "1 failed" in said, said
    finally:
        tree.close()
    assert (tree.path / ONE.file).read_text() == (ROOT / ONE.file).read_text() == before


def test_the_table_counts_by_folder_and_gives_reasons():
    from sabotage.run import Outcome

    known = replace(ONE, breaks="nothing", known="nobody can tell")
    text = table([Outcome(ONE, True, 1.0), Outcome(known, False, 1.0)])
    assert [line.split() for line in text.splitlines()[1:3]] == [["mmllm/contract", "2", "1"], ["all", "2", "1"]]
    assert "mmllm/contract/arguments.py: nothing (nobody can tell)" in text
