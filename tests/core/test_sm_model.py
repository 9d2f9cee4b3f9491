"""The choice of multiprocessors where nobody has said or measured how many."""

from dataclasses import replace

import pytest

from moe_ep.sm_model import OVERLAPPED_SMS, WARPS, Work, choose_num_sms, split

DEEPSEEK = Work("dispatch", "rank", 7168, num_tokens=4096, num_topk=8, num_experts=256, num_ranks=2)
WORKS = [
    replace(DEEPSEEK, op=op, layout=layout, num_ranks=ranks)
    for op in ("dispatch", "combine")
    for layout in ("rank", "expert")
    for ranks in (1, 2, 8, 64)
]


def test_the_link_bounds_what_is_sent():
    # 4096 tokens, of which 1 - 2**-8 go to the other rank, at 366 GB/s.
    assert DEEPSEEK.link_us() == pytest.approx(4096 * (1 - 2**-8) * 7168 / 366e3)
    assert replace(DEEPSEEK, num_ranks=1).link_us() == 0


def test_expanding_takes_more_multiprocessors_than_the_link():
    assert choose_num_sms(DEEPSEEK, 132) < choose_num_sms(replace(DEEPSEEK, layout="expert"), 132)
    assert choose_num_sms(replace(DEEPSEEK, row_bytes=14336), 132) == choose_num_sms(DEEPSEEK, 132)


@pytest.mark.parametrize("work", WORKS, ids=str)
def test_the_choice_is_within_what_there_is(work):
    for available in (1, 5, 24, 132):
        alone = choose_num_sms(work, available)
        assert 1 <= alone <= available
        assert choose_num_sms(work, available, overlapped=True) <= min(available, OVERLAPPED_SMS)


@pytest.mark.parametrize("work", WORKS, ids=str)
def test_some_multiprocessors_send_and_some_receive(work):
    for asked in (1, 2, 8, 24, 132):
        num_sms, senders = split(work, asked)
        if work.num_ranks == 1:
            assert (num_sms, senders) == (asked, 0)
            continue
        assert 1 <= senders < num_sms
        assert senders * WARPS >= work.num_ranks - 1
        assert num_sms >= asked
