"""ST-LLM against the authors' code: frames with a residual of the whole, masks, and the masked-video loss."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from mmllm.connectors.st_llm.global_local import GlobalLocal, local_indices
from mmllm.contract.parts import Site
from mmllm.contract.types import Grid, LLMInputs, MediaSpec, VisualTokens
from mmllm.encoders.common.tokens import frame_tokens
from mmllm.model.head import Head
from mmllm.train.objectives.masked_video import MaskedVideo, draw_removed, thinned

FORMS = pytest.mark.parametrize("how", [{"positions": "compact"}, {"reference": True}], ids=["default", "reference"])


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    """Equal to the tolerance of the reference values."""
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)


def as_clips(frames: Tensor) -> VisualTokens:
    """[B, T, K, D] as tokens."""
    grid = Grid(frames.shape[1], 1, frames.shape[2], raster=False)
    return frame_tokens(frames.flatten(1, 2), MediaSpec("video", grid.t), grid, grid.t)


def global_local(tokens: VisualTokens, wanted: int, states: dict[str, Tensor], reference: bool) -> GlobalLocal:
    """The part with the authors' weights: `down_proj.weight`, ..."""
    hidden = len(states["down_proj.bias"])
    part = GlobalLocal(Site((tokens.spec,)), frames=wanted, hidden=hidden, reference=reference)
    part.load_state_dict({key.replace("_proj", ""): value for key, value in states.items()})
    return part


@pytest.mark.parametrize("reference", [False, True], ids=["default", "reference"])
@pytest.mark.golden("stllm_global_local", cases=r"(\w+)_feats")
def test_local_frames_with_a_residual_of_the_whole(golden, case, reference):
    tokens, wanted = as_clips(golden[f"{case}_feats"]), golden.number(f"{case}_residual_size")
    names = [f"{side}_proj_{kind}" for side in ("down", "up") for kind in ("weight", "bias")]
    states = {name.replace("proj_", "proj."): golden[f"{case}_{name}"] for name in names}
    assert local_indices(tokens.grid.t, wanted, reference) == golden[f"{case}_index"].tolist()
    close(global_local(tokens, wanted, states, reference)(tokens).values, golden[f"{case}_out"])


@pytest.mark.golden("stllm_sampling", cases=r"(index_\w+)")
def test_which_frames_are_local(golden, case):
    wanted, frames = map(int, re.fullmatch(r"index_(\d+)_of_(\d+)", case).groups())
    assert local_indices(frames, wanted) == golden[case].tolist()


@pytest.mark.golden("stllm_sampling")
def test_which_tokens_are_removed(golden):
    draws = np.random.RandomState(1)  # the authors' generator, which draws one mask after the other
    for number in range(sum(name.endswith("_args") for name in golden)):
        tokens, rate, rows = golden[f"mask{number}_args"].tolist()
        drawn = [draw_removed(int(tokens), round(rate, 6), draws) for _ in range(int(rows))]
        assert np.array(drawn).astype(int).tolist() == golden[f"mask{number}"].tolist()


class TinyLlama(nn.Module):
    """The file's LLM with its projection, between the sequence and the loss."""

    def __init__(self, golden) -> None:
        super().__init__()
        states = golden.under("param.")
        ours = "model.stllm_model."
        self.states = {key.removeprefix(ours): value for key, value in states.items() if key.startswith(ours)}
        body = {key.removeprefix("model."): value for key, value in states.items() if not key.startswith(ours)}
        head = body.pop("lm_head.weight")
        vocabulary, width = head.shape
        settings = {
            "vocab_size": vocabulary,
            "hidden_size": width,
            "num_hidden_layers": golden.number("cfg_layers"),
            "num_attention_heads": golden.number("cfg_heads"),
            "intermediate_size": len(body["layers.0.mlp.up_proj.weight"]),
            "rms_norm_eps": 1e-6,
        }
        self.llm = LlamaModel(LlamaConfig(**settings))
        self.llm.load_state_dict(body)
        self.lm_head = Head(width, vocabulary)
        self.lm_head.load_state_dict({"weight": head})
        self.project = nn.Linear(golden["in_features"].shape[-1], width)
        self.project.load_state_dict(
            {"weight": self.states["llama_proj.weight"], "bias": self.states["llama_proj.bias"]}
        )
        self.part: GlobalLocal | None = None
        self.eval()

    def visual(self, golden, reference: bool) -> Tensor:
        """[B, n, D], what the LLM sees of the clips."""
        tokens, wanted = as_clips(self.project(golden["in_features"])), golden.number("cfg_residual_size")
        if not wanted:
            return tokens.values
        states = {key: value for key, value in self.states.items() if key.startswith(("down_proj", "up_proj"))}
        self.part = global_local(tokens, wanted, states, reference)
        assert local_indices(tokens.grid.t, wanted) == golden["residual_index"].tolist()
        return self.part(tokens).values

    def embed(self, batch: dict) -> LLMInputs:
        """The sequence is in the batch."""
        return batch["sequence"]

    def run(self, inputs: LLMInputs) -> tuple[Tensor, None]:
        """Hidden states."""
        given = {"attention_mask": inputs.mask, "position_ids": inputs.positions}
        return self.llm(inputs_embeds=inputs.embeds, **given, use_cache=False).last_hidden_state, None


def prepared(golden, model: TinyLlama, reference: bool) -> dict:
    """The batch that the file describes: whole rows, right-padded, with what is removed of them."""
    visual, pad, bos = model.visual(golden, reference), golden.number("pad_id"), golden.number("bos_id")
    width, rows = golden["full_attention_mask"].shape[1], []
    for before, after, answer, one in zip(
        *(golden[f"prompt_{at}_ids"] for at in ("before", "after")), golden["answer_ids"], visual, strict=True
    ):
        first = [bos] * golden.number("layout_bos_first") + before[before >= 0].tolist()
        rest, said = after[after >= 0].tolist(), answer[answer != pad].tolist()
        ids = first + [pad] * len(one) + rest + said
        learnt = len(ids) - len(said)
        labels = [-100] * learnt + said + [-100] * (width - len(ids))
        rows.append((ids + [pad] * (width - len(ids)), labels, len(first), len(ids)))
    ids, labels, starts, lengths = (torch.tensor(values) for values in zip(*rows, strict=True))
    places = torch.arange(width)
    where = (places >= starts[:, None]) & (places < starts[:, None] + visual.shape[1])
    embeds = model.llm.embed_tokens(ids).masked_scatter(where[..., None], visual)
    removed = torch.zeros_like(where).masked_scatter(where, golden["mask"].bool())
    mask = (places < lengths[:, None]).long()
    sequence = LLMInputs(embeds, mask, None, where)
    assert starts.eq(golden.number("visual_start")).all()
    groups = [(0, len(ids), width)]
    return {"sequence": sequence, "labels": labels, "removed": removed, "watched": where & ~removed, "groups": groups}


def objective_of(golden, model: TinyLlama, how: dict) -> MaskedVideo:
    """The objective with the file's decoder, if it has one."""
    names = {"head.": "0.", "norm.": "1."}
    given = {key.removeprefix("mvm_decoder."): value for key, value in model.states.items() if "mvm_decoder" in key}
    objective = MaskedVideo(decoder=bool(given), **how)
    objective.build(model.lm_head.in_features)
    own = {names[key[:5]] + key[5:]: value for key, value in given.items()}
    objective.decoder.load_state_dict(own)
    return objective


@FORMS
@pytest.mark.golden("stllm_mvm")
def test_masked_video(golden, how):
    model = TinyLlama(golden)
    batch, objective = prepared(golden, model, bool(how.get("reference"))), objective_of(golden, model, how)
    rate, tokens = round(golden.number("mask_rate"), 6), golden["mask"].shape[1]
    assert golden["mask"].sum(1).eq(int(rate * tokens)).all()
    close(batch["sequence"].embeds, golden["full_inputs_embeds"])
    assert torch.equal(batch["sequence"].mask, golden["full_attention_mask"])
    _check_student(golden, model, batch)
    terms = objective(model, batch)
    counts = objective.counts(batch)
    losses = {name: terms[name].sum / counts[name] for name in ("language_modeling", "masked_video")}
    close(losses["masked_video"], golden["out_loss_mvm"])
    close(losses["language_modeling"], golden["out_loss_ce"])
    total = losses["language_modeling"] + terms["masked_video"].weight * losses["masked_video"]
    close(total, golden["out_loss_total"])
    total.backward()
    close(model.project.weight.grad, golden["grad_llama_proj_weight"])
    if "grad_mvm_head_weight" in golden:
        close(objective.decoder[0].weight.grad, golden["grad_mvm_head_weight"])
    if "grad_up_proj_weight" in golden:
        close(model.part.up.weight.grad, golden["grad_up_proj_weight"])


def _check_student(golden, model: TinyLlama, batch: dict) -> None:
    """What is left of the rows, and both forwards' hidden states, at everything that is not padding."""
    whole = batch["sequence"]
    thin = thinned(whole, batch["removed"], compact=True)
    real, length = thin.real, thin.real.shape[1]
    assert torch.equal(real.long(), golden["masked_attention_mask"][:, :length])
    assert not golden["masked_attention_mask"][:, length:].any()
    close(thin.inputs.embeds[real], golden["masked_inputs_embeds"][:, :length][real])
    labels = batch["labels"].gather(1, thin.index).masked_fill(~real, -100)
    assert torch.equal(labels, golden["labels"][:, :length])
    close(model.run(thin.inputs)[0][real], golden["out_last_hidden_masked"][:, :length][real], 1e-4)
    full = whole.mask.bool()
    close(model.run(whole)[0][full], golden["out_last_hidden_full"][full], 1e-4)
