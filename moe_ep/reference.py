"""The semantics of dispatch and combine in plain torch: the oracle that every backend must equal bit for bit.

Nothing here communicates. Every argument is a list with one entry per rank, all in this process and on one
device, and the functions return lists by rank. The code prefers the obvious to the fast: loops over ranks,
experts and choices; only rows are moved in bulk.

Shapes: R ranks, E experts, L = E / R experts per rank, expert e lives on rank e // L as its local expert e %
L; T tokens of a rank (T may differ by rank and be 0), H hidden, K choices per token, N rows a rank receives.

**dispatch.** Choice k of token t names the expert topk_idx[t, k], or -1 for none. A token may not name an
expert twice.

* ``layout="expert"``: rank r receives one row per (token, expert of r), grouped by local expert, in each
  group ordered by (source rank, source token). A group is padded to a multiple of ``expert_alignment``:
  padding rows are zero, their weight is zero, and for FP8 rows their data is 0 and their scale_inv 1.0.
  ``weights [N]`` is the weight of the choice that made the row.
* ``layout="rank"``: rank r receives one row per token that names at least one of its experts, ordered by
  (source rank, source token). ``topk_idx [N, K]`` int64 keeps the choices that fall on r as local ids and is
  -1 elsewhere; ``weights [N, K]`` is 0 there.

``max_recv_rows=n`` delivers exactly n rows: the first n of the above, or all of them and then zeros (weight
0, ids -1). Rows beyond n are dropped; the counts per expert stay the true ones.

**combine** brings one row per received row back and adds them up, unweighted. With A the accumulation type
(float64 for float64 rows, else float32), every sum below is computed in A from left to right, starts from its
first term, and is +0.0 without terms:

1. on the rank that received them, the rows of one token in ascending k, rounded to the dtype of the rows (in
   rank layout there is one such row);
2. on the token's own rank: the biases in the order given, then the sums of step 1, ranks in ascending order
   of the highest k whose expert they hold; rounded once to the dtype of the rows.

Padding rows and dropped rows are not read. A rank all of whose rows of a token were dropped takes part in
step 2 with the empty sum of step 1, +0.0; the order of ranks is that of the routing, dropped rows included.

**gradients.** Rows: the gradient of dispatch is combine of the row gradients, the gradient of combine is the
dispatch of the output's gradient (padding rows get 0). Weights: each weight moved to one place, so its
gradient moves back from there; choices that are -1 or dropped get 0. A bias gets the output's gradient.

A worked example: two ranks with two experts each (0 and 1 on rank 0, 2 and 3 on rank 1), two tokens on rank
0, one on rank 1.

>>> x = [torch.tensor([[1.0], [2.0]]), torch.tensor([[4.0]])]
>>> topk_idx = [torch.tensor([[1, 0], [3, 1]]), torch.tensor([[1, -1]])]
>>> topk_weights = [torch.tensor([[0.5, 0.25], [0.75, 0.125]]), torch.tensor([[1.0, 9.0]])]
>>> rank0, rank1 = dispatch(x, topk_idx, topk_weights, num_experts=4, layout="expert", expert_alignment=2)

Expert 0 gets token 0 of rank 0 and one row of padding; expert 1 gets both tokens of rank 0, then that of rank
1, then padding:

>>> rank0.tokens.flatten().tolist(), rank0.weights.tolist()
([1.0, 0.0, 1.0, 2.0, 4.0, 0.0], [0.25, 0.0, 0.5, 0.125, 1.0, 0.0])
>>> rank0.tokens_per_expert.tolist(), rank0.padded_tokens_per_expert.tolist()
([1, 3], [2, 4])
>>> rank1.tokens.flatten().tolist(), rank1.tokens_per_expert.tolist(), rank1.padded_tokens_per_expert.tolist()
([2.0, 0.0], [0, 1], [0, 2])

The experts return ten times their expert id plus the row; padding may hold anything:

>>> nan = float("nan")
>>> rows = [torch.tensor([[1.0], [nan], [11.0], [12.0], [14.0], [nan]]), torch.tensor([[32.0], [nan]])]
>>> [y.flatten().tolist() for y in combine(rows, [rank0, rank1])]
[[12.0, 44.0], [14.0]]

In rank layout token 0, whose two experts live on rank 0, travels once:

>>> rank0, rank1 = dispatch(x, topk_idx, topk_weights, num_experts=4, layout="rank")
>>> rank0.tokens.flatten().tolist(), rank0.topk_idx.tolist(), rank0.weights.tolist()
([1.0, 2.0, 4.0], [[1, 0], [-1, 1], [1, -1]], [[0.5, 0.25], [0.0, 0.125], [1.0, 0.0]])
>>> rank1.tokens.flatten().tolist(), rank1.topk_idx.tolist(), rank1.tokens_per_expert.tolist()
([2.0], [[1, -1]], [0, 1])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

LAYOUTS = ("expert", "rank")


class Quantized(Protocol):
    """FP8 rows such as moe_ep.Fp8Tokens: data [M, H] float8_e4m3fn, scale_inv [M, ceil(H/128)] float32."""

    data: Tensor
    scale_inv: Tensor


class Fp8Rows(NamedTuple):
    """FP8 rows as this module returns them, shaped like ``Quantized``."""

    data: Tensor
    scale_inv: Tensor


@dataclass(frozen=True)
class Placement:
    """Where the rows of one rank's output come from.

    ``row_of[s]`` int64 [T_s, K]: the output row that choice k of token t of source rank s became, -1 if it
    went to another rank, is masked or was dropped. In rank layout all choices of a token that fall on this
    rank share one row. ``source_topk_idx`` [T, K] is the routing of this rank's own tokens.
    """

    layout: str
    num_rows: int
    rows_needed: int
    tokens_per_expert: Tensor
    padded_tokens_per_expert: Tensor
    row_of: tuple[Tensor, ...]
    first_expert: int
    source_topk_idx: Tensor

    @property
    def overflowed(self) -> bool:
        """Whether rows were dropped because ``max_recv_rows`` is smaller than ``rows_needed``."""
        return self.rows_needed > self.num_rows


@dataclass(frozen=True)
class Dispatched:
    """What one rank receives: tokens [N, H]; weights [N] or [N, K]; topk_idx [N, K] in rank layout only."""

    tokens: Tensor | Fp8Rows
    weights: Tensor | None
    topk_idx: Tensor | None
    placement: Placement

    @property
    def tokens_per_expert(self) -> Tensor:
        """int64 [L]: true number of rows of each local expert."""
        return self.placement.tokens_per_expert

    @property
    def padded_tokens_per_expert(self) -> Tensor:
        """int64 [L]: rows of each local expert with its padding."""
        return self.placement.padded_tokens_per_expert

    @property
    def num_rows(self) -> int:
        """N, padding and zero tail included."""
        return self.placement.num_rows


def dispatch(
    x_by_rank: Sequence[Tensor | Quantized],
    topk_idx_by_rank: Sequence[Tensor],
    topk_weights_by_rank: Sequence[Tensor] | None,
    *,
    num_experts: int,
    layout: str = "expert",
    expert_alignment: int = 1,
    max_recv_rows: int | Sequence[int] | None = None,
) -> list[Dispatched]:
    """Send every token to the ranks of its experts. See the module's text for the order of the rows.

    x_by_rank: per rank [T, H] of any dtype, or FP8 rows. topk_idx_by_rank: per rank [T, K] int64 or int32, -1
    = none. topk_weights_by_rank: per rank [T, K], or None for no weights. max_recv_rows: one number, or one
    for each rank. Raises ValueError for a routing or an option outside the contract.
    """
    placements = place(topk_idx_by_rank, num_experts, layout, expert_alignment, max_recv_rows)
    return [
        Dispatched(
            tokens=_move_rows(x_by_rank, placement),
            weights=None if topk_weights_by_rank is None else _move_weights(topk_weights_by_rank, placement),
            topk_idx=_local_topk_idx(topk_idx_by_rank, placement) if layout == "rank" else None,
            placement=placement,
        )
        for placement in placements
    ]


def combine(
    rows_by_rank: Sequence[Tensor],
    dispatched: Sequence[Dispatched],
    bias_by_rank: Sequence[Tensor | Sequence[Tensor] | None] | None = None,
) -> list[Tensor]:
    """Add up the rows [N, H] of every token on the token's own rank: [T, H] by rank, in the dtype of the
    rows.

    ``bias_by_rank``: per rank nothing, one [T, H] tensor or a sequence of them.
    """
    results = []
    for owner, mine in enumerate(dispatched):
        topk_idx_TK = mine.placement.source_topk_idx
        num_tokens, num_topk = topk_idx_TK.shape
        experts_per_rank = mine.tokens_per_expert.numel()
        rank_of_choice_TK = torch.where(topk_idx_TK >= 0, topk_idx_TK // experts_per_rank, -1)

        partials = [
            _sum_on_serving_rank(rows, theirs.placement, owner)
            for rows, theirs in zip(rows_by_rank, dispatched, strict=True)
        ]
        total = _Sum(num_tokens, rows_by_rank[owner])
        for bias in _as_biases(None if bias_by_rank is None else bias_by_rank[owner]):
            total.add(torch.arange(num_tokens, device=bias.device), bias)
        for k in range(num_topk):
            for rank in range(len(dispatched)):
                is_last_T = (rank_of_choice_TK[:, k] == rank) & (rank_of_choice_TK[:, k + 1 :] != rank).all(
                    dim=1
                )
                tokens = is_last_T.nonzero().flatten()
                total.add(tokens, partials[rank].index_select(0, tokens))
        results.append(total.rounded())
    return results


def combine_weights(weights_by_rank: Sequence[Tensor], dispatched: Sequence[Dispatched]) -> list[Tensor]:
    """Move a number per received weight back: [N] or [N, K] by rank to [T, K] by rank, 0 where no row was."""
    results = []
    for owner, mine in enumerate(dispatched):
        back_TK = weights_by_rank[owner].new_zeros(mine.placement.source_topk_idx.shape)
        for weights, theirs in zip(weights_by_rank, dispatched, strict=True):
            tokens, choices = (theirs.placement.row_of[owner] >= 0).nonzero(as_tuple=True)
            rows = theirs.placement.row_of[owner][tokens, choices]
            back_TK[tokens, choices] = (
                weights[rows] if theirs.placement.layout == "expert" else weights[rows, choices]
            )
        results.append(back_TK)
    return results


def dispatch_backward(
    grad_rows_by_rank: Sequence[Tensor],
    grad_weights_by_rank: Sequence[Tensor] | None,
    dispatched: Sequence[Dispatched],
) -> tuple[list[Tensor], list[Tensor] | None]:
    """Gradients of x [T, H] and topk_weights [T, K] by rank from those of the received rows and weights."""
    grad_x = combine(grad_rows_by_rank, dispatched)
    return grad_x, None if grad_weights_by_rank is None else combine_weights(grad_weights_by_rank, dispatched)


def combine_backward(
    grad_y_by_rank: Sequence[Tensor | Quantized], dispatched: Sequence[Dispatched]
) -> list[Tensor | Fp8Rows]:
    """Gradient of the experts' rows [N, H] by rank from that of combine's output [T, H] by rank."""
    return [_move_rows(grad_y_by_rank, each.placement) for each in dispatched]


def place(
    topk_idx_by_rank: Sequence[Tensor],
    num_experts: int,
    layout: str,
    expert_alignment: int = 1,
    max_recv_rows: int | Sequence[int] | None = None,
) -> list[Placement]:
    """The output row of every choice of every token, by receiving rank. Arguments as in ``dispatch``."""
    world_size = len(topk_idx_by_rank)
    _check_options(num_experts, world_size, layout, expert_alignment)
    for rank, topk_idx_TK in enumerate(topk_idx_by_rank):
        _check_routing(rank, topk_idx_TK, num_experts)
    limits = max_recv_rows if isinstance(max_recv_rows, Sequence) else [max_recv_rows] * world_size
    experts_per_rank = num_experts // world_size

    placements = []
    for rank in range(world_size):
        first_expert = rank * experts_per_rank
        if layout == "expert":
            row_of, counts, padded = _place_by_expert(
                topk_idx_by_rank, first_expert, experts_per_rank, expert_alignment
            )
            rows_needed = sum(padded)
        else:
            row_of, counts, rows_needed = _place_by_rank(topk_idx_by_rank, first_expert, experts_per_rank)
            padded = counts
        num_rows = rows_needed if limits[rank] is None else limits[rank]
        device = topk_idx_by_rank[rank].device
        placements.append(
            Placement(
                layout=layout,
                num_rows=num_rows,
                rows_needed=rows_needed,
                tokens_per_expert=torch.tensor(counts, dtype=torch.int64, device=device),
                padded_tokens_per_expert=torch.tensor(padded, dtype=torch.int64, device=device),
                row_of=tuple(torch.where(rows_TK < num_rows, rows_TK, -1) for rows_TK in row_of),
                first_expert=first_expert,
                source_topk_idx=topk_idx_by_rank[rank],
            )
        )
    return placements


def _place_by_expert(
    topk_idx_by_rank: Sequence[Tensor], first_expert: int, experts_per_rank: int, alignment: int
) -> tuple[list[Tensor], list[int], list[int]]:
    row_of = [torch.full_like(topk_idx_TK, -1, dtype=torch.int64) for topk_idx_TK in topk_idx_by_rank]
    counts, padded = [], []
    segment_start = 0
    for expert in range(first_expert, first_expert + experts_per_rank):
        row = segment_start
        for source, topk_idx_TK in enumerate(topk_idx_by_rank):
            tokens, choices = (topk_idx_TK == expert).nonzero(as_tuple=True)  # ascending, one choice of each
            row_of[source][tokens, choices] = torch.arange(row, row + len(tokens), device=tokens.device)
            row += len(tokens)
        counts.append(row - segment_start)
        padded.append(-(-counts[-1] // alignment) * alignment)
        segment_start += padded[-1]
    return row_of, counts, padded


def _place_by_rank(
    topk_idx_by_rank: Sequence[Tensor], first_expert: int, experts_per_rank: int
) -> tuple[list[Tensor], list[int], int]:
    row_of = []
    counts = torch.zeros(experts_per_rank, dtype=torch.int64)
    row = 0
    for topk_idx_TK in topk_idx_by_rank:
        is_local_TK = (topk_idx_TK >= first_expert) & (topk_idx_TK < first_expert + experts_per_rank)
        tokens = is_local_TK.any(dim=1).nonzero().flatten()
        row_of_token_T = torch.full_like(topk_idx_TK[:, 0], -1, dtype=torch.int64)
        row_of_token_T[tokens] = torch.arange(row, row + len(tokens), device=tokens.device)
        row_of.append(torch.where(is_local_TK, row_of_token_T.unsqueeze(1), -1))
        row += len(tokens)
        local_ids = (topk_idx_TK[is_local_TK] - first_expert).long().cpu()
        counts += torch.bincount(local_ids, minlength=experts_per_rank)
    return row_of, counts.tolist(), row


def _move_rows(values_by_rank: Sequence[Tensor | Quantized], placement: Placement) -> Tensor | Fp8Rows:
    """Output rows [N, ...] from source rows [T, ...]; rows that nothing was sent to are padding."""
    if not isinstance(values_by_rank[0], Tensor):
        data = _move_rows([each.data.view(torch.uint8) for each in values_by_rank], placement)
        scale_inv = _move_rows([each.scale_inv for each in values_by_rank], placement)
        scale_inv[_is_padding(placement)] = 1.0
        return Fp8Rows(data.view(torch.float8_e4m3fn), scale_inv)
    out = values_by_rank[0].new_zeros(placement.num_rows, *values_by_rank[0].shape[1:])
    for values, rows_TK in zip(values_by_rank, placement.row_of, strict=True):
        tokens, choices = (rows_TK >= 0).nonzero(as_tuple=True)
        # In rank layout several choices write one row, each the same values.
        out[rows_TK[tokens, choices]] = values.detach().index_select(0, tokens)
    return out


def _is_padding(placement: Placement) -> Tensor:
    is_padding_N = torch.ones(placement.num_rows, dtype=torch.bool, device=placement.source_topk_idx.device)
    for rows_TK in placement.row_of:
        is_padding_N[rows_TK[rows_TK >= 0]] = False
    return is_padding_N


def _move_weights(topk_weights_by_rank: Sequence[Tensor], placement: Placement) -> Tensor:
    shape = (
        (placement.num_rows,)
        if placement.layout == "expert"
        else (placement.num_rows, topk_weights_by_rank[0].shape[1])
    )
    out = topk_weights_by_rank[0].new_zeros(shape)
    for weights_TK, rows_TK in zip(topk_weights_by_rank, placement.row_of, strict=True):
        tokens, choices = (rows_TK >= 0).nonzero(as_tuple=True)
        rows = rows_TK[tokens, choices]
        out[rows if placement.layout == "expert" else (rows, choices)] = weights_TK.detach()[tokens, choices]
    return out


def _local_topk_idx(topk_idx_by_rank: Sequence[Tensor], placement: Placement) -> Tensor:
    shape = (placement.num_rows, topk_idx_by_rank[0].shape[1])
    out = topk_idx_by_rank[0].new_full(shape, -1, dtype=torch.int64)
    for topk_idx_TK, rows_TK in zip(topk_idx_by_rank, placement.row_of, strict=True):
        tokens, choices = (rows_TK >= 0).nonzero(as_tuple=True)
        out[rows_TK[tokens, choices], choices] = topk_idx_TK[tokens, choices].long() - placement.first_expert
    return out


def _sum_on_serving_rank(rows_NH: Tensor, placement: Placement, owner: int) -> Tensor:
    """Step 1 of combine: [T, H], for every token of ``owner`` the sum of its rows on this rank."""
    row_of_TK = placement.row_of[owner]
    if placement.layout == "rank":  # the choices share one row, which counts once
        row_of_TK = row_of_TK.amax(dim=1, keepdim=True)
    partial = _Sum(row_of_TK.shape[0], rows_NH)
    for k in range(row_of_TK.shape[1]):
        tokens = (row_of_TK[:, k] >= 0).nonzero().flatten()
        partial.add(tokens, rows_NH.index_select(0, row_of_TK[tokens, k]))
    return partial.rounded()


class _Sum:
    """A running sum [T, H] in the accumulation type of ``like``, with the contract's value when empty."""

    def __init__(self, num_tokens: int, like: Tensor) -> None:
        self.dtype = like.dtype
        accumulate = torch.float64 if like.dtype == torch.float64 else torch.float32
        # -0.0 is the neutral element of IEEE addition: -0.0 + a is a for every a, also for a = -0.0.
        self.total_TH = torch.full((num_tokens, like.shape[1]), -0.0, dtype=accumulate, device=like.device)
        self.has_term_T = torch.zeros(num_tokens, dtype=torch.bool, device=like.device)

    def add(self, tokens: Tensor, rows: Tensor) -> None:
        """Add ``rows[i]`` to the sum of ``tokens[i]``; tokens are distinct."""
        self.total_TH[tokens] += rows.detach().to(self.total_TH.dtype)
        self.has_term_T[tokens] = True

    def rounded(self) -> Tensor:
        """The sums rounded to the dtype of the rows."""
        return torch.where(self.has_term_T.unsqueeze(1), self.total_TH, 0.0).to(self.dtype)


def _as_biases(bias: Tensor | Sequence[Tensor] | None) -> Sequence[Tensor]:
    if bias is None:
        return ()
    return (bias,) if isinstance(bias, Tensor) else bias


def _check_options(num_experts: int, world_size: int, layout: str, expert_alignment: int) -> None:
    if num_experts % world_size:
        raise ValueError(
            f"num_experts = {num_experts} is not a multiple of the number of ranks, {world_size}"
        )
    if layout not in LAYOUTS:
        raise ValueError(f"layout = {layout!r}; allowed are {LAYOUTS}")
    if expert_alignment < 1 or (layout == "rank" and expert_alignment != 1):
        raise ValueError(f"expert_alignment = {expert_alignment}; it is at least 1, and 1 in rank layout")


def _check_routing(rank: int, topk_idx_TK: Tensor, num_experts: int) -> None:
    if topk_idx_TK.numel() == 0:
        return
    if topk_idx_TK.min() < -1 or topk_idx_TK.max() >= num_experts:
        raise ValueError(f"topk_idx of rank {rank} has ids outside [-1, {num_experts})")
    sorted_TK = topk_idx_TK.sort(dim=1).values
    if ((sorted_TK[:, 1:] == sorted_TK[:, :-1]) & (sorted_TK[:, 1:] >= 0)).any():
        raise ValueError(f"a token of rank {rank} names an expert twice")
