"""Where a server of this machine may listen, asked before it is started: servers fail in words of their own."""

import errno
import ipaddress
import socket

from pipeline.errors import CarvanaError

LOOPBACK = "127.0.0.1"


def is_loopback(address: str) -> bool:
    """Return whether only this machine reaches the address; raises CarvanaError if it is none."""
    if address == "localhost":
        return True
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        raise CarvanaError(
            f"--address {address} is no address: give one of this machine, such as {LOOPBACK}."
        ) from None


def check_port(address: str, port: int) -> None:
    """Raise CarvanaError unless a server can listen there now."""
    if not 0 < port < 1 << 16:
        raise CarvanaError(f"--port {port} is no port: they go from 1 to 65535.")
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do, after an earlier one
        try:
            probe.bind((address, port))
        except OSError as error:
            raise CarvanaError(_why_not(error, address, port)) from None


def server_url(address: str, port: int) -> str:
    """Return what a browser is told."""
    return f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"


def _why_not(error: OSError, address: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"Port {port} of {address} is taken, maybe by the same command elsewhere: choose one with --port."
    if error.errno == errno.EACCES:
        return f"Port {port} may not be used: choose one above 1023 with --port."
    return f"Port {port} of {address} can't be had ({error.strerror}): give this machine's own with --address."
