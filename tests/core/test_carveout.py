"""SMs that matrix products leave free: torch's setting, which a CPU build has as well."""

import pytest
import torch

from moe_ep.carveout import Carveout, leave_free, leave_free_in_both_directions
from moe_ep.errors import InvalidInput

NEEDS_CUDA = pytest.mark.skipif(torch.version.cuda is None, reason="needs torch with cuBLASLt")


def setting():
    return torch._C._get_sm_carveout_experimental()


def test_the_largest_counts_and_the_setting_comes_back():
    with leave_free(8):
        assert setting() == 8
        with leave_free(24):
            assert setting() == 24
            with leave_free(0):
                assert setting() == 24
        assert setting() == 8
        with leave_free(4):
            assert setting() == 8
    assert setting() is None


def test_a_setting_of_somebody_else_comes_back():
    torch._C._set_sm_carveout_experimental(3)
    try:
        with leave_free(8):
            assert setting() == 8
        assert setting() == 3
    finally:
        torch._C._set_sm_carveout_experimental(None)


@NEEDS_CUDA
def test_products_are_of_the_library_that_honours_it():
    library = torch.backends.cuda.preferred_blas_library
    before, meant = library(), torch._C._BlasBackend.Cublaslt
    with leave_free(8):
        assert library() == meant
        with leave_free(16):
            assert library() == meant
        assert library() == meant
    assert library() == before


def test_opened_and_closed_out_of_order_and_twice():
    first, second = Carveout(8), Carveout(16)
    first.open()
    second.open()
    second.open()
    first.close()
    assert setting() == 16
    first.close()
    second.close()
    assert setting() is None


def test_an_exception_closes_it():
    with pytest.raises(ZeroDivisionError), leave_free(8):
        _ = 1 / 0
    assert setting() is None


def test_both_directions():
    seen = []

    class Seeing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            seen.append(setting())
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            seen.append(setting())
            return 2 * grad

    x = torch.ones(3, requires_grad=True)
    inner = leave_free_in_both_directions(Seeing.apply, Seeing.apply(x), 8)
    Seeing.apply(inner).sum().backward()
    assert seen == [None, 8, None, None, 8, None]
    assert torch.equal(x.grad, torch.full((3,), 8.0))
    assert setting() is None


def test_closed_when_the_backward_does_not_get_through():
    weight = torch.ones(3, requires_grad=True)
    x = torch.ones(3, requires_grad=True)
    y = leave_free_in_both_directions(lambda x: x * weight, x, 8)
    torch.autograd.grad(y.sum(), weight)
    assert setting() is None


@pytest.mark.parametrize("num_sms", [-1, 65])
def test_refuses(num_sms):
    with pytest.raises(InvalidInput, match="0 to 64"):
        Carveout(num_sms)
