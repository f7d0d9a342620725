"""Reducers in models of transformers: their classes stay, off is off, and dropping is really dropping."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    SiglipVisionConfig,
)

import mmllm
from mmllm.contract.errors import UserError
from mmllm.contract.registry import parts
from mmllm.model.reduction.stock import body_of

LLM = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOWER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 4,
}
IMAGE, VIDEO, START, END = 60, 61, 62, 63
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "suppress_tokens": [IMAGE, VIDEO, START, END]}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}


def llava():
    """Two rows, one image each."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**TOWER),
        text_config=LlamaConfig(**LLM),
        image_token_index=IMAGE,
        image_seq_length=36,
    )
    ids = _ids([[5, IMAGE] * 1 + [6, 7], [8, IMAGE, 9, 10]], {IMAGE: 36})
    return LlavaForConditionalGeneration(config), {"input_ids": ids, "pixel_values": torch.randn(2, 3, 24, 24)}


def llava_onevision():
    """Two rows, a video of three frames each: 3 x 3 of 6 x 6 after pooling, and a newline."""
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**TOWER),
        text_config=Qwen2Config(**LLM),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
    )
    ids = _ids([[5, VIDEO, 6, 7], [8, VIDEO, 9, 10]], {VIDEO: 3 * 9 + 1})
    return LlavaOnevisionForConditionalGeneration(config), {
        "input_ids": ids,
        "pixel_values_videos": torch.randn(2, 3, 3, 24, 24),
    }


def qwen(config_class, model_class):
    """Two rows: an image; a video of two temporal patches."""
    tower = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
    if model_class is Qwen2VLForConditionalGeneration:
        tower |= {"embed_dim": 16, "hidden_size": 32}
    else:
        tower |= {"hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24, "window_size": 16}
    config = config_class(
        text_config={**LLM, "rope_parameters": ROPE},
        vision_config=tower,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    ids = _ids([[5, START, VIDEO, END, 6, 7], [8, START, IMAGE, END, 9, 10]], {IMAGE: 12, VIDEO: 24})
    width = 3 * 2 * 4 * 4
    kinds = torch.where(ids == IMAGE, 1, torch.where(ids == VIDEO, 2, 0))
    return model_class(config), {
        "input_ids": ids,
        "mm_token_type_ids": kinds,
        "pixel_values": torch.randn(6 * 8, width),
        "image_grid_thw": torch.tensor([[1, 6, 8]]),
        "pixel_values_videos": torch.randn(2 * 6 * 8, width),
        "video_grid_thw": torch.tensor([[2, 6, 8]]),
    }


def internvl():
    """Two rows, two views each."""
    tower = {**TOWER, "image_size": [24, 24], "patch_size": [4, 4]}
    config = InternVLConfig(
        vision_config=tower, text_config={"model_type": "qwen2", **LLM}, image_token_id=IMAGE, image_seq_length=9
    )
    ids = _ids([[5, IMAGE, 6, 7], [8, IMAGE, 9, 10]], {IMAGE: 18})
    return InternVLForConditionalGeneration(config), {"input_ids": ids, "pixel_values": torch.randn(4, 3, 24, 24)}


MAKERS = {
    "llava": llava,
    "llava_onevision": llava_onevision,
    "qwen2_vl": lambda: qwen(Qwen2VLConfig, Qwen2VLForConditionalGeneration),
    "qwen2_5_vl": lambda: qwen(Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration),
    "internvl": internvl,
}


def _ids(rows: list[list[int]], lengths: dict[int, int]) -> torch.Tensor:
    """Placeholders repeated, rows padded on the left."""
    long = [[one for token in row for one in [token] * lengths.get(token, 1)] for row in rows]
    most = max(map(len, long))
    return torch.tensor([[0] * (most - len(row)) + row for row in long])


@pytest.fixture(scope="module", params=MAKERS)
def stock(request):
    """(model, its inputs)."""
    torch.manual_seed(0)
    model, inputs = MAKERS[request.param]()
    return model.eval(), {**inputs, "attention_mask": (inputs["input_ids"] != 0).long()}


@pytest.fixture(autouse=True)
def _off(stock):
    """Every test begins with all tokens."""
    mmllm.reduce(stock[0], None)


@torch.no_grad()
def test_off_and_everything_kept_are_the_stock_model(stock):
    model, inputs = stock
    cls, plain = type(model), model(**inputs).logits
    said = model.generate(**copy.deepcopy(inputs), **GREEDY)
    for keep in (1, 0.5, None):
        mmllm.reduce(model, None if keep is None else "aim", keep=keep)
        assert type(model) is cls
        assert torch.equal(model(**inputs).logits, plain) == (keep != 0.5)
    assert torch.equal(model.generate(**copy.deepcopy(inputs), **GREEDY), said)
    assert "forward" not in model.model.language_model.__dict__


@pytest.mark.parametrize("name", sorted(set(parts("reducer")) - {"pixels", "visionzip"}))
@torch.no_grad()
def test_fewer_tokens_in_the_cache_and_text_untouched(stock, name):
    model, inputs = stock
    mmllm.reduce(model, name, keep=0.5)
    output = model(**inputs, use_cache=True)
    cache = getattr(output, "cache", None) or output.past_key_values
    visual = torch.isin(inputs["input_ids"], torch.tensor([IMAGE, VIDEO]))
    found = body_of(model).reduction.last
    spent = torch.stack(found.entering).float().mean(0) / visual.sum(1)
    assert (spent <= 0.5 + 1 / 12).all() and (spent > 0.2).all()
    text = inputs["attention_mask"].bool() & ~visual
    assert (found.kept | ~text).all()
    assert cache.layers[-1].keys.shape[2] < inputs["input_ids"].shape[1]
    assert cache.get_seq_length() == inputs["input_ids"].shape[1]


@pytest.mark.parametrize("beams", [1, 3])
@torch.no_grad()
def test_rows_say_what_they_say_alone(stock, beams):
    model, inputs = stock
    mmllm.reduce(model, "aim", keep=0.5)
    together = model.generate(**copy.deepcopy(inputs), **GREEDY, num_beams=beams)
    length = inputs["input_ids"].shape[1]
    for row in range(2):
        alone = _row(inputs, row)
        said = model.generate(**alone, **GREEDY, num_beams=beams)[0, alone["input_ids"].shape[1] :]
        assert torch.equal(said, together[row, length:])


def _row(inputs: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    """One row without its padding, and its own media."""
    real = inputs["attention_mask"][row].bool()
    kind = {"image": IMAGE, "video": VIDEO}
    own = {}
    for name, value in inputs.items():
        if name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            own[name] = value[row : row + 1, real]
        elif "image_grid_thw" in inputs:  # one image and one video among the two rows
            medium = "video" if "video" in name else "image"
            if (inputs["input_ids"][row] == kind[medium]).any():
                own[name] = value
        else:
            own[name] = value.chunk(2)[row]
    return own


@torch.no_grad()
def test_cached_decoding_is_recomputation(stock):
    model, inputs = stock
    mmllm.reduce(model, "random", keep=0.5)
    cached = model.generate(**copy.deepcopy(inputs), **GREEDY)
    assert torch.equal(model.generate(**copy.deepcopy(inputs), **GREEDY, use_cache=False), cached)


@pytest.mark.parametrize("name", ["pixels", "visionzip"])
def test_a_reducer_that_looks_at_the_encoder_is_refused(stock, name):
    model, _ = stock
    with pytest.raises(UserError, match="looks at the encoder"):
        mmllm.reduce(model, name, keep=0.5)
    assert not model.model.language_model.config._attn_implementation.startswith("reducible")


def test_an_llm_that_is_told_more_than_embeddings_is_refused(stock):
    """As Qwen3-VL's is, whose layers are given features of the tower's."""
    model, inputs = stock
    mmllm.reduce(model, "random", keep=0.5)
    llm, body = model.model.language_model, body_of(model)
    body._note(model.model, (inputs["input_ids"],), {})
    embeds = llm.get_input_embeddings()(inputs["input_ids"])
    with pytest.raises(UserError, match="told more than embeddings"):
        llm(inputs_embeds=embeds, deepstack_visual_embeds=[torch.zeros(1)])
