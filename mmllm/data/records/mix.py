"""What training reads: a data file of any format, several of them, or a YAML mix.

A mix is LLaVA-NeXT's `datasets: - json_path: ..., sampling_strategy: first:10%` unchanged, plus keys of our own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmllm.contract.documents import read_yaml
from mmllm.contract.errors import UserError, nearest
from mmllm.data.records.conversations import Sample, exists, expand_braces, files_of, open_source
from mmllm.data.records.formats.records import CONTAINERS
from mmllm.data.records.json_files import short
from mmllm.data.records.mixture import Joined, Mixture, Subset, is_positive

MIX_SUFFIXES = frozenset({".yaml", ".yml"})
ENTRY_KEYS = ("json_path", "sampling_strategy", "weight", "root", "format", "start")
TOP_KEYS = ("datasets", "root", "seed", "length")
MOST = 2**40
"""Upper limit of the numbers in a mix: larger ones would overflow what computes with them."""


@dataclass(frozen=True)
class Entry:
    """One data file of a mix.

    Attributes:
        path: the file, folder or name with braces.
        where: `mix.yaml:datasets[0]`, for errors.
        strategy: which records: `all`, or `first:`, `end:` or `random:` with a number or a percentage.
        start: number of records left out at the beginning, before the strategy applies.
        weight: share of the mixture.
        root: the folder that its media paths are relative to.
        format: its name; default: recognised from the file.
    """

    path: Path
    where: str
    strategy: str = "all"
    start: int = 0
    weight: float | None = None
    root: Path | None = None
    format: str | None = None


@dataclass(frozen=True)
class Mix:
    """Data files and how they are combined: mixed if they have weights, otherwise one after the other."""

    entries: tuple[Entry, ...]
    seed: int = 0
    length: int | None = None


def read_mix(path: str | Path, root: str | Path | None = None) -> Mix:
    """The mix that a path stands for; a data file is a mix of itself.

    Args:
        root: the folder that media paths are relative to if the mix does not say.

    Raises:
        UserError: not a mix; names the key.
    """
    path, root = Path(path), Path(root) if root is not None else None
    if path.suffix not in MIX_SUFFIXES:
        return Mix(tuple(Entry(Path(name), name, root=root) for name in _split(str(path))))
    data = _read(path)
    if root is None and data.get("root") is not None:
        root = _find(str(data["root"]), path.parent, None)
    entries = [
        entry
        for index, item in enumerate(data["datasets"])
        for entry in _entries(item, f"{path}:datasets[{index}]", path.parent, root)
    ]
    weighted = [entry for entry in entries if entry.weight is not None]
    if weighted and len(weighted) < len(entries):
        missing = next(entry for entry in entries if entry.weight is None)
        raise UserError(f"{missing.where}.weight", "missing: other datasets have one", hint="a weight for all or none")
    return Mix(tuple(entries), _number(data, "seed", path, 0) or 0, _number(data, "length", path, 1))


def data_files(paths: str | Path | Sequence[str | Path], root: str | Path | None = None) -> list[Path]:
    """All files that the samples come from, including the mixes.

    Raises:
        UserError: one is missing.
    """
    found: list[Path] = []
    for path in _listed(paths):
        found += [Path(path)] if Path(path).suffix in MIX_SUFFIXES else []
        for entry in read_mix(path, root).entries:
            found += files_of(entry.path)
    return found


def load_data(
    paths: str | Path | Sequence[str | Path], root: str | Path | None = None, spill: Path | None = None
) -> Sequence[Sample]:
    """The samples of a data file, a folder, a mix, or several of them joined.

    Args:
        root: the folder that media paths are relative to; default: that of each data file.
        spill: where videos given as bytes in the data are written.

    Raises:
        UserError: a file is missing, empty, broken or of an unknown format.
    """
    joined = []
    for path in _listed(paths):
        mix = read_mix(path, root)
        parts = [open_entry(entry, mix.seed, spill) for entry in mix.entries]
        if mix.entries[0].weight is None:
            joined += parts
        else:
            joined.append(Mixture(parts, [entry.weight for entry in mix.entries], mix.length, mix.seed))
    return joined[0] if len(joined) == 1 else Joined(joined)


def open_entry(entry: Entry, seed: int = 0, spill: Path | None = None) -> Sequence[Sample]:
    """The samples of one data file that its sampling strategy selects.

    Raises:
        UserError: it cannot be read, or the strategy selects nothing.
    """
    source = open_source(entry.path, entry.root, entry.format, spill)
    name, _, amount = entry.strategy.partition(":")
    rest = len(source) - entry.start
    if rest <= 0:
        raise UserError(f"{entry.where}.start", "nothing is left", expected=f"below {len(source)}", got=entry.start)
    if name == "all" and not amount:
        return Subset(source, entry.start, rest) if entry.start else source
    try:
        share = float(amount.removesuffix("%"))
        # as in LLaVA-NeXT: percentages are rounded up
        count = math.ceil(share * rest / 100) if amount.endswith("%") else int(amount)
    except (ValueError, OverflowError):  # not a number, or an infinite one
        count = 0
    if name not in ("first", "end", "random") or count < 1:
        expected = "all, or first:, end: or random: with a number or a percentage"
        raise UserError(f"{entry.where}.sampling_strategy", "unknown", expected=expected, got=entry.strategy)
    count = min(count, rest)
    start = entry.start + (rest - count if name == "end" else 0)
    return Subset(source, start, count, seed if name == "random" else None)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(path, "no such mix", expected="a .yaml file with datasets")
    data = read_yaml(path)
    _check_keys(data, TOP_KEYS, f"{path}:")
    if not isinstance(data.get("datasets"), list) or not data["datasets"]:
        raise UserError(f"{path}:datasets", "missing", expected="a list of json_path: file")
    return data


def _entries(item: object, where: str, folder: Path, root: Path | None) -> list[Entry]:
    """The data files of one item: its braces may stand for several."""
    item = {"json_path": item} if isinstance(item, str) else item
    _check_keys(item, ENTRY_KEYS, f"{where}.")
    for key in ("json_path", "sampling_strategy", "root", "format"):
        if not isinstance(item.get(key, "" if key != "json_path" else None), str):
            raise UserError(f"{where}.{key}", "not a text", got=short(item.get(key)))
    weight = item.get("weight")
    if weight is not None and not is_positive(weight):
        raise UserError(f"{where}.weight", "bad weight", expected="a positive number", got=short(weight))
    if "root" in item:
        root = _find(item["root"], folder, root)
    names = _split(item["json_path"])
    if weight is not None and len(names) > 1:
        raise UserError(f"{where}.weight", f"one weight for {len(names)} files", hint="one dataset per file")
    return [
        Entry(
            path=_find(name, folder, root),
            where=where,
            strategy=item.get("sampling_strategy", "all"),
            start=_number(item, "start", where, 0) or 0,
            weight=weight,
            root=root,
            format=item.get("format"),
        )
        for name in names
    ]


def _split(name: str) -> list[str]:
    """The data files that braces stand for; shards count as one."""
    return [name] if Path(name).suffix in CONTAINERS or exists(Path(name)) else expand_braces(name)


def _find(name: str, folder: Path, root: Path | None) -> Path:
    """The file or folder that a mix names: beside the mix, below the root, or relative to the current folder."""
    paths = [folder / name, *([root / name] if root else []), Path(name)]
    there = (path for path in paths if all(exists(Path(text)) for text in expand_braces(str(path))))
    return next(there, paths[0])


def _check_keys(data: object, known: tuple[str, ...], where: str) -> None:
    if not isinstance(data, dict):
        raise UserError(where.rstrip(":."), "not a map", expected=f"keys among {', '.join(known)}", got=short(data))
    for key in data:
        if key not in known:
            raise UserError(f"{where}{short(key)}", "unknown key", hint=nearest(str(key), list(known)))


def _number(data: dict[str, Any], key: str, where: object, least: int) -> int | None:
    value = data.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MOST):
        raise UserError(f"{where}:{key}", "bad number", expected=f"a whole number >= {least}", got=short(value))
    return value


def _listed(paths: str | Path | Sequence[str | Path]) -> Sequence[str | Path]:
    return [paths] if isinstance(paths, str | Path) else paths
