"""Hypothesis strategies: small cases with any routing, shrinking to few ranks, few tokens and few experts."""

import torch
from cases import LAYOUTS, Case
from hypothesis import strategies as st

_EXACT = (torch.float32, torch.float64)
_ROUNDED = (torch.bfloat16, torch.float16)


@st.composite
def cases(draw, *, layouts=LAYOUTS, dtypes=_EXACT + _ROUNDED, static=True, payload="normal"):
    """A Case whose routing may be balanced, unbalanced, masked, empty or all to one."""
    world_size = draw(st.sampled_from((1, 2, 3, 4)))
    num_experts = world_size * draw(st.integers(1, 4))
    num_topk = draw(st.integers(1, min(num_experts, 5)))
    # Few experts that are ever named make imbalance; the share of -1 makes masks.
    popular = draw(st.lists(st.integers(0, num_experts - 1), min_size=1, max_size=num_experts, unique=True))
    named = st.one_of(st.just(-1), st.sampled_from(popular))
    token = st.lists(named, min_size=num_topk, max_size=num_topk).map(_without_repeats)
    routing = draw(st.lists(st.lists(token, max_size=6), min_size=world_size, max_size=world_size))
    layout = draw(st.sampled_from(layouts))
    return Case(
        name="drawn",
        tokens_by_rank=tuple(len(tokens) for tokens in routing),
        hidden=8,
        num_experts=num_experts,
        num_topk=num_topk,
        layout=layout,
        expert_alignment=draw(st.sampled_from((1, 2, 5))) if layout == "expert" else 1,
        dtype=draw(st.sampled_from(dtypes)),
        routing=tuple(tuple(tokens) for tokens in routing),
        payload=payload,
        max_recv_rows=draw(st.none() | st.integers(0, 12)) if static else None,
        idx_dtype=draw(st.sampled_from((torch.int64, torch.int32))),
        num_biases=draw(st.integers(0, 2)),
        seed=draw(st.integers(0, 3)),
    )


def _without_repeats(ids):
    return tuple(e if e not in ids[:k] else -1 for k, e in enumerate(ids))
