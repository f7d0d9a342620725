"""What reaches the language model out of rows of ids with placeholders and given visual rows, by our own splice."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from mmllm.contract.types import LLMInputs, MediaSpec, TokenSpec
from mmllm.model.config import MMLLMConfig
from mmllm.model.modeling import MMLLMModel
from mmllm.processing.collate import Example, Medium, collate


class Given(nn.Module):
    """Stands for a front end: streams [rows, D] of every clip that are known already."""

    def __init__(self, clips: list[list[Tensor]]) -> None:
        super().__init__()
        self.clips = clips
        self.plan = SimpleNamespace(streams=self.specs)

    def blanks(self, visual: dict) -> tuple:
        """None: one process."""
        return ()

    def specs(self, media: MediaSpec) -> list[TokenSpec]:
        """Clip k is a video of k + 1 frames here."""
        return [TokenSpec(media, len(rows), rows.shape[1]) for rows in self.clips[media.frames - 1]]

    def streams(self, visual: dict, embed_tokens: nn.Module | None = None) -> list[list[Tensor]]:
        """Those of each pair's clip."""
        return [self.clips[visual["media"][clip]["spec"].frames - 1] for clip, _ in visual["pairs"]]

    def joined(
        self, streams: list[list[Tensor]], blank: tuple = (), embed_tokens: nn.Module | None = None
    ) -> tuple[Tensor, int]:
        """Pair by pair, stream by stream."""
        return torch.cat([rows for pair in streams for rows in pair]), 0


def row(
    ids: list[int], labels: list[int] | None, placeholder: int, clips: dict[int, list[Tensor]], start: bool
) -> Example:
    """A row of ids as our processor would expand it.

    Args:
        clips: {clip number: its streams}, one for each placeholder of the row, in order.
        start: the first stream stands after the first token, the others at the placeholder.
    """
    own: list[int] = []
    wanted: list[int] = []
    spans: list[tuple[int, int, int]] = []
    left = iter(enumerate(clips.values()))

    def fill(medium: int, stream: int, count: int) -> None:
        spans.append((len(own), medium, stream))
        own.extend([0] * count)
        wanted.extend([-100] * count)

    for place, token in enumerate(ids):
        if token == placeholder:
            medium, streams = next(left)
            for stream in range(int(start), len(streams)):
                fill(medium, stream, len(streams[stream]))
            continue
        own.append(token)
        wanted.append(-100 if labels is None else labels[place])
        if start and place == 0:
            for medium, streams in enumerate(clips.values()):
                fill(medium, 0, len(streams[0]))
    media = [Medium(clip, MediaSpec("video", clip + 1), torch.zeros(clip + 1), {}) for clip in clips]
    return Example(own, None if labels is None else wanted, media, spans)


def embedded(
    table: Tensor, clips: list[list[Tensor]], rows: list[Example], side: str = "right"
) -> tuple[LLMInputs, dict]:
    """The sequence of a batch, and the batch.

    Args:
        table: [V, D], the language model's embeddings. clips: streams of every clip. side: of the padding.
    """
    width = table.shape[1]
    llm = {"model_type": "llama", "vocab_size": len(table), "hidden_size": width, "intermediate_size": 8}
    llm |= {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 2}
    encoder = {"type": "nano_conv", "size": 4, "channels": [4, 4], "grid": [1, 1]}
    connector = [{"type": "linear", "name": "linear", "in": ["nano"]}]
    section = {"media": {"frames": 1}, "encoders": {"nano": encoder}, "connector": connector, "output": "linear"}
    model = MMLLMModel(MMLLMConfig(text_config=llm, model_section=section)).eval()
    model.front_end = Given(clips)
    model.get_input_embeddings().weight.data = table
    batch = collate(rows, 0, side, lambda prompts: {})
    return model.embed(batch["input_ids"], batch["attention_mask"], visual=batch["visual"]), batch
