"""Muon for the matrices of the hidden layers, AdamW for everything else, as one optimizer.

Source: Jordan et al. 2024 (orthogonalised momentum), with the update scaled to AdamW's size (Liu et al. 2025,
arXiv 2502.16982, section 2.2), so that the learning rates of the two can be compared. Small models leave their first
plateau in a fraction of the steps that AdamW alone needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable


class MuonAdamW(torch.optim.Optimizer):
    """Two optimizers of the library behind one interface: groups, state and steps are theirs.

    Args:
        matrices: two-dimensional parameters for Muon.
        groups: AdamW groups for the rest.
        lr: of AdamW.
        muon_lr: of Muon.
        betas: of AdamW.
        weight_decay: of the matrices.
    """

    def __init__(
        self,
        matrices: list[nn.Parameter],
        groups: list[dict[str, Any]],
        *,
        lr: float,
        muon_lr: float,
        betas: tuple[float, float] = (0.9, 0.98),
        weight_decay: float = 0.0,
    ) -> None:
        self.inner: list[torch.optim.Optimizer] = []
        if matrices:
            muon = torch.optim.Muon(matrices, lr=muon_lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
            self.inner.append(muon)
        if groups:
            self.inner.append(torch.optim.AdamW(groups, lr=lr, betas=betas))
        super().__init__([group for optimizer in self.inner for group in optimizer.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Share the inner optimizers' own group dicts, so that a scheduler reaches them."""
        self.param_groups = [group for optimizer in self.inner for group in optimizer.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> None:
        """One step of both optimizers."""
        for optimizer in self.inner:
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """Both states."""
        return {"inner": [optimizer.state_dict() for optimizer in self.inner]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore both states."""
        for optimizer, state in zip(self.inner, state_dict["inner"], strict=True):
            optimizer.load_state_dict(state)
        self._share()


def split(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """Trainable parameters as (hidden matrices, other matrices, the rest).

    Embeddings, heads, convolutions and raw parameters are not hidden matrices: they are not meant to be orthogonalised.
    """
    hidden: dict[int, nn.Parameter] = {}
    heads = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight.requires_grad and id(module.weight) not in heads:
            hidden[id(module.weight)] = module.weight
    rest = [value for value in model.parameters() if value.requires_grad and id(value) not in hidden]
    return list(hidden.values()), [v for v in rest if v.ndim > 1], [v for v in rest if v.ndim <= 1]


def muon(model: nn.Module, lr: float, muon_lr: float, weight_decay: float) -> MuonAdamW:
    """The optimizer of a model."""
    hidden, matrices, rest = split(model)
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    return MuonAdamW(hidden, groups, lr=lr, muon_lr=muon_lr, weight_decay=weight_decay)


def grouped(rates: list[tuple[list[nn.Parameter], float]], weight_decay: float) -> list[dict[str, Any]]:
    """Groups of an optimizer with a learning rate each; weight decay on matrices alone."""
    groups = []
    for parameters, lr in rates:
        chosen = [parameter for parameter in parameters if parameter.requires_grad]
        for decayed in (True, False):
            own = [parameter for parameter in chosen if (parameter.ndim >= 2) == decayed]
            if own:
                groups.append({"params": own, "lr": lr, "weight_decay": weight_decay if decayed else 0.0})
    return groups
