"""The pixels that an encoder sees are those of its model's own library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmllm.contract.registry import find
from mmllm.data.media.pixels import to_geometry
from mmllm.model.encoder_bank import build_encoder

TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
PATCHES = {**TINY, "image_size": 56, "patch_size": 14}
SIZES = ((90, 70), (57, 200), (241, 333), (97, 64))


def pictures() -> list[Image.Image]:
    """Smooth and noisy pictures of several sizes (height, width)."""
    found = []
    for seed, (height, width) in enumerate(SIZES):
        rng = np.random.default_rng(seed)
        y, x = np.mgrid[:height, :width]
        waves = 127 + 80 * np.sin(y / 9)[..., None] * np.cos(x[..., None] / (5, 11, 23))
        found.append(Image.fromarray(np.clip(waves + rng.normal(0, 25, (height, width, 3)), 0, 255).astype(np.uint8)))
    return found


def ours(encoder: Any, picture: Image.Image) -> torch.Tensor:
    """[3, h, w] as the tower gets it."""
    return encoder.normalise(to_geometry(np.asarray(picture)[None], encoder.geometry))[0]


def library_processor(kind: str, encoder: Any) -> Any:
    """The model's own processor at the encoder's size: picture -> [3, h, w]."""
    import transformers

    side = encoder.geometry.height
    square = {"height": side, "width": side}
    options = {
        "CLIPImageProcessor": {"size": {"shortest_edge": side}, "crop_size": square},
        "SiglipImageProcessor": {"size": square},
        "BitImageProcessor": {
            "size": {"shortest_edge": side * 256 // 224},
            "crop_size": square,
        },
        "VideoMAEImageProcessor": {"size": {"shortest_edge": side}, "crop_size": square},
    }[kind]
    # The published checkpoints bring mean and std of their own, which the class does not have.
    processor = getattr(transformers, kind)(**options, image_mean=list(encoder.mean), image_std=list(encoder.std))
    return lambda picture: torch.as_tensor(processor(picture, return_tensors="pt")["pixel_values"]).flatten(0, -4)[0]


@pytest.mark.parametrize(
    ("kind", "config", "processor"),
    [
        ("clip", PATCHES, "CLIPImageProcessor"),
        ("siglip", PATCHES, "SiglipImageProcessor"),
        ("dinov2", PATCHES, "BitImageProcessor"),
        ("videomae", {**PATCHES, "num_frames": 2, "tubelet_size": 2}, "VideoMAEImageProcessor"),
    ],
)
def test_pixels_are_those_of_the_models_own_processor(kind, config, processor):
    encoder = build_encoder({"type": kind, "config": config}, "encoder")
    theirs = library_processor(processor, encoder)
    for picture in pictures():
        torch.testing.assert_close(ours(encoder, picture), theirs(picture), atol=1e-3, rtol=0)


def publish(folder: Path, model_type: str, processor: str, config: dict[str, Any], **options: Any) -> Any:
    """A folder as a hub id is: config.json and preprocessor_config.json. Returns the processor."""
    import transformers

    transformers.AutoConfig.for_model(model_type, **config).save_pretrained(folder)
    made = getattr(transformers, processor)(**options)
    made.save_pretrained(folder)
    return made


STAGES = {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]}


@pytest.mark.parametrize(
    ("model_type", "processor", "config", "options"),
    [
        ("vit", "ViTImageProcessor", PATCHES, {"size": {"height": 56, "width": 56}}),
        (
            "dinov2_with_registers",
            "BitImageProcessor",
            {**PATCHES, "image_size": 70},
            {"size": {"shortest_edge": 64}, "crop_size": {"height": 56, "width": 56}},
        ),
        ("convnextv2", "ConvNextImageProcessor", STAGES, {"size": {"shortest_edge": 64}}),
        ("convnextv2", "ConvNextImageProcessor", STAGES, {"size": {"shortest_edge": 384}}),
    ],
    ids=["vit", "dinov2_with_registers", "convnext_small", "convnext_large"],
)
def test_a_name_is_completed_with_its_own_transform(model_type, processor, config, options, tmp_path):
    made = publish(tmp_path, model_type, processor, config, **options)
    huggingface = find("encoder", "huggingface")
    arguments = huggingface.resolve({"name": str(tmp_path), "layer": -1})
    assert huggingface.resolve(arguments) == arguments, "complete: nothing is fetched again"
    encoder = build_encoder({"type": "huggingface", **arguments}, "encoder")
    for picture in pictures():
        theirs = made(picture, return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(ours(encoder, picture), theirs, atol=1e-3, rtol=0)
    larger = huggingface.resolve({"name": str(tmp_path), "layer": -1, "size": 448})
    assert larger["size"] == 448
    if arguments["short"] is not None:
        assert larger["short"] == arguments["short"] * 448 // arguments["size"]


def test_what_the_recipe_gives_wins_over_the_processor(tmp_path):
    publish(tmp_path, "vit", "ViTImageProcessor", PATCHES, size={"height": 56, "width": 56})
    given = {"name": str(tmp_path), "mean": [0.1, 0.2, 0.3], "fit": "crop", "short": 64, "size": 56}
    completed = find("encoder", "huggingface").resolve(given)
    assert completed["mean"] == [0.1, 0.2, 0.3]
    assert (completed["fit"], completed["short"], completed["interpolation"]) == ("crop", 64, "bilinear")
    encoder = build_encoder({"type": "huggingface", **completed}, "encoder")
    assert encoder.geometry.short == 64


def test_a_processor_that_no_geometry_can_say_is_refused(tmp_path):
    from mmllm.contract.errors import UserError

    size = {"height": 64, "width": 64}
    publish(tmp_path, "vit", "BitImageProcessor", PATCHES, size=size, crop_size={"height": 56, "width": 56})
    with pytest.raises(UserError, match=r"resizes to .* and crops to .* Try: give size"):
        find("encoder", "huggingface").resolve({"name": str(tmp_path)})


def test_siglip2_patches_are_those_of_its_own_processor():
    from transformers import Siglip2ImageProcessor

    encoder = build_encoder({"type": "siglip2", "config": {**TINY, "num_patches": 16, "patch_size": 14}}, "encoder")
    seen = {}
    encoder.tower.embeddings.patch_embedding.register_forward_hook(lambda m, args, out: seen.update(patches=args[0]))
    picture = pictures()[0].resize((80, 80))
    from mmllm.contract.types import MediaSpec, Needs

    pixels = to_geometry(np.asarray(picture)[None], encoder.geometry)[None]
    encoder(pixels, MediaSpec("image", 1), Needs())
    processor = Siglip2ImageProcessor(patch_size=14, max_num_patches=16)
    theirs = processor(picture, return_tensors="pt")
    assert theirs["spatial_shapes"].tolist() == [[4, 4]]
    torch.testing.assert_close(seen["patches"], theirs["pixel_values"], atol=1e-3, rtol=0)


def other_resizers() -> dict[str, tuple[Any, Any]]:
    """Libraries that resize with Pillow, or in float: {name: (encoder, picture -> [3, h, w])}."""
    import open_clip
    import timm.data
    from open_clip.transform import PreprocessCfg, image_transform_v2
    from transformers import DINOv3ViTImageProcessor, VivitImageProcessor

    stages = {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)}
    convnext = build_encoder({"type": "timm", "name": "convnext_atto", "size": 64, "model_args": stages}, "encoder")
    config = timm.data.resolve_data_config({"input_size": (3, 64, 64)}, model=convnext.tower)
    lite = build_encoder({"type": "efficientnet_lite0", "size": 64}, "encoder")
    lite_config = timm.data.resolve_data_config({"input_size": (3, 64, 64)}, model=lite.tower)
    vision = {"image_size": 56, "layers": 2, "width": 32, "head_width": 8, "patch_size": 14}
    clip = build_encoder({"type": "open_clip", "config": {"embed_dim": 16, "vision_cfg": vision}}, "encoder")
    clip_config = PreprocessCfg(size=56, mean=open_clip.OPENAI_DATASET_MEAN, std=open_clip.OPENAI_DATASET_STD)
    video = {**TINY, "image_size": 56, "num_frames": 2, "tubelet_size": (2, 14, 14)}
    vivit = build_encoder({"type": "vivit", "config": video}, "encoder")
    processor = VivitImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 56, "width": 56})
    look = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "fit": "squash", "interpolation": "bilinear"}
    rotary = {"type": "huggingface", "config": {**PATCHES, "model_type": "dinov3_vit"}, **look}
    floats = DINOv3ViTImageProcessor(size={"height": 56, "width": 56})
    return {
        "timm": (convnext, timm.data.create_transform(**config)),
        "efficientnet_lite0": (lite, timm.data.create_transform(**lite_config)),
        "open_clip": (clip, image_transform_v2(clip_config, is_train=False)),
        "vivit": (vivit, lambda picture: processor([picture], return_tensors="pt")["pixel_values"][0, 0]),
        "dinov3": (
            build_encoder(rotary, "encoder"),
            lambda picture: floats(picture, return_tensors="pt")["pixel_values"][0],
        ),
    }


@pytest.mark.parametrize("name", ["timm", "efficientnet_lite0", "open_clip", "vivit"])
def test_pixels_are_those_of_libraries_that_resize_with_pillow(name):
    encoder, theirs = other_resizers()[name]
    for picture in pictures():
        torch.testing.assert_close(ours(encoder, picture), theirs(picture), atol=1e-3, rtol=0)


def test_pixels_of_a_library_that_resizes_in_float_differ_by_a_grey_level_at_most():
    """DINOv3's processor does not round; frames are uint8 here, whatever the encoder."""
    encoder, theirs = other_resizers()["dinov3"]
    for picture in pictures():
        levels = (ours(encoder, picture) - theirs(picture)).abs() * torch.tensor(encoder.std).view(3, 1, 1) * 255
        assert levels.max() <= 1.01
        assert levels.mean() <= 0.35


def test_a_crop_is_rounded_its_own_way_and_what_is_not_cropped_shares_its_frames():
    from mmllm.encoders.common.transform import CLIP, Transform

    down, even = (Transform(*CLIP, 28, resampler="pillow", centre=centre) for centre in ("down", "even"))
    assert (down.geometry.centre, even.geometry.centre) == ("down", "even")
    assert even.override(fit="squash").geometry == down.override(fit="squash").geometry
