"""Alignment levels: how completely a text covers its image, as ranks of a score cut into groups of equal size.

Source: AlignGPT (Zhao et al. 2024, arXiv 2405.14129), section on pre-training; the authors published ids only, so the
rule for ties and remainders is ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from mmllm.contract.errors import UserError
from mmllm.contract.library import pretrained
from mmllm.data.media.types import MediaRef
from mmllm.data.records.conversations import Sample

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

FIELD = "level"
"""The field of a record that holds its level; 0 is the weakest."""
AUTHORS_FIELD = "similarity"
"""The same in the authors' published records, where it is an integer."""


def level_of(sample: Sample) -> object:
    """The level that a record gives; None if it gives none."""
    theirs = sample.fields.get(AUTHORS_FIELD)
    return sample.fields.get(FIELD, theirs if isinstance(theirs, int) else None)


def levels_by_rank(scores: Sequence[float] | np.ndarray, levels: int) -> np.ndarray:
    """Scores [M] -> level [M] of each: floor(rank * levels / M), ranks by a stable ascending sort.

    Raises:
        UserError: fewer scores than levels, or a score that is not a number.
    """
    import numpy as np

    scores = _checked(scores, levels)
    order = np.argsort(scores, kind="stable")
    rank = np.empty(len(scores), np.int64)
    rank[order] = np.arange(len(scores))
    return rank * levels // len(scores)


def level_edges(scores: Sequence[float] | np.ndarray, levels: int) -> np.ndarray:
    """The lowest score [levels - 1] of every level except the first, to sort new data into these levels."""
    import numpy as np

    scores = np.sort(_checked(scores, levels))
    return scores[[-(-level * len(scores) // levels) for level in range(1, levels)]]


def levels_by_edges(scores: Sequence[float] | np.ndarray, edges: Sequence[float] | np.ndarray) -> np.ndarray:
    """Scores [M] -> level [M]; a score equal to an edge belongs to the level above it.

    Raises:
        UserError: a score is not a number.
    """
    import numpy as np

    return np.searchsorted(np.asarray(edges), _numbers(scores), side="right")


def with_levels(records: Iterable[dict[str, Any]], levels: Iterable[int | None]) -> Iterator[dict[str, Any]]:
    """Records with the field `level`; those whose level is None are left unchanged."""
    for record, level in zip(records, levels, strict=True):
        yield record if level is None else {**record, FIELD: int(level)}


def clip_score(images: Tensor, text: Tensor) -> float:
    """Mean cosine of frames [F, J] with a text [J], both in the space that their towers share."""
    import torch

    images, text = (torch.nn.functional.normalize(value.float(), dim=-1) for value in (images, text))
    return float((images @ text).mean())


class Pair:
    """An image-text model of transformers, with its own processors, that scores how well a text fits frames.

    Args:
        name: hub id or folder.
        device: where it runs.

    Raises:
        UserError: it cannot be loaded, or has no joint space.
    """

    def __init__(self, name: str, device: str = "cpu") -> None:
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        try:
            self.model = pretrained(AutoModel, name).eval().to(device)
            self.processor, self.tokenizer = (
                pretrained(AutoImageProcessor, name),
                pretrained(AutoTokenizer, name),
            )
        except (OSError, ValueError) as error:
            what = f"no such folder, and as a hub id it cannot be loaded ({error.__class__.__name__})"
            raise UserError(name, what, hint=f"hf download {name}") from error
        if not hasattr(self.model, "get_image_features"):
            raise UserError(name, "not an image-text model", expected="CLIP, SigLIP or another with a joint space")
        self.length = self.model.config.text_config.max_position_embeddings

    def score(self, frames: np.ndarray, text: str) -> float:
        """The score of frames [T, H, W, 3] uint8 and a text, which is cut at the tower's maximum length."""
        import torch

        pixels = self.processor(images=list(frames), return_tensors="pt")["pixel_values"]
        # Padded as SigLIP was trained; CLIP reads nothing after the end of a text.
        options = {"padding": "max_length", "truncation": True, "max_length": self.length, "return_tensors": "pt"}
        ids = self.tokenizer([text], **options)["input_ids"]
        with torch.no_grad():
            images = self.model.get_image_features(pixel_values=pixels.to(self.model.device)).pooler_output
            said = self.model.get_text_features(input_ids=ids.to(self.model.device)).pooler_output
        return clip_score(images, said[0])


def media_and_answer(sample: Sample) -> tuple[MediaRef, str] | None:
    """The first medium of a conversation and the assistant's text; None if there is no medium.

    Raises:
        UserError: the medium is not a file.
    """
    media = sample.media()
    if not media:
        return None
    first = media[0]
    if not isinstance(first.get("path"), str):
        raise UserError(sample.id, "its medium is not a file", expected="a record that names a path")
    bounds = {key: first[key] for key in ("start", "end", "fps") if first.get(key) is not None}
    return MediaRef(first["type"], first["path"], **bounds), " ".join(sample.answers())


def _checked(scores: Sequence[float] | np.ndarray, levels: int) -> np.ndarray:
    scores = _numbers(scores)
    if levels < 2:
        raise UserError("align-levels: levels", "too few to tell apart", expected="2 or more", got=levels)
    if len(scores) < levels:
        raise UserError("align-levels", f"{len(scores)} scores for {levels} levels", expected="one or more per level")
    return scores


def _numbers(scores: Sequence[float] | np.ndarray) -> np.ndarray:
    import numpy as np

    scores = np.asarray(scores, np.float64)
    bad = np.flatnonzero(~np.isfinite(scores))
    if len(bad):
        raise UserError(f"align-levels: score {bad[0] + 1}", f"is {scores[bad[0]]}", expected="a number")
    return scores
