"""What teacher and trainer share: records, errors, codec. Knows no model, no engine, no loss."""

import os

# gRPC's core writes its INFO lines to stderr unless told otherwise before it is imported.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
