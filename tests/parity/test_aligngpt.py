"""AlignGPT against the authors' modules: gate, level token, all that reaches the language model, levels by rank."""

from __future__ import annotations

import pytest
import torch
from helpers.spliced import embedded, row
from torch import Tensor, nn

from mmllm.connectors.aligngpt import LevelGate
from mmllm.contract.parts import Site
from mmllm.contract.types import MediaSpec, PromptFeatures, TokenSpec
from mmllm.data.records.alignment_levels import level_edges, levels_by_edges, levels_by_rank
from mmllm.encoders.common.tokens import frame_tokens

PLACEHOLDER = -200


def close(ours: Tensor, theirs: Tensor) -> None:
    """Equal to the tolerance of the reference values."""
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def gate_of(golden) -> LevelGate:
    """The part with the authors' weights."""
    hidden, length = golden["gate_fc1_weight"].shape
    levels, width = golden["level_table"].shape
    spec = TokenSpec(MediaSpec("image", 1), length, width)
    part = LevelGate(Site((spec,), width, width), levels=levels, hidden=hidden, length=length).eval()
    part.table.data = golden["level_table"]
    for layer, name in ((part.gate[0], "gate_fc1_"), (part.gate[2], "gate_fc2_")):
        layer.load_state_dict(golden.under(name))
    return part


def prompts(tokens: Tensor, mask: Tensor, level: Tensor | None = None) -> PromptFeatures:
    """Prompts of tokens [B, L, D]; a record's level where it is known."""
    made = PromptFeatures(mask.long(), mask, tokens)
    made.alignment_level = level
    return made


def images(values: Tensor):
    """Projected tokens [B, n, D] of B images."""
    return frame_tokens(values, MediaSpec("image", 1), None, 1)


@pytest.mark.golden("aligngpt_gate_levels")
@torch.no_grad()
def test_gate(golden):
    part, given = gate_of(golden), images(golden["gate_image_embeds"])
    said = prompts(golden["gate_text_embeds"], golden["gate_text_mask"])
    close(part.weights(given.values, said), golden["gate_weights"])
    close(part(given, prompt=said).values[:, 0], golden["gate_level_token"])
    blank = golden["gate_dummy_output_batch2"]
    close(part.gate(torch.ones(len(blank), part.length)), blank)


def projected(golden, name: str) -> Tensor:
    """A batch's vision features at the language model's width."""
    features = golden[f"{name}_image_features"]
    layer = nn.Linear(*reversed(golden["projector_weight"].shape))
    layer.load_state_dict(golden.under("projector_"))
    return layer(features)


def said_in(golden, ids: Tensor, labels: Tensor | None, mask: Tensor) -> PromptFeatures:
    """What the gate reads of rows of ids: all but the start and the image, with labels only up to what is learnt."""
    read = mask.bool() & (ids != PLACEHOLDER)
    read[:, 0] = False
    if labels is not None:
        read &= (labels != -100).cumsum(1) == 0
    return prompts(golden["embed_tokens_weight"][ids.clamp_min(0)], read.float())


def check_sequence(golden, name: str, tokens: Tensor, level: Tensor, with_labels: bool = True) -> None:
    """Rows with the level token after the start and the image at its place, by our own splice.

    The authors move rows of text alone behind the others and cut them where the longest of those ends; ours stay.
    """
    theirs = golden[f"{name}_attention_mask"]
    ids = golden[f"{name}_input_ids"]
    mask = golden[f"{name}_attention_mask_in"] if with_labels else torch.ones_like(ids)
    labels = golden[f"{name}_labels_in"] if with_labels else None
    clips = [[level[index], tokens[index]] for index in range(len(ids))]
    rows = []
    seen = (ids == PLACEHOLDER).any(1).tolist()
    for index in sorted(range(len(ids)), key=lambda index: not seen[index]):
        real = mask[index].bool()
        own, wanted = ids[index][real].tolist(), None if labels is None else labels[index][real].tolist()
        if seen[index]:
            rows.append(row(own, wanted, PLACEHOLDER, {index: clips[index]}, start=True))
        else:  # no level token
            length = theirs.shape[1]
            rows.append(row(own[:length], None if wanted is None else wanted[:length], PLACEHOLDER, {}, start=True))
    sequence, batch = embedded(golden["embed_tokens_weight"], clips, rows)
    assert batch["attention_mask"].tolist() == theirs.long().tolist()
    if with_labels:
        assert batch["labels"].tolist() == golden[f"{name}_labels"].tolist()
    real = theirs.bool()
    close(sequence.embeds[real], golden[f"{name}_inputs_embeds"][real])


@pytest.mark.golden("aligngpt_gate_levels")
@torch.no_grad()
def test_pretraining_takes_the_records_level(golden):
    tokens, level = projected(golden, "pretrain"), golden["pretrain_level_ids"]
    none = torch.zeros(len(tokens), 1)
    said = prompts(golden["embed_tokens_weight"][:1].expand(len(tokens), 1, -1), none, level)
    part = gate_of(golden)
    found = part(images(tokens), prompt=said).values
    close(found[:, 0], golden["level_table"][level])
    check_sequence(golden, "pretrain", tokens, found)
    # a record without a level gets the mixture, and nothing said an even one
    said.alignment_level, said.present = torch.full_like(level, -1), torch.zeros(len(level), dtype=torch.bool)
    close(
        part(images(tokens), prompt=said).values[:, 0],
        (part.table[-1] + part.table[:-1].mean(0)).expand(len(tokens), -1),
    )


@pytest.mark.golden("aligngpt_gate_levels")
@torch.no_grad()
def test_tuning_as_the_authors_do_it_reads_the_answer(golden):
    part, tokens = gate_of(golden), projected(golden, "finetune")
    ids, mask = golden["finetune_input_ids"], golden["finetune_attention_mask_in"]
    level = part(images(tokens), prompt=said_in(golden, ids, None, mask)).values
    check_sequence(golden, "finetune", tokens, level)


@pytest.mark.golden("aligngpt_gate_levels")
@torch.no_grad()
def test_instruction_alone_gives_the_same_token_in_training_and_inference(golden):
    part, tokens = gate_of(golden), projected(golden, "inference")
    ids = golden["inference_input_ids"]
    level = part(images(tokens), prompt=said_in(golden, ids, None, torch.ones_like(ids))).values
    check_sequence(golden, "inference", tokens, level, with_labels=False)
    whole = golden["finetune_input_ids"]
    same = [next(index for index, one in enumerate(whole) if torch.equal(one[: len(cut)], cut)) for cut in ids]
    trained, labels, mask = whole[same], golden["finetune_labels_in"][same], golden["finetune_attention_mask_in"][same]
    ours = part(images(tokens), prompt=said_in(golden, trained, labels, mask)).values
    close(ours, level)
    if part.levels > 2:  # of a single local level the weight is always 1
        leaked = part(images(tokens), prompt=said_in(golden, trained, None, mask)).values
        assert not torch.equal(leaked, level)


@pytest.mark.golden("aligngpt_bucketing")
def test_levels_by_rank(golden):
    scores, levels = golden["clip_scores"].numpy(), golden.number("n_levels")
    theirs = golden["levels_equal_frequency_stable"]
    assert levels_by_rank(scores, levels).tolist() == theirs.tolist()
    found = levels_by_edges(scores, level_edges(scores, levels))
    moved = [scores[index] for index in range(len(scores)) if found[index] != theirs[index]]
    assert all((scores == score).sum() > 1 for score in moved)  # by edges, equal scores share a level
