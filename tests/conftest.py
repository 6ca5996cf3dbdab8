"""Settings of all tests."""

import os

# Tests compile many small programs and run each a few times: half the time goes into optimising.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
