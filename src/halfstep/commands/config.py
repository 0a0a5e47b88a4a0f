"""`halfstep write-schema`: the JSON schema of config.yaml, for completion and checks in editors."""

from pathlib import Path

from halfstep.files import write_json
from halfstep.resolve import schema


def write_schema(output: Path = Path("workflow/schemas/config.schema.json")) -> None:
    """Write the JSON schema of config.yaml.

    Run this after a change of halfstep.config: a test fails if the committed schema differs.

    Args:
        output: file to write
    """
    write_json(output, schema())
    print(output)
