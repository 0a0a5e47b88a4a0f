"""Start-up times: of commands, of an import, of the paper's graphs, and of 300 empty jobs.

    python benchmarks/startup.py [repeats]

prints medians of whole processes, each with its goal. They are reported, never asserted.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from subprocess import DEVNULL

ROOT = Path(__file__).parents[1]
JOBS = """
rule all:
    input: expand("{n}.txt", n=range(300))
rule one:
    output: "{n}.txt"
    shell: "touch {output}"
"""
PYTHON = sys.executable
HALFSTEP, SNAKEMAKE = [PYTHON, "-m", "halfstep.cli"], [PYTHON, "-m", "snakemake"]


def median_s(commands: list[list[str]], repeats: int, folder: Path = ROOT) -> float:
    """Median time of running these commands one after another."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for command in commands:
            subprocess.run(command, cwd=folder, check=True, stdout=DEVNULL, stderr=DEVNULL)
        times.append(time.perf_counter() - start)
    return median(times)


def report(name: str, goal_s: float, measured_s: float) -> None:
    print(f"{name:42} {measured_s:8.2f} s   goal {goal_s} s", flush=True)


def main(repeats: int = 5) -> None:
    help_of_generate = [*HALFSTEP, "generate", "--help"]
    graphs = [
        [*SNAKEMAKE, "-n", "--quiet", "--cores", "1", "--config", f"preset={name}"]
        for name in ("owt-small", "owt-scaling")
    ]
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    report("halfstep --help", 0.3, median_s([[*HALFSTEP, "--help"]], repeats))
    report("import halfstep", 0.1, median_s([[PYTHON, "-c", "import halfstep"]], repeats))
    report("halfstep generate --help (imports torch)", 3, median_s([help_of_generate], repeats))
    report("graph of owt-small and owt-scaling", 10, median_s(graphs, min(repeats, 3)))
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "Snakefile").write_text(JOBS)
        jobs = [*SNAKEMAKE, "--cores", "2", "--quiet", "all"]
        report("300 jobs that do nothing", 90, median_s([jobs], 1, Path(folder)))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
