"""The teacher of a distillation: a finished model, held still, that reads the same clips as the student."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mmllm.api import load
from mmllm.contract.errors import UserError
from mmllm.contract.library import pretrained
from mmllm.model.folder import model_folder
from mmllm.model.foreign.convert import family_of, published_processor
from mmllm.processing.processor import MMLLMProcessor
from mmllm.train.machine import join, precision

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mmllm.model.modeling import MMLLMForConditionalGeneration
    from mmllm.train.context import StageContext

FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@lru_cache(maxsize=2)
def teacher_processor(folder: str) -> MMLLMProcessor:
    """The teacher's processor, once per process.

    Raises:
        UserError: no model there.
    """
    family = family_of(folder)
    if family is not None:
        return published_processor(folder, family)
    return pretrained(MMLLMProcessor, str(model_folder(folder)))


def load_teacher(folder: str, context: StageContext) -> MMLLMForConditionalGeneration:
    """The teacher on the student's device and in its number format, without gradient.

    Raises:
        UserError: no model there, or a vocabulary other than the student's.
    """
    model, _ = load(Path(folder), dtype=FORMATS[precision(context.options)])
    return model.to(join(context.options).device).eval().requires_grad_(False)


def shared_vocabulary(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> int:
    """How many ids both tokenizers have, each for the same token.

    Raises:
        UserError: an id stands for different tokens.
    """
    where, hint = "objective distillation: teacher", "a teacher with the student's tokenizer"
    theirs, ours = teacher.get_vocab(), student.get_vocab()
    for token, number in ours.items():
        if theirs.get(token, number) != number:
            what = f"another vocabulary: {token!r} is {theirs[token]} there and {number} here"
            raise UserError(where, what, hint=hint)
    missing = [token for token in ours if token not in theirs]
    if missing:
        what = f"another vocabulary: it lacks {len(missing)} of the student's tokens ({missing[0]!r} ...)"
        raise UserError(where, what, hint=hint)
    return len(ours)
