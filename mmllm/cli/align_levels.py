"""`mmllm data align-levels`."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmllm.cli.common import calm_libraries, common, flag, given_path
from mmllm.contract.arguments import Count
from mmllm.contract.errors import UserError
from mmllm.device import pick_device

if TYPE_CHECKING:
    from mmllm.data.media.types import MediaRef
    from mmllm.data.records.conversations import Source

EPILOG = """\
examples:
  mmllm data align-levels captions.jsonl --pair openai/clip-vit-large-patch14-336 --out captions.levels.jsonl
  mmllm data align-levels more.jsonl --pair openai/clip-vit-large-patch14-336 \\
      --edges captions.levels.edges.json --out more.levels.jsonl
  mmllm data align-levels runs/world/train/caption.jsonl --pair runs/clip --levels 4 \\
      --out runs/world/train/levels.jsonl

Records without a medium get no level. Beside the data, OUT.edges.json keeps the scores between the levels. If their
media are not found from the output folder, records are written as conversations with absolute paths.
"""


def configure(verbs: argparse._SubParsersAction) -> None:
    """Add the action and its flags."""
    what = "how completely texts cover their images: levels from 0 (weak) up, for AlignGPT's pre-training"
    formatter = argparse.RawDescriptionHelpFormatter
    parser = verbs.add_parser("align-levels", help=what, description=what, epilog=EPILOG, formatter_class=formatter)
    parser.add_argument("data", type=given_path, metavar="FILE", help="a data file of JSON records")
    parser.add_argument(
        "--out", type=given_path, required=True, metavar="OUT.jsonl", help="the records with their levels"
    )
    scores = parser.add_mutually_exclusive_group(required=True)
    scores.add_argument("--pair", metavar="NAME", help="image-text model that scores: a hub id, a folder, a run")
    scores.add_argument("--scores", type=given_path, metavar="FILE", help="scores from elsewhere, one number per line")
    parser.add_argument("--levels", type=int, help="number of levels, of equal size (default 8)")
    parser.add_argument(
        "--edges", type=given_path, metavar="FILE", help="use the levels of other data: their edges.json"
    )
    parser.add_argument(
        "--frames", type=flag(Count), default=8, help="frames of a video to score (default 8; a run: its own)"
    )
    parser.add_argument(
        "--root", type=given_path, help="folder that media paths are relative to (default: the file's own)"
    )
    common(parser, "--quiet", "--plugin", "--device")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Score, rank and write."""
    from mmllm.data.records.alignment_levels import (
        level_edges,
        levels_by_edges,
        levels_by_rank,
        media_and_answer,
        with_levels,
    )
    from mmllm.data.records.conversations import open_source

    if options.out.exists() and options.out.samefile(options.data):
        raise UserError(options.out, "the data would be overwritten", hint="--out another.jsonl")
    known = _read_edges(options) if options.edges else None
    count = 8 if options.levels is None else options.levels
    source = open_source(options.data, options.root)
    names, pairs = zip(*((sample.id, media_and_answer(sample)) for sample in source), strict=True)
    scored = [index for index, pair in enumerate(pairs) if pair is not None]
    wanted = [(names[index], *pairs[index]) for index in scored]
    if not scored:
        raise UserError(options.data, "no record has a medium to compare its text with")
    scores = _given(options.scores, len(scored)) if options.scores else _scored(wanted, options)
    found = levels_by_rank(scores, count) if known is None else levels_by_edges(scores, known)
    edges = level_edges(scores, count).tolist() if known is None else known
    levels: list[int | None] = [None] * len(pairs)
    for index, level in zip(scored, found.tolist(), strict=True):
        levels[index] = level
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", encoding="utf-8") as file:
        for record in with_levels(_records(source, options.out.parent), levels):
            file.write(_line(record, options.data))
    if known is None:
        about = {"levels": count, "edges": edges, "pair": options.pair}
        options.out.with_suffix(".edges.json").write_text(json.dumps(about, indent=1))
    sizes = Counter(found.tolist())
    shown = ", ".join(f"{level}: {sizes[level]}" for level in range(len(edges) + 1))
    print(f"{len(scored)} records in {len(edges) + 1} levels ({shown}) -> {options.out}")
    return 0


def _records(source: Source, folder: Path) -> Iterator[dict[str, Any]]:
    """The records, written so that their media are found: unchanged beside the data or the media."""
    from mmllm.data.records.formats.messages import as_record

    stay = folder.resolve() in (source.path.parent.resolve(), source.root.resolve())
    for index in range(len(source)):
        yield source.records[index][0] if stay else as_record(source[index])


def _read_edges(options: argparse.Namespace) -> list[float]:
    path = options.edges
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        edges, pair = [float(edge) for edge in about["edges"]], about.get("pair")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(path, "no edges of levels", hint="the .edges.json that align-levels wrote") from error
    if options.levels not in (None, len(edges) + 1):
        raise UserError(f"--levels {options.levels}", f"{path} makes {len(edges) + 1} levels", hint="leave it out")
    if not _same(pair, options.pair):
        theirs, ours = (f"of {name}" if name else "computed elsewhere" for name in (pair, options.pair))
        print(f"warning: the edges are of scores {theirs}, these are {ours}", file=sys.stderr)
    return edges


def _same(one: str | None, other: str | None) -> bool:
    """Whether two names refer to the same image-text model: hub ids, or paths of the same folder."""
    return one == other or (None not in (one, other) and Path(one).resolve() == Path(other).resolve())


def _given(path: Path, count: int) -> list[float]:
    try:
        scores = [float(line) for line in path.read_text(encoding="utf-8").split()]
    except (OSError, ValueError) as error:
        raise UserError(path, "no scores", expected="one number per line") from error
    if len(scores) != count:
        raise UserError(path, f"{len(scores)} scores for {count} records with a medium")
    return scores


def _scored(pairs: list[Any], options: argparse.Namespace) -> list[float]:
    """A score per record, from its name, medium and text."""
    from mmllm.data.media.guard import GuardedReader
    from mmllm.data.media.sampling import Sampling
    from mmllm.data.records.alignment_levels import Pair
    from mmllm.model.contrastive_scorer import TrainedPair, is_run
    from mmllm.progress import Progress

    calm_libraries()
    device, sampling = pick_device(options.device), Sampling(frames=options.frames)
    bar, scores = Progress("scored", len(pairs), quiet=options.quiet), []
    with GuardedReader() as reader, closing(bar):
        if is_run(options.pair):
            score = TrainedPair(options.pair, device).score
        else:
            pair = Pair(options.pair, device)

            def score(name: str, ref: MediaRef, text: str) -> float:
                return pair.score(reader.read(ref, sampling).frames, text)

        for number, (name, ref, text) in enumerate(pairs, start=1):
            scores.append(score(name, ref, text))
            bar.update(number)
    return scores


def _line(record: dict[str, Any], path: Path) -> str:
    try:
        return json.dumps(record, ensure_ascii=False) + "\n"
    except TypeError as error:
        raise UserError(path, "its records hold more than plain JSON", expected="a .json or .jsonl file") from error
