"""`mmllm flops`."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from mmllm.cli.common import calm_libraries, common, flag, print_json, reduce_flags, settings
from mmllm.contract.arguments import Count

EPILOG = """\
examples:
  mmllm flops llava_onevision_video model.media.frames=32
  mmllm flops ppllava --reduce none --reduce random --reduce aim --keep 0.25
  mmllm flops llava --image --answer 128

Multiply-adds of one medium, a question and an answer. Nothing is loaded and nothing is run.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    parser.epilog = EPILOG
    parser.description = "What an answer costs: tower, connector, prefill and decoding apart."
    parser.add_argument("recipe", help="a shipped name or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--image", action="store_true", help="of an image instead of a video")
    parser.add_argument("--frames", type=flag(Count), help="frames of the video (default: the recipe's own)")
    parser.add_argument("--text", type=flag(Count), default=100, help="tokens of text in the prompt (default 100)")
    parser.add_argument("--answer", type=flag(Count), default=32, help="tokens of the answer (default 32)")
    reduce_flags(parser)
    common(parser, "--json", "--plugin", "--trust-remote-code")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the table."""
    calm_libraries()
    from mmllm.checks.flops import costs, render
    from mmllm.config.recipe import load
    from mmllm.model.blueprint import Blueprint

    blueprint = Blueprint.of(load(options.recipe, options.overrides))
    kind = "image" if options.image else "video"
    found = costs(blueprint, settings(options), kind, options.frames, options.text, options.answer)
    if options.json:
        print_json({"recipe": blueprint.recipe.name, "costs": [asdict(cost) for cost in found]})
    else:
        print(render(found))
    return 0
