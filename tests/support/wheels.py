"""The wheel of this checkout, and a virtual environment with it, made without the network."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from dryrun import REPOSITORY, clean_environment

PARTS = (
    *("pyproject.toml", "README.md", "LICENSE", "src"),  # what setuptools reads
    *("Snakefile", "config.yaml", "rules", "workflow", "envs"),  # what src/halfstep/packaged names
)


def build_wheel(folder: Path) -> Path:
    """Build the wheel from a copy of the checkout, whose links are links, into `folder`."""
    copy, built = folder / "copy", folder / "built"
    copy.mkdir()
    generated = shutil.ignore_patterns("*.egg-info", "__pycache__")
    for part in PARTS:
        if (REPOSITORY / part).is_dir():
            shutil.copytree(REPOSITORY / part, copy / part, symlinks=True, ignore=generated)
        else:
            shutil.copy(REPOSITORY / part, copy)
    run_pip("wheel", "--no-build-isolation", "--wheel-dir", str(built), str(copy))
    (wheel,) = built.glob("*.whl")
    return wheel


def run_pip(command: str, *words: str, options: tuple[str, ...] = ()) -> None:
    """Run pip without dependencies and without the network; it must succeed."""
    call = [sys.executable, "-m", "pip", *options, command, "--no-deps", "--no-index", *words]
    done = subprocess.run(call, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr


class Installed:
    """A virtual environment with the wheel, which sees the packages of this environment.

    Attributes:
        folder: of the environment
        package: folder of the installed package
    """

    def __init__(self, folder: Path, wheel: Path):
        venv.create(folder, with_pip=False, symlinks=True)
        self.folder = folder
        python = f"python{sys.version_info.major}.{sys.version_info.minor}"
        site = folder / "lib" / python / "site-packages"
        self.package = site / "halfstep"
        others = {sysconfig.get_path(kind) for kind in ("purelib", "platlib")}
        # A path in a .pth is searched last, and its own .pth files, an editable halfstep among
        # them, are not read.
        (site / "others.pth").write_text("\n".join(sorted(others)) + "\n")
        run_pip("install", str(wheel), options=("--python", str(folder / "bin/python")))

    def call(self, here: Path, *words: str, **environment: str) -> subprocess.CompletedProcess:
        """Run a program of the environment, as one types it after its activation, in `here`."""
        inherited = clean_environment()
        inherited.pop("PYTHONPATH", None)
        path = os.pathsep.join([str(self.folder / "bin"), os.environ["PATH"]])
        program, *arguments = words
        return subprocess.run(
            [str(self.folder / "bin" / program), *arguments],
            cwd=here,
            env=inherited | {"PATH": path, "CUDA_VISIBLE_DEVICES": ""} | environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
