"""The product by which a device's FLOP/s are measured. Oracle: the libraries against each other."""

import time

import torch

from lownibble.rehearsal import products
from lownibble.rehearsal.products import Product, fastest

CPU = torch.device("cpu")


def test_the_libraries_multiply_the_same():
    torch.manual_seed(0)
    found = products.products(CPU, 96)
    assert found[0].library == "torch.mm"
    assert {each.flops for each in found} == {2 * 96**3}
    expected, *others = [each.multiply() for each in found]
    assert expected.any()
    for other in others:
        torch.testing.assert_close(other, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_the_faster_one_counts(monkeypatch):
    def slow():
        time.sleep(0.01)
        return torch.zeros(1)

    pair = [Product("slow", 1.0, slow), Product("fast", 1.0, lambda: torch.zeros(1))]
    for order in (pair, pair[::-1]):
        monkeypatch.setattr(products, "products", lambda device, size=None, order=order: order)
        assert fastest(CPU).library == "fast"
