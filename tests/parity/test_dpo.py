"""Preference losses against the authors' functions: by hand, and by the objective over a head that passes logits on."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from mmllm.model import head as heads
from mmllm.model.head import Head
from mmllm.train.objectives.preference import Preference
from mmllm.train.objectives.preference_losses import LOSSES, Pairs, Settings, kto_pair


def passing(width: int) -> Head:
    """A head whose logits are its rows."""
    head = Head(width, width)
    head.weight = nn.Parameter(torch.eye(width), requires_grad=False)
    return head


def token_log_probs(logits: Tensor, ids: Tensor, scored: Tensor) -> Tensor:
    """[B, L - 1], 0 where nothing is scored."""
    found = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return found * scored[:, 1:]


def rows_and_batch(logits: Tensor, ids: Tensor, scored: Tensor) -> tuple[Tensor, dict]:
    """The authors' order (all chosen, then all rejected) as ours (pair by pair)."""
    count = len(ids) // 2
    order = [row for pair in range(count) for row in (pair, pair + count)]
    masks = [scored[row, 1:].bool() for row in order]
    rows = torch.cat([logits[row, :-1][mask] for row, mask in zip(order, masks, strict=True)])
    targets = torch.cat([ids[row, 1:][mask] for row, mask in zip(order, masks, strict=True)])
    return rows, {"targets": targets, "lengths": [int(mask.sum()) for mask in masks]}


def in_turn(values: Tensor) -> Tensor:
    """[chosen ..., rejected ...] -> pair by pair."""
    return values.view(2, -1).T.flatten()


def pairs_of(policy: Tensor, reference: Tensor, lengths: Tensor) -> Pairs:
    halves = [value.chunk(2) for value in (policy, reference, lengths)]
    return Pairs(*(half for side in halves for half in side))


@pytest.mark.golden("second_ring_preference_losses")
def test_preference_losses(golden):
    """Every formula, from the log-probabilities."""
    ids, scored = golden["input_ids"], golden["completion_mask"]
    assert not (scored * (1 - golden["attention_mask"])).any()
    tokens = token_log_probs(golden["policy_logits"], ids, scored)
    torch.testing.assert_close(tokens, golden["policy_token_logps"], rtol=2e-5, atol=2e-6)
    policy = tokens.sum(1)
    reference = token_log_probs(golden["ref_logits"], ids, scored).sum(1)
    lengths = scored[:, 1:].sum(1)
    for name, values in (("policy", policy), ("ref", reference)):
        for half, found in zip(("chosen", "rejected"), values.chunk(2), strict=True):
            torch.testing.assert_close(found, golden[f"{name}_{half}_logps"], rtol=2e-5, atol=2e-5)
    for half, found in zip(("chosen", "rejected"), lengths.chunk(2), strict=True):
        assert found.tolist() == golden[f"len_{half}"].tolist()
    pairs = pairs_of(policy, reference, lengths)
    alone = pairs_of(policy, torch.zeros_like(reference), lengths)
    names = {
        r"trl_dpo_sigmoid_beta(.*)": "sigmoid",
        r"trl_hinge_beta(.*)": "hinge",
        r"trl_ipo_beta(.*)": "ipo",
        r"trl_sigmoid_norm_beta(.*)": "sigmoid_norm",
        r"ipo_summed_beta(.*)": "ipo_sum",
        r"dpo_label_smooth(?P<smooth>.*)_beta(.*)": "sigmoid",
        r"trl_robust_ls(?P<smooth>.*)_beta(.*)": "robust",
        r"rso_sigmoid_norm_gamma(.*)": "sigmoid",
        r"rso_hinge_norm_gamma(.*)": "hinge",
        r"slic_hinge_delta(.*)": "hinge",
        r"slic_hinge_gamma(.*)": "hinge",
    }
    for key in golden:
        for pattern, loss in names.items():
            if match := re.fullmatch(pattern, key):
                beta, smooth = (_number(text) for text in (match.groups()[-1], match.groupdict().get("smooth", "0")))
                given = alone if key.startswith("slic") else pairs
                found = LOSSES[loss](given, Settings(beta=beta, label_smoothing=smooth))
                torch.testing.assert_close(found, golden[key], rtol=2e-5, atol=2e-5)
        if match := re.fullmatch(r"reward_(chosen|rejected)_beta(.*)", key):
            found = getattr(pairs, match[1]) - getattr(pairs, f"reference_{match[1]}")
            torch.testing.assert_close(_number(match[2]) * found, golden[key], rtol=2e-5, atol=2e-5)
    sft = -pairs.chosen.sum() / pairs.chosen_length.sum()
    torch.testing.assert_close(sft[None], golden["trl_sft"], rtol=2e-5, atol=2e-5)
    (total,) = [key for key in golden if key.startswith("hound_total")]
    alpha, beta, gamma = (_number(text) for text in re.findall(r"(?:alpha|beta|gamma)([0-9p]+)", total))
    found = alpha * LOSSES["sigmoid"](pairs, Settings(beta)).mean() + gamma * sft
    torch.testing.assert_close(found[None], golden[total], rtol=2e-5, atol=2e-5)


@pytest.mark.golden("second_ring_preference_losses")
def test_preference_with_a_reference_after_a_short_context(golden):
    """LongPO: the reference's log-probabilities are given, as a stored reference gives them."""
    ids, real = golden["input_ids"], golden["attention_mask"]
    short = [golden[f"longpo_short_ref_{half}_logps"] for half in ("chosen", "rejected")]
    (key,) = [key for key in golden if key.startswith("longpo_pref")]
    beta = _number(key.rpartition("beta")[2])
    rows, batch = rows_and_batch(golden["policy_logits"], ids, golden["completion_mask"])
    objective, head = Preference(loss="sigmoid", beta=beta), passing(rows.shape[-1])
    per_pair = []
    for index in range(len(short[0])):  # sums over one pair are that pair's loss
        first, last = (sum(batch["lengths"][: 2 * n]) for n in (index, index + 1))
        part = {"targets": batch["targets"][first:last], "lengths": batch["lengths"][2 * index : 2 * index + 2]}
        reference = torch.stack([side[index] for side in short])
        per_pair.append(objective.score(head, rows[first:last], part, reference)["preference"])
    pref = torch.stack(per_pair)
    torch.testing.assert_close(pref, golden[key], rtol=2e-5, atol=2e-5)
    full = token_log_probs(golden["policy_logits"], ids, real).chunk(2)[0].sum(1)
    nll = -full / real.chunk(2)[0][:, 1:].sum(1)
    torch.testing.assert_close(nll, golden["longpo_nll_chosen_fullseq"], rtol=2e-5, atol=2e-5)
    (total,) = [name for name in golden if name.startswith("longpo_total")]
    share = _number(total.rpartition("lambda")[2])
    torch.testing.assert_close((nll + share * pref).mean()[None], golden[total], rtol=2e-5, atol=2e-5)


@pytest.mark.golden("ppllava_dpo")
@pytest.mark.parametrize("chunked", [False, True])
def test_ppllava_dpo(golden, chunked, monkeypatch):
    """Pairs, log-probabilities, losses, rewards and gradients of PPLLaVA's DPO stage."""
    if chunked:
        monkeypatch.setattr(heads, "ELEMENTS", 1)
    sides = [(golden[f"{half}_ids"], golden[f"{half}_labels"]) for half in ("chosen", "rejected")]
    length = golden["concat_ids"].shape[1]
    pad = [nn.functional.pad(ids, (0, length - ids.shape[1])) for ids, _ in sides]
    labels = [nn.functional.pad(own, (0, length - own.shape[1]), value=-100) for _, own in sides]
    assert torch.cat(pad).tolist() == golden["concat_ids"].tolist()
    assert torch.cat(labels).tolist() == golden["concat_labels"].tolist()
    assert (golden["concat_ids"] != 0).long().tolist() == golden["concat_mask"].tolist()

    scored = torch.cat(labels) != -100
    targets = torch.cat(labels).clamp_min(0)
    policy = golden["policy_logits"].requires_grad_()
    lengths = scored[:, 1:].sum(1)
    sums = {name: token_log_probs(golden[f"{name}_logits"], targets, scored).sum(1) for name in ("policy", "ref")}
    for name, values in sums.items():
        torch.testing.assert_close(values, golden[f"{name}_logps_sum"], rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(values / lengths, golden[f"{name}_logps_mean"], rtol=2e-5, atol=2e-5)

    beta, smooth = golden.number("beta"), golden.number("label_smoothing")
    pairs = pairs_of(sums["policy"], sums["ref"], lengths)
    free = pairs_of(sums["policy"], torch.zeros_like(sums["ref"]), lengths)
    plain = Settings(beta)
    for key, found in {
        "loss_sigmoid": LOSSES["sigmoid"](pairs, plain),
        "loss_sigmoid_smooth": LOSSES["sigmoid"](pairs, Settings(beta, smooth)),
        "loss_sigmoid_reffree": LOSSES["sigmoid"](free, plain),
        "loss_hinge": LOSSES["hinge"](pairs, plain),
        "loss_ipo": LOSSES["ipo"](pairs, plain),
        "loss_kto_pair": kto_pair(pairs, plain),
    }.items():
        torch.testing.assert_close(found, golden[key], rtol=2e-5, atol=2e-5)
    for half in ("chosen", "rejected"):
        rise = getattr(pairs, half) - getattr(pairs, f"reference_{half}")
        torch.testing.assert_close(beta * rise, golden[f"{half}_rewards_sigmoid"], rtol=2e-5, atol=2e-5)
        mean = rise / getattr(pairs, f"{half}_length")
        torch.testing.assert_close(beta * mean, golden[f"{half}_rewards_ipo"], rtol=2e-5, atol=2e-5)

    rows, batch = rows_and_batch(policy, targets, scored)
    objective = Preference(beta=beta, weight=golden.number("dpo_alpha"), sft=golden.number("gamma"))
    found = objective.score(passing(rows.shape[-1]), rows, batch, in_turn(sums["ref"]))
    counts = objective.counts(batch)
    means = {name: value / counts[name] for name, value in found.items()}
    torch.testing.assert_close(means["sft"], golden["sft_loss_chosen"], rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(means["chosen_wins"], golden["reward_accuracy"])
    total = sum(objective.weights[name] * means[name] for name in ("preference", "sft") if objective.weights[name])
    torch.testing.assert_close(total, golden["total_loss"], rtol=2e-5, atol=2e-5)
    total.backward()
    torch.testing.assert_close(policy.grad, golden["grad_policy_logits"], rtol=1e-4, atol=2e-7)


def _number(text: str) -> float:
    """0p05 -> 0.05."""
    return float(text.replace("p", "."))
