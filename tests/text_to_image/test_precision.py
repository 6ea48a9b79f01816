"""The precision that autocast gives products, by what the hardware has."""

from __future__ import annotations

import pytest
import torch

from seal_fast.text_to_image.precision import Precision, autocast
from seal_fast.training import native_bfloat16

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("fp32", torch.float32),
        ("bf16", torch.bfloat16 if native_bfloat16(CPU) else torch.float32),
        ("fp16", torch.float16),
    ],
)
def test_products_have_the_precision_that_is_asked_for(precision: Precision, dtype: torch.dtype) -> None:
    with autocast(CPU, precision):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == dtype


def test_full_precision_ends_an_outer_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16), autocast(CPU, "fp32"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
