"""A copy of the workflow as committed, for all tests of this folder."""

import pytest
from dryrun import Workflow, copy


@pytest.fixture(scope="session")
def workflow(tmp_path_factory) -> Workflow:
    """The copy is shared: a test that edits files makes another one."""
    return copy(tmp_path_factory.mktemp("workflow"))
