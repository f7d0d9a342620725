"""Smaller frames through the same encoders, and their tokens at the places of more."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mmllm.contract.batch import VisualInputs
from mmllm.contract.errors import UserError
from mmllm.contract.parts import Encoder
from mmllm.contract.types import MediaSpec, VisualTokens
from mmllm.model.encoder_bank import EncoderBank
from mmllm.model.front_end_plan import FrontEndPlan


def side_for(plan: FrontEndPlan, keep: float) -> float:
    """The largest share of the frames' sides at which a video, and an image, make at most `keep` of their tokens.

    Raises:
        UserError: an encoder reads one size only, or not even the smallest frames are few enough.
    """
    most = max(encoder.output_spec(MediaSpec("image", 1)).grid.h for encoder in _gridded(plan.bank))
    media = [plan.nominal(kind) for kind in ("video", "image")]
    whole = [sum(spec.tokens for spec in plan.streams(one)) for one in media]
    least, defect = [], None
    for side in range(most - 1, 0, -1):
        try:
            small = small_bank(plan.bank, side / most)
            found = [sum(spec.tokens for spec in plan.streams_through(small, one)) for one in media]
        except UserError as error:  # a part may have no way with this size, and have one with a smaller
            defect = error
            continue
        if all(few <= max(1, int(keep * many + 1e-9)) for few, many in zip(found, whole, strict=True)):
            return side / most
        least = found
    if not least and defect is not None:
        raise defect
    what = f"smaller frames make no fewer than {least} of {whole} tokens (video, image)"
    raise UserError("reduce pixels", what, hint="a larger keep, or another reducer")


def _gridded(bank: EncoderBank) -> list[Encoder]:
    found = [encoder for encoder in bank.encoders.values() if encoder.output_spec(MediaSpec("image", 1)).grid]
    if len(found) < len(bank.encoders):
        raise UserError("reduce pixels", "an encoder's tokens have no rows and columns", hint="another reducer")
    return found


def small_bank(bank: EncoderBank, share: float) -> EncoderBank:
    """The encoders for frames whose sides have this share of their tokens, weights shared.

    Raises:
        UserError: an encoder reads one size only.
    """
    small = EncoderBank({})
    for name, encoder in bank.encoders.items():
        grid = encoder.output_spec(MediaSpec("image", 1)).grid
        try:
            if grid is None:
                raise ValueError("its tokens have no rows and columns")
            small.encoders[name] = encoder.shrunk(max(1, int(share * grid.h + 1e-9)))
        except ValueError as error:
            raise UserError(f"reduce pixels: encoders.{name}", str(error), hint="another reducer") from error
    return small


def small_visual(visual: VisualInputs, bank: EncoderBank, small: EncoderBank) -> VisualInputs:
    """The media of a batch at the size that the small encoders read.

    Raises:
        UserError: an image in tiles, whose size decides how many there are.
    """
    return {**visual, "media": [_smaller(clip, bank, small) for clip in visual["media"]]}


def _smaller(clip: dict[str, Any], bank: EncoderBank, small: EncoderBank) -> dict[str, Any]:
    if clip["spec"].tiles is not None:
        raise UserError("reduce pixels", "an image in tiles: fewer pixels are fewer tiles", hint="another reducer")
    pixels = {}
    for name, encoder in bank.encoders.items():
        if (frames := clip.get("pixels", {}).get(encoder.geometry)) is not None:
            target = small.encoders[name].geometry
            pixels[target] = _resized(frames, target.height, target.width)
    return {key: value for key, value in clip.items() if key not in ("features", "keys")} | {"pixels": pixels}


def _resized(frames: Tensor, height: int, width: int) -> Tensor:
    small = torch.nn.functional.interpolate(frames.float(), size=(height, width), mode="bilinear", antialias=True)
    return small.round().clamp(0, 255).to(torch.uint8)


def spread(streams: list[list[VisualTokens]], visual: VisualInputs, plan: FrontEndPlan) -> list[list[VisualTokens]]:
    """The tokens of each stream at evenly spaced places among as many as whole frames have.

    Raises:
        UserError: smaller frames make as many tokens, since a part fixes their number.
    """
    found = []
    for (clip, _), own in zip(visual["pairs"], streams, strict=True):
        specs = plan.streams(visual["media"][clip]["spec"])
        found.append([_placed(tokens, spec.tokens) for tokens, spec in zip(own, specs, strict=True)])
    return found


def _placed(tokens: VisualTokens, count: int) -> VisualTokens:
    few = tokens.values.shape[1]
    if few >= count:
        what = f"smaller frames make {few} tokens instead of {count}: a part fixes their number"
        raise UserError("reduce pixels", what, hint="another reducer")
    place = torch.arange(count, device=tokens.values.device)
    index = ((torch.arange(few, device=place.device) + 0.5) * (count / few)).long()
    present = torch.zeros(1, count, dtype=torch.bool, device=place.device).index_fill(1, index, True)
    nearest = (place * few // count).clamp_max(few - 1)
    values = tokens.values.new_zeros(1, count, tokens.values.shape[2]).index_copy(1, index, tokens.values)
    return replace(
        tokens,
        values=values,
        grid=None,
        positions=tokens.positions[:, nearest],
        sizes=tokens.sizes[:, nearest] * present,
        extras={"present": present},
        sources=None,
    )
