"""A model trained with the objective `contrastive`, as a scorer of how well a text fits a medium."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from mmllm.contract.errors import UserError
from mmllm.data.records.alignment_levels import clip_score
from mmllm.data.records.conversations import Sample
from mmllm.model.config import MMLLMConfig
from mmllm.model.folder import model_folder
from mmllm.processing.collate import move

if TYPE_CHECKING:
    from mmllm.data.media.types import MediaRef


class TrainedPair:
    """The towers of one of our runs (`nano/clip`), which read a medium as they did in training.

    Args:
        run: run folder or model folder.
        device: where it runs.

    Raises:
        UserError: there is no model, or not one trained with this objective.
    """

    def __init__(self, run: str, device: str = "cpu") -> None:
        from mmllm.api import load
        from mmllm.config.recipe import load as load_recipe
        from mmllm.train.objectives.contrastive import Contrastive
        from mmllm.train.stage import build_objective

        self.model, self.processor = load(run, device=device)
        recipe = load_recipe(model_folder(run) / "recipe.yaml")
        objectives = [build_objective(stage.objective, recipe.where("stages")) for stage in recipe.stages.values()]
        trained = [objective for objective in objectives if isinstance(objective, Contrastive)]
        if not trained:
            hint = "a run of mmllm train nano/clip"
            raise UserError(run, "was not trained with the objective contrastive, so it cannot score a text", hint=hint)
        self.objective = trained[-1]

    def score(self, name: str, ref: MediaRef, text: str) -> float:
        """Cosine of a medium and a text; `name` is the record's, for errors.

        Raises:
            UserError: the medium cannot be read, or the text is empty.
        """
        import torch

        fields = {"type": ref.kind, "path": ref.path, "start": ref.start, "end": ref.end, "fps": ref.fps}
        asked = {"role": "user", "content": [{key: value for key, value in fields.items() if value is not None}]}
        sample = Sample(name, [asked, {"role": "assistant", "content": text}], {})
        batch = move(self.objective.prepare([sample], self.processor), self.model.device)
        with torch.no_grad():
            images, texts = self.model.pooled_images(batch), self.model.pooled_texts(batch, self.objective.text)
        return clip_score(images, texts[0])


def is_run(name: str) -> bool:
    """Whether a name is one of our run or model folders rather than the library's."""
    try:
        config = json.loads((model_folder(name) / "config.json").read_text(encoding="utf-8"))
    except (UserError, OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == MMLLMConfig.model_type
