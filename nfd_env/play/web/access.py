"""Who may come in: host names, origins, the token, and a pause for who guesses."""

from __future__ import annotations

import hmac
import ipaddress
import math
import os
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlencode, urlsplit

from aiohttp import web

SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob: data:; media-src blob:; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
TOKEN_VARIABLE = "NFD_TOKEN"
_LOOPBACK_NAMES = {"localhost", "127.0.0.1", "::1"}


class Throttle:
    """Counts failures by address, and makes who fails again and again wait longer and longer."""

    def __init__(self, free: int = 3, first: float = 1.0, most: float = 30.0) -> None:
        """After ``free`` failures wait ``first`` seconds, then twice that, ``most`` at most."""
        self._free, self._first, self._most = free, first, most
        self._failures: OrderedDict[str, tuple[int, float]] = OrderedDict()

    def wait(self, address: str) -> float:
        """Seconds until ``address`` may try again; 0 when it may now."""
        _, until = self._failures.get(address, (0, 0.0))
        return max(0.0, until - time.monotonic())

    def failed(self, address: str) -> None:
        """Note a failure."""
        now = time.monotonic()
        count, until = self._failures.pop(address, (0, now))
        # Who has been quiet for long enough begins anew.
        count = 1 if now - until > 20 * self._most else count + 1
        doublings = min(count - self._free, 30)
        pause = 0.0 if doublings < 1 else min(self._most, self._first * 2 ** (doublings - 1))
        self._failures[address] = count, now + pause
        if len(self._failures) > 4096:  # room for every honest one; who guesses comes again
            self._failures.popitem(last=False)


class Access:
    """Lets requests in, or raises the refusal."""

    def __init__(
        self, host: str, token: str | None, origins: Sequence[str] = (), secret: str = ""
    ) -> None:
        """See ``PlayServer``; ``secret`` is what browsers get for the token, "" for a new one.

        Raises:
            ValueError: when an origin is none.
        """
        self.loopback = is_loopback(host)
        self._token = token
        self._origins = {check_origin(origin) for origin in origins}
        allowed = {urlsplit(o).hostname or "" for o in self._origins}
        self._hosts = _LOOPBACK_NAMES | allowed | ({host.lower()} if self.loopback else set())
        # Not the token itself: it can neither be read from a browser nor be guessed through it.
        self._pass = secret or secrets.token_urlsafe(32)
        self._throttle = Throttle()

    def check(self, request: web.Request, cookie: str) -> None:
        """Let ``request`` pass.

        Args:
            request: a request.
            cookie: name of the cookie that a browser is given for the token.

        Raises:
            web.HTTPException: the refusal, or the redirection that takes the token out of sight.
        """
        # A page of another site must neither open our socket nor, by rebinding its name to
        # 127.0.0.1, pass for ours.
        if self.loopback and _host_name(request.host) not in self._hosts:
            raise web.HTTPForbidden(
                text="This server answers to localhost only. Behind a proxy start it with "
                "--allow-origin and the address that the browser shows.\n"
            )
        origin = request.headers.get("Origin")
        ours = (f"http://{request.host}", f"https://{request.host}")
        if origin is not None and origin not in ours and origin.lower() not in self._origins:
            raise web.HTTPForbidden(
                text="Requests from other sites are refused; see nfd serve --allow-origin.\n"
            )
        if self._token is None or _same(request.cookies.get(cookie, ""), self._pass):
            return
        # Another scheme's is for somebody else, a proxy before us.
        scheme, _, bearer = request.headers.get("Authorization", "").partition(" ")
        bearer = bearer.strip() if scheme.lower() == "bearer" else ""
        given = bearer or (request.query.get("token", "") if request.path == "/" else "")
        if not given:
            raise web.HTTPUnauthorized(
                text="Open the address with ?token=... that nfd serve printed.\n"
            )
        address = _network(request.remote or "")
        wait = self._throttle.wait(address)
        if wait > 0:  # the token is not even looked at
            raise web.HTTPTooManyRequests(
                headers={"Retry-After": str(math.ceil(wait))},
                text="Too many wrong tokens came from your address. Try again later.\n",
            )
        if not _same(given, self._token):
            self._throttle.failed(address)
            raise web.HTTPUnauthorized(text="This token is not the right one.\n")
        if bearer:
            return
        # The token leaves the address bar at once. Relative, because a proxy may have put a path
        # before ours.
        rest = [(k, v) for k, v in request.query.items() if k != "token"]
        response = web.HTTPSeeOther("./" + ("?" + urlencode(rest) if rest else ""))
        response.set_cookie(cookie, self._pass, httponly=True, samesite="Lax", path="/")
        raise response


def read_token(token: str | None, file: str | os.PathLike[str] | None) -> str | None:
    """The token from the command line, a file, or the environment variable ``NFD_TOKEN``.

    Returns:
        None when there is none.

    Raises:
        ValueError: when it is given twice, or is empty or not plain text.
        OSError: when the file cannot be read.
    """
    if token is not None and file is not None:
        raise ValueError("give either a token or a token file, not both")
    where = "the token"
    if file is not None:
        where = f"the token in {file}"
        try:
            token = Path(file).expanduser().read_text(encoding="utf-8").strip()
        except UnicodeDecodeError:
            raise ValueError(f"{where} is not plain text") from None
    elif token is None and TOKEN_VARIABLE in os.environ:
        where, token = f"the token in {TOKEN_VARIABLE}", os.environ[TOKEN_VARIABLE].strip()
    if token is not None and (not token or not token.isprintable() or " " in token):
        raise ValueError(f"{where} must be one line of visible characters, without spaces")
    return token


def check_host(host: str) -> str:
    """An address to listen at, without the brackets of an IPv6 address in a link.

    Raises:
        ValueError: when it is none.
    """
    bare = host[1:-1] if host[:1] == "[" and host[-1:] == "]" else host
    try:
        ipaddress.ip_address(bare)
    except ValueError:  # a name, perhaps, of labels of 1 to 63 characters (RFC 1035)
        if not re.fullmatch(r"(?=.{1,253}$)[\w-]{1,63}(\.[\w-]{1,63})*\.?", bare) or bare != host:
            raise ValueError(
                "a host is an address or a name of this machine, such as 127.0.0.1, ::1, or "
                f"0.0.0.0 for all of its addresses, without http:// and port; got {host!r}"
            ) from None
    return bare


def is_loopback(host: str) -> bool:
    """Whether ``host`` can be reached from this machine only."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_origin(origin: str) -> str:
    """An origin as a browser sends it, in lower case.

    Raises:
        ValueError: when it is none, such as "*".
    """
    try:
        parts = urlsplit(origin.strip().lower())
        host, port = parts.hostname, parts.port
    except ValueError:
        parts, host, port = urlsplit(""), None, None
    if parts.scheme not in ("http", "https") or not host or "*" in host or parts.path.strip("/"):
        raise ValueError(
            f"an allowed origin is the beginning of an address, such as https://hub.example.org, "
            f"got {origin!r}"
        )
    name = f"[{host}]" if ":" in host else host
    default = {"http": 80, "https": 443}[parts.scheme]
    return f"{parts.scheme}://{name}" + ("" if port in (None, default) else f":{port}")


def _same(given: str, secret: str) -> bool:
    return hmac.compare_digest(given.encode(errors="replace"), secret.encode(errors="replace"))


def _host_name(address: str) -> str:
    """The host of a Host header, "" where it is malformed."""
    try:
        return urlsplit(f"//{address}").hostname or ""
    except ValueError:
        return ""


def _network(address: str) -> str:
    """Whom an address belongs to: with IPv6 a whole /64, which everybody has to themselves."""
    try:
        ip = ipaddress.ip_address(address.split("%")[0])
    except ValueError:
        return address
    if ip.version == 6 and ip.ipv4_mapped is None:
        return str(ipaddress.ip_network((ip, 64), strict=False))
    return str(ip)
