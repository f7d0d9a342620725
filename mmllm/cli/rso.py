"""`mmllm data rso`."""

from __future__ import annotations

import argparse
import json
import random
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmllm.cli.common import calm_libraries, common, flag, given_path
from mmllm.contract.arguments import Count, Positive, bind
from mmllm.contract.errors import UserError
from mmllm.contract.files import append_lines

if TYPE_CHECKING:
    from mmllm.contract.scorer import Scorer
    from mmllm.data.records.conversations import Sample
    from mmllm.model.modeling import MMLLMForConditionalGeneration
    from mmllm.processing.processor import MMLLMProcessor

EPILOG = """\
examples:
  mmllm data rso questions.jsonl --model runs/mine --scorer pair name=runs/clip --out pairs.jsonl
  mmllm data rso questions.jsonl --model runs/mine --scorer words --make best --candidates 8 --out best.jsonl
  mmllm data rso questions.jsonl --model runs/mine --scorer mine --plugin mine.py --out pairs.jsonl

Run again, it continues. Pairs train with the objective `preference`: loss sigmoid or hinge, beta 0.05.
"""


def configure(verbs: argparse._SubParsersAction) -> None:
    """Add the action and its flags."""
    what = "pairs of a better and a worse answer of a model's own, by rejection sampling (RSO), or its best answers"
    formatter = argparse.RawDescriptionHelpFormatter
    parser = verbs.add_parser("rso", help=what, description=what, epilog=EPILOG, formatter_class=formatter)
    parser.add_argument("data", type=given_path, metavar="FILE", help="a data file; answers at its end are left out")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="arguments of the scorer")
    parser.add_argument("--model", required=True, help="run folder or model folder that answers")
    parser.add_argument("--scorer", required=True, help="pair, words, or one of a plug-in")
    parser.add_argument("--out", type=given_path, required=True, metavar="OUT.jsonl", help="what is written")
    parser.add_argument("--make", choices=["pairs", "best"], default="pairs", help="pairs, or the best of n answers")
    parser.add_argument("--candidates", type=flag(Count), default=64, help="answers per question (default 64)")
    parser.add_argument("--keep", type=flag(Count), default=8, help="answers accepted of them (default 8)")
    parser.add_argument("--beta", type=flag(Positive), default=0.5, help="temperature of acceptance (default 0.5)")
    parser.add_argument(
        "--ranking", choices=["first_round", "tournament"], default="first_round", help="how pairs meet"
    )
    parser.add_argument("--temperature", type=flag(Positive), default=1.0, help="of the model's answers (default 1)")
    parser.add_argument("--new-tokens", type=flag(Count), default=64, help="length of an answer (default 64)")
    parser.add_argument("--limit", type=flag(Count), help="only the first records")
    parser.add_argument("--root", type=given_path, help="folder that media paths are relative to")
    common(parser, "--quiet", "--plugin", "--seed", "--device", "--dtype")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Ask, score, sample and write, record by record."""
    from mmllm.api import load
    from mmllm.contract.registry import find
    from mmllm.data.records.conversations import open_source
    from mmllm.device import pick_device
    from mmllm.progress import Progress

    calm_libraries()
    cls = find("scorer", options.scorer, "--scorer")
    given = dict(word.split("=", 1) if "=" in word else (word, None) for word in options.overrides)
    scorer = cls(**bind(cls, given, f"--scorer {options.scorer}"))
    source = open_source(options.data, options.root)
    total = min(len(source), options.limit or len(source))
    done = _done(options.out)
    model, processor = load(options.model, device=pick_device(options.device), dtype=options.dtype or "auto")
    bar, written = Progress("records", total, quiet=options.quiet), 0
    with closing(bar):
        for number in range(total):
            sample = _question(source[number])
            if sample.id not in done:
                lines = _records(sample, model, processor, scorer, options, number)
                append_lines(options.out, [json.dumps(line, ensure_ascii=False) for line in lines])
                written += len(lines)
            bar.update(number + 1)
    print(f"{written} records -> {options.out}" + (f" ({len(done)} questions were done before)" if done else ""))
    return 0


def _done(out: Path) -> set[str]:
    """Questions that an earlier run wrote something about."""
    if not out.is_file():
        return set()
    found = set()
    for line in out.read_text(encoding="utf-8").splitlines():
        try:
            found.add(str(json.loads(line)["question"]))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(out, "holds something else", hint="another --out") from error
    return found


def _question(sample: Sample) -> Sample:
    """A conversation without its last answer, which becomes the field `answer`."""
    if sample.messages[-1]["role"] != "assistant":
        return sample
    (answer,) = sample.answers()[-1:]
    return replace(sample, messages=sample.messages[:-1], fields={**sample.fields, "answer": answer})


def _records(
    sample: Sample,
    model: MMLLMForConditionalGeneration,
    processor: MMLLMProcessor,
    scorer: Scorer,
    options: argparse.Namespace,
    number: int,
) -> list[dict[str, Any]]:
    """What is written about one question; nothing where its answers have equal rewards, so that it is asked again."""
    from mmllm.data.records.formats.messages import as_record
    from mmllm.data.records.rejection_sampling import RANKINGS, distinct, rejection_sample

    answers = _answers(sample, model, processor, options, number)
    candidates = distinct(answers, [scorer.score(sample, answer) for answer in answers])
    record = {**as_record(replace(sample, fields={})), "question": sample.id}
    if options.make == "best":
        best = max(candidates, key=candidates.__getitem__)
        messages = [*record["messages"], {"role": "assistant", "content": best}]
        return [{**record, "messages": messages, "score": candidates[best]}]
    texts, draw = list(candidates), random.Random(f"{options.seed} {number}").random
    accepted, _ = rejection_sample(list(candidates.values()), options.keep, options.beta, draw)
    pairs = list(RANKINGS[options.ranking]([texts[index] for index in accepted], candidates))
    scores = [{"chosen_score": candidates[one], "rejected_score": candidates[other]} for one, other in pairs]
    return [
        {**record, "id": f"{sample.id}-{index}", "chosen": one, "rejected": other, **scores[index]}
        for index, (one, other) in enumerate(pairs)
    ]


def _answers(
    sample: Sample,
    model: MMLLMForConditionalGeneration,
    processor: MMLLMProcessor,
    options: argparse.Namespace,
    number: int,
) -> list[str]:
    """Sampled answers, stripped; empty ones are left out unless there is nothing else."""
    import torch

    torch.manual_seed(options.seed * 1_000_003 + number)
    batch = processor.apply_chat_template(
        [sample.messages], tokenize=True, return_dict=True, add_generation_prompt=True
    ).to(model.device)
    output = model.generate(
        **batch,
        do_sample=True,
        temperature=options.temperature,
        num_return_sequences=options.candidates,
        max_new_tokens=options.new_tokens,
    )
    texts = processor.tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    found = [text.strip() for text in texts]
    return [text for text in found if text] or found[:1]
