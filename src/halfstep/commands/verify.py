"""`halfstep merge-provenance` and `halfstep verify`: all records in one file, and whether every artefact is still what its record says."""

from pathlib import Path
from typing import Annotated

import tyro

from halfstep.errors import HalfstepError
from halfstep.files import write_json
from halfstep.progress import Progress
from halfstep.records import provenance


def merge_provenance(results: Path = Path("results")) -> None:
    """Write {results}/provenance.json: every artefact with its checksum, its inputs', command, versions and commit.

    Args:
        results: the folder with data, models, samples, metrics, tables and figures
    """
    write_json(results / provenance.NAME, provenance.merge_records(results))


def verify(results: Annotated[Path, tyro.conf.Positional] = Path("results")) -> None:
    """Recompute all checksums; print a line for each file that was changed or is missing, and each artefact that is older than its input.

    Args:
        results: the folder with data, models, samples, metrics, tables and figures
    """
    total = sum(path.stat().st_size for path in provenance.walk(results)[1])
    with Progress("verify", max(1, total >> 20), "MB") as progress:
        seen = 0

        def tick(size: int) -> None:
            nonlocal seen
            seen += size
            if (ahead := (seen >> 20) - progress.done) > 0:
                progress.update(ahead)

        faults, recorded, unlisted = provenance.verify_records(results, tick)
    for fault in faults:
        print(fault)
    if faults:
        raise HalfstepError(
            f"what does not fit is named above, found {len(faults)}; {recorded} files are recorded, {unlisted} others are not"
        )
    print(
        f"{results}: all {recorded} recorded files are as they were made, from the inputs that are there; {unlisted} files have no record"
    )
