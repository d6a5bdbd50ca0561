"""What teacher and trainer share: records, errors, codec. Knows no model, no engine, no loss."""

import os

__version__ = "0.1.0"
"""Of driftline and driftline-client alike: both distributions read it here."""

# gRPC's core writes its INFO lines to stderr unless told otherwise before it is imported.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
