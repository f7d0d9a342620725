"""`mmllm ask`."""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import closing
from typing import TYPE_CHECKING, Any

from mmllm.cli.common import calm_libraries, common, flag, media_reader, print_json, reader_flags
from mmllm.contract.arguments import Count, Positive
from mmllm.device import pick_device

if TYPE_CHECKING:
    from mmllm.processing.collate import VisualBatch
    from mmllm.processing.processor import MMLLMProcessor

EPILOG = """\
examples:
  mmllm ask --model runs/mine --video clip.mp4 "What does the red square do?"
  mmllm ask --model runs/mine --video 'clip.mp4#t=3,8' --frames 16 "Who enters?"
  mmllm ask --model runs/mine --image a.jpg --image b.jpg "What differs?"
"""


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
    parser.add_argument("--model", required=True, help="run folder or model folder")
    parser.add_argument("--video", action=AddMedium, metavar="FILE[#t=START,END]", help="a video (may repeat)")
    parser.add_argument("--image", action=AddMedium, metavar="FILE", help="an image (may repeat)")
    sampling = parser.add_mutually_exclusive_group()
    sampling.add_argument("--frames", type=flag(Count), help="frames of each video (default: the model's own)")
    sampling.add_argument("--fps", type=flag(Positive), help="frames per second of each video, instead of --frames")
    parser.add_argument("--max-new-tokens", type=flag(Count), default=64, help="longest answer (default 64)")
    reader_flags(parser)
    common(parser, "--json", "--quiet", "--plugin", "--trust-remote-code", "--device", "--dtype")
    parser.set_defaults(run=run, media=None)


def run(options: argparse.Namespace) -> int:
    """Ask and print the answer."""
    calm_libraries()
    from mmllm.api import check_new_tokens, load, stream_answer
    from mmllm.data.media.loading import MediaLoader
    from mmllm.data.media.types import MediaRef

    media = [MediaRef.parse(kind, text) for kind, text in options.media or []]
    device = pick_device(options.device)
    model, processor = load(options.model, device=device, dtype=options.dtype or "auto")
    check_new_tokens(processor, options.max_new_tokens, "--max-new-tokens")
    processor.loader = MediaLoader(media_reader(options.backend, options.time_limit, options.corrupt))
    content = [
        {"type": ref.kind, "path": ref.path, "start": ref.start, "end": ref.end, "fps": ref.fps} for ref in media
    ]
    content.append({"type": "text", "text": options.question})
    batch = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
        processor_kwargs={"frames": options.frames, "fps": options.fps},
    ).to(model.device)
    check_new_tokens(processor, options.max_new_tokens, "--max-new-tokens", prompt=batch["input_ids"].shape[1])
    _say(batch, _visual_tokens(batch, processor), options.quiet)
    start, pieces = time.perf_counter(), []
    with closing(stream_answer(model, processor, batch, max_new_tokens=options.max_new_tokens)) as stream:
        for piece in stream:
            pieces.append(piece)
            if not options.json:
                print(piece, end="", flush=True)
    answer = "".join(pieces).strip()
    if options.json:
        seconds = round(time.perf_counter() - start, 3)
        visual = _visual_tokens(batch, processor)
        print_json({"answer": answer, "visual_tokens": visual, "seconds": seconds})
    else:
        print()
    if not answer:
        print("warning: the answer is empty: the first token ends it", file=sys.stderr)
    return 0


def _visual_tokens(batch: VisualBatch, processor: MMLLMProcessor) -> int:
    """The number of visual positions in the prompt."""
    specs = [batch["visual"]["media"][clip]["spec"] for clip, _ in batch["visual"]["pairs"]]
    streams = [processor.plan.streams(spec) for spec in specs]
    return sum(streams[pair][stream].tokens for _, _, pair, stream in batch["visual"]["spans"].tolist())


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
