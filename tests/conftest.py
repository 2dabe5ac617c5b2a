"""What all tests share."""

import pytest
from hypothesis import settings

# Examples may compile a kernel, so no deadline; the same examples everywhere, so that a failure can be repeated.
settings.register_profile("amhs", deadline=None, derandomize=True)
settings.load_profile("amhs")


@pytest.fixture(scope="session")
def week(tmp_path_factory):
    """A folder of four runs, made once for all tests that read runs; they must not change it."""
    from reviewed import make_runs, own_settings

    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("week")
        own_settings(patch, root)
        yield make_runs(root)


@pytest.fixture(scope="session")
def batch(tmp_path_factory):
    """A copy of the project with one run, `batch`: stages 01 and 02 with the values their notebooks have as defaults."""
    from by_hand import copy_project, run_in_batch

    return run_in_batch(copy_project(tmp_path_factory.mktemp("real") / "project"), "business", "poc")
