"""Numbers that travel with rows, and what V2's handles learn from a plan's tables, by torch."""

import pytest
import torch
from elastic_cases import Mode, cases, expected_dispatch, max_tokens, places
from exercise import assert_same_bits

from moe_ep.compat.deep_ep.elastic_sources import PlannedSources
from moe_ep.compat.deep_ep.numbers import Column, Ids, fill, pack, part, unpack


def test_what_becomes_of_numbers():
    ids = torch.tensor([[5, -1], [3, 6]])
    weights = torch.tensor([[0.5, 1.0], [2.0, 4.0]])
    words = pack([Ids(ids), weights])
    assert words.tolist()[0][:2] == [6, 0]
    travelled, w = part(words, 0, 2, torch.int32), part(words, 2, 2, torch.float32)
    here = {"first": 4, "count": 2}
    local, masked = torch.empty(3, 2, dtype=torch.int64), torch.empty(2, 2)
    place = torch.empty(2, 2, dtype=torch.int32)
    fill(
        [
            Column(travelled, local, "local", **here),
            Column(w, masked, "masked", ids=travelled, **here),
            Column(torch.tensor([[True, False], [True, True]]), place, "place"),
        ]
    )
    assert local.tolist() == [[1, -1], [-1, -1], [0, 0]]
    assert masked.tolist() == [[0.5, 0.0], [0.0, 0.0]]
    assert place.tolist() == [[0, -1], [0, 1]]


def test_words_are_unpacked_as_they_were_packed():
    scales = torch.randint(-(2**31), 2**31, (3, 5), dtype=torch.int32).t()
    weights = torch.tensor([[float("nan")], [-0.0], [1.0], [2.0], [3.0]])
    words = pack([scales, weights])
    assert words.shape == (5, 4)
    for actual, wanted in zip(unpack(words, [scales, weights]), (scales, weights), strict=True):
        assert actual.is_contiguous()
        assert_same_bits(actual, wanted, "unpacked")
    assert pack([]) is None
    # Ranks send a number by itself alike, whether they have to copy it or not.
    assert pack([scales]).shape == pack([scales.contiguous()]).shape == (5, 3)


def planned_sources(case, mode: Mode, rank: int) -> PlannedSources:
    """The tables that a plan makes (csrc/nvlink/plan_tables.h), pair by pair."""
    room, size = max_tokens(case) + 2, case.world_size
    found = places(case, mode, rank)
    starts = [sum(place.source < source for place in found) for source in range(size + 1)]
    tokens = torch.full((size * room,), 77, dtype=torch.int32)
    rows = torch.full((size, room, case.num_topk), 77, dtype=torch.int32)
    for i, place in enumerate(found):
        tokens[i] = place.token
        of_pair = rows[place.source, i - starts[place.source]].fill_(-1)
        for j, k in enumerate(place.ks):
            of_pair[k] = place.rows[j if mode.expand else 0]
    starts = torch.tensor(starts, dtype=torch.int32)
    known = len(found) if mode.exact and not mode.expand else None
    return PlannedSources(starts, tokens, rows, known, size, max_tokens(case), mode.expand, not mode.exact)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("expand", [False, True])
@pytest.mark.parametrize("case", cases(4), ids=str)
def test_handles_learn_from_tables_what_they_learn_from_numbers(case, expand, exact):
    mode = Mode("tables", expand=expand, exact=exact)
    for rank in range(case.world_size):
        sources = planned_sources(case, mode, rank)
        wanted = expected_dispatch(case, mode, rank)
        assert sources.num_tokens() == wanted["num_recv_tokens"]
        assert_same_bits(sources.metadata(), wanted["recv_src_metadata"], "metadata")
        ends = wanted["psum_num_recv_tokens_per_scaleup_rank"]
        assert_same_bits(sources.ends_by_rank(), ends, "ends")
