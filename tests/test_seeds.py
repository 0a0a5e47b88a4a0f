"""Names of repeated trainings: what repeat_names makes, the other two functions take apart."""

import pytest

from halfstep.seeds import first_training, repeat_names, repeat_seed


def test_the_first_training_keeps_the_name():
    assert repeat_names("a", None) == repeat_names("a", [7]) == ["a"]
    assert repeat_names("a-b", [3, 1, 20]) == ["a-b", "a-b-seed-1", "a-b-seed-20"]


@pytest.mark.parametrize("model", ["{}/teacher", "{}/kl_backward/round-12", "t/{}/round-1", "{}"])
def test_names_are_taken_apart(model):
    """In the place of a teacher or of a run; a seed is not taken for the number of a round."""
    for seeds in ([1], [3, 1, 20]):
        models = [model.format(name) for name in repeat_names("a-seeds-2x", seeds)]
        assert {first_training(name) for name in models} == {models[0]}
        assert [repeat_seed(name) for name in models] == [None, *seeds[1:]]


@pytest.mark.parametrize("name", ["a-seed-", "a-seed-0", "a-seed-2b", "a-seed-2-b", "seed-2x", "a"])
def test_other_names_are_no_repeats(name):
    assert (first_training(name), repeat_seed(name)) == (name, None)
