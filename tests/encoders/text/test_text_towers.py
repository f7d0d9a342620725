"""Text towers against their own libraries, with tokenizers that the tests make."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mmllm.checks.part import check_part
from mmllm.contract.errors import UserError
from mmllm.contract.parts import Site
from mmllm.contract.registry import find, parts
from mmllm.contract.types import Needs

TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
ALL = Needs(prompt=("tokens", "pooled"))
PROMPTS = ["what moves left", "a dog", "", "how many red balls roll over the wide green hill"]


@pytest.mark.parametrize("name", sorted(parts("text")))
def test_a_text_source_keeps_the_contract(name):
    assert check_part("text", name) >= 1


def clip_tokenizer(folder: Path) -> Path:
    """CLIP's tokenizer with a vocabulary of single letters."""
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer.from_pretrained(folder).save_pretrained(folder)
    return folder


def word_tokenizer(folder: Path) -> Path:
    """A tokenizer of whole words that ends with </s> and pads with it, as SigLIP's does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = sorted({word for prompt in PROMPTS for word in prompt.split()})
    vocabulary = {"<unk>": 0, "</s>": 1, **{word: index for index, word in enumerate(words, start=2)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)
    return folder


def published(kind: str, folder: Path) -> Any:
    """A tiny two-tower model with its tokenizer, saved as it is published; returns the model."""
    import transformers

    torch.manual_seed(5)
    vision = {**TINY, "image_size": 28, "patch_size": 14}
    if kind == "clip_text":
        text = {**TINY, "vocab_size": 60, "max_position_embeddings": 24, "bos_token_id": 52, "eos_token_id": 53}
        config = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=16)
        config.text_config.projection_dim = config.vision_config.projection_dim = 16
        model = transformers.CLIPModel(config)
        clip_tokenizer(folder)
    else:
        text = {**TINY, "vocab_size": 60, "max_position_embeddings": 12, "pad_token_id": 1}
        model = transformers.SiglipModel(transformers.SiglipConfig(vision_config=vision, text_config=text))
        word_tokenizer(folder)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("kind", ["clip_text", "siglip_text"])
def test_features_are_the_librarys_own(kind, tmp_path):
    theirs = published(kind, tmp_path)
    cls = find("text", kind)
    arguments = cls.resolve({"name": str(tmp_path)})
    source = cls(Site(), **arguments).eval()
    source.load_weights()
    texts = [text for text in PROMPTS if text]
    ids, mask = source.tokenize(texts)
    padding = "max_length" if kind == "siglip_text" else True
    given = source.tokenizer(texts, truncation=True, max_length=source.length, padding=padding, return_tensors="pt")
    if kind == "clip_text":
        assert ids.shape == given["input_ids"].shape
        assert torch.equal(mask, given["attention_mask"])
        assert torch.equal(ids * mask, given["input_ids"] * mask)
    else:
        assert torch.equal(ids, given["input_ids"])
        given.pop("attention_mask")
    with torch.no_grad():
        features = source(ids, mask, replace(ALL, prompt_hidden_states=(-1, 1)))
        output = theirs.get_text_features(**given, output_hidden_states=True)
    assert features.pooled.shape[1] == source.joint
    torch.testing.assert_close(features.pooled, output.pooler_output, atol=1e-6, rtol=0)
    real = mask.bool()
    torch.testing.assert_close(features.tokens[real], output.last_hidden_state[real], atol=1e-6, rtol=0)
    for place, index in enumerate((3, 1)):
        level = features.hidden_states[:, :, place]
        torch.testing.assert_close(level[real], output.hidden_states[index][real], atol=1e-6, rtol=0)
    assert features.present.all()


@pytest.mark.parametrize("kind", ["clip_text", "siglip_text"])
def test_an_empty_prompt_is_absent_and_a_long_one_keeps_its_end(kind, tmp_path):
    published(kind, tmp_path)
    cls = find("text", kind)
    source = cls(Site(), **cls.resolve({"name": str(tmp_path)}), length=8).eval()
    ids, mask = source.tokenize(PROMPTS)
    with torch.no_grad():
        features = source(ids, mask, Needs(prompt=("pooled",)))
    assert features.tokens is None
    assert features.present.tolist() == [True, True, False, True]
    assert mask[2].sum() == 1
    assert features.pooled.isfinite().all()
    long = ids[3][mask[3].bool()].tolist()
    end = source.tokenizer.eos_token_id
    assert len(long) == 8
    assert long[-1] == end
    assert source.tokenize(["  \n "])[1].sum() == 1


def test_lengths_beyond_the_positions_and_missing_tokenizers_are_refused(tmp_path):
    clip = find("text", "clip_text")
    config = {**TINY, "vocab_size": 60, "max_position_embeddings": 24}
    with pytest.raises(ValueError, match="length 248: the tower has 24 positions"):
        clip(Site(), config=config, length=248)
    source = clip(Site(), config=config)
    with pytest.raises(UserError, match="neither a tokenizer nor a name"):
        source.tokenize(["a dog"])
    with pytest.raises(UserError, match="no tokenizer at"):
        clip(Site(), config=config, tokenizer=str(tmp_path / "none")).tokenize(["a dog"])
    with pytest.raises(ValueError, match="layers -4 to 3"):
        source(*source.collate([[52, 1, 53]]), Needs(prompt_hidden_states=(9,)))
    other = clip(Site(), config=config, tokenizer=str(clip_tokenizer(tmp_path)))
    assert other.tokenize(["ab"])[0].tolist() == [[52, 0, 27, 53]]
    other.load_state_dict(source.state_dict())
    assert other.digest() == source.digest()


def test_a_frozen_text_source_stays_in_eval_mode():
    source = find("text", "clip_text")(Site(), config={**TINY, "vocab_size": 60, "max_position_embeddings": 24})
    assert source.train().training
    source.requires_grad_(False).train()
    assert not any(module.training for module in source.modules())
    assert not source(*source.collate([[52, 1, 53]]), ALL).pooled.requires_grad


def test_roberta_is_the_librarys_own_and_counts_positions_behind_the_padding(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaModel

    torch.manual_seed(7)
    config = RobertaConfig(**TINY, vocab_size=60, max_position_embeddings=14)
    theirs = RobertaModel(config, add_pooling_layer=False).eval()
    theirs.save_pretrained(tmp_path)
    words = sorted({word for prompt in PROMPTS for word in prompt.split()})
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    vocabulary = {word: index for index, word in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("<s>", 0), ("</s>", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(tmp_path)
    cls = find("text", "roberta_text")
    source = cls(Site(), **cls.resolve({"name": str(tmp_path)})).eval()
    source.load_weights()
    ids, mask = source.tokenize(PROMPTS)
    assert source.positions == 12 and mask.sum(dim=1).tolist() == [5, 4, 1, 12]
    with torch.no_grad():
        features = source(ids, mask, replace(ALL, prompt_hidden_states=(-1, 1)))
        output = theirs(ids, mask, output_hidden_states=True)
    assert features.pooled is None and features.present.tolist() == [True, True, False, True]
    real = mask.bool() & features.present[:, None]
    torch.testing.assert_close(features.tokens[real], output.last_hidden_state[real], atol=1e-6, rtol=0)
    for place, index in enumerate((3, 1)):
        level = features.hidden_states[:, :, place]
        torch.testing.assert_close(level[real], output.hidden_states[index][real], atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="length 14: the tower has 12 positions"):
        cls(Site(), **cls.resolve({"name": str(tmp_path)}), length=14)


OPEN_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 28, "layers": 1, "width": 32, "head_width": 8, "patch_size": 14},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 3},
}


def test_open_clips_text_tower_with_its_own_tokenizer(tmp_path):
    import open_clip
    from safetensors.torch import save_file

    torch.manual_seed(6)
    theirs = open_clip.CLIP(**json.loads(json.dumps(OPEN_CLIP))).eval()
    save_file({key: value.contiguous() for key, value in theirs.state_dict().items()}, tmp_path / "model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": OPEN_CLIP, "preprocess_cfg": {}}))
    cls = find("text", "open_clip_text")
    arguments = cls.resolve({"name": f"local-dir:{tmp_path}", "weights": "pretrained"})
    source = cls(Site(), **arguments).eval()
    source.load_weights()
    ids, mask = source.tokenize(PROMPTS)
    expected = open_clip.get_tokenizer(f"local-dir:{tmp_path}")(PROMPTS)
    assert torch.equal(ids[[0, 1, 3]], expected[[0, 1, 3]])
    assert mask.sum(dim=1).tolist() == [5, 4, 1, 12]
    with torch.no_grad():
        features = source(ids, mask, replace(ALL, prompt_hidden_states=(-1, 0)))
        pooled = theirs.encode_text(expected)
    present = [0, 1, 3]
    assert features.present.tolist() == [True, True, False, True]
    torch.testing.assert_close(features.pooled[present], pooled[present], atol=1e-6, rtol=0)
    assert features.hidden_states.shape == (4, 12, 2, 32)
    torch.testing.assert_close(theirs.ln_final(features.hidden_states[:, :, 0]), features.tokens, atol=1e-6, rtol=0)
    assert source.joint == 16
    with pytest.raises(ValueError, match="has 12 positions"):
        cls(Site(), **arguments, length=40)


def test_open_clips_text_towers_of_transformers_are_refused():
    with pytest.raises(ValueError, match="roberta"):
        find("text", "open_clip_text")(Site(), name="roberta-ViT-B-32")


def test_the_llms_table_reads_a_prompt_of_one_word_twice_so_that_it_is_one():
    from helpers.tiny import tokenizer_folder
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder())
    source = find("text", "llm_embedding")(Site(llm_width=8), length=4)
    source.__dict__["_tokenizer"] = tokenizer
    table = torch.nn.Embedding(len(tokenizer), 8)
    (one,) = tokenizer("left", add_special_tokens=False)["input_ids"]
    assert source.encode("left") == [one, one]
    ids, mask = source.tokenize(["left", "", "A red square moves left and then up."])
    found = source(ids, mask, ALL, table)
    assert found.present.tolist() == [True, False, True]
    assert mask.sum(1).tolist() == [2, 1, 4]
    assert torch.equal(found.tokens[0, :2], table.weight[[one, one]])
