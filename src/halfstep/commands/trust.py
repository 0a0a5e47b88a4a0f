"""`halfstep trust`: allow the code of a checkpoint's model to run in this account."""

from __future__ import annotations

from pathlib import Path

from halfstep.checkpoint import read_meta
from halfstep.errors import HalfstepError
from halfstep.remote_code import allow_code, files_of_code
from halfstep.sanitize import shorten


def trust(checkpoint: Path) -> None:
    """Allow the code of a model, which its checkpoint keeps in code/, to run in this account.

    Read the code first: it can do whatever you can do. Consent is for this very code, whichever
    checkpoint holds it; code that has changed needs a new one. `halfstep import
    --trust-remote-code` has given it on the machine of the import.

    Args:
        checkpoint: folder of a checkpoint
    """
    about = read_meta(checkpoint).get("transformers") or {}
    digest = about.get("code")
    if digest is None:
        raise HalfstepError(
            f"--checkpoint {checkpoint}: its model brings no code; nothing needs to be allowed"
        )
    print(f"code of {shorten(about['source'])}, as the checkpoint says, in {checkpoint}/code:")
    print("  " + ", ".join(sorted(files_of_code(digest))))
    print(f"  sha256 {digest}")
    print(f"allowed in this account; to take it back, delete {allow_code(digest, about['source'])}")
