"""Preference steps against TRL's, on the same text model and batch."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers.tiny import tiny_model, tiny_processor, tiny_recipe, tokenizer_folder
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from mmllm.contract.batch import Batch
from mmllm.train.objectives.preference import Preference
from mmllm.train.objectives.preference_losses import LOSSES, Pairs, Settings

RECORDS = [
    {"prompt": "What moves?", "chosen": " A red square moves left.", "rejected": " Nothing."},
    {"prompt": "How many balls are there, and where do they go?", "chosen": " two", "rejected": " three of them roll"},
    {"prompt": "Is it blue?", "chosen": " no, it is green", "rejected": " yes"},
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Our model, and the library's with the weights of our LLM."""
    ours = tiny_model(tiny_recipe())
    stock = AutoModelForCausalLM.from_config(ours.config.text_config).eval()
    stock.model.load_state_dict(ours.model.language_model.state_dict())
    stock.lm_head.weight = stock.get_input_embeddings().weight
    folder = tmp_path_factory.mktemp("stock")  # TRL loads its reference by the model's name
    stock.save_pretrained(folder)
    return ours, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def trl_trainer(stock, folder, loss: str, **settings):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder())
    config = trl.DPOConfig(
        output_dir=str(folder),
        loss_type=[loss],
        per_device_train_batch_size=len(RECORDS),
        use_cpu=True,
        bf16=False,
        report_to="none",
        gradient_checkpointing=False,
        disable_dropout=True,
        **settings,
    )
    return trl.DPOTrainer(
        model=stock, args=config, train_dataset=Dataset.from_list(RECORDS), processing_class=tokenizer
    )


def our_batch(rows: dict[str, Tensor]) -> Batch:
    """TRL's rows (all chosen, then all rejected) as ours: one row per pair, its answers as branches."""
    ids, real, answer = (rows[name] for name in ("input_ids", "attention_mask", "completion_mask"))
    count = len(ids) // 2
    found = []
    for pair in range(count):
        lists = [ids[row][real[row].bool()].tolist() for row in (pair, pair + count)]
        prefix = int((answer[pair] == 0)[real[pair].bool()].sum())
        assert lists[0][:prefix] == lists[1][:prefix]
        tails = [tokens[prefix:] for tokens in lists]
        own = len(lists[0])
        sources = [prefix - 1 + i for i in range(len(tails[0]))]
        sources += [prefix - 1, *range(own, own + len(tails[1]) - 1)]
        positions = [*range(own), *range(prefix, prefix + len(tails[1]))]
        segments = [0] * prefix + [1] * len(tails[0]) + [2] * len(tails[1])
        found.append((lists[0] + tails[1], positions, segments, sources, tails))
    length = max(len(row[0]) for row in found)

    def padded(index: int, value: int) -> Tensor:
        return torch.tensor([row[index] + [value] * (length - len(row[index])) for row in found])

    return {
        "input_ids": padded(0, 0),
        "attention_mask": (padded(2, -1) >= 0).long(),
        "position_ids": padded(1, 0),
        "segments": padded(2, -1),
        "sources": torch.tensor([row * length + at for row, one in enumerate(found) for at in one[3]]),
        "targets": torch.tensor([token for one in found for tail in one[4] for token in tail]),
        "lengths": [len(tail) for one in found for tail in one[4]],
    }


@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "ipo", "robust", "sigmoid_norm"])
def test_a_step_is_trls(models, tmp_path, loss):
    ours, stock = models
    settings = {"beta": 0.4, "label_smoothing": 0.1 if loss == "robust" else 0.0}
    trainer = trl_trainer(stock, tmp_path, loss, **settings)
    with torch.no_grad():  # as a policy that has moved away from its reference
        torch.manual_seed(3)
        for name, value in trainer.ref_model.named_parameters():
            if "norm" not in name:
                value += 0.02 * torch.randn_like(value)
    rows = next(iter(trainer.get_train_dataloader()))
    batch = our_batch(rows)
    reference = trl_log_probs(trainer.ref_model, rows)
    stock.zero_grad()
    expected = trainer.compute_loss(stock, rows)
    expected.backward()

    objective = Preference(loss=loss, reference="none", **settings)
    ours.zero_grad()
    ours.requires_grad_(True)
    hidden = ours.run(ours.embed(batch))[0].flatten(0, 1)[batch["sources"]]
    found = objective.score(ours.lm_head, hidden, batch, reference)["preference"] / len(RECORDS)
    found.backward()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    theirs = dict(stock.model.named_parameters())
    for name, parameter in ours.model.language_model.named_parameters():
        gradient = theirs[name].grad
        assert (parameter.grad - gradient).norm() <= 1e-5 * gradient.norm().clamp_min(1e-3), name


@torch.no_grad()
def trl_log_probs(model, rows: dict[str, Tensor]) -> Tensor:
    """Sums over the answers, pair by pair."""
    logits = model(rows["input_ids"], rows["attention_mask"]).logits[:, :-1].log_softmax(-1)
    tokens = logits.gather(-1, rows["input_ids"][:, 1:, None])[..., 0] * rows["completion_mask"][:, 1:]
    return tokens.sum(1).view(2, -1).T.flatten()


def pairs() -> Pairs:
    torch.manual_seed(0)
    lengths = torch.tensor([3, 7, 5]), torch.tensor([4, 2, 9])
    sums = [-3 * torch.rand(3) * length for length in lengths]
    return Pairs(sums[0].requires_grad_(), sums[1].requires_grad_(), torch.zeros(3), torch.zeros(3), *lengths)


def test_simpo_is_trls():
    cpo = pytest.importorskip("trl.experimental.cpo.cpo_trainer")
    given = pairs()
    own = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu"),
        loss_type="simpo",
        beta=2.0,
        label_smoothing=0.0,
        alpha=0.0,
        simpo_gamma=1.0,
    )
    means = given.chosen / given.chosen_length, given.rejected / given.rejected_length
    expected = cpo.CPOTrainer.cpo_loss(own, *means)[0]
    close(LOSSES["simpo"](given, Settings(beta=2.0, gamma=0.5)), expected, given)


def test_orpo_is_trls():
    orpo = pytest.importorskip("trl.experimental.orpo.orpo_trainer")
    given = pairs()
    means = given.chosen / given.chosen_length, given.rejected / given.rejected_length
    own = SimpleNamespace(beta=0.3, accelerator=SimpleNamespace(device="cpu"))
    expected = -orpo.ORPOTrainer.odds_ratio_loss(own, *means)[0]
    close(LOSSES["orpo"](given, Settings(beta=0.3)), expected, given)


def close(found: Tensor, expected: Tensor, given: Pairs) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    for side in (given.chosen, given.rejected):
        one, other = (torch.autograd.grad(value.sum(), side, retain_graph=True)[0] for value in (found, expected))
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)


def test_our_rows_are_what_the_processor_makes():
    """What the tests above build by hand has the keys of the objective's own batches."""
    from mmllm.data.records.conversations import Sample

    processor = tiny_processor(tiny_recipe())
    sample = Sample("a", [{"role": "user", "content": "What moves?"}], {"chosen": "a dog", "rejected": "a red cat"})
    made = Preference(reference="none").prepare([sample], processor)
    assert {"segments", "sources", "targets", "lengths", "position_ids"} <= set(made)
