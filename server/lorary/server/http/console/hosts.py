"""Which ``Host`` may be asked where nobody is asked for a token.

A web page of a stranger can let its own name mean 127.0.0.1 and then call this server as if it were its own
(DNS rebinding). It cannot keep its name out of ``Host``. So without tenants the console's data is for callers that
came by an IP address, by ``localhost``, or by the host that the server was told to listen on.
"""

from __future__ import annotations

import ipaddress
import re

from lorary.errors import AccessDenied

_HOST = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<name>[^:\[\]]+))(?::\d+)?")


def check_host(header: str, own: str) -> None:
    """Check that a request came by a name that no stranger's page can have.

    Args:
        header: the request's ``Host``.
        own: the host that the server listens on.

    Raises:
        AccessDenied: it came by another name.
    """
    match = _HOST.fullmatch(header)
    host = (match["v6"] or match["name"]).lower() if match else ""
    if host in ("localhost", own.lower()) or host.endswith(".localhost") or _is_address(host):
        return
    raise AccessDenied(
        f"the console was asked for as '{header[:128]}'. This server asks nobody for a token, so it answers "
        "only where it is reached by an IP address or as localhost: any other name may be a stranger's "
        "web page. Use the address, or give --access."
    )


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
