"""How long work takes, by hand."""

import pytest

from halfstep.errors import HalfstepError
from halfstep.gpus import GPUS, SUSTAINED_BANDWIDTH, sustained
from halfstep.workflow.rates import CPU_SPEED, Rates, Work, choose_rates


def test_a_gpu_takes_the_longer_of_products_and_memory():
    rates, speed = Rates("a100"), sustained(GPUS["a100"], 768, "bfloat16")
    memory = SUSTAINED_BANDWIDTH * GPUS["a100"].bandwidth
    assert rates.seconds(Work(3 * speed, 768, "bfloat16", 2 * memory, 5), 2, 8) == 1.5 + 5
    assert rates.seconds(Work(3 * speed, 768, "bfloat16", 8 * memory, 5), 2, 8) == 4 + 5


def test_a_cpu_shares_products_among_its_threads():
    work = Work(6 * CPU_SPEED, 768, "float32", 1e20, 1)
    assert Rates().seconds(work, 0, 3) == 3
    assert Rates().seconds(work.times(10), 0, 3) == 30


def test_the_gpu_is_the_one_that_is_asked_for_or_the_sites_or_an_h100():
    site = {"HALFSTEP_SLURM_GPU_MODEL": "nvidia_a100"}
    assert choose_rates("H200", site).gpu == "h200" and choose_rates(None, site).gpu == "a100"
    for unknown in ({}, {"HALFSTEP_SLURM_GPU_MODEL": "mi300"}):
        rates = choose_rates(None, unknown)
        assert rates.gpu == "h100" and "assumed" in rates.described(on_gpus=True)
    assert "TFLOP/s" not in rates.described(on_gpus=False)
    with pytest.raises(HalfstepError, match="--gpu: found 'mi300', expected one of .*h100"):
        choose_rates("mi300", site)
