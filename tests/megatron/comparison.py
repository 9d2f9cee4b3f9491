"""Whether two runs gave the same tensors."""

from __future__ import annotations

import torch


def assert_equal(ours: dict[str, torch.Tensor], stock: dict[str, torch.Tensor], *, rtol: float) -> None:
    """Every tensor differs by at most ``rtol`` of its largest value; 0 means bit for bit, but for the sign of 0."""
    assert ours.keys() == stock.keys()
    for name, wanted in stock.items():
        got = ours[name]
        if wanted is None or got is None:
            assert got is None and wanted is None, f"{name}: only one of the two has a gradient"
            continue
        assert torch.isfinite(wanted).all() and torch.isfinite(got).all(), f"{name} is not finite"
        difference = (got.double() - wanted.double()).abs().max()
        largest = wanted.double().abs().max()
        assert difference <= rtol * largest, (
            f"{name} differs by {difference:.3g}; its values go up to {largest:.3g}"
        )
    live = [name for name, wanted in stock.items() if wanted is not None and wanted.count_nonzero()]
    assert len(live) >= 3, f"almost all tensors are zero, so that equality says little; not zero are {live}"


def assert_close(ours: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """Every tensor is what it is without FP8, but for the error of products of numbers with 4 significant bits."""
    assert ours.keys() == wanted.keys()
    for name, exact in wanted.items():
        got = ours[name]
        if exact is None or got is None:
            assert got is None and exact is None, f"{name}: only one of the two has a gradient"
            continue
        assert got.dtype == exact.dtype and torch.isfinite(got).all(), f"{name} is {got.dtype}, or not finite"
        error = (got.double() - exact.double()).norm() / exact.double().norm()
        assert error < 0.09, f"{name} has a relative error of {error:.3f}"


def assert_as_near(
    ours: dict[str, torch.Tensor], stock: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]
) -> None:
    """Every tensor is as near as stock's to what float32 gives: through a whole model every operation rounds what the
    one before it rounded, so that two right results may differ by more than either rounding.
    """
    assert ours.keys() == stock.keys() == exact.keys()
    for name, true in exact.items():
        if true is None:
            assert ours[name] is None and stock[name] is None, f"{name}: only some have a gradient"
            continue
        size = true.double().norm()
        error, allowed = (((got[name].double() - true.double()).norm() / size) for got in (ours, stock))
        print(f"{name}: {error:.2e}, stock {allowed:.2e}")
        assert error <= 1.25 * allowed + 2**-10, (
            f"{name} is off by {error:.2e} of float32's, stock's by {allowed:.2e}"
        )
        assert allowed < 0.5, f"stock's {name} is off by {allowed:.2e} of float32's: that is no measure"
