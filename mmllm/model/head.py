"""The head over the LLM's hidden states: logits, and scores of many rows without ever holding their logits together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, islice, pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.autograd.function import FunctionCtx

    from mmllm.model.vocabulary import CoordinateTables

Score = Callable[[Tensor, slice], dict[str, Tensor]]
"""(float32 logits [n, V] of some rows, which rows) -> {term: a sum over these rows}; the same terms for all rows."""
Read = Callable[[Tensor, slice], Tensor]
"""(float32 logits [n, V] of some rows, which rows) -> a value per row, [n, ...]."""

ELEMENTS = 2**24
"""Logits scored at a time: 67 MB in float32, a few times over."""
MULTIPLIED = 4
"""Chunks whose logits are computed at once: 268 MB. A product of few rows reads the whole weight for little work."""


class Head(nn.Linear):
    """The projection from hidden states to the vocabulary.

    It is called in one of four ways, so that its weight is read inside its forward alone:
    `head(rows)` gives logits; `head(rows, score=f)` sums of scores with their gradients; `head(rows, read=f)` a value
    per row without gradients; `head()` the Gram matrix of its weight.

    With a vocabulary of coordinates its tables are part of the head: their tokens' logits stand at their ids, in the
    place of rows that the weight has to spare, or behind them; ids of neither have a logit of -inf.
    """

    _vocabulary: tuple[CoordinateTables, ...] = ()

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__(width, vocabulary, bias=False)

    def forward(
        self,
        rows: Tensor | None = None,
        score: Score | None = None,
        read: Read | None = None,
        *,
        scales: dict[str, float] | None = None,
        groups: Sequence[int] | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """Logits of hidden states, or what `score` or `read` makes of them, chunk by chunk.

        Gradients of a score are formed while the logits of a chunk are there, and nothing is computed again. That
        needs the terms' share in the loss beforehand, up to a common factor: with several terms, `scales`.

        Args:
            rows: [..., D]; [N, D] with `score` or `read`; None = the Gram matrix.
            score: called with the logits of each chunk.
            read: as `score`, without gradients.
            scales: {term: its factor in the loss}; default: 1 each. A term with factor 0 gets no gradient.
            groups: sizes of runs of rows that have to be scored together; default: each row on its own.

        Returns:
            logits [..., V]; with `score` {term: sum}; with `read` values [N, ...]; without rows W'W [D, D].

        Raises:
            RuntimeError: in the backward, where the loss weighs the terms otherwise than `scales` says.
        """
        tables = self._tables()
        if rows is None:
            weight = self.weight.float()
            with torch.autocast(weight.device.type, enabled=False):
                return weight.T @ weight
        if score is not None:
            return _scored(rows, self.weight, tables, score, scales or {}, groups)
        if read is not None:
            with torch.no_grad():
                chunks = _chunks(groups or [1] * len(rows), self.out_features)
                return torch.cat([read(_float(self._logits(rows[chunk], tables)), chunk) for chunk in chunks])
        return self._logits(rows, tables)

    def use(self, vocabulary: CoordinateTables) -> None:
        """Take the tables of a vocabulary along; they stay the model's, and are no part of this module's state."""
        self._vocabulary = (vocabulary,)

    def _tables(self) -> Extra | None:
        if not self._vocabulary:
            return None
        (vocabulary,) = self._vocabulary
        layout = vocabulary.layout
        return Extra(vocabulary().outputs, vocabulary.ids(self.weight.device), layout.first + len(layout))

    def _logits(self, rows: Tensor, tables: Extra | None) -> Tensor:
        logits = super().forward(rows)
        return logits if tables is None else tables.extended(logits, rows)


class Extra(NamedTuple):
    """Rows of a head beside its weight.

    Attributes:
        outputs: [N, D].
        ids: [N], the tokens that they stand for.
        length: of the logits, up to the last of these tokens.
    """

    outputs: Tensor
    ids: Tensor
    length: int

    def extended(self, logits: Tensor, rows: Tensor) -> Tensor:
        """Logits [..., V] of rows [..., D] with those of these tokens in their places, [..., V or more]."""
        missing = self.length - logits.shape[-1]
        if missing > 0:
            logits = nn.functional.pad(logits, (0, missing), value=-torch.inf)
        own = nn.functional.linear(rows, self.outputs)
        return logits.index_copy(-1, self.ids, own.to(logits.dtype))


def log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """log p(target) of each row: logits [N, V] and targets [N] -> [N]; the negative of cross-entropy."""
    return _LogProbs.apply(logits, targets)


class _LogProbs(torch.autograd.Function):
    """Keeps the logits alone for the backward, where the library's form holds four tensors of their size."""

    @staticmethod
    def forward(ctx: FunctionCtx, logits: Tensor, targets: Tensor) -> Tensor:
        """[N, V] and [N] -> [N]."""
        total = logits.logsumexp(-1)
        ctx.save_for_backward(logits, targets, total)
        return logits.gather(-1, targets[:, None])[:, 0] - total

    @staticmethod
    def backward(ctx: FunctionCtx, upstream: Tensor) -> tuple[Tensor, None]:
        """upstream * (one-hot - softmax)."""
        logits, targets, total = ctx.saved_tensors
        gradient = torch.sub(logits, total[:, None]).exp_().mul_(-upstream[:, None])
        return gradient.scatter_add_(-1, targets[:, None], upstream[:, None]), None


def _chunks(groups: Sequence[int], vocabulary: int) -> Iterator[slice]:
    """Runs of whole groups with at most `ELEMENTS` logits; a group that has more stands alone."""
    most, first = max(1, ELEMENTS // vocabulary), 0
    for start, stop in pairwise(accumulate(groups, initial=0)):
        if stop - first > most and start > first:
            yield slice(first, start)
            first = start
    if sum(groups) > first or not groups:
        yield slice(first, sum(groups))


def _batched(chunks: Iterator[slice], count: int) -> Iterator[list[slice]]:
    """Consecutive chunks, so many at a time."""
    while some := list(islice(chunks, count)):
        yield some


def _float(logits: Tensor) -> Tensor:
    """In float32 or better; they were computed in the number format of autocast."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def _scored(
    rows: Tensor,
    weight: Tensor,
    tables: Extra | None,
    score: Score,
    scales: dict[str, float],
    groups: Sequence[int] | None,
) -> dict[str, Tensor]:
    """{term: sum over all rows}, differentiable in rows, weight and tables."""
    names: list[str] = []
    learning = torch.is_grad_enabled()  # inside a Function it never is
    outputs = None if tables is None else tables.outputs
    values = _ChunkedScore.apply(
        rows, weight, outputs, tables, score, scales, groups or [1] * len(rows), names, learning
    )
    return dict(zip(names, values, strict=True))


class _ChunkedScore(torch.autograd.Function):
    """Sums of scores; the gradient of their sum weighted by `scales` is formed in the forward."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        rows: Tensor,
        weight: Tensor,
        outputs: Tensor | None,
        tables: Extra | None,
        score: Score,
        scales: dict[str, float],
        groups: Sequence[int],
        names: list[str],
        learning: bool,
    ) -> tuple[Tensor, ...]:
        """Rows [N, D] and weight [V, D] -> one sum per term; their names are put into `names`.

        Args:
            outputs: [E, D], rows beside the weight, or None.
            tables: the same with their tokens.
        """
        of_rows, of_weight, of_outputs = (wanted and learning for wanted in ctx.needs_input_grad[:3])
        grad_rows = torch.zeros_like(rows) if of_rows else None
        grad_weight = torch.empty_like(weight) if of_weight else None
        grad_outputs = torch.zeros_like(outputs) if of_outputs else None
        extra = None if tables is None else tables._replace(outputs=outputs)
        totals: dict[str, Tensor] = {}
        shares: dict[str, float] = {}
        first = True
        for chunks in _batched(_chunks(groups, len(weight)), MULTIPLIED):
            rows_of = slice(chunks[0].start, chunks[-1].stop)
            logits, some = nn.functional.linear(rows[rows_of], weight), False
            logits = logits if extra is None else extra.extended(logits, rows[rows_of])
            for chunk in chunks:
                part = logits[chunk.start - rows_of.start : chunk.stop - rows_of.start]
                if not (of_rows or of_weight or of_outputs):
                    _add(totals, score(_float(part), chunk))
                    continue
                gradient = _gradient(_float(part), score, chunk, scales, totals, shares)
                if gradient is not None:  # in the place of its logits, which nobody reads again
                    part.copy_(gradient)
                    some = True
            if some and extra is not None:
                logits = _add_outputs(logits, rows, extra, grad_rows, grad_outputs, rows_of, len(weight))
            if some:
                _add_gradients(logits, rows[rows_of], weight, grad_rows, grad_weight, rows_of, first)
                first = False
            logits = part = gradient = None  # or the next ones would be computed while these are held
        if first and grad_weight is not None:
            grad_weight.zero_()
        names += totals
        # Not by save_for_backward, which would keep a second reference: the gradient itself becomes the weight's then.
        kept = [grad_rows, grad_weight, grad_outputs]
        ctx.kept, ctx.scales = kept, [shares.get(name, 0.0) for name in totals]
        ctx.mark_non_differentiable(*(value for name, value in totals.items() if name not in shares))
        return tuple(totals.values())

    @staticmethod
    def backward(ctx: FunctionCtx, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        """The kept gradients times the factor that the loss has beside `scales`."""
        if ctx.kept is None:
            raise RuntimeError("the head's gradients are gone: they serve one backward")
        factor, kept, ctx.kept = _common_factor(upstream, ctx.scales), ctx.kept, None
        for gradient in kept:
            if gradient is not None:
                gradient.mul_(factor.to(gradient.dtype))
        return (*kept, None, None, None, None, None, None)


def _gradient(
    logits: Tensor,
    score: Score,
    chunk: slice,
    scales: dict[str, float],
    totals: dict[str, Tensor],
    shares: dict[str, float],
) -> Tensor | None:
    """The gradient of a chunk's weighted score with respect to its logits.

    The sums are added to `totals`; `shares` learns by how much each term with a gradient was weighted.
    """
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        sums = score(leaf, chunk)
        _add(totals, {name: value.detach() for name, value in sums.items()})
        # Relative to the largest: what is small in itself would be lost in float16, whose loss is scaled only later.
        largest = max((abs(scales.get(name, 1.0)) for name, value in sums.items() if value.requires_grad), default=0.0)
        for name, value in sums.items():
            if value.requires_grad and largest:
                shares[name] = scales.get(name, 1.0) / largest
        weighed = [shares[name] * value for name, value in sums.items() if shares.get(name)]
        return torch.autograd.grad(sum(weighed), leaf)[0] if weighed else None


def _add_outputs(
    gradient: Tensor,
    rows: Tensor,
    extra: Extra,
    grad_rows: Tensor | None,
    grad_outputs: Tensor | None,
    where: slice,
    vocabulary: int,
) -> Tensor:
    """Through the product with the rows beside the weight; returns what is left for the weight, [n, V]."""
    own = gradient[:, extra.ids]
    if grad_rows is not None:
        grad_rows[where] += (own @ extra.outputs.to(own.dtype)).to(grad_rows.dtype)
    if grad_outputs is not None:
        grad_outputs += (own.T @ rows[where].to(own.dtype)).to(grad_outputs.dtype)
    return gradient.index_fill_(1, extra.ids, 0)[:, :vocabulary]


def _add_gradients(
    gradient: Tensor,
    rows: Tensor,
    weight: Tensor,
    grad_rows: Tensor | None,
    grad_weight: Tensor | None,
    where: slice,
    first: bool,
) -> None:
    """Through the product of rows and weight, in its number format; the first chunk writes the weight's gradient."""
    dtype = gradient.dtype
    if grad_rows is not None:
        grad_rows[where] += (gradient @ weight.to(dtype)).to(grad_rows.dtype)
    if grad_weight is None:
        return
    if grad_weight.dtype == dtype:
        grad_weight.addmm_(gradient.T, rows.to(dtype), beta=0 if first else 1)
    elif first:
        grad_weight.copy_(gradient.T @ rows.to(dtype))
    else:
        grad_weight += gradient.T @ rows.to(dtype)


def _add(totals: dict[str, Tensor], sums: dict[str, Tensor]) -> None:
    for name, value in sums.items():
        totals[name] = totals[name] + value if name in totals else value


def _common_factor(upstream: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
    """What the gradients of the terms are beside their scales; the same for all of them.

    Raises:
        RuntimeError: it differs.
    """
    factors = torch.stack([value / share for value, share in zip(upstream, scales, strict=True) if share])
    if not torch.allclose(factors, factors[:1], rtol=1e-4, atol=0):
        raise RuntimeError(f"the head's terms were scored with scales {list(scales)}, the loss weighs them otherwise")
    return factors[0]
