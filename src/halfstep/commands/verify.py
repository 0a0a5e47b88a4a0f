"""`halfstep merge-provenance` and `halfstep verify`: merge all records, and check them."""

from pathlib import Path
from typing import Annotated

import tyro

from halfstep.errors import HalfstepError
from halfstep.files import write_json
from halfstep.progress import Progress
from halfstep.records import provenance


def merge_provenance(results: Path = Path("results")) -> None:
    """Write {results}/provenance.json: the records of all files in one.

    For each file it holds the checksum, the checksums of its inputs, command, versions and commit.

    Args:
        results: the folder with data, models, samples, metrics, tables and figures
    """
    write_json(results / provenance.NAME, provenance.merge_records(results))


def verify(
    results: Annotated[Path, tyro.conf.Positional] = Path("results"), unrecorded: bool = False
) -> None:
    """Recompute the checksums of all files that a job wrote, and print one line for each problem.

    A problem is a file that was changed, a file or a record that is missing, or an output that is
    older than one of its inputs. Links are followed. No job writes report.html, which Snakemake
    makes, or MLflow's store and its copies of figures and tables: they have no record.

    Args:
        results: the folder with data, models, samples, metrics, tables and figures
        unrecorded: also print the files that have no record
    """
    check = provenance.Verification(results)
    hashed = 0
    with Progress("verify", max(1, check.size >> 20), "MB") as progress:

        def tick(size: int) -> None:
            nonlocal hashed
            hashed += size
            if ahead := (hashed >> 20) - progress.done:
                progress.update(ahead)

        faults = check.faults(tick)
    if unrecorded:
        print(*(f"{path}: no record" for path in check.unrecorded), sep="\n")
    for fault in faults:
        print(fault)
    others = len(check.unrecorded)
    if faults:
        plural = "" if len(faults) == 1 else "s"
        raise HalfstepError(
            f"{len(faults)} problem{plural} (listed above); {check.recorded} files have records, "
            f"{others} do not"
        )
    print(
        f"{results}: all {check.recorded} recorded files are unchanged, and so are their inputs; "
        f"{others} files have no record (--unrecorded lists them)"
    )
