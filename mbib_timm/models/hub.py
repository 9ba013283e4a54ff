"""The Hub as this package asks it: names that can be, requests that end, and one sentence for what goes wrong."""

import contextlib
import re
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

from huggingface_hub import constants, get_session, get_token, set_client_factory
from huggingface_hub.errors import (
    HFValidationError,
    HTTPError,  # that of the HTTP client that the Hub's uses
    LocalEntryNotFoundError,
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

    def before(self, request: Any) -> None:
        if not self.asking:
            return
        now = time.monotonic()
        if self.asked is None:
            self.asked = now
        elif now - self.asked > PATIENCE_SECONDS:
            raise MbibError(f"the Hub at {request.url.host} has not answered for {now - self.asked:.0f} seconds")
        limits = request.extensions.get("timeout", {})
        request.extensions["timeout"] = {
            phase: min(limits.get(phase) or REQUEST_SECONDS, REQUEST_SECONDS)
            for phase in ("connect", "read", "write", "pool")
        }

    def after(self, response: Any) -> None:
        self.asked = None


_PATIENCE = _Patience()


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
    session: Any = get_session()
    if _PATIENCE.before in session.event_hooks["request"]:
        return
    create: Any = _http._GLOBAL_CLIENT_FACTORY  # which has no public name

    def limited() -> Any:
        client = create()
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
        return MbibError(f"hf-hub:{repository}: the Hub cannot be reached, and there is no copy in the cache")
    return MbibError(f"hf-hub:{repository}: {what_went_wrong(error)}")


def what_went_wrong(error: Exception) -> str:
    """Return what an error of the Hub's client says, in a line, without the token."""
    # Anything else is of whatever took the answer apart: JSON, a key, a header.
    known = isinstance(error, HTTPError | OSError | RuntimeError)
    text = first_line(error) if known else "the answer is not the Hub's; is HF_ENDPOINT right, or a proxy in between?"
    token = get_token()
    return text.replace(token, "***") if token else text
