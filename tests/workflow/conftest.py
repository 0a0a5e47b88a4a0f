"""A copy of the workflow as committed, for all tests of this folder."""

import functools

import pytest
from dryrun import Workflow, copy


@pytest.fixture(scope="session")
def workflow(tmp_path_factory) -> Workflow:
    """The copy is shared: a test that edits files makes another one. A dry run is made once."""
    shared = copy(tmp_path_factory.mktemp("workflow"))
    shared.plan = functools.cache(shared.plan)
    return shared
