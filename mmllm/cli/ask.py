"""`mmllm ask`."""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmllm.cli.common import (
    calm_libraries,
    common,
    flag,
    given_path,
    media_reader,
    print_json,
    question_about,
    reader_flags,
    reduce_flags,
    settings,
)
from mmllm.contract.arguments import Count, Positive
from mmllm.contract.errors import UserError
from mmllm.contract.grounding import TimeSpan, Tube
from mmllm.device import pick_device
from mmllm.drawing import check_suffix

if TYPE_CHECKING:
    from mmllm.contract.batch import MediumInputs
    from mmllm.model.modeling import MMLLMForConditionalGeneration
    from mmllm.processing.collate import VisualBatch
    from mmllm.processing.processor import MMLLMProcessor

EPILOG = """\
examples:
  mmllm ask --model runs/mine --video clip.mp4 "What does the red square do?"
  mmllm ask --model runs/mine --video 'clip.mp4#t=3,8' --frames 16 "Who enters?"
  mmllm ask --model runs/mine --image a.jpg --image b.jpg "What differs?"
  mmllm ask --model runs/llava_st --video clip.mp4 --out answer.mp4 "Track the red square."
  mmllm ask --model runs/mine --video clip.mp4 --reduce none --reduce random --reduce aim --keep 0.5 "Who enters?"

Several --reduce or several --model: one line for each, with visual tokens, time and memory.
"""
HEAD = ("visual tokens first/mean/last layer", "first word", "peak", "answer")


class AddMedium(argparse.Action):
    """Keeps --video and --image in the order in which they were given."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        """Record one medium."""
        namespace.media = [*(namespace.media or []), (self.dest, values)]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    parser.epilog = EPILOG
    parser.description = "Ask a model about videos and images; the answer streams to stdout."
    parser.add_argument("question")
    parser.add_argument("--model", required=True, action="append", help="run folder or model folder (may repeat)")
    parser.add_argument("--video", action=AddMedium, metavar="FILE[#t=START,END]", help="a video (may repeat)")
    parser.add_argument("--image", action=AddMedium, metavar="FILE", help="an image (may repeat)")
    sampling = parser.add_mutually_exclusive_group()
    sampling.add_argument("--frames", type=flag(Count), help="frames of each video (default: the model's own)")
    sampling.add_argument("--fps", type=flag(Positive), help="frames per second of each video, instead of --frames")
    what = "draw the places and moments of the answer: a picture or a clip"
    parser.add_argument("--out", type=given_path, metavar="FILE.png|FILE.mp4", help=what)
    parser.add_argument("--max-new-tokens", type=flag(Count), default=64, help="longest answer (default 64)")
    reduce_flags(parser)
    reader_flags(parser)
    common(parser, "--json", "--quiet", "--plugin", "--trust-remote-code", "--device", "--dtype")
    parser.set_defaults(run=run, media=None)


def run(options: argparse.Namespace) -> int:
    """Ask and print the answer, or a table of several."""
    calm_libraries()
    from mmllm.api import check_new_tokens, load, reduce
    from mmllm.data.media.loading import MediaLoader
    from mmllm.data.media.types import MediaRef
    from mmllm.model.reduction.read import visual_tokens

    ways, media = settings(options), [MediaRef.parse(kind, text) for kind, text in options.media or []]
    alone = len(ways) == 1 and len(options.model) == 1
    if len(set(options.model)) < len(options.model):
        raise UserError("--model", "given twice", got=", ".join(options.model))
    if options.out is not None:
        check_suffix(options.out)
        if not alone or not media:
            raise UserError("--out", "draws the answer of one model about a medium")
    found = []
    for path in options.model:
        model, processor = load(path, device=pick_device(options.device), dtype=options.dtype or "auto")
        check_new_tokens(processor, options.max_new_tokens, "--max-new-tokens")
        if options.out is not None and processor.plan.vocabulary is None:
            what = "this model has no words for places and moments"
            raise UserError("--out", what, hint="a model with a vocabulary of coordinates, as nano/llava_st")
        processor.loader = MediaLoader(media_reader(options.backend, options.time_limit, options.corrupt))
        batch = question_about(processor, media, options.question, frames=options.frames, fps=options.fps)
        batch = batch.to(model.device)
        prompt = batch["input_ids"].shape[1]
        check_new_tokens(processor, options.max_new_tokens, "--max-new-tokens", prompt=prompt)
        visual = sum(visual_tokens(batch, processor.plan))
        _say(batch, visual, options.quiet)
        for name, section in ways.items():
            reduce(model, section)
            answer = _answer(model, processor, batch, options.max_new_tokens, show=alone and not options.json)
            found.append(
                {
                    "model": path,
                    "reduce": name,
                    "visual_tokens": visual,
                    **answer,
                    **_places(answer["answer"], batch, processor),
                }
            )
    _print(found, alone, options)
    if options.out is not None:
        _draw(found[0]["answer"], batch, processor, options.out)
    return 0


def _places(answer: str, batch: VisualBatch, processor: MMLLMProcessor) -> dict[str, Any]:
    """What an answer says of when and where, in seconds and shares of the frame; nothing where it says nothing."""
    from mmllm.processing.expansion import seconds_of
    from mmllm.processing.grounding import entry_of, read

    layout = processor.plan.vocabulary
    if layout is None or not batch["visual"]["media"]:
        return {}
    found = read(answer, layout)
    at = partial(seconds_of, times=_subject(batch)["times"])
    things = [TimeSpan(at(span.start), at(span.end)) for span in found.spans] + found.boxes
    if found.tube.boxes:
        things.append(Tube(tuple((at(moment), box) for moment, box in found.tube.boxes)))
    return {"places": [entry_of(thing) for thing in things]} if things else {}


def _subject(batch: VisualBatch) -> MediumInputs:
    """The medium that an answer speaks of: the last in the prompt."""
    visual = batch["visual"]
    clip, _ = visual["pairs"][int(visual["spans"][-1][2])]
    return visual["media"][clip]


def _draw(answer: str, batch: VisualBatch, processor: MMLLMProcessor, path: Path) -> None:
    """Write the medium that an answer speaks of, of an image the view of the whole, with what the answer says."""
    from mmllm.drawing import enlarged, marked, save
    from mmllm.processing.grounding import read

    medium = _subject(batch)
    pixels = next(iter(medium["pixels"].values()))
    pixels = pixels[:1] if medium["spec"].kind == "image" else pixels
    save(marked(enlarged(pixels), read(answer, processor.plan.vocabulary)), path)
    print(f"wrote {path}", file=sys.stderr)


def _answer(
    model: MMLLMForConditionalGeneration, processor: MMLLMProcessor, batch: VisualBatch, most: int, show: bool
) -> dict[str, Any]:
    """An answer, and what it cost; `show` prints it as it comes."""
    from mmllm.api import stream_answer
    from mmllm.device import PeakMemory
    from mmllm.model.reduction.read import tokens_read

    start, first, pieces = time.perf_counter(), None, []
    with (
        PeakMemory(model.device) as peak,
        closing(stream_answer(model, processor, batch, max_new_tokens=most)) as stream,
    ):
        for piece in stream:
            if first is None and piece:
                first = time.perf_counter() - start
            pieces.append(piece)
            if show:
                print(piece, end="", flush=True)
    if show:
        print()
    seconds = time.perf_counter() - start
    return {
        "answer": "".join(pieces).strip(),
        "visual_tokens_by_layer": tokens_read(model, batch)[0],
        "first_word_seconds": round(seconds if first is None else first, 3),
        "seconds": round(seconds, 3),
        "peak_bytes": peak.bytes,
    }


def _print(found: list[dict[str, Any]], alone: bool, options: argparse.Namespace) -> None:
    from mmllm.tables import aligned

    if options.json:
        single = {key: found[0][key] for key in ("answer", "places", "visual_tokens", "seconds") if key in found[0]}
        print_json(single if alone and found[0]["reduce"] == "none" else found[0] if alone else found)
    elif not alone:
        several = ["model"] * (len(options.model) > 1) + ["reduce"] * (len(found) > len(options.model))
        print("\n".join(aligned([[*several, *HEAD], *(_row(one, several) for one in found)], left=len(several))))
    for one in found:
        for place in one.get("places", []) if not options.quiet else []:
            print(_in_words(place), file=sys.stderr)
        if not one["answer"]:
            print("warning: the answer is empty: the first token ends it", file=sys.stderr)


def _in_words(place: dict[str, Any]) -> str:
    """A place or moment for a person."""
    if place["type"] == "time":
        return "from {:.2f} to {:.2f} s".format(*place["time"])
    if place["type"] == "box":
        return "box {:.2f} {:.2f} {:.2f} {:.2f}".format(*place["box"])
    moments = ("{:.2f} s: {:.2f} {:.2f} {:.2f} {:.2f}".format(*row) for row in place["tube"])
    return "track " + ", ".join(moments)


def _row(found: dict[str, Any], named: list[str]) -> list[str]:
    """One line of the table."""
    layers = found["visual_tokens_by_layer"]
    tokens = f"{layers[0]} / {sum(layers) / len(layers):.0f} / {layers[-1]}"
    peak = "-" if found["peak_bytes"] is None else f"{found['peak_bytes'] / 1e9:.2f} GB"
    return [*(found[name] for name in named), tokens, f"{found['first_word_seconds']:.2f} s", peak, found["answer"]]


def _say(batch: VisualBatch, visual: int, quiet: bool) -> None:
    if quiet:
        return
    for clip in batch["visual"]["media"]:
        spec, times = clip["spec"], clip["times"]
        if spec.kind == "image":
            print("1 image", file=sys.stderr)
        else:
            print(f"{spec.frames} frames from {times[0]:.2f} to {times[-1]:.2f} s", file=sys.stderr)
    print(f"{visual} visual tokens, {batch['input_ids'].shape[1]} in the prompt", file=sys.stderr)
