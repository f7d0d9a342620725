"""A model trained by the objective `contrastive`, as judge of how a text fits frames."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmllm.contract.errors import UserError

if TYPE_CHECKING:
    import numpy as np


class TrainedPair:
    """Scores as `mmllm.data.align_levels.Pair` does, with towers of a run of ours (`nano/clip`).

    Args:
        run: run folder or model folder. device: where it runs.

    Raises:
        UserError: no model there, or one without a text source.
    """

    def __init__(self, run: str, device: str = "cpu") -> None:
        from mmllm.api import load
        from mmllm.train.objectives.contrastive import Contrastive

        self.model, self.processor = load(run, device=device)
        self.objective = Contrastive()
        if not self.processor.front_end.prompts.sources:
            hint = "a run of the objective contrastive: mmllm train nano/clip"
            raise UserError(run, "has no text source, so it cannot score a text", hint=hint)

    def score(self, frames: np.ndarray, text: str) -> float:
        """Cosine of a clip [T, H, W, 3] uint8 and a text."""
        import torch

        from mmllm.batch import move
        from mmllm.data.align_levels import clip_score
        from mmllm.data.conversations import Sample

        asked = {"role": "user", "content": [{"type": "video", "video": frames}]}
        sample = Sample("pair", [asked, {"role": "assistant", "content": text}], {})
        batch = move(self.objective.prepare([sample], self.processor), self.model.device)
        with torch.no_grad():
            return clip_score(self.model.pooled_images(batch), self.model.pooled_texts(batch)[0])


def is_run(name: str) -> bool:
    """Whether a name is a run folder or a model folder of ours, and not one of the library's."""
    import json

    from mmllm.api import model_folder
    from mmllm.configuration import MMLLMConfig

    try:
        config = json.loads((model_folder(name) / "config.json").read_text(encoding="utf-8"))
    except (UserError, OSError, ValueError):
        return False
    return config.get("model_type") == MMLLMConfig.model_type
