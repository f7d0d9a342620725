"""LLaVA-KD's losses against the authors' functions: by hand, and by the objective over heads that pass logits on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mmllm.model import head as heads
from mmllm.model.head import Head
from mmllm.train.objectives.distillation import Distillation
from mmllm.train.objectives.divergences import DIVERGENCES

WEIGHTS = {"code": 1.0, "paper": 0.5}


def passing(width: int) -> Head:
    """A head whose logits are its rows."""
    head = Head(width, width)
    head.weight = nn.Parameter(torch.eye(width), requires_grad=False)
    return head


def case_of(golden, case: str) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Logits of both models, scored positions [B, L - 1] and visual positions [B, L]."""
    logits = {name: golden[f"{case}_{name}_logits"] for name in ("student", "teacher")}
    labels = golden[f"{case}_labels"]
    start, count, images = golden[f"{case}_visual_start_and_count_and_num_images"].tolist()
    visual = torch.zeros_like(labels, dtype=torch.bool)
    if images:
        visual[:, start : start + count] = True
    return logits, labels, visual


@pytest.mark.golden("llava_kd_losses", cases=r"(\w+)_student_logits")
@pytest.mark.parametrize("chunked", [False, True])
def test_llava_kd_objective(golden, case, chunked, monkeypatch):
    """Every term, both totals and both gradients; in one chunk and in chunks of a few rows."""
    if chunked:
        monkeypatch.setattr(heads, "ELEMENTS", 3 * golden[f"{case}_student_logits"].shape[-1])
    for name, relation in WEIGHTS.items():
        logits, labels, visual = case_of(golden, case)
        student, teacher = logits["student"].requires_grad_(), logits["teacher"]
        seen = visual.sum(1).tolist()
        objective = Distillation(teacher="none", relation=relation, relation_over="batch")
        batch = {"labels": labels, "seen": seen}
        scored = labels[:, 1:] != -100
        targets = labels[:, 1:][scored]
        rows = [torch.cat([side[:, :-1][scored], side[visual]]) for side in (student, teacher)]
        head = passing(student.shape[-1])
        sums = objective.score(head, rows[0], head, rows[1], targets, batch)
        sums["relation"] = objective.relate(head, rows[0][len(targets) :], head, rows[1][len(targets) :], batch)
        counts = objective.counts(batch)
        means = {term: value / max(1, counts[term]) for term, value in sums.items()}
        for term, key in (
            ("language_modeling", "ce"),
            ("response", "response_kl"),
            ("visual", "visual_kl"),
            ("relation", "relation"),
        ):
            torch.testing.assert_close(means[term], golden[f"{case}_loss_{key}"], rtol=2e-5, atol=2e-6)
        exact = golden[f"{case}_float64_ce_resp_vis_rel"]
        torch.testing.assert_close(torch.stack(list(means.values())), exact, rtol=2e-5, atol=2e-6)
        total = sum(objective.weights[term] * value for term, value in means.items())
        suffix = "code_weights_1_1_1_1" if name == "code" else "paper_weights_1_1_1_05"
        torch.testing.assert_close(total, golden[f"{case}_loss_total_{suffix}"], rtol=2e-5, atol=2e-6)
        total.backward()
        expected = golden[f"{case}_grad_student_logits_{name}_weights"]
        torch.testing.assert_close(student.grad, expected, rtol=1e-4, atol=2e-7)


@pytest.mark.golden("llava_kd_losses", cases=r"(\w+)_student_logits")
def test_llava_kd_divergences(golden, case):
    """The authors' forward forms lack the teacher's entropy; ours are divergences, 0 or more."""
    logits, labels, _ = case_of(golden, case)
    scored = labels[:, 1:] != -100
    student, teacher = (side[:, :-1] for side in logits.values())
    entropy = -(teacher.softmax(-1) * teacher.log_softmax(-1)).sum(-1)
    expected = {
        "forward": ("forward_kl_cross_entropy_form", 0.0),
        "reverse": ("reverse_kl", 0.0),
        "js": ("js_lam09", 0.9),
        "tv": ("tv", 0.0),
        "skew_forward": ("skewed_forward_kl_lam01", 0.1),
        "skew_reverse": ("skewed_reverse_kl_lam01", 0.1),
    }
    for name, (key, skew) in expected.items():
        apart = DIVERGENCES[name](student, teacher, skew)
        assert (apart > -1e-6).all()
        found = apart + entropy if "forward" in name else apart
        torch.testing.assert_close(found[scored].mean(), golden[f"{case}_util_{key}"], rtol=2e-5, atol=2e-6)
    for name, key in (("reverse", "reverse_kl"), ("skew_reverse", "skewed_reverse_kl")):
        apart = DIVERGENCES[name](student, teacher, 0.1)
        torch.testing.assert_close(apart.mean(), golden[f"{case}_util_{key}_all_tokens"], rtol=2e-5, atol=2e-6)


@pytest.mark.golden("llava_kd_losses")
def test_llava_kd_cosines_of_the_authors_forward(golden):
    """What their forward returns beside the logits and nothing uses: cosines of the projector's outputs."""
    image, text = (nn.functional.normalize(golden[f"rel_{kind}_embeds"], dim=-1) for kind in ("image", "text"))
    torch.testing.assert_close(image @ image.mT, golden["rel_image_self_cosine"])
    torch.testing.assert_close(image @ text.T, golden["rel_image_text_cosine"])
    torch.testing.assert_close((text @ text.T)[None], golden["rel_text_self_cosine"])
