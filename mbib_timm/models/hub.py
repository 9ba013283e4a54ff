"""The Hub as this package asks it: names that can be, requests that end, and one sentence for what goes wrong."""

import contextlib
import logging
import re
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.request import getproxies

from huggingface_hub import constants, get_session, get_token, set_client_factory
from huggingface_hub.errors import (
    HFValidationError,
    HTTPError,  # that of the HTTP client that the Hub's uses
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import _http, validate_repo_id

from mbib_timm.errors import MbibError, first_line
from mbib_timm.files import printable

# Seconds that a request waits to connect, to send, and for the next bytes of an answer; those of the Hub's client that
# the environment sets count where they are longer.
REQUEST_SECONDS = max(30, constants.HF_HUB_DOWNLOAD_TIMEOUT, constants.HF_HUB_ETAG_TIMEOUT)
# Seconds without any answer after which no request is made again.
PATIENCE_SECONDS = 60


def split_repository(name: str) -> tuple[str, str | None]:
    """Split the name of a repository, ``organisation/name`` or ``organisation/name@revision``.

    Raises:
        MbibError: the Hub takes no such name.
    """
    repository, at, revision = name.partition("@")
    try:
        validate_repo_id(repository)
        is_valid = repository.isascii()  # older clients take letters that the Hub does not
    except HFValidationError:
        is_valid = False
    if not is_valid:
        raise MbibError(
            f"hf-hub:{printable(name)[:100]}: there is no such name: expected ORGANISATION/NAME of letters, digits, "
            "'-', '_' and '.', up to 96 in all"
        )
    if at and (not re.fullmatch(r"[\w.+-]+(/[\w.+-]+)*", revision, re.ASCII) or ".." in revision):
        given = f"{printable(revision)[:40]!r} is none" if revision else "there is none"
        raise MbibError(f"hf-hub:{repository}@: expected a revision after the @, and {given}")
    return repository, revision or None


class _Patience:
    """Hooks of the Hub's HTTP client: every request of ours has a time limit, and a silent Hub is not asked for ever.

    The client is the whole process's. What others ask while we do not, is left as it is.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.asking = 0  # of our questions, in all threads, how many are open
        self.asked: float | None = None  # when the first request without an answer was made
        self.answered = False  # once, since the first of them
        self.unknown: set[str] = set()  # hosts whose names do not resolve
        self.may_have_proxies = True  # which would resolve them

    def before(self, request: Any) -> None:
        if not self.asking:
            return
        now = time.monotonic()
        if self.asked is None:
            self.asked = now
        elif now - self.asked > PATIENCE_SECONDS:
            raise MbibError(f"the Hub at {request.url.host} has not answered for {now - self.asked:.0f} seconds")
        elif not (self.answered or self.may_have_proxies) and self._is_unknown(request.url.host):
            # As the Hub's client says it of itself where it is set to be offline: it looks into its cache, and asks no
            # more. It would ask six times for each file.
            raise OfflineModeIsEnabled(f"the Hub cannot be reached: the name {request.url.host} is not found")
        limits = request.extensions.get("timeout", {})
        request.extensions["timeout"] = {
            phase: min(limits.get(phase) or REQUEST_SECONDS, REQUEST_SECONDS)
            for phase in ("connect", "read", "write", "pool")
        }

    def after(self, response: Any) -> None:
        self.asked = None
        self.answered = True

    def _is_unknown(self, host: str) -> bool:
        """Return whether the name of a host does not resolve, which is asked once."""
        if host not in self.unknown:
            try:
                socket.getaddrinfo(host, None)
            except (socket.gaierror, UnicodeError):
                self.unknown.add(host)
        return host in self.unknown


_PATIENCE = _Patience()


class _Retries(logging.Filter):
    """Lines of the Hub's client on each of its attempts: what comes of them, one sentence says."""

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        is_retry = "thrown while requesting" in text or text.startswith("Retrying in")
        return not (is_retry and _PATIENCE.asking)


_RETRIES = _Retries()


def prepare_hub() -> None:
    """Give the Hub's client, whose requests may wait for ever, time limits; they hold within `patience`.

    A client of the caller's own, with proxies or certificates, stays what it is.

    Raises:
        MbibError: a token that cannot be sent.
    """
    token = get_token()
    if token is not None and not re.fullmatch(r"[\x21-\x7e]+", token):
        raise MbibError(
            "the Hub's token holds characters that cannot be sent; set HF_TOKEN anew, or log in again with hf auth "
            "login"
        )
    logging.getLogger(_http.__name__).addFilter(_RETRIES)  # once, however often
    session: Any = get_session()
    if _PATIENCE.before in session.event_hooks["request"]:
        return
    create: Any = _http._GLOBAL_CLIENT_FACTORY  # which has no public name
    own = getattr(_http, "default_client_factory", None)

    def limited() -> Any:
        client = create()
        # The client reads them from the environment as it is made.
        _PATIENCE.may_have_proxies = create is not own or bool(getproxies())
        hooks = client.event_hooks
        client.event_hooks = {
            "request": [*hooks["request"], _PATIENCE.before],
            "response": [*hooks["response"], _PATIENCE.after],
        }
        return client

    set_client_factory(limited)


@contextlib.contextmanager
def patience() -> Iterator[None]:
    """Limit how long the Hub is waited for, until the last of several questions at the same time has ended."""
    with _PATIENCE.lock:
        if not _PATIENCE.asking:
            _PATIENCE.asked = None
            _PATIENCE.answered = False
            _PATIENCE.unknown.clear()
        _PATIENCE.asking += 1
    try:
        yield
    finally:
        with _PATIENCE.lock:
            _PATIENCE.asking -= 1


@contextlib.contextmanager
def limited_sockets() -> Iterator[None]:
    """Give a time limit to requests of clients that have none, such as torch's for weights that timm has elsewhere."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(REQUEST_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def hub_error(repository: str, error: Exception) -> MbibError:
    """Return what to tell a user of an error of the Hub's client: one line, without the request's address."""
    if isinstance(error, MbibError):
        return MbibError(f"hf-hub:{repository}: {error}")
    if isinstance(error, RepositoryNotFoundError):
        return MbibError(
            f"hf-hub:{repository}: there is no such repository, or it is private and needs a token (hf auth login)"
        )
    if isinstance(error, RevisionNotFoundError):
        return MbibError(f"hf-hub:{repository}: the repository has no such revision: no branch, tag or commit")
    if isinstance(error, LocalEntryNotFoundError):
        return MbibError(
            f"hf-hub:{repository}: the Hub cannot be reached, and there is no copy in the cache; is there a network? "
            "Without one, `mbib models` lists what comes with the package, and the folder of a run is a model too"
        )
    return MbibError(f"hf-hub:{repository}: {what_went_wrong(error)}")


def what_went_wrong(error: Exception) -> str:
    """Return what an error of the Hub's client says, in a line, without the token."""
    # Anything else is of whatever took the answer apart: JSON, a key, a header.
    known = isinstance(error, HTTPError | OSError | RuntimeError)
    text = first_line(error) if known else "the answer is not the Hub's; is HF_ENDPOINT right, or a proxy in between?"
    if isinstance(error, HTTPError) and text.startswith("[Errno"):  # of the connection
        text = f"the Hub cannot be reached ({text.partition('] ')[2]})"
    token = get_token()
    return text.replace(token, "***") if token else text
