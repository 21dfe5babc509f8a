"""The tiny models are what tests take them for."""

import pytest
from support.models import WITH_BIAS, tiny


@pytest.mark.parametrize("family", WITH_BIAS)
def test_the_families_with_bias_have_one(family: str) -> None:
    biases = [p for name, p in tiny(family).named_parameters() if name.endswith("bias")]
    assert any(bool(p.count_nonzero()) for p in biases if p.ndim == 1)
