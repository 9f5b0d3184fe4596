"""A web server for one person: who may ask, how much a request may hold. Its answers are search.py's."""

import contextlib
import importlib.util
import ipaddress
import json
import re
import secrets
import signal
import socket

from common.console import UserError
from common.images import shown

_BODY = 64 << 10  # bytes of a request that is no picture
_POLICY = "default-src 'none'; img-src 'self' blob:; script-src 'self'; style-src 'self'; connect-src 'self'"
_POLICY += "; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",  # the address may hold the secret
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


def refusal(scope: dict, hosts: set[str], anywhere: bool) -> tuple[int, str] | None:
    """Why a request is not answered: a foreign Host (another name was made to point here), or one sent by a foreign
    page. A program that is no browser sends neither Origin nor Sec-Fetch-Site."""
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
    host = headers.get("host", "")
    name = re.sub(r":\d+$", "", host).strip("[]").lower()
    if name not in hosts and not (anywhere and is_address(name)):
        return 421, "Host is not this server"
    site, origin = headers.get("sec-fetch-site", "none"), headers.get("origin")
    if scope["method"] not in ("GET", "HEAD"):
        if site not in ("same-origin", "none") or origin not in (None, f"http://{host}"):
            return 403, "changes are taken from this server's own page only"
    elif site not in ("same-origin", "none") and headers.get("sec-fetch-mode") != "navigate":
        return 403, "pictures and answers are given to this server's own page only"
    return None


def is_address(name: str) -> bool:
    try:
        return bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def guarded(app, hosts: set[str], anywhere: bool, secret: str):
    """The app behind all checks; with a secret every address begins with it, and any other is not found."""
    from starlette.responses import JSONResponse

    async def asgi(scope, receive, send):
        if scope["type"] != "http":
            return await app(scope, receive, send)

        async def send_guarded(message):
            if message["type"] == "http.response.start":
                message["headers"] += [(k.lower().encode(), v.encode()) for k, v in _HEADERS.items()]
            await send(message)

        refused = refusal(scope, hosts, anywhere)
        if secret and refused is None:
            first, _, rest = scope["path"].removeprefix("/").partition("/")
            if not secrets.compare_digest(first.encode(), secret.encode()):
                refused = 404, "not found"
            scope = scope | {"path": "/" + rest, "raw_path": b"/" + rest.encode()}
        answer = app if refused is None else JSONResponse({"error": refused[1]}, refused[0])
        await answer(scope, receive, send_guarded)

    return asgi


async def body_of(request, most: int) -> bytes:
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise UserError(f"more than {most:,} bytes; send a smaller one")
        parts.append(part)
    return b"".join(parts)


async def json_of(request) -> dict:
    if request.headers.get("content-type", "").split(";")[0] != "application/json":
        raise UserError("wanted a body of Content-Type application/json")
    body = await body_of(request, _BODY)
    try:
        data = json.loads(body)
        json.dumps(data, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UserError("a text holds half a character (a lone surrogate), which no file can keep") from None
    except (ValueError, RecursionError):
        raise UserError("the body is not JSON") from None
    if not isinstance(data, dict):
        raise UserError("wanted a JSON object")
    return data


def only(data: dict, *known: str) -> None:
    """UserError that names the keys of a request's JSON that nobody reads: what they say would be left out silently."""
    if strange := [key for key in data if key not in known]:
        raise UserError(f"{', '.join(map(shown, strange))}: unknown; wanted {', '.join(known)}")


def number_of(table, name: str, default: int | None, least: int, most: int) -> int:
    """A whole number of a request's JSON or of its address."""
    value = table.get(name, default)
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}", value):
        value = int(value)
    if type(value) is not int or not least <= value <= most:
        raise UserError(f"{name} is {shown(value)}, wanted a whole number from {least} to {most}")
    return value


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound and listens. UserError where the address is not this machine's, the port is in use,
    or a package of the page is missing."""
    missing = [name for name in ("starlette", "uvicorn") if not importlib.util.find_spec(name)]
    if missing:
        raise UserError(f"the page needs {' and '.join(missing)}: pip install -r requirements-search.txt")
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: {error.strerror}; take another --port, or 0") from None


def serve(server, listening: socket.socket) -> None:
    """Runs uvicorn's server until Ctrl-C. It answers what it began, for timeout_graceful_shutdown seconds at most."""
    first = server.handle_exit

    def once(number, frame) -> None:
        # at a second Ctrl-C uvicorn would leave everything as it lies, with tracebacks
        if not (server.should_exit and number == signal.SIGINT):
            first(number, frame)

    server.handle_exit = once
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it at its end
        server.run(sockets=[listening])

    # one more, while the last threads end, ends the process without a word
    signal.signal(signal.SIGINT, signal.SIG_DFL)
