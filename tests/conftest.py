"""For all tests: gRPC is told to be quiet before a test imports it."""

import teacher_wire  # noqa: F401
