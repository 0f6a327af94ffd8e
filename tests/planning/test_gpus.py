from __future__ import annotations

import pytest
from ray.util.accelerators import accelerators

from hycluster.errors import SettingsError
from hycluster.planning.gpus import GPUS, gpu


@pytest.mark.parametrize("name", ["H20", "h20", "a100-80gb", "mi300x"])
def test_names_are_taken_in_any_case(name: str) -> None:
    assert gpu(name).name.lower() == name.lower()


@pytest.mark.parametrize(
    ("name", "hint"), [("H2O", " (did you mean H20?)"), ("A100", " (did you mean A10?)"), ("", "")]
)
def test_an_unknown_one_lists_all(name: str, hint: str) -> None:
    with pytest.raises(SettingsError) as refused:
        gpu(name)
    assert refused.value.message == f"--gpu: {name!r} is not known{hint}; must be one of {', '.join(GPUS)}"


@pytest.mark.parametrize("name", GPUS)
def test_figures_are_of_one_kind(name: str) -> None:
    """A figure with sparsity, or of the wrong unit, would stand out."""
    one = GPUS[name]
    assert one.tflops_8 / one.tflops_16 == pytest.approx(2, rel=0.03)
    assert 100 < one.tflops_16 * 1000 / one.bandwidth_gbs * 2 < 1000 or name == "H20"
    assert 20 < one.memory_gib < 300
    assert one.host_gbs in (32, 64)


def test_ray_knows_the_names() -> None:
    known = {value for value in vars(accelerators).values() if isinstance(value, str)}
    # Ray takes others as they are, by the driver's name of the product.
    assert {name for name, one in GPUS.items() if one.accelerator not in known} == {"A10", "H800"}


def test_without_fp8_arithmetic_weights_are_widened() -> None:
    assert gpu("A100-80GB").tflops("fp8") == 312
    assert gpu("A100-80GB").tflops("int8") == 624
    assert gpu("H100").tflops("fp8") == 1979
    assert gpu("H100").tflops("int4") == 989
