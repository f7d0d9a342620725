"""Images and texts in one space: the CLIP and SigLIP losses over the whole batch of all processes.

Sources: CLIP (Radford et al. 2021, figure 3), SigLIP (Zhai et al. 2023, algorithm 1).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, distributed, nn

from mmllm.contract.batch import Batch
from mmllm.contract.errors import UserError, nearest
from mmllm.contract.objective import Objective
from mmllm.contract.registry import register
from mmllm.contract.types import Term
from mmllm.data.records.conversations import Sample

if TYPE_CHECKING:
    from torch.autograd.function import FunctionCtx

    from mmllm.contract.parts import TextSource
    from mmllm.processing.processor import MMLLMProcessor


class ClipLoss(nn.Module):
    """Each image picks its text among all texts, and each text its image.

    Args:
        temperature: initial value of the learned temperature, which never falls below 0.01.
    """

    def __init__(self, temperature: float = 0.07) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(-math.log(temperature)))

    def forward(self, images: Tensor, texts: Tensor, all_images: Tensor, all_texts: Tensor, first: int) -> Tensor:
        """Summed over this process's rows [B, J], scored against all [A, J], in which they start at `first`."""
        with torch.no_grad():  # the value itself: clamped only where used, it would get no gradient and never recover
            self.scale.clamp_(max=math.log(100))
        scale = self.scale.exp()
        targets = first + torch.arange(len(images), device=images.device)
        of_images = nn.functional.cross_entropy(scale * images @ all_texts.T, targets, reduction="sum")
        of_texts = nn.functional.cross_entropy(scale * texts @ all_images.T, targets, reduction="sum")
        return (of_images + of_texts) / 2


class SiglipLoss(nn.Module):
    """Every pair of an image and a text is a yes-or-no question.

    Args:
        temperature: initial value of the learned temperature.
        bias: initial value of the learned bias.
    """

    def __init__(self, temperature: float = 0.1, bias: float = -10.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(-math.log(temperature)))
        self.bias = nn.Parameter(torch.tensor(bias))

    def forward(self, images: Tensor, texts: Tensor, all_images: Tensor, all_texts: Tensor, first: int) -> Tensor:
        """Summed over the texts of this process and all images."""
        logits = self.scale.exp() * texts @ all_images.T + self.bias
        own = torch.zeros_like(logits, dtype=torch.bool)
        own[:, first : first + len(texts)].fill_diagonal_(True)
        return -nn.functional.logsigmoid(torch.where(own, logits, -logits)).sum()


LOSSES: dict[str, type[nn.Module]] = {"clip": ClipLoss, "siglip": SiglipLoss}


@register("objective", "contrastive")
class Contrastive(Objective):
    """Pull clips and their descriptions together, and clips and other clips' descriptions apart.

    A sample is a conversation with one clip or image, which the assistant describes. The loss is that of the whole
    batch: the features of all processes are gathered, and each process scores its own rows against all; gradients
    flow back to every process. Micro-batches are refused: they would be compared only within themselves, which is
    another loss.

    The model gives `pooled_images(batch)` [B, J] and `pooled_texts(batch, source)` [B, J], row by row the same pairs.

    Args:
        loss: "clip" or "siglip".
        temperature: initial value of the learned temperature; None = 0.07 for clip, 0.1 for siglip.
        text: the text source that reads the descriptions; None = the only one.
    """

    def __init__(
        self,
        *,
        loss: Literal["clip", "siglip"] = "clip",
        temperature: float | None = None,
        text: str | None = None,
    ) -> None:
        super().__init__()
        if temperature is not None and temperature <= 0:
            raise UserError("objective contrastive: temperature", "must be above 0", got=temperature)
        self.loss = LOSSES[loss]() if temperature is None else LOSSES[loss](temperature)
        self.text = text
        self.waiting = False  # whether a batch was counted and not yet scored

    def prepare(self, samples: list, processor: MMLLMProcessor) -> Batch:
        """Conversations -> clips as `visual`, one pair per sample, and their descriptions as ids and mask [B, L].

        Raises:
            UserError: a sample that is not one clip and its description, or no text source.
        """
        described = [caption_of(sample) for sample in samples]
        source = self._source(processor.plan.prompts.sources)
        ids, mask = source.tokenize([caption for _, caption in described])
        media: dict[Any, int] = {}
        clips, pairs = [], []
        for entry, _ in described:
            medium = processor.read(entry)
            if medium.key not in media:
                media[medium.key] = len(clips)
                clips.append(medium.for_model())
            pairs.append((media[medium.key], -1))
        visual = {"media": clips, "pairs": pairs, "spans": torch.zeros(0, 4, dtype=torch.long)}
        names = [sample.id for sample in samples]
        return {"input_ids": ids, "attention_mask": mask, "visual": visual, "names": names}

    def _source(self, sources: nn.ModuleDict) -> TextSource:
        known = list(sources)
        name = known[0] if self.text is None and len(known) == 1 else self.text
        if name not in known:
            hint = nearest(str(name), known) if known else "model.text: {name: {type: clip_text, ...}}"
            raise UserError("objective contrastive: text", f"no text source is called {name!r}", hint=hint)
        return sources[name]

    def counts(self, batch: Batch) -> dict[str, int]:
        """How many pairs.

        Raises:
            UserError: a second batch came before the first was scored, so gradients are being accumulated.
        """
        if self.waiting:
            what = "micro-batches are compared only within themselves, so their loss differs from the batch's"
            raise UserError("objective contrastive", what, hint="no micro_batch, a smaller batch or more processes")
        self.waiting = True
        return {"contrastive": len(batch["input_ids"])}

    def forward(self, model: nn.Module, batch: Batch) -> dict[str, Term]:
        """The summed loss of this process's rows.

        Raises:
            UserError: the two towers have no common space, or processes have unequal batches.
        """
        self.waiting = False
        images, texts = model.pooled_images(batch), model.pooled_texts(batch, self.text)
        if images.shape != texts.shape:
            what = "images and texts have no common space"
            raise UserError("objective contrastive", what, expected=list(texts.shape), got=list(images.shape))
        with torch.autocast(images.device.type, enabled=False):
            images = nn.functional.normalize(images.float(), dim=-1)
            texts = nn.functional.normalize(texts.float(), dim=-1)
            rows, first = gather(torch.cat([images, texts], dim=-1))
            total = self.loss(images, texts, *rows.chunk(2, dim=-1), first)
        return {"contrastive": Term(total, len(images))}


def caption_of(sample: Sample) -> tuple[dict[str, Any], str]:
    """(clip or image, the assistant's description of it) from a conversation.

    Raises:
        UserError: not exactly one medium and one answer.
    """
    media, answers = sample.media(), [answer.strip() for answer in sample.answers()]
    if len(media) != 1 or not answers or not answers[0]:
        got = f"{len(media)} media, {len(answers)} answers"
        raise UserError(f"sample {sample.id}", "is not a clip and its description", expected="one of each", got=got)
    return media[0], answers[0]


def gather(rows: Tensor) -> tuple[Tensor, int]:
    """The rows [B, J] of all processes [A, J], with gradients to each of them, and the index of this one's first row.

    Raises:
        UserError: processes have unequal numbers of rows.
    """
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return rows, 0
    own = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.zeros_like(own) for _ in range(distributed.get_world_size())]
    distributed.all_gather(counts, own)
    found = [int(count) for count in counts]
    if len(set(found)) > 1:
        raise UserError("objective contrastive", "processes have unequal batches", got=found)
    return _Gather.apply(rows), distributed.get_rank() * len(rows)


class _Gather(torch.autograd.Function):
    """All processes' rows in the forward; in the backward, the sum of all processes' gradients for this one's rows."""

    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor) -> Tensor:
        """[B, J] -> [A, J], in the order of the processes."""
        found = [torch.empty_like(rows) for _ in range(distributed.get_world_size())]
        distributed.all_gather(found, rows.contiguous())
        return torch.cat(found)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:
        """[A, J] -> [B, J], summed over the processes."""
        whole = gradient.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(whole)
        return whole.chunk(distributed.get_world_size())[distributed.get_rank()]
