"""The head: scores in chunks against the plain form, on the LLMs' own heads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from mmllm.model import head as module
from mmllm.model.head import Head, log_probs

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "vocab_size": 101, "head_dim": 8}
KINDS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, "ELEMENTS", 101 * 7)


class Scored(nn.Module):
    """A stock causal LM with our head over it; cross-entropy and entropy of some rows, in chunks or at once."""

    def __init__(self, kind: str, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.llm = AutoModelForCausalLM.from_config(KINDS[kind](**SIZES, tie_word_embeddings=tied))
        self.head = Head(32, 101)
        self.head.weight = self.llm.lm_head.weight
        assert (self.head.weight is self.llm.get_input_embeddings().weight) == tied

    def terms(self, ids: Tensor, chunked: bool) -> dict[str, Tensor]:
        rows, targets = self.llm.model(ids).last_hidden_state[:, :-1].flatten(0, 1), ids[:, 1:].flatten()

        def score(logits: Tensor, which: slice) -> dict[str, Tensor]:
            loss = nn.functional.cross_entropy(logits, targets[which], reduction="sum")
            entropy = (logits.softmax(-1) * logits.log_softmax(-1)).sum()
            right = (logits.argmax(-1) == targets[which]).float().sum()
            return {"loss": loss, "entropy": entropy, "right": right}

        if chunked:
            return self.head(rows, score, scales={"loss": 0.25, "entropy": 0.05})
        return score(self.head(rows).float(), slice(0, len(rows)))


def gradients(model: Scored, ids: Tensor, chunked: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model.zero_grad()
    terms = model.terms(ids, chunked)
    (2.5 * terms["loss"] + 0.5 * terms["entropy"]).backward()
    return terms, {name: value.grad.clone() for name, value in model.named_parameters()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", list(KINDS))
def test_chunks_are_the_whole(kind, tied):
    model, ids = Scored(kind, tied), torch.randint(0, 90, (3, 11))  # rows 90 to 100 stand for padding, as in Qwen2
    whole, expected = gradients(model, ids, chunked=False)
    terms, found = gradients(model, ids, chunked=True)
    for name, value in whole.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-5, atol=1e-6)
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-5 * value.norm(), name


@pytest.mark.parametrize("tied", [False, True])
def test_bfloat16_errs_no_more_than_the_plain_form(tied):
    model, ids = Scored("llama", tied), torch.randint(0, 101, (3, 11))
    _, exact = gradients(model, ids, chunked=False)
    errors = []
    for chunked in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            _, found = gradients(model, ids, chunked)
        errors.append(sum(float((found[name] - value).norm() / value.norm()) for name, value in exact.items()))
    assert errors[1] <= 1.1 * errors[0]


def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same():
    model, ids = Scored("llama", False), torch.randint(0, 101, (2, 9))
    _, expected = gradients(model, ids, chunked=False)
    model.head.weight.requires_grad_(False)
    model.zero_grad()
    terms = model.terms(ids, chunked=True)
    (2.5 * terms["loss"] + 0.5 * terms["entropy"]).backward()
    assert model.head.weight.grad is None
    name = "llm.model.layers.0.mlp.down_proj.weight"
    torch.testing.assert_close(model.get_parameter(name).grad, expected[name], rtol=1e-5, atol=1e-6)


def test_a_loss_that_weighs_the_terms_otherwise_is_an_error():
    model, ids = Scored("llama", False), torch.randint(0, 101, (2, 9))
    terms = model.terms(ids, chunked=True)
    with pytest.raises(RuntimeError, match="the loss weighs them otherwise"):
        (terms["loss"] + terms["entropy"]).backward()


def test_groups_stay_together_and_values_come_without_gradients():
    head, rows = Head(8, 101), torch.randn(20, 8, requires_grad=True)
    seen: list[tuple[int, int]] = []

    def read(logits: Tensor, which: slice) -> Tensor:
        assert not logits.requires_grad
        seen.append((which.start, which.stop))
        return log_probs(logits, torch.zeros(len(logits), dtype=torch.long))

    values = head(rows, read=read, groups=[3, 3, 9, 2, 3])
    assert seen == [(0, 6), (6, 15), (15, 20)]
    torch.testing.assert_close(values, head(rows).log_softmax(-1)[:, 0])
    assert not values.requires_grad


def test_no_rows_are_a_loss_of_zero_with_a_gradient():
    head, rows = Head(8, 101), torch.randn(0, 8, requires_grad=True)
    none = torch.zeros(0, dtype=torch.long)
    total = head(rows, lambda logits, _: {"loss": nn.functional.cross_entropy(logits, none, reduction="sum")})["loss"]
    total.backward()
    assert total.item() == 0
    assert not head.weight.grad.any()


def test_the_gram_matrix():
    head = Head(8, 101)
    rows = torch.randn(5, 8)
    logits = head(rows)
    torch.testing.assert_close(rows @ head() @ rows.T, logits @ logits.T, rtol=1e-4, atol=1e-5)
