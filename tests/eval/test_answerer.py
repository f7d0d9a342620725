"""Batches that were read ahead are taken for the very question that they were read for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmllm.contract.errors import UserError
from mmllm.eval.answerer import ModelAnswerer, evaluate_model
from mmllm.model.checkpoint import weights_digest


class Batch(dict):
    """A batch that is where it should be."""

    def to(self, device: Any) -> Batch:
        return self


class Processor:
    """Notes with how many frames each conversation is read."""

    def __init__(self) -> None:
        self.read: list[tuple[Any, int | None]] = []
        self.tokenizer = SimpleNamespace(batch_decode=lambda rows, **options: [str(int(row[0])) for row in rows])

    def apply_chat_template(self, conversations: list[Any], processor_kwargs: dict[str, Any], **options: Any) -> Batch:
        self.read.append((conversations, processor_kwargs["frames"]))
        ids = torch.full((len(conversations), 1), processor_kwargs["frames"] or 0)
        return Batch(input_ids=ids, visual={"media": []})


def answerer(frames: int | None = None) -> tuple[ModelAnswerer, Processor]:
    """One whose model says with how many frames it was asked, and has read three visual tokens, then one."""
    processor = Processor()
    reduction = SimpleNamespace(last=SimpleNamespace(entering=[torch.tensor([3]), torch.tensor([1])]))
    answers = {"generate": lambda input_ids, **options: input_ids.repeat(1, 2), "reduction": reduction}
    model = SimpleNamespace(device="cpu", **answers)
    return ModelAnswerer(model, processor, "uniform", frames), processor


def test_a_batch_read_ahead_is_used_once_and_for_its_own_frames():
    answer, processor = answerer()
    chats = [[{"role": "user", "content": "What?"}]]
    answer.prefetch(chats, frames=None)
    assert answer(chats, frames=1, max_new_tokens=4) == ["1"]
    assert answer.visual_tokens == [2.0]
    assert answer(chats, frames=None, max_new_tokens=4) == ["0"]
    assert sorted(frames or 0 for _, frames in processor.read) == [0, 1]
    assert answer(chats, frames=None, max_new_tokens=4) == ["0"]
    assert len(processor.read) == 3


def test_a_calls_frames_win_over_the_answerers_own():
    answer, _ = answerer(frames=16)
    chats = [[{"role": "user", "content": "What?"}]]
    assert answer(chats, frames=None, max_new_tokens=4) == ["16"]
    assert answer(chats, frames=1, max_new_tokens=4) == ["1"]


def test_every_weight_is_in_the_digest():
    digests = set()
    for name in (None, "weight", "bias"):
        layer = torch.nn.Linear(2, 2)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.fill_(1.0)
            if name is not None:
                getattr(layer, name).view(-1)[-1] = 2.0
        digests.add(weights_digest(layer))
    assert len(digests) == 3


def test_answers_of_other_weights_are_not_continued_and_other_frames_lie_elsewhere(tmp_path, monkeypatch):
    def run(benchmark: Any, root: Any, answer: Any, folder: Path, *arguments: Any, **options: Any) -> str:
        return folder.name

    monkeypatch.setattr("mmllm.eval.answerer.run_benchmark", run)
    torch.manual_seed(0)
    models = [torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)]

    def evaluate(model: int = 0, frames: int | None = None, section: str = "mlp") -> Any:
        tokenizer = SimpleNamespace(backend_tokenizer=SimpleNamespace(to_str=lambda: "{}"), chat_template="t")
        loader = SimpleNamespace(reader=SimpleNamespace(backend="pyav", corrupt="warn"))
        processor = SimpleNamespace(model_section={"connector": section}, tokenizer=tokenizer, loader=loader)
        return evaluate_model(models[model], processor, "mvbench", tmp_path, tmp_path / "out", frames=frames)

    for layer in models:
        layer.generation_config, layer.dtype = SimpleNamespace(to_dict=dict), torch.float32
    first = evaluate()
    assert first == evaluate()
    other = evaluate(frames=4)
    assert other != first and other == evaluate(frames=4)
    models[0].reduction = SimpleNamespace(section={"type": "random", "keep": 0.5})
    assert evaluate() not in (first, other)
    models[0].reduction = None
    assert evaluate() == first
    for changed, options in {"weights": {"model": 1}, "front_end": {"section": "pool"}}.items():
        with pytest.raises(UserError, match=f"holds answers of another run; these differ: {changed}. Try"):
            evaluate(**options)
