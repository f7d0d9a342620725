"""The base classes of the parts: a part is an ordinary module with typed arguments that declares its output shape."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmllm.contract.arguments import signature
from mmllm.contract.types import Geometry, MediaSpec, Needs, PromptFeatures, TokenSpec, VisualTokens


class NoPrompt(ValueError):
    """A part reads the prompt, but no text source is named for it."""


@dataclass(frozen=True)
class Site:
    """The surroundings that a part is built for.

    Attributes:
        inputs: specs of its inputs, for the recipe's own media.
        llm_width: width of the LLM's embeddings; the meaning of `width: llm`.
        prompt_width: width of the text source's tokens, or None.
        prompt_joint: width of the text source's joint space, or None.
    """

    inputs: tuple[TokenSpec, ...] = ()
    llm_width: int = 0
    prompt_width: int | None = None
    prompt_joint: int | None = None

    def width(self, width: int | str) -> int:
        """A `width` argument as a number: "llm" is the LLM's width.

        Raises:
            ValueError: neither a number above 0 nor "llm".
        """
        if width == "llm":
            return self.llm_width
        if isinstance(width, str):
            raise ValueError(f'width is a number or "llm", not {width!r}')
        if width < 1:
            raise ValueError(f"width is 1 or more, not {width}")
        return width

    def text_width(self) -> int:
        """Width of the prompt's tokens, for a part that requires them.

        Raises:
            NoPrompt: no text source is named for it.
            ValueError: the text source gives ids alone.
        """
        if self.prompt_width is None:
            raise NoPrompt("reads the prompt: give it a text source")
        if not self.prompt_width:
            raise ValueError("reads the prompt's features, and its text source gives ids alone")
        return self.prompt_width


class Part(nn.Module):
    """A part on the way from pixels to LLM.

    A part uses only its arguments. Its parameters depend on widths and arguments, never on a clip's grid, and
    its token counts on `MediaSpec` alone.
    """

    kind: ClassVar[str] = ""
    registered_name: ClassVar[str] = ""
    idle: tuple[str, ...] = ()
    """Beginnings of names of weights that a checkpoint has and that its output does not depend on."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site

    def needs(self) -> Needs:
        """What the part reads besides its inputs' values."""
        return Needs()

    def output_spec(self, *inputs: TokenSpec) -> TokenSpec:
        """What `forward` will return for inputs of these shapes: arithmetic only, also valid on the meta device.

        Raises:
            ValueError: the inputs do not fit.
        """
        raise NotImplementedError

    def forward(self, *inputs: VisualTokens, **context: Any) -> VisualTokens:
        """One token set from the inputs; `prompt=` is passed where `needs` asks for it."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Write every raw parameter and buffer through `transformers.initialization` (loading starts on meta)."""

    def initialise(self, sources: dict[str, nn.Module]) -> None:
        """Copy from towers, once, for a fresh model; never when loading a checkpoint."""

    def load_weights(self) -> None:
        """Fetch pretrained weights, if the arguments name any; once, for a fresh model."""

    def multiply_adds(self, *inputs: TokenSpec) -> int | None:
        """Multiply-adds per clip, where counting a forward on the meta device would be wrong; otherwise None."""
        return None

    def statistics(self) -> dict[str, Tensor]:
        """Scalars about the last forward that are worth logging, by name; empty by default."""
        return {}

    @classmethod
    def examples(cls) -> Iterator[tuple[dict[str, Any], tuple[TokenSpec, ...]]]:
        """(arguments, input specs) pairs that the part is tested with; a part without any fails the test."""
        raise NotImplementedError(f"{cls.__name__} gives no examples()")


class Tower(Part):
    """A part with its own network, for pixels or text. Built without weights; `load_weights` fetches them.

    Attributes:
        arguments: the keyword arguments that it was built with.
        version: of what it computes. Raise it when equal arguments and weights give a different output than before:
            cached features are then recomputed.
        origins: arguments that only say where weights or tokenizers come from; the digest leaves them out.
    """

    arguments: dict[str, Any]
    version: ClassVar[int] = 1
    origins: ClassVar[tuple[str, ...]] = ("name", "weights", "tokenizer")

    def __new__(cls, /, *args: Any, **arguments: Any) -> Tower:
        """Remember the arguments, so that no subclass can forget one in its digest."""
        tower = super().__new__(cls)
        tower.__dict__["arguments"] = arguments
        return tower

    @property
    def trainable(self) -> bool:
        """Whether gradients reach its weights; if not, it runs under no_grad and stays in eval mode."""
        return any(parameter.requires_grad for parameter in self.parameters())

    def train(self, mode: bool = True) -> Tower:
        """Training mode for a trainable tower only: a frozen one has no dropout and no running statistics."""
        return super().train(mode and self.trainable)

    @classmethod
    def resolve(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        """Arguments completed so that the tower can be built offline (an inline config beside a name)."""
        return arguments

    def digest(self) -> str:
        """sha256, in hex, of everything that determines its output: class, version, arguments, all weights and buffers.

        The source of a user's own class counts too, since nobody raises a version number while experimenting.

        Raises:
            ValueError: it has no memory (meta device).
        """
        defaults = {name: default for name, (_, default) in signature(type(self)).items()}
        arguments = {key: value for key, value in {**defaults, **self.arguments}.items() if key not in self.origins}
        ours = type(self).__module__.startswith("mmllm.")
        facts = [self.kind, self.registered_name, self.version, "" if ours else _source(type(self)), arguments]
        text = json.dumps(facts, sort_keys=True, default=repr)
        digest = hashlib.sha256(text.encode())
        for name, tensor in sorted({**dict(self.named_parameters()), **dict(self.named_buffers())}.items()):
            if tensor.is_meta:
                raise ValueError(f"{name} has no memory: no digest of a shape")
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor_bytes(tensor))
        return digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> bytes:
    """The bytes of a tensor of any shape, scalar and empty ones included, for a digest."""
    return tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes()


def _source(cls: type) -> str:
    """The source of a class, so that an edited plug-in counts as a different one."""
    try:
        return inspect.getsource(cls)
    except (OSError, TypeError):
        return cls.__qualname__


class Encoder(Tower):
    """Pixels to tokens.

    Attributes:
        geometry: how the frames it reads are resized.
        mean: per channel, subtracted from pixels in 0..1.
        std: per channel, divisor of pixels in 0..1.
        frames: number of frames of a clip that it reads (it divides the clip's frames), or None = all of them.
        per_frame: whether the tokens of a frame are independent of the other frames, so that a long clip may be read in
            chunks.
    """

    geometry: Geometry
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    frames: int | None = None
    per_frame: bool = True

    def frames_of(self, media: MediaSpec) -> int:
        """Number of frames of such a clip that it reads.

        Raises:
            ValueError: its own number of frames does not divide the clip's.
        """
        if self.frames is None or media.kind == "image" or media.frames < self.frames:
            return media.frames
        if media.frames % self.frames:
            raise ValueError(f"reads {self.frames} frames, which does not divide a clip of {media.frames}")
        return self.frames

    def shrunk(self, side: int) -> Encoder:
        """The same encoder, weights shared, for frames so small that they have `side` tokens along each side.

        Raises:
            ValueError: it reads one size only.
        """
        raise ValueError("reads one size of frames only")

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 [..., 3, h, w] -> the encoder's dtype, (x / 255 - mean) / std. The only cast of pixels."""
        dtype = next(self.parameters()).dtype
        mean = torch.tensor(self.mean, device=pixels.device).view(3, 1, 1)
        std = torch.tensor(self.std, device=pixels.device).view(3, 1, 1)
        return ((pixels.float() / 255 - mean) / std).to(dtype)

    def output_spec(self, media: MediaSpec) -> TokenSpec:
        """The tokens of one clip of this kind.

        Raises:
            ValueError: the encoder cannot read such a clip.
        """
        raise NotImplementedError

    def extras_spec(self, media: MediaSpec, needs: Needs) -> dict[str, tuple[int, ...]]:
        """{extra: its shape without the batch} that `forward` returns for these needs besides the tokens.

        hidden_states and keys: (N, K, C), one row per token; cls: (T, K, C), one row per frame; K requested
        layers, in the order of the needs.

        Raises:
            ValueError: the encoder does not have that.
        """
        for name in ("hidden_states", "cls", "keys"):
            if getattr(needs, name):
                raise ValueError(f"gives no {name}")
        return {}

    def forward(self, pixels: Tensor, media: MediaSpec, needs: Needs) -> VisualTokens:
        """Tokens of B clips.

        Args:
            pixels: uint8 [B, F, 3, h, w], already in this encoder's geometry.
            media: what the B clips are.
            needs: the union of the needs of all parts that read this encoder.
        """
        raise NotImplementedError


class TextSource(Tower):
    """Prompts to features.

    Attributes:
        width: of `tokens`; 0 = it gives ids alone.
        joint: of `pooled`, the space shared with an image tower; None = no such space.
        length: most tokens of a prompt that are read.
        layered: whether it has layers, requested as `hidden_states`.
    """

    width: int
    joint: int | None = None
    length: int
    layered: bool = True

    def encode(self, text: str) -> list[int]:
        """Ids of one prompt with its start and end, at most `length`; the end is kept where the text is cut."""
        raise NotImplementedError

    def collate(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Rows of ids, padded as the tower expects -> ids [B, L] and mask [B, L] of 1 (real) and 0.

        An empty row stands for no prompt and has one token unmasked; every other row has at least two.
        """
        raise NotImplementedError

    def tokenize(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Prompts -> ids [B, L] and mask [B, L]; a text without a word counts as no prompt."""
        return self.collate([self.encode(text) if text.strip() else [] for text in texts])

    def forward(self, ids: Tensor, mask: Tensor, needs: Needs, embed_tokens: nn.Module | None = None) -> PromptFeatures:
        """Features of B prompts.

        Args:
            ids, mask: [B, L], as returned by `tokenize`.
            needs: which of `tokens` and `pooled` are wanted (`prompt`), and which layers (`prompt_hidden_states`) as
                `hidden_states` [B, L, K, C], numbered as an encoder's layers are.
            embed_tokens: the LLM's table of embeddings, for a source that has none of its own.
        """
        raise NotImplementedError


__all__ = ["Encoder", "Part", "PromptFeatures", "Site", "TextSource", "Tower"]
