"""What the streams of a fusion are called."""

from __future__ import annotations

from mmllm.cli.inspect import _encoder


def test_a_stream_is_called_by_the_encoder_that_its_first_inputs_lead_to():
    """A bridge reads an encoder and, beside it, plain tokens that may come from anywhere."""
    inputs = {"bridge": ("clip", "plain"), "plain": ("pool",), "pool": ("dino",), "linear": ("bridge",)}
    assert [_encoder(name, inputs) for name in ("linear", "plain", "dino")] == ["clip", "dino", "dino"]
