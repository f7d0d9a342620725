"""RSO's rejection sampling against the authors' code."""

from __future__ import annotations

import pytest

from mmllm.data.records.rejection_sampling import acceptance, rejection_sample


@pytest.mark.golden("second_ring_rso_sampling", cases=r"accepted_idx_b(\d+)")
def test_rso_sampling(golden, case):
    rewards, uniforms = golden.exact("rewards").tolist(), golden.exact("uniforms").tolist()
    beta = golden.exact("betas").tolist()[int(case)]
    coming = iter(uniforms)
    accepted, draws = rejection_sample(rewards, golden.number("num_samples"), beta, lambda: next(coming))
    assert accepted == golden[f"accepted_idx_b{case}"].tolist()
    assert draws == golden.number(f"uniforms_used_b{case}")
    found = [acceptance(reward, max(rewards), beta) for reward in rewards]
    assert found == pytest.approx(golden.exact(f"first_pass_accept_prob_b{case}").tolist(), rel=1e-6)
