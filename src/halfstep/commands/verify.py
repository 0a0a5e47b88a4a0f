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


def verify(results: Annotated[Path, tyro.conf.Positional] = Path("results")) -> None:
    """Recompute all checksums and print one line for each problem.

    A problem is a file that was changed, a file that is missing, or an output that is older than
    one of its inputs.

    Args:
        results: the folder with data, models, samples, metrics, tables and figures
    """
    _, others = provenance.find_records(results)
    total = sum(path.stat().st_size for path in others)
    hashed = 0
    with Progress("verify", max(1, total >> 20), "MB") as progress:

        def tick(size: int) -> None:
            nonlocal hashed
            hashed += size
            ahead = (hashed >> 20) - progress.done
            if ahead > 0:
                progress.update(ahead)

        faults, recorded, unrecorded = provenance.verify_records(results, tick)
    for fault in faults:
        print(fault)
    if faults:
        raise HalfstepError(
            f"{len(faults)} problems (listed above); {recorded} files have records, "
            f"{unrecorded} do not"
        )
    print(
        f"{results}: all {recorded} recorded files are unchanged, and so are their inputs; "
        f"{unrecorded} files have no record"
    )
