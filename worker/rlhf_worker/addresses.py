"""Hosts and ports, of IPv4 and IPv6 alike: a node may have one kind alone."""

import socket


def bracketed(host: str) -> str:
    """As a URL has it."""
    return f"[{host}]" if ":" in host else host


def tcp(host: str, port: int) -> str:
    """torch's name of a meeting place."""
    return f"tcp://{bracketed(host)}:{port}"


def listen(host: str, port: int = 0, backlog: int = 128) -> socket.socket:
    """On this address alone, by the host's own family. Port 0: a free one. Raises OSError."""
    return socket.create_server((host, port), family=family(host), backlog=backlog)


def free_port(host: str) -> int:
    """On all of this machine's addresses of the host's kind. Raises OSError."""
    with listen("::" if ":" in host else "") as probe:
        return int(probe.getsockname()[1])


def family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
