from __future__ import annotations

import pytest

from hycluster.planning.architecture import GIB
from hycluster.planning.gpus import gpu
from hycluster.planning.layouts import Workload, search
from hycluster.planning.offload import kv_offload, weight_offload
from hycluster.planning.precision import precision_of
from tests.planning.configs import published, shape


@pytest.mark.parametrize("name", ["llama-3.1-70b", "hunyuan-large", "deepseek-v3"])
def test_a_gib_keeps_as_many_tokens_as_the_model_says(name: str) -> None:
    model, precision, demand = shape(name), precision_of(published(name)), Workload(8192, 1)
    fit = search(model, precision, gpu("H200"), demand).fits[0]
    bought = kv_offload(model, fit, precision, gpu("H200"), 8192)
    # Of a latent cache, which all tensor ranks have, one copy is kept.
    whole = {"llama-3.1-70b": 327_680, "hunyuan-large": 81_920, "deepseek-v3": 70_272}[name]
    assert bought.tokens_per_gib == pytest.approx(GIB / whole, rel=0.02)
    assert bought.read_tokens_per_s > 5 * bought.prefill_tokens_per_s


def test_weights_in_host_memory_spare_gpus_and_cost_speed() -> None:
    model, precision, demand = shape("hunyuan-large"), precision_of(published("hunyuan-large")), Workload(8192, 1)
    found = search(model, precision, gpu("H20"), demand)
    misfit = found.misfits[-1]
    bought = weight_offload(model, misfit, precision, gpu("H20"), demand)
    assert bought is not None
    assert bought.parallel.devices == 8
    held = misfit.share.weights_bytes - bought.offload_gib * GIB + misfit.share.kv_bytes(8192)
    assert held <= (96 * 0.9 - 4) * GIB < held + GIB
    assert bought.tokens_per_s_each < found.fits[0].decode.tokens_per_s_each


def test_where_the_kv_cache_alone_is_too_large_it_is_of_no_use() -> None:
    model, precision = shape("llama-3.1-8b"), precision_of(published("llama-3.1-8b"))
    # With 16.2 GiB for weights and cache and 14.6 GiB of cache some weights can stay; with less room none could.
    roomy, tight = Workload(120_000, 1), Workload(120_000, 1, utilization=0.5)
    for demand, enough in ((roomy, True), (tight, False)):
        misfit = search(model, precision, gpu("L4"), demand).misfits[0]
        assert (weight_offload(model, misfit, precision, gpu("L4"), demand) is not None) == enough
