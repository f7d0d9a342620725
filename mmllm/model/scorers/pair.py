"""How well an answer fits the clip, by an image-text model."""

from __future__ import annotations

from dataclasses import replace

from mmllm.contract.errors import UserError
from mmllm.contract.registry import register
from mmllm.contract.scorer import Scorer
from mmllm.data.media.guard import GuardedReader
from mmllm.data.media.sampling import Sampling
from mmllm.data.records.alignment_levels import Pair, media_and_answer
from mmllm.data.records.conversations import Sample


@register("scorer", "pair")
class PairScorer(Scorer):
    """Cosine of the first clip or image and the answer.

    Args:
        name: hub id or folder of CLIP, SigLIP or the like, or a run with the objective `contrastive`.
        frames: frames of a video; a run reads its own number.
        device: where it runs.
    """

    def __init__(self, *, name: str, frames: int = 8, device: str = "cpu") -> None:
        from mmllm.model.contrastive_scorer import TrainedPair, is_run

        self.trained = TrainedPair(name, device) if is_run(name) else None
        self.pair = None if self.trained else Pair(name, device)
        self.sampling, self.reader = Sampling(frames=frames), GuardedReader()

    def score(self, sample: Sample, answer: str) -> float:
        """See `Scorer`.

        Raises:
            UserError: no medium to compare with, or it cannot be read.
        """
        answered = replace(sample, messages=[*sample.messages, {"role": "assistant", "content": answer}])
        found = media_and_answer(answered)
        if found is None:
            raise UserError(f"sample {sample.id}", "no medium to compare an answer with", hint="--scorer words")
        if self.trained is not None:
            return self.trained.score(sample.id, found[0], answer)
        return self.pair.score(self.reader.read(found[0], self.sampling).frames, answer)
