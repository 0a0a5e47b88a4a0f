"""What a job asks of its machine, computed without Snakemake."""

import pytest

from halfstep.config import SIZES
from halfstep.errors import ConfigError
from halfstep.workflow.machine import (
    BASE,
    MACHINE,
    RESOURCES,
    SPREAD,
    Site,
    base_resources,
    demand_of,
    fewest_nodes,
    names_cluster,
    read_site,
    spread_resources,
)

KINDS = ("pretrain", "round", "sample")


def test_every_network_size_has_a_row():
    assert list(MACHINE) == list(SIZES)


def test_another_shape_asks_for_what_the_next_larger_size_asks():
    for size, demand in MACHINE.items():
        assert demand_of(size) is demand
    assert demand_of("1x32x2x8") is MACHINE["tiny"]
    assert demand_of("3x130x1") is MACHINE["mini"]
    assert demand_of("13x768x12") is MACHINE["medium"]
    assert demand_of("90x9000x9") is MACHINE["8B"]


@pytest.mark.parametrize("kind", RESOURCES)
def test_every_resource_of_a_kind_is_computed(kind):
    computed = base_resources("small", kind, 1, Site()).keys() | set(SPREAD)
    assert set(RESOURCES[kind]) <= computed
    assert kind == "import" or set(BASE) <= set(RESOURCES[kind])


@pytest.mark.parametrize("size", MACHINE)
@pytest.mark.parametrize("kind", KINDS)
def test_a_first_try_asks_for_the_row(size, kind):
    gpus, hours = getattr(MACHINE[size], kind)
    asked = base_resources(size, kind, 1, Site(gpu_model="a100"))
    assert asked == {
        "gpu": gpus,
        "gpu_model": "a100" if gpus else "",
        "mem_mb": MACHINE[size].mem_mb,
        "micro_batch": MACHINE[size].micro_batch,
        "runtime": hours * 60,
        "limit": f"${{SLURM_JOB_ID:+--time-limit {hours * 60}}}",
        "blocks": "",
    }


@pytest.mark.parametrize("kind", ["latency", "import"])
def test_other_jobs_are_as_large_as_a_sample(kind):
    assert base_resources("8B", kind, 2, Site()) == base_resources("8B", "sample", 2, Site())


def test_a_job_can_bring_its_own_time_limit():
    asked = [base_resources("small", "latency", n, Site(max_minutes=80), 45) for n in (1, 2, 3)]
    assert [one["runtime"] for one in asked] == [45, 67, 80]
    assert all(one["gpu"] == 1 for one in asked)


@pytest.mark.parametrize("size", MACHINE)
def test_each_retry_asks_for_half_as_much_again(size):
    site = Site(max_minutes=10**9)
    first = base_resources(size, "round", 1, site)
    for attempt in (2, 3, 4):
        again = base_resources(size, "round", attempt, site)
        for name in ("mem_mb", "runtime"):
            assert 2 * again[name] == (attempt + 1) * first[name]
        assert all(again[name] == first[name] for name in ("gpu", "gpu_model", "micro_batch"))


def test_the_time_stays_within_the_limit_of_the_site():
    for attempt in (1, 2, 3):
        asked = base_resources("small", "pretrain", attempt, Site(max_minutes=1440))
        assert asked["runtime"] == 1440
        assert "--time-limit 1440}" in asked["limit"]


def test_the_fewest_nodes_are_those_of_a_search():
    for gpus in range(1, 65):
        for per_node in range(1, 17):
            fits = [n for n in range(1, gpus + 1) if gpus % n == 0 and gpus // n <= per_node]
            assert fewest_nodes(gpus, per_node) == min(fits)
    assert fewest_nodes(0, 4) == 1


@pytest.mark.parametrize("gpus", [0, 1])
def test_a_job_of_one_process_asks_for_nothing_more(gpus):
    asked = spread_resources(gpus, nodes=1, gpu_model="a100", threads=8, rule="pretrain")
    assert set(asked) == set(SPREAD)
    assert asked.pop("srun") == asked.pop("processes") == ""
    assert set(asked.values()) == {None}


def test_several_gpus_of_one_node_are_as_many_processes():
    asked = spread_resources(4, nodes=1, gpu_model="a100", threads=8, rule="pretrain")
    set_ones = {name: value for name, value in asked.items() if value is not None}
    assert set_ones == {"nodes": 1, "srun": "", "processes": "--processes 4"}


@pytest.mark.parametrize("gpus, nodes", [(4, 2), (12, 3), (4, 4), (32, 8)])
def test_several_nodes_have_one_task_and_equally_many_gpus(gpus, nodes):
    asked = spread_resources(gpus, nodes, gpu_model="", threads=6, rule="pretrain")
    each = gpus // nodes
    assert set(asked) == set(SPREAD)
    assert (asked["nodes"], asked["tasks"], asked["tasks_per_gpu"]) == (nodes, nodes, 0)
    assert (asked["mpi"], asked["gres"]) == ("srun", f"gpu:{each}")
    assert asked["processes"] == f"--processes {gpus}"
    assert asked["srun"].split() == [
        "srun",
        f"--nodes={nodes}",
        "--ntasks-per-node=1",
        f"--gpus-per-node={each}",
        "--cpus-per-task=6",
        "--kill-on-bad-exit=1",
    ]
    assert asked["srun"].endswith(" ")  # the command follows
    named = spread_resources(gpus, nodes, gpu_model="h100", threads=6, rule="pretrain")
    assert named == asked | {"gres": f"gpu:h100:{each}"}


def test_uneven_shares_are_refused():
    with pytest.raises(ValueError, match="gpu: found 5 for 2 nodes, .*pretrain:gpu="):
        spread_resources(5, nodes=2, gpu_model="", threads=8, rule="pretrain")


def test_the_site_is_read_from_the_environment():
    assert read_site({}) == Site()
    set_ones = {
        "HALFSTEP_SLURM_GPU_MODEL": "a100",
        "HALFSTEP_SLURM_GPUS_PER_NODE": "8",
        "HALFSTEP_SLURM_MAX_MINUTES": "1440",
    }
    assert read_site(set_ones) == Site("a100", 8, 1440)


@pytest.mark.parametrize("name", ["GPUS_PER_NODE", "MAX_MINUTES"])
@pytest.mark.parametrize("text", ["0", "-1", "1.5", "", "four"])
def test_a_bad_number_of_the_site_is_one_sentence(name, text):
    with pytest.raises(ConfigError) as caught:
        read_site({f"HALFSTEP_SLURM_{name}": text})
    expected = f"HALFSTEP_SLURM_{name}: found {text!r}, expected a whole number above zero"
    assert str(caught.value).startswith(expected)


@pytest.mark.parametrize("arguments, environment, expected", [
    (["all", "-np", "--config", "preset=ci"], {}, False),
    (["--profile", "slurm", "all"], {}, True),
    (["--profile=slurm"], {}, True),
    (["-e", "slurm"], {}, True),
    (["--executor", "slurm"], {}, True),
    (["--workflow-profile", "slurm"], {}, True),
    (["--workflow-profile=slurm"], {}, True),
    (["--workflow-profile", "none"], {}, False),
    (["--executor", "local"], {}, False),
    (["all"], {"SNAKEMAKE_PROFILE": "slurm"}, True),
])  # fmt: skip
def test_a_profile_or_an_executor_names_a_cluster(arguments, environment, expected):
    assert names_cluster(arguments, environment) == expected
