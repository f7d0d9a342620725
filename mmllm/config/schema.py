"""The typed sections of a recipe: which keys exist, with which types and defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mmllm.contract.arguments import Count, NotNegative, Positive, Share


@dataclass(frozen=True)
class LLM:
    """The language model of a recipe.

    Attributes:
        name: source of weights and tokenizer: a hub id, a folder, or `package:NAME`, an installed package.
        gguf: the GGUF file there, where the weights are in that format.
        config: its geometry, inline.
        tokenizer: a different source of the tokenizer.
        template: how a conversation is written, as a chat template (Jinja); default: the tokenizer's own.
    """

    name: str | None = None
    gguf: str | None = None
    config: dict | None = None
    tokenizer: str | None = None
    template: str | None = None


@dataclass(frozen=True)
class Stage:
    """One stage of training.

    Attributes:
        data: a data file of any format, a mix (.yaml), or several of them, concatenated.
        trains: what learns: `encoders`, `text`, `connector`, `llm`, one of them by name (`encoders.clip`), or a module
            inside (`encoders.clip.adapter`, `llm.layers.20`). `llm.lora` is an adapter of the LLM.
        steps: length in optimizer steps; give exactly one of steps and epochs.
        epochs: length in epochs.
        batch: samples per optimizer step over all processes.
        micro_batch: most samples per forward and process.
        checkpointing: recompute activations in the backward pass instead of keeping them.
        optimizer: "adamw", or "muon": Muon on hidden matrices, AdamW on the rest.
        muon_lr: Muon's own peak learning rate.
        lr: peak learning rate; or {name: rate} for every name in `trains`.
        schedule: its shape after the warm-up.
        warmup: share of the steps.
        weight_decay: on matrices only.
        clip: largest gradient norm; 0 = no clipping.
        init: a run or model folder whose weights it starts from; default: the previous stage. Or {name: folder} for
            single parts, named as in `trains`, which may combine parts from several recipes.
        lora: the adapter that `llm.lora` trains (rank, alpha, dropout, targets, dora, init).
        keep: "merged" puts the adapter into the weights at the end; "adapter" keeps it beside them.
        validation: how many samples are held out and scored now and then; the best weights are kept in `best/`.
        validate_every: steps between two scorings; default: a fifth of the stage.
        share: keep its trained weights in the cache, so that other recipes with an equal stage start from them.
    """

    objective: str | dict = "language_modeling"
    data: str | tuple[str, ...] = ""
    trains: tuple[str, ...] = ("connector",)
    steps: Count | None = None
    epochs: Positive | None = None
    batch: Count = 32
    micro_batch: Count | None = None
    checkpointing: bool = False
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: NotNegative | dict = 1e-3
    muon_lr: NotNegative = 1e-2
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Share = 0.03
    weight_decay: NotNegative = 0.0
    clip: NotNegative = 1.0
    init: str | dict | None = None
    validation: Count | None = None
    validate_every: Count | None = None
    lora: dict | None = None
    keep: Literal["merged", "adapter"] = "merged"
    share: bool = False
