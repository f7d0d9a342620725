"""The losses of CLIP and SigLIP: by hand, as the library's, over two processes, and the nano text tower."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from mmllm.contract.errors import UserError
from mmllm.contract.types import Needs
from mmllm.data.records.conversations import Sample
from mmllm.train.objectives.contrastive import LOSSES, Contrastive, caption_of

BATCH, WIDTH = 6, 5


class Towers(nn.Module):
    """Two linear towers over given rows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.images, self.texts = nn.Linear(4, WIDTH), nn.Linear(3, WIDTH)

    def pooled_images(self, batch: dict) -> Tensor:
        """[B, WIDTH]."""
        return self.images(batch["seen"])

    def pooled_texts(self, batch: dict, source: str | None) -> Tensor:
        """[B, WIDTH]."""
        return self.texts(batch["input_ids"])


def rows(first: int = 0, count: int = BATCH) -> dict[str, Tensor]:
    """Rows of the one batch."""
    generator = torch.Generator().manual_seed(1)
    seen, said = torch.randn(BATCH, 4, generator=generator), torch.randn(BATCH, 3, generator=generator)
    return {"seen": seen[first : first + count], "input_ids": said[first : first + count]}


def run(loss: str, first: int = 0, count: int = BATCH) -> dict[str, Tensor]:
    """The summed loss over some rows and all gradients."""
    towers, objective = Towers(), Contrastive(loss=loss)
    term = objective(towers, rows(first, count))["contrastive"]
    assert term.count == count
    term.sum.backward()
    named = [*towers.named_parameters(), *objective.named_parameters()]
    return {"loss": term.sum.detach(), **{name: value.grad for name, value in named}}


def unit(towers: Towers) -> tuple[Tensor, Tensor]:
    """Features of length one."""
    batch = rows()
    pair = towers.pooled_images(batch), towers.pooled_texts(batch, None)
    return tuple(nn.functional.normalize(value, dim=-1) for value in pair)


def test_clips_loss_by_hand():
    images, texts = unit(Towers())
    similar = (images @ texts.T / 0.07).exp()
    own = similar.diagonal()
    by_hand = -((own / similar.sum(1)).log() + (own / similar.sum(0)).log()).sum() / 2
    torch.testing.assert_close(run("clip")["loss"], by_hand.detach(), atol=1e-5, rtol=1e-5)


def test_siglips_loss_equals_the_librarys():
    """The library's loss over the same features, with its start of scale and bias."""
    from transformers import SiglipConfig, SiglipModel

    images, texts = unit(Towers())
    small = {"hidden_size": WIDTH, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision = {**small, "image_size": 4, "patch_size": 4}
    model = SiglipModel(SiglipConfig(text_config={**small, "vocab_size": 8}, vision_config=vision)).eval()
    nn.init.constant_(model.logit_scale, math.log(10))
    nn.init.constant_(model.logit_bias, -10.0)

    class Given(nn.Module):
        """A tower that gives what it was given."""

        def __init__(self, value: Tensor) -> None:
            super().__init__()
            self.value = value

        def forward(self, *arguments, **keywords):
            return SimpleNamespace(pooler_output=self.value)

    model.vision_model, model.text_model = Given(images), Given(texts)
    theirs = model(input_ids=torch.zeros(1, 1), pixel_values=torch.zeros(1), return_loss=True).loss
    torch.testing.assert_close(run("siglip")["loss"] / BATCH, theirs.detach(), atol=1e-6, rtol=1e-6)


def test_scale_is_learnt_and_bounded():
    assert run("clip")["loss.scale"].abs() > 0
    objective = Contrastive(loss="clip", temperature=0.001)
    towers = Towers()
    hundred = Contrastive(loss="clip", temperature=0.01)
    torch.testing.assert_close(
        objective(towers, rows())["contrastive"].sum, hundred(towers, rows())["contrastive"].sum, atol=1e-4, rtol=1e-5
    )
    assert objective.loss.scale.item() == pytest.approx(math.log(100))  # brought back, so that it still learns
    objective(towers, rows())["contrastive"].sum.backward()
    assert objective.loss.scale.grad.abs() > 0
    with pytest.raises(UserError, match="must be above 0"):
        Contrastive(temperature=0.0)


def test_two_processes_are_one(tmp_path):
    """Sums of losses and of gradients over two processes = those of one process with the whole batch."""
    command = [sys.executable, __file__, str(tmp_path)]
    started = [subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True) for rank in range(2)]
    for process in started:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors[-3000:]
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for loss in LOSSES:
        for name, value in run(loss).items():
            torch.testing.assert_close(found[0][loss][name] + found[1][loss][name], value, atol=1e-5, rtol=1e-5)
    assert found[0]["unequal"] == found[1]["unequal"] == "processes have unequal batches"


def test_micro_batches_are_refused():
    objective, batch = Contrastive(), rows()
    assert objective.counts(batch) == {"contrastive": BATCH}
    with pytest.raises(UserError, match="compared only within themselves"):
        objective.counts(batch)
    objective(Towers(), batch)
    assert objective.counts(batch) == {"contrastive": BATCH}


def test_towers_without_a_common_space_are_refused():
    towers = Towers()
    towers.texts = nn.Linear(3, WIDTH + 1)
    with pytest.raises(UserError, match=r"no common space, expected \[6, 6\], got \[6, 5\]"):
        Contrastive()(towers, rows())


def sample(name: str, *content, answer: str | None = "A red square moves left.") -> Sample:
    """A conversation of one turn."""
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": "Describe it."}]}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    return Sample(name, messages, {})


def test_what_is_no_description_is_refused():
    clip = {"type": "video", "path": "a.mp4"}
    assert caption_of(sample("right", clip)) == (clip, "A red square moves left.")
    for wrong in (sample("blind"), sample("twice", clip, clip), sample("mute", clip, answer=None)):
        with pytest.raises(UserError, match=f"sample {wrong.id}: is not a clip and its description"):
            caption_of(wrong)


def test_a_batch_of_clips_and_descriptions():
    """Equal clips are read into the batch once and stand in as many pairs as there are samples."""
    clip, other = {"type": "video", "path": "a.mp4"}, {"type": "video", "path": "b.mp4"}

    class Source:
        """Words as their lengths."""

        def tokenize(self, texts):
            ids = torch.tensor([[len(word) for word in text.split()][:3] for text in texts])
            return ids, torch.ones_like(ids)

    def read(entry):
        return SimpleNamespace(key=entry["path"], for_model=lambda: {"path": entry["path"]})

    sources = {"words": Source()}
    processor = SimpleNamespace(read=read, plan=SimpleNamespace(prompts=SimpleNamespace(sources=sources)))
    samples = [sample("0", clip), sample("1", other, answer="Two blue dots stay."), sample("2", clip)]
    batch = Contrastive().prepare(samples, processor)
    assert batch["visual"]["media"] == [{"path": "a.mp4"}, {"path": "b.mp4"}]
    assert batch["visual"]["pairs"] == [(0, -1), (1, -1), (0, -1)]
    assert batch["input_ids"].tolist() == [[1, 3, 6], [3, 4, 4], [1, 3, 6]]
    assert batch["names"] == ["0", "1", "2"]
    with pytest.raises(UserError, match=r"no text source is called 'wards'\. Try: words"):
        Contrastive(text="wards").prepare(samples, processor)


def test_the_nano_text_tower_keeps_the_contract():
    from mmllm.checks.part import check_part

    assert check_part("text", "nano_text") == 2


def test_the_nano_text_tower_reads_nanoworlds_words():
    from helpers.tiny import tokenizer_folder

    from mmllm.contract.parts import Site
    from mmllm.contract.registry import find

    torch.manual_seed(0)
    tower = find("text", "nano_text")(Site(), tokenizer=tokenizer_folder(), joint=8, length=12).eval()
    ids, mask = tower.tokenize(["A red square moves left.", "", "A red square. " * 20])
    assert ids.shape[1] == 12
    assert ids[0, 0] == 1
    assert ids[0][mask[0].bool()][-1] == ids[2, -1] == 5
    with torch.no_grad():
        both = tower(ids, mask, Needs(prompt=("pooled",), prompt_hidden_states=(-2, -1)))
        real = int(mask[0].sum())
        alone = tower(ids[:1, :real], mask[:1, :real], Needs(prompt=("pooled",)))
    assert both.present.tolist() == [True, False, True]
    assert both.hidden_states.shape == (3, 12, 2, 96)
    torch.testing.assert_close(both.pooled[:1], alone.pooled, atol=1e-5, rtol=0)
    small = find("text", "nano_text")(Site(), tokenizer=tokenizer_folder(), vocabulary=20)
    with pytest.raises(UserError, match="smaller than the tokenizer"):
        small.encode("A red square moves left.")


def main(folder: str, rank: int) -> None:
    """One of two processes: its half of the batch under either loss, then unequal halves."""
    from torch import distributed

    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found: dict = {loss: run(loss, first=rank * BATCH // 2, count=BATCH // 2) for loss in LOSSES}
    try:
        run("clip", count=2 + rank)
    except UserError as error:
        found["unequal"] = error.what
    torch.save(found, Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))


def test_its_temperature_trains_is_resumed_and_stays_out_of_the_model(tmp_path, monkeypatch):
    from helpers.tiny import frames, tiny_recipe, tokenizer_folder, write_video
    from safetensors.torch import load_file

    from mmllm.train import progress
    from mmllm.train.context import RunOptions, Stopped
    from mmllm.train.run import train

    lines = []
    for index in range(8):
        write_video(tmp_path / f"{index}.mp4", frames(index, 8))
        content = [{"type": "video", "path": f"{index}.mp4"}, {"type": "text", "text": "Describe the video."}]
        said = {"role": "assistant", "content": f"A red square moves {index} times."}
        lines.append(json.dumps({"id": str(index), "messages": [{"role": "user", "content": content}, said]}))
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    recipe = tiny_recipe("nano/clip")
    recipe.model["text"]["words"] |= {"joint": 64}
    recipe.model["llm"]["tokenizer"] = tokenizer_folder()
    stage = {**recipe.data["stages"]["contrast"], "data": str(tmp_path / "data.jsonl"), "steps": 4, "batch": 4}
    recipe.data["stages"] = {"contrast": stage}
    options = RunOptions(jobs=0, device="cpu", quiet=True, log_steps=1, save_steps=2, cache=tmp_path)
    train(recipe, tmp_path / "whole", options)
    own = load_file(tmp_path / "whole/stages/1-contrast/checkpoint-4/objective.safetensors")
    assert own["loss.scale"].item() != pytest.approx(-math.log(0.07), abs=1e-6)
    assert not [key for key in load_file(tmp_path / "whole/model/model.safetensors") if "objective" in key]

    real = progress.StopOnSignal.on_step_end

    def stop(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.signal = 15
        return real(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(progress.StopOnSignal, "on_step_end", stop)
        with pytest.raises(Stopped):
            train(recipe, tmp_path / "cut", options)
    train(recipe, tmp_path / "cut", options)
    again = load_file(tmp_path / "cut/stages/1-contrast/checkpoint-4/objective.safetensors")
    assert torch.equal(own["loss.scale"], again["loss.scale"])
    whole, cut = (load_file(tmp_path / name / "model/model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[key], cut[key]) for key in whole)
