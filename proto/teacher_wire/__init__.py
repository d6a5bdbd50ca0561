"""What teacher and trainer share: records, errors, codec. Knows no model, no engine, no loss."""

import os

__version__ = "0.2.0"
"""Of driftline and driftline-client alike: both distributions read it here."""
CONTRACT = "opd.teacher.v1"
"""The protobuf package that both speak; what is in the wheel below it is its source."""


def version_line(program: str) -> str:
    """What a command says of itself when it is asked for its version."""
    return f"{program} {__version__} (contract {CONTRACT})"


# gRPC's core writes its INFO lines to stderr unless told otherwise before it is imported.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
