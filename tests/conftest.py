"""What all tests share."""

from hypothesis import settings

# Examples may compile a kernel, so no deadline; the same examples everywhere, so that a failure can be repeated.
settings.register_profile("amhs", deadline=None, derandomize=True)
settings.load_profile("amhs")
