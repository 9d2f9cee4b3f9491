"""Timelines: named ranges of all threads, nested, and none but while they are recorded."""

import threading
import time

import torch

import moe_ep
from moe_ep.streams import named_range
from moe_ep.timeline import Span, Timeline, own_us

CPU = torch.device("cpu")


def test_ranges_are_recorded_nested_and_in_order():
    timeline = Timeline(CPU)
    with named_range("before"):
        pass
    with timeline:
        with named_range("outer"), named_range("inner"):
            time.sleep(0.002)
        with named_range("last"):
            pass
    with named_range("after"):
        pass
    outer, inner, last = timeline.spans()
    assert [span.name for span in (outer, inner, last)] == ["outer", "inner", "last"]
    assert outer.begin_us <= inner.begin_us < inner.end_us <= outer.end_us <= last.begin_us
    assert inner.end_us - inner.begin_us >= 2000
    assert {span.stream for span in timeline.spans()} == {0}


def test_all_threads_and_several_recordings():
    timeline = Timeline(CPU)

    def work():
        with named_range("thread"):
            pass

    for _ in range(2):
        with timeline:
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
    first, second = timeline.spans()
    assert first.name == second.name == "thread"
    assert 0 <= first.begin_us <= first.end_us <= second.begin_us


def test_the_backward_is_seen():
    timeline = Timeline(CPU)
    with moe_ep.Communicator(hidden=4, max_tokens_per_rank=2, num_experts=2, num_topk=1) as comm, timeline:
        x = torch.ones(2, 4, requires_grad=True)
        out = moe_ep.dispatch(x, torch.tensor([[0], [1]]), torch.ones(2, 1), comm)
        moe_ep.combine(out.tokens, out.handle).sum().backward()
    names = [span.name for span in timeline.spans()]
    forward = ["moe_ep.dispatch", "moe_ep.combine"]
    assert names == [*forward, "moe_ep.combine.backward", "moe_ep.dispatch.backward"]


def test_a_spans_own_time_is_without_those_inside():
    dispatch = Span("moe_ep.dispatch", 0, 10, 100)
    spans = [
        Span("moe_ep.router", 0, 0, 9),
        dispatch,
        Span("moe_ep.experts.quantize_weight", 0, 15, 20),
        Span("shared expert", 0, 20, 60),
        Span("moe_ep.experts.swiglu", 0, 30, 40),
        Span("experts", 1, 30, 90),
        Span("experts", 0, 101, 150),
    ]
    assert own_us(dispatch, spans) == 90 - 5 - 40
    assert own_us(spans[3], spans) == 40 - 10
    assert own_us(spans[-1], spans) == 49
