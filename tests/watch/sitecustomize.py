"""Loaded by Python itself at its start where this folder is on PYTHONPATH: whatever a process asks of the network is
written to the file $VGGT_LORA_ASKED.

So are the questions of the processes that it starts. Addresses of this machine are nobody's business.
"""
import os
import platform
import sys

OWN = {"", "localhost", "::1", "0.0.0.0", platform.node()}


def host_of(event: str, arguments: tuple):
    """The machine that is asked for; None where none is."""
    if event == "socket.connect":
        return arguments[1][0] if isinstance(arguments[1], tuple) else None  # a path is a socket of this machine
    return arguments[0] if event in ("socket.getaddrinfo", "socket.gethostbyname", "urllib.Request") else None


def watch(event: str, arguments: tuple) -> None:
    """Write down what is asked."""
    if event.startswith(("socket.", "urllib.")) and (host := host_of(event, arguments)) is not None:
        host = host.decode(errors="replace") if isinstance(host, bytes) else str(host)
        if host not in OWN and not host.startswith("127.") and "://127.0.0.1" not in host:
            frame, callers = sys._getframe(1), []
            while frame is not None and len(callers) < 12:
                callers.append(f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}")
                frame = frame.f_back
            with open(os.environ["VGGT_LORA_ASKED"], "a", encoding="utf-8") as log:
                log.write(f"{event} {host} {' '.join(callers)}\n")


if os.environ.get("VGGT_LORA_ASKED"):
    sys.addaudithook(watch)
