"""CLIP's objective: the library's loss over the same features, for every way in which a batch is spread."""

from __future__ import annotations

import torch
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

from mmllm.train.objectives.contrastive import ClipLoss


def test_the_loss_and_its_gradients_are_the_librarys():
    generator = torch.Generator().manual_seed(0)
    images, texts = (
        torch.nn.functional.normalize(torch.randn(6, 5, generator=generator), dim=-1).requires_grad_() for _ in "ab"
    )
    loss = ClipLoss(temperature=0.05)
    theirs = image_text_contrastive_loss(texts @ images.T / 0.05)
    wanted = torch.autograd.grad(theirs, (images, texts))
    for parts in (1, 2, 3):
        size = 6 // parts
        ours = sum(
            loss(images[first : first + size], texts[first : first + size], images, texts, first)
            for first in range(0, 6, size)
        )
        torch.testing.assert_close(ours / 6, theirs, atol=1e-6, rtol=1e-6)
        for found, expected in zip(torch.autograd.grad(ours / 6, (images, texts)), wanted, strict=True):
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
