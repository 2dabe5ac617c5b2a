"""What all tests share."""

import os
import shutil

import pytest
from hypothesis import settings

# Examples may compile a kernel, so no deadline; the same examples everywhere, so that a failure can be repeated.
settings.register_profile("amhs", deadline=None, derandomize=True)
settings.load_profile("amhs")

# Runs of the tests are registered nowhere: importing MLflow alone takes 3 s. tests/test_registry.py turns it on for itself.
os.environ["AMHS_REGISTRY"] = "off"


def pytest_xdist_make_scheduler(config, log):
    """A file's tests share fixtures, so they stay on one worker; library notebooks share nothing and fill the gaps at the end.

    The `--dist loadgroup` of xdist 3.8 would say this shorter, but does nothing with pytest 9.2.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return nodeid if "test_library_notebook_runs" in nodeid else nodeid.split("::")[0]

    return ByFile(config, log)


@pytest.fixture(scope="session")
def week(tmp_path_factory):
    """A folder of four runs, made once for all tests that read runs; they must not change it."""
    from reviewed import make_runs, own_settings

    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("week")
        own_settings(patch, root)
        return make_runs(root)


@pytest.fixture(scope="module")
def browser():
    """Debian's chromium, driven by playwright; started once for a file's tests."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not chromium:
        pytest.skip("no chromium on this machine; scripts/system-packages.sh installs it")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        started = p.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"], timeout=60_000)
        yield started
        started.close()
