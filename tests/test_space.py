"""The folder that makes a Space of the demo: what the Hub reads of it, what it installs, and that its page answers."""

import json
import os
import re
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from loopback_hub import TestHub
from packaging.requirements import Requirement
from packaging.version import Version
from pages import PROJECT, REPOSITORY, ROOT, blocks
from PIL import Image

import mbib_timm
from mbib_timm.inference import demo
from mbib_timm.licences import LICENCES
from mbib_timm.models.zoo import ZOO

SPACE = ROOT / "space"
HEADER = yaml.safe_load((SPACE / "README.md").read_text(encoding="utf-8").split("---\n")[1])
DEFAULT = re.search(r'"MBIB_MODEL", "([\w.]+)"', (SPACE / "app.py").read_text(encoding="utf-8"))[1]
MODEL = {model.name: model for model in ZOO}[DEFAULT]
# What the Hub's reference of a Space's fields allows.
COLOURS = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
TEXTS = {"title", "emoji", "sdk", "sdk_version", "python_version", "app_file", "license", "short_description"}


def extra(name):
    """The requirement of an extra that has one."""
    return Requirement(re.search(rf'^{name} = \["([^"]+)"\]$', PROJECT, re.MULTILINE)[1])


def test_the_hub_can_read_the_header():
    assert HEADER.keys() == {*TEXTS, "colorFrom", "colorTo", "models", "tags"}
    assert all(isinstance(HEADER[key], str) for key in TEXTS)  # a version without quotes may be read as a number
    assert len(HEADER["short_description"]) <= 60
    assert not HEADER["emoji"].isascii()
    assert len(HEADER["emoji"]) == 1
    assert {HEADER["colorFrom"], HEADER["colorTo"]} <= COLOURS
    assert HEADER["license"] in LICENCES
    assert (HEADER["sdk"], HEADER["app_file"]) == ("gradio", "app.py")


def test_its_versions_are_those_of_the_package():
    gradio = extra("demo")
    assert gradio.name == HEADER["sdk"]
    assert Version(HEADER["sdk_version"]).release[2:], "a release of Gradio's, not a range"
    assert HEADER["sdk_version"] in gradio.specifier
    lowest = re.search(r'^requires-python = ">=([\d.]+)"$', PROJECT, re.MULTILINE)[1]
    assert Version(HEADER["python_version"]) >= Version(lowest)
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    assert f'- python: "{HEADER["python_version"]}"' in workflow, "a version that the tests run on"


def test_the_version_of_gradio_is_the_one_that_is_tested():
    gradio = pytest.importorskip("gradio", reason="the demo's extra is not installed")
    assert Version(HEADER["sdk_version"]).major == Version(gradio.__version__).major


def test_it_shows_a_packaged_model_under_the_name_of_its_card():
    assert MODEL.weights is not None
    assert HEADER["models"] == [MODEL.repository]
    assert f"hf-hub:{MODEL.repository}" in (ROOT / "model_cards" / f"{DEFAULT}.md").read_text(encoding="utf-8")
    assert f"`{DEFAULT}`" in (SPACE / "README.md").read_text(encoding="utf-8")


def test_it_installs_this_release_with_the_demos_extras():
    lines = (SPACE / "requirements.txt").read_text(encoding="utf-8").splitlines()
    options = [line for line in lines if line.startswith("-")]
    (requirement,) = [Requirement(line) for line in lines if not line.startswith(("#", "-"))]
    assert options == ["--extra-index-url https://download.pytorch.org/whl/cpu"]
    assert requirement.name == re.search(r'^name = "(.+)"$', PROJECT, re.MULTILINE)[1]
    assert requirement.url == f"git+{REPOSITORY}@v{mbib_timm.__version__}"
    assert requirement.extras == {"demo", "cam", "lite0"}
    assert all(extra(name) for name in requirement.extras)


def serve(popen, tmp_path):
    """Start app.py as a Space does, on loopback; returns the process and the page's address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {
        **os.environ, "GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port), "HF_HUB_OFFLINE": "1",
        "GRADIO_ANALYTICS_ENABLED": "0", "GRADIO_TEMP_DIR": str(tmp_path / "uploads"), "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    server = popen([sys.executable, "app.py"], cwd=SPACE, env=environment, stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            with urllib.request.urlopen(f"{url}/config", timeout=30) as answer:
                return url, json.load(answer)
        except OSError:
            assert server.poll() is None, "app.py has ended"
            time.sleep(0.2)
    raise AssertionError("no page after two minutes")


@pytest.mark.parametrize("own", [None, "hf-hub:me/digits"])
def test_its_model_is_that_of_the_variable(own, monkeypatch):
    pages, page = [], SimpleNamespace(launch=lambda **_: None)
    monkeypatch.setattr(demo, "build_page", lambda target: (pages.append(target), page)[1])
    monkeypatch.delenv("MBIB_MODEL", raising=False)
    if own:
        monkeypatch.setenv("MBIB_MODEL", own)
    runpy.run_path(str(SPACE / "app.py"))
    assert pages == [own or DEFAULT]


@pytest.mark.slow
@pytest.mark.browser
def test_its_page_answers_what_predict_says(popen, tmp_path):
    pytest.importorskip("gradio", reason="the demo's extra is not installed")
    client = pytest.importorskip("gradio_client")
    url, config = serve(popen, tmp_path)
    assert config["title"] == f"mbib_timm: {DEFAULT}"
    picture = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(picture)
    page = client.Client(url, verbose=False, download_files=str(tmp_path), analytics_enabled=False)
    reason, *answers = page.predict(client.handle_file(picture), api_name="/show")
    assert not reason["visible"]
    heads = [None, *mbib_timm.load(DEFAULT).model.module.prediction_heads]
    assert len(answers) - len(heads) in (0, 1)  # Grad-CAM's picture is the last, where it is installed
    for head, answer in zip(heads, answers, strict=False):
        predictor = mbib_timm.load(DEFAULT, **({} if head is None else {"head": head}))
        (expected,) = mbib_timm.predict(predictor, picture)
        counts = dict(zip(predictor.model.class_names, predictor.model.class_counts, strict=True))
        assert answer["label"] == f"{expected.name} (n = {counts[expected.name]:,})"
        shown = {each["label"].partition(" (n = ")[0]: each["confidence"] for each in answer["confidences"]}
        assert shown == pytest.approx({each.name: each.probability for each in expected.classes}, rel=1e-4)
        assert list(shown) == [each.name for each in expected.classes]


@pytest.mark.slow
@pytest.mark.hub
def test_the_commands_on_the_page_make_a_space(tmp_path):
    """As docs/hub.md has them, with the client of huggingface_hub, on a Hub on loopback."""
    (found,) = [block for block in blocks(ROOT / "docs" / "hub.md", "sh") if "hf repos create" in block]
    clone, create, upload = found.splitlines()
    assert clone == f"git clone {REPOSITORY} && cd {REPOSITORY.rpartition('/')[2]}"
    hub = TestHub(tmp_path / "hub", user="me", lfs_threshold=100_000).start()
    environment = {
        **os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": hub.token,
        "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    }  # fmt: skip
    shutil.copytree(SPACE, tmp_path / "space")
    try:
        for command in (create, upload):
            program, *arguments = shlex.split(command)
            assert program == "hf"
            call = [sys.executable, "-m", "huggingface_hub.cli.hf", *arguments]
            done = subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, done.stdout + done.stderr
        repository = hub.load("me/digits-demo")
        assert repository["sdk"] == HEADER["sdk"]
        assert repository["variables"] == [{"key": "MBIB_MODEL", "value": "hf-hub:me/digits"}]
        _, tree = hub.resolve(repository, "main")
        sent = {path: hub.blob(entry) for path, entry in tree.items() if path != ".gitattributes"}
    finally:
        hub.stop()
    assert sent == {file.name: file.read_bytes() for file in SPACE.iterdir() if file.is_file()}
    assert sent.keys() == {"README.md", "app.py", "requirements.txt"}
