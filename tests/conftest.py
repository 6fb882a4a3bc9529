"""What every test shares: how Hypothesis runs here."""

from __future__ import annotations

import os

from hypothesis import settings

# No deadlines: on a busy machine they would fail tests at random. On CI the same examples every time.
settings.register_profile("pykvm", deadline=None, derandomize="CI" in os.environ, print_blob=True)
settings.load_profile("pykvm")
