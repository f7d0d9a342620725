"""`mmllm convert`."""

from __future__ import annotations

import argparse
import sys

from mmllm.cli.common import calm_libraries, common, given_path, print_json
from mmllm.contract.errors import UserError

EPILOG = """\
examples:
  mmllm convert --model llava-hf/llava-1.5-7b-hf --out models/llava
  mmllm convert --model models/llava --to transformers --out models/back

Families: LLaVA-1.5, LLaVA-NeXT, LLaVA-OneVision, Video-LLaVA. What comes out of the first command has a recipe.yaml,
and is a start for training (`stages.X.init=models/llava`).
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    parser.epilog = EPILOG
    parser.description = "A published checkpoint as a model folder of ours, or a model of ours as one of transformers."
    parser.add_argument("--model", required=True, help="run folder, model folder, folder of transformers, or hub id")
    parser.add_argument("--out", required=True, type=given_path, help="a new folder")
    parser.add_argument("--to", choices=["mmllm", "transformers"], default="mmllm", help="which format (default mmllm)")
    common(parser, "--json", "--quiet", "--dtype", "--trust-remote-code")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Convert."""
    calm_libraries()
    from mmllm.api import load
    from mmllm.contract.files import write_text
    from mmllm.model.foreign.convert import family_of, load_published, save_published

    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise UserError(f"--out {options.out}", "not an empty folder")
    family, dtype = family_of(options.model), options.dtype or "auto"
    if options.to == "transformers":
        model, processor = load(options.model, dtype=dtype)
        written = save_published(model, processor, options.out)
        made = written.config.model_type
    else:
        if family is None:
            raise UserError(f"--model {options.model}", "a model of mmllm already", hint="--to transformers")
        model, processor, recipe = load_published(options.model, family, dtype)
        model.save_pretrained(options.out)
        processor.save_pretrained(options.out)
        write_text(options.out / "recipe.yaml", recipe.dump())
        made = "mmllm"
    count = sum(parameter.numel() for parameter in model.parameters())
    if options.json:
        print_json({"out": str(options.out), "model_type": made, "parameters": count})
    else:
        print(options.out)
        if not options.quiet:
            print(f"{made}, {count:,} parameters", file=sys.stderr)
    return 0
