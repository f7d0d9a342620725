"""`mmllm inspect tokens`: which patches each visual token stands for, and after which layer it was dropped."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
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
from mmllm.contract.arguments import Count
from mmllm.contract.errors import UserError, nearest
from mmllm.device import pick_device
from mmllm.drawing import SIDE, check_suffix, marked, save

if TYPE_CHECKING:
    import numpy as np
    import torch

    from mmllm.contract.types import VisualTokens
    from mmllm.model.modeling import MMLLMForConditionalGeneration
    from mmllm.processing.collate import VisualBatch
    from mmllm.processing.processor import MMLLMProcessor

GONE = 0.75
"""How much of a patch that was dropped at the door is covered; later ones are covered less."""
ANSWER = 160
"""Longest answer whose places are drawn."""


@dataclass(frozen=True)
class Seen:
    """What became of the patches of one medium.

    Attributes:
        token: [T, h, w], the LLM's visual token that each patch went into; -1 for none.
        dropped: [T, h, w], after which layer it was dropped; -1 at the door, the number of layers if never.
        layers: of the LLM.
        entering: visual tokens that each layer read.
    """

    token: torch.Tensor
    dropped: torch.Tensor
    layers: int
    entering: list[int]


def configure_tokens(verbs: argparse._SubParsersAction) -> None:
    """Add the verb's flags."""
    tokens = verbs.add_parser("tokens", help="which patches each token stands for, and where it is dropped")
    tokens.add_argument("--model", required=True, help="run folder, model folder or published checkpoint")
    medium = tokens.add_mutually_exclusive_group(required=True)
    medium.add_argument("--video", metavar="FILE[#t=START,END]", help="a video")
    medium.add_argument("--image", metavar="FILE", help="an image")
    tokens.add_argument("--question", default="What happens?", help="read beside it; importance depends on it")
    tokens.add_argument("--frames", type=flag(Count), help="frames of the video (default: the model's own)")
    tokens.add_argument("--stream", metavar="NAME", help="of several, by its node (default: the one with most tokens)")
    what = "draw the frames, with the places and moments of the answer: a picture or a clip (may repeat)"
    tokens.add_argument("--out", action="append", type=given_path, metavar="FILE.png|FILE.mp4", help=what)
    reduce_flags(tokens)
    reader_flags(tokens)
    common(tokens, "--json", "--plugin", "--trust-remote-code", "--device", "--dtype")
    tokens.set_defaults(run=run_tokens)


def run_tokens(options: argparse.Namespace) -> int:
    """Print how many tokens are left after each layer, and draw which."""
    for path in options.out or []:
        check_suffix(path)
    calm_libraries()
    from mmllm.api import load
    from mmllm.data.media.loading import MediaLoader
    from mmllm.data.media.types import MediaRef
    from mmllm.processing.grounding import read

    ways = settings(options)
    if len(ways) > 1:
        raise UserError("--reduce", "one at a time", got=", ".join(ways))
    model, processor = load(options.model, device=pick_device(options.device), dtype=options.dtype or "auto")
    processor.loader = MediaLoader(media_reader(options.backend, options.time_limit, options.corrupt))
    model.model.reduce(next(iter(ways.values())))
    medium = MediaRef.parse("video" if options.video else "image", options.video or options.image)
    batch = question_about(processor, [medium], options.question, frames=options.frames)
    seen = look(model, batch.to(model.device), options.stream)
    if options.json:
        facts = {"token": seen.token.tolist(), "dropped": seen.dropped.tolist(), "entering": seen.entering}
        print_json({"layers": seen.layers, **facts})
    else:
        print(_table(seen))
    frames = drawn(batch["visual"]["media"][0]["pixels"], seen) if options.out else None
    if options.out and processor.plan.vocabulary is not None:
        frames = marked(frames, read(answer_of(model, processor, batch), processor.plan.vocabulary))
    for path in options.out or []:
        save(frames, path)
        print(f"wrote {path}", file=sys.stderr)
    return 0


def answer_of(model: MMLLMForConditionalGeneration, processor: MMLLMProcessor, batch: VisualBatch) -> str:
    """What the model says, for the places and moments in it."""
    from mmllm.api import stream_answer

    return "".join(stream_answer(model, processor, batch, max_new_tokens=ANSWER))


def look(model: MMLLMForConditionalGeneration, batch: VisualBatch, stream: str | None = None) -> Seen:
    """What becomes of the patches of a prompt's only medium.

    Args:
        stream: the node of one of several streams; default: the one with most tokens.

    Raises:
        UserError: no such stream, or a part does not say which tokens its own are made of.
    """
    import torch

    front, layers = model.model.front_end, len(model.model.language_model.layers)
    with torch.no_grad():
        (streams,) = front.streams(batch["visual"], model.get_input_embeddings(), sources=True)
        model(**batch)
    number = _stream(front.plan.output[batch["visual"]["media"][0]["spec"].kind], stream, streams)
    tokens = streams[number]
    if tokens.sources is None:
        what = "a part on the way does not say what its tokens are made of"
        raise UserError("model.connector", what, hint="a recipe of pool, token_merge and projectors")
    token, reduction = tokens.sources[0].cpu(), model.reduction
    count = tokens.values.shape[1]
    gone, entering = torch.full((count,), layers), [count] * layers
    if reduction is not None and reduction.last is not None:
        span = next(at for at, row in enumerate(batch["visual"]["spans"].tolist()) if row[3] == number)
        start = int(batch["visual"]["spans"][span, 1])
        gone = reduction.last.dropped[0, start : start + count].cpu()
        if (into := reduction.last.sources.get(span)) is not None:
            places = (gone >= 0).nonzero()[:, 0]  # merged tokens live where one of them was
            into = into.cpu()
            at = torch.where(into < 0, torch.arange(count), places[into.clamp_min(0)])
            token = at[token.clamp_min(0)].masked_fill(token < 0, -1)
        entering = [int(number.sum()) for number in reduction.last.entering]
    dropped = gone[token.clamp_min(0)].masked_fill(token < 0, -1)
    shape = _patches(model, batch, len(token))
    return Seen(token.view(shape), dropped.view(shape), layers, entering)


def _stream(names: list[str], wanted: str | None, streams: list[VisualTokens]) -> int:
    """The position of the stream that is looked at."""
    if wanted is None:
        return max(range(len(streams)), key=lambda number: streams[number].values.shape[1])
    if wanted not in names:
        raise UserError(f"--stream {wanted}", "no such stream", hint=nearest(wanted, names))
    return names.index(wanted)


def _patches(model: MMLLMForConditionalGeneration, batch: VisualBatch, count: int) -> tuple[int, int, int]:
    """Frames, rows and columns of the encoder that the patches belong to."""
    spec = batch["visual"]["media"][0]["spec"]
    for name in model.model.front_end.plan.encoders_of(spec):
        grid = model.model.front_end.bank.encoders[name].output_spec(spec).grid
        if grid is not None and grid.tokens == count:
            return grid.t, grid.h, grid.w
    raise UserError("model.encoders", "its patches have no rows and columns to draw")


def _table(seen: Seen) -> str:
    from mmllm.tables import aligned

    patches = seen.token.numel()
    rows = [("layer", "visual tokens")]
    before = None
    for layer, count in enumerate(seen.entering):
        if count != before:
            rows.append((str(layer), str(count)))
        before = count
    held = len(seen.token[seen.token >= 0].unique())
    return "\n".join([f"{patches} patches in {held} tokens; tokens that enter each layer:", *aligned(rows, left=0)])


def drawn(pixels: dict[Any, torch.Tensor], seen: Seen) -> np.ndarray:
    """Frames [T, H, W, 3] uint8: borders between tokens; the earlier a token is dropped, the more of it is covered."""
    import numpy as np
    import torch

    frames = next(iter(pixels.values())).float().cpu()
    count, rows, columns = seen.token.shape
    frames = frames[:: max(1, len(frames) // count)][:count]
    cell = max(2, -(-SIDE // rows) // 2 * 2)
    size = (rows * cell, columns * cell)
    image = torch.nn.functional.interpolate(frames, size=size, mode="bilinear").permute(0, 2, 3, 1)
    share = GONE * (1 - (seen.dropped + 1).clamp_min(0) / (seen.layers + 1))
    cover = _spread(share, cell)[..., None]
    image = image * (1 - cover)
    token = _spread(seen.token, cell)
    edge = torch.zeros_like(token, dtype=torch.bool)
    edge[:, 1:] |= token[:, 1:] != token[:, :-1]
    edge[:, :, 1:] |= token[:, :, 1:] != token[:, :, :-1]
    image[edge] = 0.5 * image[edge] + 0.5 * image.new_tensor([255.0, 255.0, 0.0])
    return image.round().clamp(0, 255).to(torch.uint8).numpy().astype(np.uint8)


def _spread(values: torch.Tensor, cell: int) -> torch.Tensor:
    """A value for each patch -> for each pixel."""
    return values.repeat_interleave(cell, dim=1).repeat_interleave(cell, dim=2)
