"""How long nothing takes: help, import, a command that needs torch, the graph of the paper's presets, and 300 jobs that do nothing.

python benchmarks/startup.py [repeats]     medians of whole processes, beside the goal of each; reported, never asserted
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
JOBS = """
rule all:
    input: expand("{n}.txt", n=range(300))
rule one:
    output: "{n}.txt"
    shell: "touch {output}"
"""
HALFSTEP, SNAKEMAKE = [sys.executable, "-m", "halfstep.cli"], [sys.executable, "-m", "snakemake"]


def seconds(commands: list[list[str]], repeats: int, cwd: Path = ROOT) -> float:
    """Median time of running these one after another."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for command in commands:
            subprocess.run(
                command, cwd=cwd, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
        times.append(time.perf_counter() - start)
    return median(times)


def main(repeats: int = 5) -> None:
    graphs = [
        [*SNAKEMAKE, "-n", "--quiet", "--cores", "1", "--config", f"preset={name}"]
        for name in ("owt-small", "owt-scaling")
    ]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "Snakefile").write_text(JOBS)
        cases = (
            ("halfstep --help", 0.3, [[*HALFSTEP, "--help"]], repeats, ROOT),
            ("import halfstep", 0.1, [[sys.executable, "-c", "import halfstep"]], repeats, ROOT),
            (
                "halfstep generate --help (imports torch)",
                3,
                [[*HALFSTEP, "generate", "--help"]],
                repeats,
                ROOT,
            ),
            ("graph of owt-small and owt-scaling", 10, graphs, min(repeats, 3), ROOT),
            (
                "300 jobs that do nothing",
                90,
                [[*SNAKEMAKE, "--cores", "2", "--quiet", "all"]],
                1,
                Path(folder),
            ),
        )
        print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
        for name, goal, commands, times, where in cases:
            print(f"{name:42} {seconds(commands, times, where):8.2f} s   goal {goal} s", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
