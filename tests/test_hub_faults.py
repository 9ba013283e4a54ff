"""What the Hub may do wrong, at every request that publishing and loading make: an end in time, and one sentence."""

import contextlib
import logging
import os
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import forked
import pytest
from huggingface_hub import HfApi, close_session, constants, get_session, set_client_factory
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import _http
from loopback_hub import FAULTS, TestHub

from mbib_timm.errors import CheckpointError, MbibError
from mbib_timm.models import hub as hub_module
from mbib_timm.models.weights import Source, create_with_weights, load_model
from mbib_timm.publishing.publish import Publisher, PublishError
from mbib_timm.publishing.release import Release, make_release

REPOSITORY = "tester/mbib_resnet20.digits"
SECONDS = 30  # within which everything that fails here ends, on a busy machine too
STATUSES = (400, 401, 403, 404, 409, 412, 418, 429, 500, 503)
KINDS = [*FAULTS, *STATUSES]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub over LFS, whose client does not sleep between two attempts."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    hub = TestHub(tmp_path / "hub").start()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    close_session()
    yield hub
    hub.stop()
    close_session()


@contextlib.contextmanager
def faulty(hub, fault, monkeypatch):
    """A fault of the Hub, whose client meanwhile waits half a second instead of half a minute."""
    with monkeypatch.context() as patch:
        patch.setattr(hub_module, "REQUEST_SECONDS", 0.5)
        patch.setattr(hub_module, "PATIENCE_SECONDS", 1.5)
        hub.fail.append([*fault, 10**6])
        yield
        hub.fail.clear()
    close_session()  # a connection that a fault has spoilt is not used again


@pytest.fixture(scope="module")
def release(finished_run):
    """What a run's folder gives, and with it one file that goes by LFS, small enough for a table."""
    made = make_release(finished_run, REPOSITORY)
    kept = {name: content for name, content in made.files.items() if not name.startswith("figures/")}
    return Release(made.name, REPOSITORY, {**kept, "model.safetensors": bytes(5000)})


# By what it is called: method and path, and whether publishing makes it.
PUBLISHING = {
    "create_repo": ("POST", "/api/repos/create"),
    "model_info": ("GET", "/api/models/[^/]+/[^/]+$"),
    "tree": ("GET", "/tree/"),
    "refs": ("GET", "/refs"),
    "validate-yaml": ("POST", "/api/validate-yaml"),
    "preupload": ("POST", "/preupload/"),
    "LFS batch": ("POST", "/lfs/objects/batch"),
    "LFS upload": ("PUT", "/_lfs/"),
    "LFS verify": ("POST", "/verify"),
    "commit": ("POST", "/commit/"),
    "tag": ("POST", "/tag/"),
}
LOADING = {
    "HEAD of config.json": ("HEAD", "/config.json"),
    "GET of config.json": ("GET", "/config.json"),
    "HEAD of the weights": ("HEAD", "/model.safetensors"),
    "GET of the weights": ("GET", "/model.safetensors"),
}


def files_of(hub):
    """What the repository's main branch holds, by path; None where there is no repository."""
    repository = hub.load(REPOSITORY)
    return None if repository is None else repository["commits"][repository["refs"]["main"]]["tree"]


def cells(calls):
    """The table: a diagonal runs always, each kind at every third call with the slow tests, the rest with --faults."""
    for i, call in enumerate(calls):
        for k, kind in enumerate(KINDS):
            marks = [] if k == 7 * i % len(KINDS) else [pytest.mark.slow]
            if marks and (i + k) % 3:
                marks.append(pytest.mark.all_faults)
            yield pytest.param(kind, call, id=f"{kind}-{call}", marks=marks)


@pytest.mark.parametrize(("kind", "call"), cells(PUBLISHING))
def test_publishing(hub, release, kind, call, capsys, monkeypatch):
    start = time.monotonic()
    message = None
    with faulty(hub, [*PUBLISHING[call], kind], monkeypatch):
        try:
            Publisher(HfApi(endpoint=hub.url), release, wait=lambda seconds: None).publish(False, None)
        except PublishError as error:
            message = str(error)
    assert time.monotonic() - start < SECONDS
    tree = files_of(hub)
    there = set() if tree is None else set(tree) - {".gitattributes"}
    assert there in (set(), set(release.files)), "whole, or untouched"
    if message is None:
        assert there == set(release.files), "said to be published"
        assert hub.load(REPOSITORY)["tags"] == {"v1": hub.load(REPOSITORY)["refs"]["main"]}
    else:
        assert "\n" not in message
        assert hub.token not in message
        assert len(message) < 600
        if there:
            assert "all files are in" in message
            assert "only its tag v1 is missing" in message
    assert hub.token not in "".join(capsys.readouterr())
    Publisher(HfApi(endpoint=hub.url), release).publish(False, None)
    assert set(files_of(hub)) - {".gitattributes"} == set(release.files)
    assert hub.load(REPOSITORY)["tags"] == {"v1": hub.load(REPOSITORY)["refs"]["main"]}
    assert len(hub.load(REPOSITORY)["commits"]) == 2


def test_a_revision_that_is_not_there(hub, release):
    Publisher(HfApi(endpoint=hub.url), release, wait=lambda seconds: None).publish(False, "v1")
    assert Source("", repository=f"{REPOSITORY}@v1").file("config.json") is not None
    with pytest.raises(MbibError, match=f"^hf-hub:{REPOSITORY}@v9: the repository has no such revision"):
        load_model(f"hf-hub:{REPOSITORY}@v9")


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """A Hub whose name does not resolve, the client as it comes, and the lines that it logs."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setattr(constants, "ENDPOINT", "http://hub.invalid")
    template = "http://hub.invalid/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(_http, "_GLOBAL_CLIENT_FACTORY", _http.default_client_factory)
    monkeypatch.setattr(hub_module._PATIENCE, "may_have_proxies", True)
    close_session()
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("huggingface_hub").addHandler(handler)
    yield lines
    logging.getLogger("huggingface_hub").removeHandler(handler)
    close_session()


@pytest.mark.parametrize("name", [f"hf-hub:{REPOSITORY}", "resnet50.a1_in1k"])
def test_a_name_that_does_not_resolve_is_asked_once_again(nowhere, name, monkeypatch):
    """And no second file is asked for, nor is there a line on every attempt."""
    waits, asked = [], []
    own = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: (asked.append(a), own(*a, **k))[1])
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", waits.append)
    with pytest.raises(
        MbibError, match=r"^hf-hub:\S+: the Hub cannot be reached, .* is there a network\? .*mbib models"
    ):
        load_model(name)
    assert waits == []
    assert len(asked) == 2
    assert nowhere == []


def test_publishing_to_a_name_that_does_not_resolve(nowhere, release):
    waits = []
    message = (
        "^cannot create the repository: the Hub cannot be reached: the name hub.invalid is not found; publish again"
    )
    with pytest.raises(PublishError, match=message):
        Publisher(HfApi(endpoint="http://hub.invalid"), release, wait=waits.append).publish(False, None)
    assert waits == [1]


def test_others_have_the_clients_lines_and_attempts(nowhere, monkeypatch):
    """What is asked while this package asks nothing is left as it is, and so are names that a proxy resolves."""
    waits = []
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", waits.append)
    hub_module.prepare_hub()
    with pytest.raises(Exception, match=r"Name or service|Temporary failure|not known"):
        _http.http_backoff("GET", "http://hub.invalid/api", max_retries=1)
    assert waits == [1]
    assert any("Retrying in" in line for line in nowhere)
    assert not hub_module._PATIENCE.may_have_proxies
    monkeypatch.setenv("http_proxy", "http://proxy.invalid")
    close_session()  # as the Hub's client does itself where no connection is made
    _http.get_session()
    assert hub_module._PATIENCE.may_have_proxies


def test_a_name_that_does_not_resolve_for_a_moment_is_asked_again(nowhere):
    """Where the Hub has answered, its client's attempts go on, as a publication's do."""
    hub_module.prepare_hub()
    _http.get_session()
    request = SimpleNamespace(url=SimpleNamespace(host="hub.invalid"), extensions={})
    with hub_module.patience():
        hub_module._PATIENCE.before(request)
        hub_module._PATIENCE.after(None)
        for _ in range(3):
            hub_module._PATIENCE.before(request)
    with hub_module.patience():
        hub_module._PATIENCE.before(request)
        with pytest.raises(OfflineModeIsEnabled, match=r"the name hub\.invalid is not found"):
            hub_module._PATIENCE.before(request)


def test_after_silence_others_may_ask(hub, monkeypatch):
    """A service that could not reach the Hub once asks it again hours later, through another library."""
    with faulty(hub, [".*", ".*", "drop"], monkeypatch), pytest.raises(MbibError):
        load_model(f"hf-hub:{REPOSITORY}")
    monkeypatch.setattr(hub_module, "PATIENCE_SECONDS", 0)
    assert HfApi(endpoint=hub.url).whoami()["name"] == "tester"


def test_the_callers_client_stays(hub, release, monkeypatch):
    """Of a proxy, of certificates, or, here, of a header."""
    Publisher(HfApi(endpoint=hub.url), release).publish(False, None)
    kind = type(get_session())
    monkeypatch.setattr("huggingface_hub.utils._http._GLOBAL_CLIENT_FACTORY", None)
    set_client_factory(lambda: kind(headers={"X-Team": "traps"}, follow_redirects=True))
    assert Source("", repository=REPOSITORY).file("config.json") is not None
    session = get_session()
    assert session.headers["X-Team"] == "traps"
    assert hub_module._PATIENCE.before in session.event_hooks["request"]


@pytest.mark.parametrize(("kind", "call"), cells(LOADING))
def test_loading(hub, finished_run, kind, call, capsys, monkeypatch):
    files = {name: (finished_run / name).read_bytes() for name in ("config.json", "model.safetensors")}
    Publisher(HfApi(endpoint=hub.url), Release("mbib_resnet20.digits", REPOSITORY, files)).publish(False, None)
    start = time.monotonic()
    message = None
    with faulty(hub, [*LOADING[call], kind], monkeypatch):
        try:
            loaded = load_model(f"hf-hub:{REPOSITORY}")
        except MbibError as error:
            message = str(error)
    assert time.monotonic() - start < SECONDS
    if message is None:
        assert loaded.num_classes == 10
    else:
        assert "\n" not in message
        assert REPOSITORY in message
        assert hub.token not in message
        assert len(message) < 600
    assert hub.token not in "".join(capsys.readouterr())
    assert load_model(f"hf-hub:{REPOSITORY}").num_classes == 10, "nothing broken is left in the cache"


@pytest.mark.parametrize("token", ["hf_käse", "hf_a b", "hf_\x00", "hf_\x1b[31m", "hf_\U0001f600"])
def test_a_token_that_cannot_be_sent(hub, release, token, monkeypatch):
    monkeypatch.setattr(hub_module, "get_token", lambda: token)
    for action in (
        lambda: Publisher(HfApi(endpoint=hub.url), release).publish(False, None),
        lambda: load_model(f"hf-hub:{REPOSITORY}"),
    ):
        with pytest.raises(MbibError, match="the Hub's token holds characters that cannot be sent") as raised:
            action()
        assert token not in str(raised.value)
    assert hub.requests == []


def test_weights_at_a_plain_address_have_a_time_limit(monkeypatch, tmp_path):
    """timm fetches what is not on the Hub through torch, whose client waits for ever."""
    monkeypatch.setattr(hub_module, "REQUEST_SECONDS", 0.5)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    before = socket.getdefaulttimeout()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/weights.pth"
        start = time.monotonic()
        with pytest.raises(CheckpointError, match=r"cannot load resnet10t: .*timed out"):
            create_with_weights(Source("resnet10t"), pretrained_cfg_overlay={"url": address, "hf_hub_id": None})
    assert time.monotonic() - start < SECONDS
    assert socket.getdefaulttimeout() == before


@pytest.mark.slow
def test_commands_end_too(hub, tmp_path):
    """With the limits as they are, where the environment shortens those of downloads."""
    hub.fail.append([".*", ".*", "html", 10**6])
    environment = {
        **os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    call = [sys.executable, "-m", "mbib_timm", "predict", f"hf-hub:{REPOSITORY}", __file__]
    done = subprocess.run(call, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1
    for token in ("hf_käse", "hf_a\nb"):
        done = forked.mbib("predict", f"hf-hub:{REPOSITORY}", __file__, HF_TOKEN=token)
        assert done.returncode == 2, done.stderr
        assert token not in done.stderr
        assert "Traceback" not in done.stderr
