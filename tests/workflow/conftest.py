"""The workflow as committed, in a folder of its own."""

import pytest
from dryrun import Workflow, copy


@pytest.fixture(scope="session")
def workflow(tmp_path_factory) -> Workflow:
    """As committed: for reading, do not edit."""
    return copy(tmp_path_factory.mktemp("workflow"))
