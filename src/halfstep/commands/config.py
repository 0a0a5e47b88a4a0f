"""`halfstep write-schema`: the JSON schema of config.yaml, from which editors complete and check it."""

from pathlib import Path

from halfstep.files import write_json
from halfstep.resolve import schema


def write_schema(output: Path = Path("workflow/schemas/config.schema.json")) -> None:
    """Write the schema of config.yaml. A test fails when the committed one differs: run this after a change of halfstep.config.

    Args:
        output: where to write it
    """
    write_json(output, schema())
    print(output)
