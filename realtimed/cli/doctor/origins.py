"""Entries of ALLOWED_ORIGINS that no browser ever sends: Caddy accepts them, and they let nobody in.

A browser sends the serialization of an origin: scheme, host and port as the URL standard writes them (HTML, 7.1.1
"Origins"; https://url.spec.whatwg.org/#host-parsing).
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterator
from typing import Final, NamedTuple

from realtimed.text import quoted

__all__ = ["ANYBODY", "NOBODY", "Mistake", "mistakes"]

NOBODY: Final = "none"
"""The word for requests without an Origin header."""

ANYBODY: Final = "null"
"""The origin of pages that have none. Every site can give it to its pages, by putting them into a sandboxed frame."""

_LONGEST: Final = 300
"""Characters of an origin: a host has 253 at most."""

_DEFAULT_PORTS: Final = {"http": 80, "https": 443}

_ENTRY: Final = re.compile(
    r"(?:([A-Za-z][A-Za-z0-9+.-]*)://)?(?:[^/?#@]*@)?(\[[^\]/?#]*\]|[^:/?#\[\]]*)(:[^/?#]*)?(.*)", re.DOTALL
)

_HOST: Final = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*")


class Mistake(NamedTuple):
    """An entry that no browser sends, the reason, and what browsers send instead if that is known."""

    entry: str
    why: str
    instead: str | None

    def __str__(self) -> str:
        instead = f"; browsers send {self.instead}" if self.instead is not None else ""
        return f"{quoted(self.entry)}: {self.why}{instead}"


def mistakes(allowed: str) -> Iterator[Mistake]:
    """Yield the entries of ALLOWED_ORIGINS that no browser sends."""
    if odd := sorted(set(allowed) & set("\t\n\v\f\r")):
        yield Mistake(odd[0], "origins are separated by spaces, and by nothing else", None)
    for entry in allowed.split():
        found = _mistake(entry)
        if found is not None:
            yield found


def _mistake(entry: str) -> Mistake | None:
    if entry in (NOBODY, ANYBODY):
        return None
    if entry.lower() in (NOBODY, ANYBODY):
        return Mistake(entry, f"the word is written {entry.lower()}", None)
    if len(entry) > _LONGEST:
        return Mistake(entry, "no origin is that long", None)
    if "*" in entry:
        return Mistake(entry, "there are no wildcards: Caddy compares letter by letter, so name each origin", None)
    if "," in entry or ";" in entry:
        return Mistake(entry, "origins are separated by spaces, and by nothing else", None)
    if set(entry) & set("'\"`<>\\"):
        return Mistake(entry, "no origin has quotes, brackets or backslashes in it", None)
    match = _ENTRY.fullmatch(entry)
    if match is None:
        return Mistake(entry, "this is not an origin", None)
    if re.match("https?:(?!//)", entry, re.IGNORECASE):
        return Mistake(entry, "an origin begins with http:// or https://", None)
    scheme, host, port, rest = match[1], match[2], match[3], match[4]
    if scheme is not None and scheme.lower() not in _DEFAULT_PORTS:
        return _of_another_scheme(entry, scheme, host)
    return _of_a_site(entry, scheme, host, port, rest)


def _of_another_scheme(entry: str, scheme: str, host: str) -> Mistake | None:
    """Check an origin of an application or a browser extension, such as capacitor://localhost or chrome-extension://abc."""
    if scheme.lower() in ("ws", "wss"):
        page = ("https" if scheme.lower() == "wss" else "http") + entry[len(scheme) :]
        mistake = _mistake(page)
        instead = page if mistake is None else mistake.instead
        return Mistake(entry, "the origin is that of the page, not of the WebSocket", instead)
    if scheme.lower() == "file":
        return Mistake(entry, f"a page that is a file has no origin but {ANYBODY}, as any other page may have", None)
    if scheme != scheme.lower() or not host or entry.endswith("/"):
        return Mistake(entry, "this is not an origin", None)
    return None


def _of_a_site(entry: str, scheme: str | None, host: str, port: str | None, rest: str) -> Mistake | None:
    """Check an origin with http, https or no scheme."""
    name = _as_browsers_write(host)
    number = _port(port)
    if name is None:
        return Mistake(entry, "no host has such a name", None)
    if number is None:
        return Mistake(entry, "a port is a number from 1 to 65535", None)
    known = (scheme or "https").lower()
    shown = f":{number}" if number and number != _DEFAULT_PORTS[known] else ""
    sent = f"{known}://{name}{shown}"
    if sent == entry:
        return None
    if scheme is None:
        return Mistake(entry, "an origin begins with its scheme", f"{sent} or http://{name}{shown}")
    if rest or f"//{host}" not in entry:
        why = "an origin ends with host and port, without a slash or a path" if rest else "an origin has no user"
    elif scheme != known or host.lower() != host:
        why = "origins are in lower case"
    elif host != name:
        why = "this host is written in another way"
    else:
        why = (
            f"{known} implies port {_DEFAULT_PORTS[known]}: leave it out"
            if not shown
            else "this port is written in another way"
        )
    return Mistake(entry, why, sent)


def _port(text: str | None) -> int | None:
    """Return the port in `text`, 0 if there is none, or None if it is not a port."""
    digits = (text or ":").removeprefix(":")
    if not digits:
        return 0
    if not digits.isascii() or not digits.isdigit() or len(digits) > 10 or not 0 < int(digits) < 65536:
        return None
    return int(digits)


def _as_browsers_write(host: str) -> str | None:
    """Return a host as it stands in an origin, or None if it is not a host."""
    if host.startswith("["):
        return _ipv6(host[1:-1])
    name = host.lower()
    if not name.isascii():
        import idna  # noqa: PLC0415  (rarely needed)

        try:
            name = idna.encode(name, uts46=True).decode()
        except idna.IDNAError:
            return None
    name = name.removesuffix(".")  # sent only if a visitor types the dot
    if _HOST.fullmatch(name) is None:
        return None
    if re.fullmatch(r"[0-9]+|0x[0-9a-f]*", name.rpartition(".")[2]):  # the URL standard takes it for an IPv4 address
        try:
            return socket.inet_ntoa(socket.inet_aton(name))
        except OSError:
            return None
    return name


def _ipv6(text: str) -> str | None:
    try:
        address = ipaddress.IPv6Address(text)
    except ValueError:
        return None
    if address.scope_id is not None:
        return None
    if address.ipv4_mapped is not None:
        return f"[::ffff:{int(address) >> 16 & 0xFFFF:x}:{int(address) & 0xFFFF:x}]"
    return f"[{address.compressed}]"
