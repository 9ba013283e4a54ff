"""The demo page: what it shows of an image is what the model says, and it is served on this machine alone."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from types import SimpleNamespace

import forked
import numpy as np
import pytest
import timm
import torch
from PIL import ExifTags, Image

from mbib_timm.errors import DataError, MbibError
from mbib_timm.inference import demo as demo_module
from mbib_timm.inference.demo import build_page, class_labels, classify, open_upload, shown_heads
from mbib_timm.inference.inputs import find_images
from mbib_timm.inference.predictor import Predictor
from mbib_timm.models.weights import LoadedModel, load_model


@pytest.fixture
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8))


def test_every_head_is_shown_with_the_training_images_of_its_classes(finished_run, picture):
    model = load_model(str(finished_run))
    labels = class_labels(model)
    assert labels[3] == f"3 (n = {model.class_counts[3]})"
    assert shown_heads(model) == {"prediction": "Prediction (mean of v3 and z)", "v3": "Head v3", "z": "Head z"}
    shown = classify([Predictor(model, head) for head in shown_heads(model)], labels, picture).heads
    images = timm.data.create_transform(**model.preprocessing)(picture)[None]
    with torch.inference_mode():
        *_, v, z = model.module.forward_heads(images)
        expected = [torch.softmax(logits, 1)[0] for logits in ((v + z) / 2, v, z)]
    for head, probabilities in zip(shown, expected, strict=True):
        best = probabilities.argsort(descending=True)[:5].tolist()
        assert list(head) == [labels[label] for label in best]
        assert list(head.values()) == pytest.approx(probabilities[best].tolist(), rel=1e-5)


def test_classes_of_one_name_are_told_apart(finished_run):
    model = load_model(str(finished_run))
    names = ("crane", "crane", *model.class_names[2:])
    twins = LoadedModel(model.source, model.module, model.preprocessing, names, None, None)
    assert class_labels(twins)[:3] == ["crane [0]", "crane [1]", "2"]


def test_any_mode_of_image_is_taken(finished_run, picture):
    model = load_model(str(finished_run))
    for mode in ("L", "RGBA", "P", "CMYK", "1"):
        (shown,) = classify([Predictor(model)], class_labels(model), picture.convert(mode)).heads
        assert len(shown) == 5


def test_an_image_is_turned_as_predict_turns_it(finished_run, picture, tmp_path):
    model = load_model(str(finished_run))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    picture.save(tmp_path / "turned.png", exif=exif)
    predictor, labels = Predictor(model), class_labels(model)
    (found,) = find_images([str(tmp_path / "turned.png")])
    (batch,) = predictor.score(found.images)
    (expected,) = predictor.items(batch)
    (shown,) = classify([predictor], labels, open_upload(tmp_path / "turned.png")).heads
    assert list(shown.items()) == [(labels[label], pytest.approx(p, rel=1e-5)) for label, p in expected.classes]
    (upright,) = classify([predictor], labels, picture).heads
    assert upright != shown


def test_why_an_image_cannot_be_read(tmp_path, picture):
    file = tmp_path / "image.png"
    picture.save(file)
    content = file.read_bytes()
    for broken, message in (
        (b"text", "not an image, or damaged, or of a kind"),
        (content[:200], "image file is truncated"),
    ):
        file.write_bytes(broken)
        with pytest.raises(DataError, match=f"This file cannot be read: {message}"):
            open_upload(file)


# The second has more than Pillow opens.
@pytest.mark.parametrize(("side", "millions"), [(12_000, 144), (15_000, 225)])
def test_a_small_file_of_many_pixels_is_not_decoded(tmp_path, side, millions):
    (tmp_path / "bomb.pgm").write_bytes(b"P5 %d %d 255\n" % (side, side))
    with pytest.raises(DataError, match=f"it has {millions} million pixels, and up to 50 million are read: make it"):
        open_upload(tmp_path / "bomb.pgm")


def test_uploads_have_a_size_limit_and_go_away(finished_run, monkeypatch):
    gradio = pytest.importorskip("gradio", reason="the demo's extra is not installed")
    launched = {}
    monkeypatch.setattr(gradio.Blocks, "launch", lambda page, **given: launched.update(given, page=page))
    monkeypatch.setattr(gradio.Blocks, "block_thread", lambda page: None)
    monkeypatch.setattr(gradio.Blocks, "local_url", "http://127.0.0.1", raising=False)
    demo_module.demo(str(finished_run), device="cpu")
    assert launched["max_file_size"] == 20 * 2**20
    assert launched["page"].delete_cache == (60, 600)


def test_the_page_says_it_and_shows_where_a_class_is_seen(finished_run, picture, tmp_path):
    gradio = pytest.importorskip("gradio", reason="the demo's extra is not installed")
    pytest.importorskip("pytorch_grad_cam", reason="the extra of Grad-CAM is not installed")
    page = build_page(str(finished_run), "cpu")
    (call,) = page.fns.values()
    upload = call.inputs[0]
    file = tmp_path / "image.png"
    picture.save(file)
    payload = gradio.data_classes.ImageData(path=str(file), orig_name=file.name)
    reason, *heads, overlay = call.fn(upload.preprocess(payload))
    assert not reason.visible
    assert [len(head) for head in heads] == [5, 5, 5]
    assert overlay.size == (224, 224)
    file.write_bytes(b"no image")
    reason, *heads, overlay = call.fn(upload.preprocess(payload))
    assert reason.value.startswith("This file cannot be read: not an image")
    assert heads == [{}, {}, {}]
    assert overlay is None
    assert call.fn(upload.preprocess(None))[1:] == [{}, {}, {}, None]


def test_without_gradio_it_says_what_to_install(finished_run, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(MbibError, match=r"pip install 'mbib-timm\[demo\]'"):
        build_page(str(finished_run))


def test_no_port_that_is_free_is_not_called_none(monkeypatch):
    def launch(**_):
        raise OSError("Cannot find empty port in range: 7860-7959")

    monkeypatch.setattr(demo_module, "build_page", lambda *_: SimpleNamespace(launch=launch))
    with pytest.raises(MbibError, match=r"^no port is free; give one with --port$"):
        demo_module.demo("a_model")


@pytest.mark.slow
@pytest.mark.browser
def test_it_is_served_on_this_machine_alone(finished_run, tmp_path, popen):
    pytest.importorskip("gradio", reason="the demo's extra is not installed")
    assert demo_module.LOOPBACK == "127.0.0.1"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        call = [sys.executable, "-m", "mbib_timm", "demo", str(finished_run), "--device", "cpu"]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "GRADIO_TEMP_DIR": str(tmp_path)}
        done = forked.mbib(*call[3:], "--port", port, HF_HUB_OFFLINE="1")
        assert done.returncode == 2
        assert f"port {port} is taken" in done.stderr
    server = popen(call, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = server.stdout.readline()
        url = re.search(r"http://127\.0\.0\.1:\d+", line)[0]
        with urllib.request.urlopen(f"{url}/config", timeout=30) as answer:
            page = json.load(answer)
        labels = [part["props"].get("label") for part in page["components"]]
        assert {"Image", *shown_heads(load_model(str(finished_run))).values()} <= set(labels)
        assert upload(url, b"x" * (21 * 2**20)) == 413
        assert upload(url, b"x" * 1000) == 200
        assert [path for path in tmp_path.rglob("*") if path.is_file()]
        addresses = {address for address in socket.gethostbyname_ex(socket.gethostname())[2] if address != "127.0.0.1"}
        for address in addresses:
            with pytest.raises(OSError):  # noqa: PT011 (refused or unreachable, as the system puts it)
                socket.create_connection((address, int(url.rpartition(":")[2])), timeout=5).close()
    finally:
        server.send_signal(signal.SIGINT)
        _, errors = server.communicate(timeout=60)
    assert "Traceback" not in errors
    assert not [path for path in tmp_path.rglob("*") if path.is_file()], "uploads go when the page closes"


def upload(url, content):
    """The status that the page answers to an upload with."""
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + content + b"\r\n--x--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    request = urllib.request.Request(f"{url}/gradio_api/upload", body, headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
