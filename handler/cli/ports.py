"""Finds free ports, and identifies the program that uses a port."""

import contextlib
import socket

import psutil
import requests

LOOPBACK = "127.0.0.1"
# A listener on one of these receives connections to loopback.
LOCAL_ADDRESSES = (LOOPBACK, "0.0.0.0", "::", "::ffff:127.0.0.1", "::ffff:0.0.0.0")
PING_TIMEOUT_S = 2


def find_free_ports(count: int) -> list[int]:
    """Returns `count` different ports that no program uses."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind((LOOPBACK, 0))
        return [each.getsockname()[1] for each in sockets]


def is_port_free(port: int) -> bool:
    """Returns whether a server can listen on this port of the loopback interface."""
    with socket.socket() as probe:
        # Like a server: connections of a server that has just stopped do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
        return True


def describe_listener(port: int) -> str:
    """Returns which program listens on a port and how to stop it, for an error message."""
    program, commands = "another program", []
    if _is_torchserve(port):
        # `torchserve --stop` only finds a server that `torchserve --start` started: it needs its pid file.
        program = "a TorchServe"
        commands = ["Ctrl-C where it was started", "`torchserve --stop` if `torchserve --start` started it"]
    if listener := find_listener(port):
        name, pid = listener
        program, commands = f"{program} ({name}, pid {pid})", [*commands, f"`kill {pid}`"]
    return f"{program}: stop it" + (f" ({', or '.join(commands)})" if commands else "")


def find_listener(port: int) -> tuple[str, int] | None:
    """Returns name and pid of the process that listens on a port, or None if this user may not see it."""
    try:
        for connection in psutil.net_connections(kind="tcp"):
            if connection.status != psutil.CONN_LISTEN or not connection.laddr or not connection.pid:
                continue
            # The same port of another interface is free for us.
            if connection.laddr.port == port and connection.laddr.ip in LOCAL_ADDRESSES:
                return psutil.Process(connection.pid).name(), connection.pid
    except (psutil.Error, OSError):
        pass
    return None


def _is_torchserve(port: int) -> bool:
    """Whether the program on a port answers like TorchServe's inference address."""
    try:
        answer = requests.get(f"http://{LOOPBACK}:{port}/ping", timeout=PING_TIMEOUT_S).json()
    except (requests.RequestException, ValueError):
        return False
    # Without a token TorchServe rejects even a ping.
    return isinstance(answer, dict) and (
        answer.get("status") == "Healthy" or answer.get("type") == "InvalidKeyException"
    )
