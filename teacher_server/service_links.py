"""Variables that Kubernetes puts into every container for each Service of the namespace.

A Service called `teacher-grpc` brings TEACHER_GRPC_PORT=tcp://10.96.3.7:50051, which is the name of
a setting and none of its values.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping

log = logging.getLogger(__name__)
_NAME = re.compile(r"_SERVICE_(HOST|PORT(_\w+)?)$|_PORT_\d+_(TCP|UDP|SCTP)(_(ADDR|PORT|PROTO))?$")
_ADDRESS = re.compile(r"(tcp|udp|sctp)://\S+:\d+")


def without_service_links(env: Mapping[str, str], prefix: str) -> dict[str, str]:
    """The variables but for such links under the prefix; one line of the log says which."""
    links = [
        name
        for name, value in env.items()
        if name.startswith(prefix)
        and (_NAME.search(name) or (name.endswith("_PORT") and _ADDRESS.fullmatch(value)))
    ]
    if links:
        log.warning(
            "%s: what Kubernetes says of a Service of that name, no setting, and not read; "
            "enableServiceLinks: false in the pod keeps it away",
            ", ".join(links),
        )
    return {name: value for name, value in env.items() if name not in links}
