"""`mmllm inspect`."""

from __future__ import annotations

import argparse
import sys
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
)
from mmllm.cli.inspect_tokens import configure_tokens
from mmllm.contract.arguments import Count
from mmllm.contract.errors import UserError

if TYPE_CHECKING:
    from mmllm.model.front_end_plan import FrontEndPlan
    from mmllm.model.modeling import MMLLMForConditionalGeneration
    from mmllm.processing.processor import MMLLMProcessor
from mmllm.device import pick_device

EPILOG = """\
examples:
  mmllm inspect fusion --model runs/merv --video a.mp4 --video b.mp4
  mmllm inspect fusion --model runs/merv --video a.mp4 --question "What moves?" --out fusion.png
  mmllm inspect tokens --model runs/mine --video a.mp4 --question "What moves?" --reduce aim --keep 0.25 --out a.png
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    parser.epilog = EPILOG
    parser.description = "Look inside a model while it watches."
    verbs = parser.add_subparsers(dest="action", metavar="fusion|tokens", required=True)
    fusion = verbs.add_parser("fusion", help="how much weight each encoder gets, clip by clip")
    fusion.add_argument("--model", required=True, help="run folder or model folder")
    fusion.add_argument("--video", action="append", required=True, metavar="FILE[#t=START,END]", help="may repeat")
    fusion.add_argument("--question", default="", help="for models whose visual tokens depend on it")
    fusion.add_argument("--frames", type=flag(Count), help="frames of each video (default: the model's own)")
    fusion.add_argument("--out", type=given_path, metavar="FILE.png", help="also draw a chart")
    reader_flags(fusion)
    common(fusion, "--json", "--plugin", "--trust-remote-code", "--device", "--dtype")
    fusion.set_defaults(run=run_fusion)
    configure_tokens(verbs)


def run_fusion(options: argparse.Namespace) -> int:
    """Print the stream weights of each fusion, one row per clip."""
    if options.out is not None and options.out.suffix.lower() != ".png":
        raise UserError(f"--out {options.out}", "not a PNG file", expected="FILE.png")
    calm_libraries()
    from mmllm.api import load
    from mmllm.data.media.loading import MediaLoader

    model, processor = load(options.model, device=pick_device(options.device), dtype=options.dtype or "auto")
    processor.loader = MediaLoader(media_reader(options.backend, options.time_limit, options.corrupt))
    streams = fusions(model.model.front_end.plan)
    if not streams:
        raise UserError(options.model, "does not mix encoders", hint="a recipe with a fusion: nano/merv")
    videos = list(dict.fromkeys(options.video))
    rows = [
        {"video": video, **_look(model, processor, video, options.question, options.frames, streams)}
        for video in videos
    ]
    if options.out is not None:
        _draw(rows, streams, options.out)
        print(f"wrote {options.out}", file=sys.stderr)
    print_json(rows) if options.json else print(_render(rows, streams))
    return 0


def fusions(plan: FrontEndPlan) -> dict[str, list[str]]:
    """{node that mixes streams: names of its streams}: their encoders where those differ, otherwise their nodes."""
    inputs = {node.name: node.inputs for node in plan.nodes}
    found = {}
    for name, _, read, spec in plan.walk(plan.nominal("video")):
        if "fusion" in spec.extras and not any("fusion" in given.extras for given in read):
            sources = [_encoder(stream, inputs) for stream in inputs[name]]
            found[name] = sources if len(set(sources)) == len(sources) else list(inputs[name])
    return found


def _encoder(name: str, inputs: dict[str, tuple[str, ...]]) -> str:
    while name in inputs:
        name = inputs[name][0]
    return name


def _look(
    model: MMLLMForConditionalGeneration,
    processor: MMLLMProcessor,
    video: str,
    question: str,
    frames: int | None,
    streams: dict[str, list[str]],
) -> dict[str, Any]:
    """{fusion: {stream: weight}} of one clip."""
    import torch

    from mmllm.data.media.types import MediaRef
    from mmllm.processing.collate import move

    batch = question_about(processor, [MediaRef.parse("video", video)], question, frames=frames)
    visual = move(batch["visual"], model.device)
    with torch.no_grad():
        seen = {
            node: model.model.front_end.tokens_of(visual, node, model.get_input_embeddings())[0] for node in streams
        }
    weights = {node: tokens.extras["fusion"][0].tolist() for node, tokens in seen.items()}
    return {node: dict(zip(streams[node], weights[node], strict=True)) for node in streams}


def _labels(rows: list[dict[str, Any]]) -> list[str]:
    """File names, or paths where names are equal."""
    names = [Path(row["video"]).name for row in rows]
    return names if len(set(names)) == len(names) else [row["video"] for row in rows]


def _render(rows: list[dict[str, Any]], streams: dict[str, list[str]]) -> str:
    from mmllm.tables import aligned

    blocks = []
    for node, names in streams.items():
        lines = [[node, *names]]
        for label, row in zip(_labels(rows), rows, strict=True):
            lines.append([label, *(f"{row[node][name]:.3f}" for name in names)])
        blocks.append("\n".join(aligned(lines)))
    return "\n\n".join(blocks)


def _draw(rows: list[dict[str, Any]], streams: dict[str, list[str]], path: Path) -> None:
    """Stacked bars, one per clip; a panel per fusion."""
    from matplotlib.figure import Figure

    path.parent.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(7, (1.4 + 0.4 * len(rows)) * len(streams)), dpi=110, layout="constrained")
    labels = _labels(rows)
    for axes, (node, names) in zip(figure.subplots(len(streams), squeeze=False)[:, 0], streams.items(), strict=True):
        left = [0.0] * len(rows)
        for name in names:
            shares = [row[node][name] for row in rows]
            axes.barh(range(len(rows)), shares, left=left, height=0.7, label=name)
            left = [start + share for start, share in zip(left, shares, strict=True)]
        axes.set(title=node, xlim=(0, 1), xlabel="weight", yticks=range(len(rows)), yticklabels=labels)
        axes.invert_yaxis()
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
