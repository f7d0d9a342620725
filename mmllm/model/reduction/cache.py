"""The keys and values of a reduced prompt: every layer keeps those that entered it, so that their lengths differ."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache


class ReducedCache(DynamicCache):
    """A cache whose layers differ in length.

    Attributes:
        seen: length of the sequence so far, dropped tokens included: what generating counts on.
        real: for each layer [B, n], which of its entries are no padding.
        full: for each layer, whether all of them are.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0
        self.real: list[Tensor] = []
        self.full: list[bool] = []

    def get_seq_length(self, layer_idx: int | None = None) -> int:
        """The length of the sequence, or how many entries a layer has."""
        if layer_idx is None:
            return self.seen
        return super().get_seq_length(layer_idx) if layer_idx < len(self.layers) else 0

    def note(self, layer: int, real: Tensor, full: bool) -> Tensor:
        """Say which of the tokens that a layer is about to read are no padding -> [B, n] of all its entries."""
        if layer == len(self.real):
            self.real.append(real)
            self.full.append(full)
        else:
            self.real[layer] = torch.cat([self.real[layer], real], dim=1)
            self.full[layer] = self.full[layer] and full
        return self.real[layer]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in another order, for beams."""
        super().reorder_cache(beam_idx)
        self.real = [real.index_select(0, beam_idx.to(real.device)) for real in self.real]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row several times in a row."""
        super().batch_repeat_interleave(repeats)
        self.real = [real.repeat_interleave(repeats, dim=0) for real in self.real]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Some of the rows."""
        super().batch_select_indices(indices)
        self.real = [real[indices.to(real.device)] for real in self.real]

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens, given as a negative number."""
        super().crop(tokens_to_remove)
        self.seen += tokens_to_remove
        self.real = [real[:, :tokens_to_remove] for real in self.real] if tokens_to_remove else self.real

    def bytes(self) -> int:
        """Of all keys and values."""
        held = (tensor for layer in self.layers for tensor in (layer.keys, layer.values))
        return sum(tensor.numel() * tensor.element_size() for tensor in held)
