"""What always holds of AlignGPT's level token and of levels by rank."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny import frames, image, save_model, tiny_model, tiny_processor, tiny_recipe, turn, video, write_video

from mmllm.cli import main
from mmllm.connectors.aligngpt import LevelGate
from mmllm.contract.errors import UserError
from mmllm.contract.parts import Site
from mmllm.contract.types import Grid, MediaSpec, PromptFeatures, TokenSpec
from mmllm.data.media.types import MediaRef
from mmllm.data.records.alignment_levels import clip_score, level_edges, level_of, levels_by_edges, levels_by_rank
from mmllm.data.records.conversations import Sample
from mmllm.data.records.mix import load_data
from mmllm.encoders.common.tokens import frame_tokens
from mmllm.world.tokenizer import build_tokenizer

WIDTH = 6


def gate(length: int = 8, levels: int = 5, **arguments: object) -> LevelGate:
    """A part with random weights."""
    torch.manual_seed(0)
    spec = TokenSpec(MediaSpec("video", 2), 8, WIDTH, Grid(2, 2, 2))
    return LevelGate(Site((spec,), WIDTH, WIDTH), length=length, levels=levels, hidden=16, **arguments).eval()


def clips(seed: int = 1, count: int = 8, batch: int = 3):
    """Random tokens."""
    values = torch.randn(batch, count, WIDTH, generator=torch.Generator().manual_seed(seed))
    return frame_tokens(values, MediaSpec("video", 2), None, 2)


def said(
    seed: int = 2, lengths: tuple[int, ...] = (4, 2, 3), present: tuple[bool, ...] = (True,) * 3
) -> PromptFeatures:
    """Random prompts."""
    tokens = torch.randn(len(lengths), max(lengths), WIDTH, generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return PromptFeatures(mask.long(), mask.long(), tokens, present=torch.tensor(present))


@pytest.mark.parametrize("similarity", ["dot", "scaled", "cosine"])
@torch.no_grad()
def test_the_token_is_the_global_level_and_a_convex_mixture_of_the_others(similarity):
    part = gate(similarity=similarity)
    weights = part.weights(clips().values, said())
    torch.testing.assert_close(weights.sum(1), torch.ones(3))
    assert weights.min() >= 0
    assert weights.std() > 0
    out = part(clips(), prompt=said())
    expected = part.table[-1] + weights @ part.table[:-1]
    torch.testing.assert_close(out.values[:, 0], expected, atol=1e-6, rtol=0)
    assert out.spec == part.output_spec(clips().spec)
    assert not out.sizes.any()


@torch.no_grad()
def test_padding_of_the_prompt_never_matters():
    part, prompt = gate(), said()
    longer = torch.cat([prompt.tokens, torch.full((3, 2, WIDTH), 100.0)], dim=1)
    tokens = torch.where(torch.cat([prompt.mask, torch.zeros(3, 2)], 1)[..., None] > 0, longer, torch.tensor(7.0))
    mask = torch.nn.functional.pad(prompt.mask, (0, 2))
    padded = PromptFeatures(mask, mask, tokens, present=prompt.present)
    torch.testing.assert_close(part(clips(), prompt=padded).values, part(clips(), prompt=prompt).values)


@torch.no_grad()
def test_without_a_prompt_the_gate_is_neutral():
    part = gate()
    prompt = said(present=(True, False, True))
    prompt.tokens[1] = torch.nan
    weights = part.weights(clips().values, prompt)
    torch.testing.assert_close(weights[1], torch.full((4,), 0.25))
    torch.testing.assert_close(weights[0], part.weights(clips().values, said())[0])
    assert part.weights(clips().values, None).eq(0.25).all()


@torch.no_grad()
def test_a_records_level_is_its_embedding_and_other_rows_are_mixed():
    part, prompt = gate(), said()
    prompt.alignment_level = torch.tensor([2, -1, 4])
    out = part(clips(), prompt=prompt).values[:, 0]
    assert torch.equal(out[0], part.table[2])
    assert torch.equal(out[2], part.table[4])
    torch.testing.assert_close(out[1], part(clips(), prompt=said()).values[1, 0])
    prompt.alignment_level = torch.tensor([0, -1, 0])  # the weakest level is one, too
    out = part(clips(), prompt=prompt).values[:, 0]
    assert torch.equal(out[0], part.table[0]) and torch.equal(out[2], part.table[0])


def test_every_weight_is_in_the_graph_whatever_the_records_carry():
    part, prompt = gate(), said()
    prompt.alignment_level = torch.tensor([0, 1, 2])
    part(clips(), prompt=prompt).values.sum().backward()
    assert all(parameter.grad is not None for parameter in part.parameters())
    assert part.table.grad[:3].all()


@torch.no_grad()
def test_similarities_of_another_number_of_tokens_are_resampled():
    part = gate(length=4)
    pairs = clips().values.repeat_interleave(2, dim=1)[:, :8]  # 4 tokens, each twice
    four = frame_tokens(clips().values[:, :4], MediaSpec("video", 2), None, 2)
    torch.testing.assert_close(part.weights(pairs, said()), part.weights(four.values, said()))
    assert part(clips(count=3), prompt=said()).values.shape == (3, 1, WIDTH)


def test_what_does_not_fit_is_refused():
    spec = TokenSpec(MediaSpec("video", 2), 8, WIDTH)
    with pytest.raises(ValueError, match="text source"):
        LevelGate(Site((spec,), WIDTH))
    with pytest.raises(ValueError, match="width 6 with a prompt of width 7"):
        LevelGate(Site((spec,), WIDTH, 7))
    with pytest.raises(ValueError, match="levels"):
        gate(levels=1)


def test_levels_have_equal_sizes_and_keep_the_order():
    scores = np.random.default_rng(0).normal(size=103)
    levels = levels_by_rank(scores, 8)
    sizes = np.bincount(levels, minlength=8)
    assert sizes.max() - sizes.min() <= 1
    assert (np.diff(levels[np.argsort(scores)]) >= 0).all()
    edges = level_edges(scores, 8)
    assert levels_by_edges(scores, edges).tolist() == levels.tolist()
    assert levels_by_edges([-99, 99, edges[2]], edges).tolist() == [0, 7, 3]


def test_equal_scores_are_ranked_in_their_order():
    assert levels_by_rank([0.5] * 4, 2).tolist() == [0, 0, 1, 1]


def test_bad_scores_are_refused_by_their_record():
    with pytest.raises(UserError, match="score 2: is nan"):
        levels_by_rank([0.1, float("nan"), 0.3], 2)
    with pytest.raises(UserError, match="score 2: is nan"):
        levels_by_edges([0.1, float("nan")], [0.2])
    with pytest.raises(UserError, match="2 scores for 3 levels"):
        levels_by_rank([0.1, 0.2], 3)


def test_scores_are_mean_cosines():
    frames = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    assert clip_score(frames, torch.tensor([5.0, 0.0])) == pytest.approx(0.5)
    assert clip_score(frames[1:], torch.tensor([5.0, 0.0])) == pytest.approx(0)


def test_a_record_s_level_or_its_first_question_makes_the_token():
    """From records to embeddings, padded and mixed; what learns the mixture learns the LLM's table too."""
    recipe = tiny_recipe("nano/aligngpt")
    processor, model = tiny_processor(recipe), tiny_model(recipe)
    clip, answer = video(1), turn("it moves left", role="assistant")
    chats = [[turn(clip, "What moves?"), answer]] * 3 + [[turn("Say something."), answer]]
    chats.append([turn(clip, "What moves?"), answer, turn("A second question, and a long one?"), answer])
    examples = [
        processor.encode(chat, alignment_level=level)
        for chat, level in zip(chats, (2, None, 0, None, None), strict=True)
    ]
    batch = processor.collate(examples, padding_side="left")
    embeds = model.embed(batch).embeds
    starts = {row: start for row, start, _, stream in batch["visual"]["spans"].tolist() if stream == 0}
    assert sorted(starts) == [0, 1, 2, 4]  # text alone has no token
    for row, start in starts.items():
        first = int(batch["attention_mask"][row].argmax())
        assert start == first + int(batch["input_ids"][row, first] == processor.tokenizer.bos_token_id)
    token = {row: embeds[row, start] for row, start in starts.items()}
    table = model.model.front_end.parts["level_gate"].table
    assert torch.equal(token[0], table[2]) and torch.equal(token[2], table[0])
    torch.testing.assert_close(token[4], token[1])
    assert (token[1] - table).abs().max(dim=1).values.min() > 1e-3
    token[1].square().sum().backward()
    learnt = model.get_input_embeddings().weight.grad.abs().sum(dim=1).nonzero()[:, 0].tolist()
    assert set(learnt) == set(processor.tokenizer("What moves?", add_special_tokens=False)["input_ids"])


def records(folder: Path, count: int = 6) -> Path:
    """Captions of random pictures, and one record without a picture."""
    for index in range(count):
        image(index).save(folder / f"{index}.png")
    asked = {"from": "human", "value": "<image>\nWhat is this?"}
    rows = [
        {"id": f"r{index}", "image": f"{index}.png", "conversations": [asked, {"from": "gpt", "value": text}]}
        for index, text in enumerate(("red square", "blue", "a red disc moves", "left", "right", "up and down")[:count])
    ]
    talk = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hello"}]
    rows.insert(2, {"id": "talk", "conversations": talk})
    path = folder / "captions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict]:
    """Records of a file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_given_scores_become_levels_and_edges_serve_new_data(tmp_path, capsys):
    data, out, scores = records(tmp_path), tmp_path / "levels.jsonl", tmp_path / "scores.txt"
    scores.write_text("0.1\n0.6\n0.3\n0.2\n0.5\n0.4\n")
    assert main(["data", "align-levels", str(data), "--scores", str(scores), "--levels", "3", "--out", str(out)]) == 0
    found = read(out)
    assert [record.get("level") for record in found] == [0, 2, None, 1, 0, 2, 1]
    assert found[0]["conversations"] == read(data)[0]["conversations"]
    edges = out.with_suffix(".edges.json")
    assert json.loads(edges.read_text())["edges"] == [0.3, 0.5]
    assert "6 records in 3 levels" in capsys.readouterr().out
    scores.write_text("9\n9\n9\n9\n9\n0.3\n")
    command = ["data", "align-levels", str(data), "--scores", str(scores), "--edges", str(edges)]
    assert main([*command, "--out", str(tmp_path / "new.jsonl")]) == 0
    assert [record.get("level") for record in read(tmp_path / "new.jsonl")] == [2, 2, None, 2, 2, 2, 1]
    assert "warning" not in capsys.readouterr().err
    edges.write_text(json.dumps({"edges": [0.3, 0.5], "pair": "runs/clip"}))
    assert main([*command, "--out", str(tmp_path / "new.jsonl")]) == 0
    assert "the edges are of scores of runs/clip, these are computed elsewhere" in capsys.readouterr().err
    assert main([*command, "--levels", "7", "--out", str(tmp_path / "new.jsonl")]) == 2
    assert "--levels 7: " in (said := capsys.readouterr().err) and "makes 3 levels" in said


def test_levels_written_elsewhere_still_find_their_media(tmp_path):
    """In another folder records become conversations, which are right below any root."""
    (tmp_path / "data").mkdir()
    data, out, scores = records(tmp_path / "data"), tmp_path / "out" / "levels.jsonl", tmp_path / "scores.txt"
    scores.write_text("0.1\n0.6\n0.3\n0.2\n0.5\n0.4\n")
    assert main(["data", "align-levels", str(data), "--scores", str(scores), "--levels", "3", "--out", str(out)]) == 0
    for root in (None, tmp_path / "data"):
        before, after = load_data(data), load_data(out, root)
        assert [sample.fields.get("level") for sample in after] == [0, 2, None, 1, 0, 2, 1]
        assert [(sample.id, sample.messages) for sample in after] == [(one.id, one.messages) for one in before]


def test_levels_written_beside_data_or_media_leave_the_records_as_they_are(tmp_path):
    (tmp_path / "images").mkdir()
    data, scores = records(tmp_path / "images").rename(tmp_path / "captions.jsonl"), tmp_path / "scores.txt"
    scores.write_text("0.1\n0.6\n0.3\n0.2\n0.5\n0.4\n")
    for out in (tmp_path / "levels.jsonl", tmp_path / "images/levels.jsonl"):
        command = ["data", "align-levels", str(data), "--scores", str(scores), "--levels", "3", "--out", str(out)]
        assert main([*command, "--root", str(tmp_path / "images")]) == 0
        assert [{**record, "level": None} for record in read(out)] == [{**one, "level": None} for one in read(data)]


def test_the_authors_published_levels_are_read():
    for fields, level in (({"similarity": 3}, 3), ({"level": 1, "similarity": 3}, 1), ({"similarity": 0.31}, None)):
        assert level_of(Sample("x", [], fields)) == level


def test_the_gate_has_the_authors_size():
    spec = TokenSpec(MediaSpec("image", 1), 576, WIDTH, Grid(1, 24, 24))
    part = LevelGate(Site((spec,), WIDTH, WIDTH))
    assert sum(parameter.numel() for parameter in part.gate.parameters()) == 149_511


def test_a_record_whose_level_the_table_has_not_is_named_when_it_is_read():
    chat = [turn(video(1), "What moves?"), turn("it moves left", role="assistant")]
    processor = tiny_processor(tiny_recipe("nano/aligngpt"))
    count = processor.plan.alignment_levels
    assert processor.encode(chat, alignment_level=count - 1).alignment_level == count - 1
    with pytest.raises(UserError, match=f"sample clip-7: level: .*expected below {count}, got {count}"):
        processor.encode(chat, alignment_level=count, name="clip-7")
    without = tiny_processor(tiny_recipe("nano/llava"))
    assert without.encode(chat, alignment_level=count).alignment_level == count


def test_mistakes_of_the_command_are_named(tmp_path, capsys):
    data, scores = records(tmp_path), tmp_path / "scores.txt"
    scores.write_text("0.1\n")
    six = tmp_path / "six.txt"
    six.write_text("0.1\n" * 6)
    command = ["data", "align-levels", str(data), "--out"]
    assert main([*command, str(tmp_path / "a.jsonl"), "--scores", str(scores)]) == 2
    assert "1 scores for 6 records with a medium" in capsys.readouterr().err
    seven = tmp_path / "seven.txt"
    seven.write_text("0.1\n" * 7)
    assert main([*command, str(tmp_path / "a.jsonl"), "--scores", str(seven)]) == 2
    assert "7 scores for 6 records with a medium" in capsys.readouterr().err
    assert main([*command, str(data), "--scores", str(scores)]) == 2
    assert "would be overwritten" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "a.jsonl"), "--pair", str(tmp_path / "none")]) == 2
    assert "cannot be loaded" in capsys.readouterr().err
    for levels in ("0", "1"):
        assert main([*command, str(tmp_path / "a.jsonl"), "--scores", str(six), "--levels", levels]) == 2
        assert f"levels: too few to tell apart, expected 2 or more, got {levels}" in capsys.readouterr().err
    data.write_text(data.read_text().splitlines()[2] + "\n")
    assert main([*command, str(tmp_path / "a.jsonl"), "--scores", str(scores)]) == 2
    assert "no record has a medium" in capsys.readouterr().err
    assert not (tmp_path / "a.jsonl").exists()


def test_a_pair_of_towers_scores_pictures_and_captions(tmp_path):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 768, "max_position_embeddings": 16, "eos_token_id": 5}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config={**sizes, "image_size": 28, "patch_size": 14}))
    pair = tmp_path / "pair"
    model.save_pretrained(pair)
    CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(pair)
    build_tokenizer().save_pretrained(pair)
    data, out = records(tmp_path), tmp_path / "levels.jsonl"
    command = ["data", "align-levels", str(data), "--pair", str(pair), "--levels", "2", "--quiet"]
    assert main([*command, "--device", "cpu", "--out", str(out)]) == 0
    levels = [record.get("level") for record in read(out)]
    assert sorted(level for level in levels if level is not None) == [0, 0, 0, 1, 1, 1]
    assert levels[2] is None


def test_a_contrastive_run_scores_media_as_it_read_them_in_training(tmp_path, capsys):
    from mmllm.model.contrastive_scorer import TrainedPair

    recipe = tiny_recipe("nano/clip", overrides=("model.text.words.joint=64",))
    pair = tmp_path / "run/model"
    tiny_model(recipe).save_pretrained(pair)
    tiny_processor(recipe).save_pretrained(pair)
    (pair / "recipe.yaml").write_text(recipe.dump())
    data, out = records(tmp_path), tmp_path / "levels.jsonl"
    command = ["data", "align-levels", str(data), "--levels", "2", "--quiet", "--device", "cpu", "--out", str(out)]
    assert main([*command, "--pair", str(tmp_path / "run")]) == 0
    levels = [record.get("level") for record in read(out)]
    assert sorted(level for level in levels if level is not None) == [0, 0, 0, 1, 1, 1]
    judge, path = TrainedPair(str(pair)), write_video(tmp_path / "a.mp4", frames(3, 9))
    spec = judge.processor.read({"type": "video", "path": str(path)}).for_model()
    visual = {"media": [spec], "pairs": [(0, -1)], "spans": torch.zeros(0, 4, dtype=torch.long)}
    ids, mask = judge.processor.plan.prompts.sources["words"].tokenize(["a red square"])
    with torch.no_grad():
        seen = judge.model.pooled_images({"visual": visual})
        text = judge.model.pooled_texts({"input_ids": ids, "attention_mask": mask})
    expected = torch.nn.functional.cosine_similarity(seen, text).item()
    assert judge.score("x", MediaRef("video", str(path)), "a red square") == pytest.approx(expected, abs=1e-6)
    assert judge.score("x", MediaRef("video", str(path)), "a blue circle") != pytest.approx(expected, abs=1e-6)
    with pytest.raises(UserError, match="sample r7"):
        judge.score("r7", MediaRef("image", str(tmp_path / "0.png")), " ")
    save_model(tmp_path / "blind")
    assert main([*command, "--pair", str(tmp_path / "blind")]) == 2
    assert "was not trained with the objective contrastive" in capsys.readouterr().err
