"""The bases of the parts: a part is an ordinary module with typed arguments that declares its shape arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmllm.contract.types import Geometry, MediaSpec, Needs, PromptFeatures, Term, TokenSpec, VisualTokens


@dataclass(frozen=True)
class Site:
    """Where a part stands: what it is built from.

    Attributes:
        inputs: specs of what it reads, for the recipe's own media.
        llm_width: width of the LLM's embeddings; what `width: llm` means.
        prompt_width, prompt_joint: widths of the text source's tokens and of its joint space, or None.
    """

    inputs: tuple[TokenSpec, ...] = ()
    llm_width: int = 0
    prompt_width: int | None = None
    prompt_joint: int | None = None

    def width(self, width: int | str) -> int:
        """A `width` argument as a number: "llm" is the LLM's width.

        Raises:
            ValueError: neither a number nor "llm".
        """
        if width == "llm":
            return self.llm_width
        if isinstance(width, str):
            raise ValueError(f'width is a number or "llm", not {width!r}')
        return width


class Part(nn.Module):
    """A part of the walk from pixels to LLM.

    A part touches only its arguments. Its parameters depend on widths and arguments, never on a clip's grid, and
    its token counts on `MediaSpec` alone.
    """

    kind: ClassVar[str] = ""
    registered_name: ClassVar[str] = ""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site

    def needs(self) -> Needs:
        """What the part reads beside its inputs' values."""
        return Needs()

    def output_spec(self, *inputs: TokenSpec) -> TokenSpec:
        """What `forward` will return for inputs of these shapes: arithmetic only, valid on a meta copy.

        Raises:
            ValueError: the inputs do not fit.
        """
        raise NotImplementedError

    def forward(self, *inputs: VisualTokens, **context: Any) -> VisualTokens:
        """One token set out of the inputs; `prompt=` and `tables=` arrive where `needs` asks for them."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Write every raw parameter and buffer through `transformers.initialization` (loading starts on meta)."""

    def initialise(self, sources: dict[str, nn.Module]) -> None:
        """Copy from towers, once, for a fresh model; never when loading a checkpoint."""

    def multiply_adds(self, *inputs: TokenSpec) -> int | None:
        """Multiply-adds for one clip, where counting a forward on the meta device would be wrong; else None."""
        return None

    @classmethod
    def examples(cls) -> Iterator[tuple[dict[str, Any], tuple[TokenSpec, ...]]]:
        """(arguments, input specs) pairs with which the part is tested; a part without any fails the test."""
        raise NotImplementedError(f"{cls.__name__} gives no examples()")


class Encoder(Part):
    """Pixels to tokens. Built without weights; `load_weights` fetches them for a fresh model.

    Attributes:
        geometry: how the frames it reads are resized.
        mean, std: per-channel normalisation of pixels in 0..1.
        frames: how many frames of a clip it reads (they divide the clip's frames), or None = all of them.
    """

    geometry: Geometry
    mean: ClassVar[tuple[float, float, float]] = (0.0, 0.0, 0.0)
    std: ClassVar[tuple[float, float, float]] = (1.0, 1.0, 1.0)
    frames: int | None = None

    @property
    def trainable(self) -> bool:
        """Whether gradients reach its weights; else it runs under no_grad and stays in eval mode."""
        return any(parameter.requires_grad for parameter in self.parameters())

    def train(self, mode: bool = True) -> Encoder:
        """Training mode for a trainable encoder only: a frozen one has no dropout and no running statistics."""
        return super().train(mode and self.trainable)

    def frames_of(self, media: MediaSpec) -> int:
        """How many frames of such a clip it reads.

        Raises:
            ValueError: its own number of frames does not divide the clip's.
        """
        if self.frames is None or media.kind == "image" or media.frames < self.frames:
            return media.frames
        if media.frames % self.frames:
            raise ValueError(f"reads {self.frames} frames, which does not divide a clip of {media.frames}")
        return self.frames

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 [..., 3, h, w] -> the encoder's dtype, (x / 255 - mean) / std. The only cast of pixels."""
        dtype = next(self.parameters()).dtype
        mean = torch.tensor(self.mean, device=pixels.device).view(3, 1, 1)
        std = torch.tensor(self.std, device=pixels.device).view(3, 1, 1)
        return ((pixels.float() / 255 - mean) / std).to(dtype)

    @classmethod
    def resolve(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        """Arguments completed so that the encoder can be built offline (an inline config beside a name)."""
        return arguments

    def output_spec(self, media: MediaSpec) -> TokenSpec:
        """The tokens of one clip of this kind.

        Raises:
            ValueError: the encoder cannot read such a clip.
        """
        raise NotImplementedError

    def forward(self, pixels: Tensor, media: MediaSpec, needs: Needs) -> VisualTokens:
        """Tokens of B clips.

        Args:
            pixels: uint8 [B, F, 3, h, w], already in this encoder's geometry.
            media: what the B clips are.
            needs: the union of what the parts that read this encoder declared.
        """
        raise NotImplementedError

    def load_weights(self) -> None:
        """Fetch pretrained weights, if the arguments name any."""


class Objective(nn.Module):
    """What a stage optimises. Runs inside the model's forward, so that gradients are synchronised."""

    kind: ClassVar[str] = "objective"
    registered_name: ClassVar[str] = ""

    def prepare(self, samples: list, processor: Any) -> dict[str, Any]:
        """A batch out of raw samples; runs in a loader worker."""
        raise NotImplementedError

    def counts(self, batch: dict[str, Any]) -> dict[str, int]:
        """{term: denominator} of a batch, without a forward; summed over micro-batches and processes."""
        raise NotImplementedError

    def forward(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Term]:
        """Named sums and counts, out of `model.embed`, `model.run` and `model.logits`."""
        raise NotImplementedError


__all__ = ["Encoder", "Objective", "Part", "PromptFeatures", "Site"]
