"""config.json and the weights beside it: what cannot be, or contradicts itself, is refused in a sentence everywhere."""

import json
import os
import shutil

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import previous_run

from mbib_timm.cli import main
from mbib_timm.errors import CheckpointError, MbibError
from mbib_timm.models.model_config import _ARGS, _CFG, _TOP, read_config
from mbib_timm.models.preprocessing import settle
from mbib_timm.models.pretraining import Origin
from mbib_timm.models.weights import find_source, load_model
from mbib_timm.recipe import Recipe
from mbib_timm.training.run_folder import RunFolder

CLASSES = 4
NAMES = ("ant", "bee", "cat", "dog")


@pytest.fixture
def folder(tmp_path):
    """A trained model of four classes that takes images of 16 x 16 pixels."""
    place = tmp_path / "model"
    shutil.copytree(previous_run(CLASSES, names=NAMES), place)
    return place


def changed(**keys):
    """A change of the file: keys with other values, `cfg__mean` for one of pretrained_cfg, `args__x` of model_args."""

    def change(content):
        for name, value in keys.items():
            part, nested, key = name.partition("__")
            where = content[{"cfg": "pretrained_cfg", "args": "model_args"}[part]] if nested else content
            where[key if nested else name] = value
        return json.dumps(content).encode()

    return change


def without(*keys):
    return lambda content: json.dumps({key: value for key, value in content.items() if key not in keys}).encode()


def raw(content):
    return lambda _: content


def twice(key):
    return lambda content: json.dumps(content)[:-1].encode() + f', "{key}": 4}}'.encode()


REFUSED = {
    # The file itself
    "empty": (raw(b""), "Expecting value"),
    "no JSON": (raw(b"architecture: cifar_resnet20"), "Expecting value"),
    "cut": (lambda content: json.dumps(content).encode()[:200], "line 1"),
    "a list": (raw(b"[]"), "content: expected keys and values, got []"),
    "a number": (raw(b"7"), "content: expected keys and values, got 7"),
    "null": (raw(b"null"), "content: expected keys and values, got null"),
    "a text": (raw(b'"cifar_resnet20"'), "content: expected keys and values"),
    "nothing": (raw(b"{}"), "architecture: missing"),
    "too deep": (raw(b"[" * 100_000), "nested too deep"),
    "deep inside": (raw(b'{"label_names": ' + b"[" * 90_000 + b"]" * 90_000 + b"}"), "nested too deep"),
    "byte-order mark": (lambda content: b"\xef\xbb\xbf" + json.dumps(content).encode(), "BOM"),
    "UTF-16": (lambda content: json.dumps(content).encode("utf-16"), "can't decode"),
    "Latin-1": (lambda content: json.dumps(content).encode().replace(b"ant", b"\xe4nt"), "can't decode"),
    "key twice": (twice("num_classes"), "'num_classes' occurs twice"),
    "foreign key twice": (lambda content: json.dumps(content)[:-1].encode() + b', "a": 1, "a": 2}', "twice"),
    "too large": (lambda content: json.dumps(content).encode() + b" " * (9 << 20), "larger than 8 MB"),
    "endless number": (raw(b'{"num_classes": ' + b"1" * 5000 + b"}"), "Exceeds the limit"),
    # Its architecture
    "no architecture": (without("architecture"), "architecture: missing"),
    "architecture null": (changed(architecture=None), "architecture: missing"),
    "architecture a number": (changed(architecture=20), "architecture: expected a text, got 20"),
    "architecture unknown": (changed(architecture="cifar_resnet21"), "did you mean 'cifar_resnet32' or"),
    "architecture empty": (changed(architecture=""), "unknown architecture"),
    "architecture with a tag": (changed(architecture="cifar_resnet20.digits"), "unknown architecture"),
    "architecture another's": (changed(architecture="cifar_resnet32"), "missing keys"),
    "model_args a list": (changed(model_args=["num_classes"]), "model_args: expected keys and values"),
    "model_args unknown": (changed(args__depth=20), "unexpected keyword argument 'depth'"),
    "model_args lenient": (changed(args__pretrained_strict=False), "pretrained_strict is not an argument"),
    "model_args features": (changed(args__features_only=True), "features_only is not an argument"),
    "model_args device": (changed(args__device="meta"), "device is not an argument"),
    "model_args checkpoint": (changed(args__checkpoint_path="x.pt"), "checkpoint_path is not an argument"),
    "model_args of wrong type": (changed(args__classifier=7), "unknown classifier"),
    "in_chans no number": (changed(args__in_chans="3"), "model_args.in_chans: expected a whole number"),
    "in_chans other": (changed(args__in_chans=1), "expected 1 numbers, one for each channel"),
    "tag a number": (changed(cfg__tag=7), "pretrained_cfg.tag: expected a text"),
    # Its classes
    "num_classes a text": (changed(num_classes="4"), 'num_classes: expected a whole number from 0 to 1,000,000'),
    "num_classes fractional": (changed(num_classes=4.0), "num_classes: expected a whole number"),
    "num_classes true": (changed(num_classes=True), "num_classes: expected a whole number"),
    "num_classes negative": (changed(num_classes=-4), "num_classes: expected a whole number"),
    "num_classes huge": (changed(num_classes=10**18), "num_classes: expected a whole number"),
    "num_classes otherwise": (changed(num_classes=7), "contradicts itself: num_classes is 7"),
    "model_args otherwise": (changed(args__num_classes=7), "model_args.num_classes is 7"),
    "cfg otherwise": (changed(cfg__num_classes=7), "pretrained_cfg.num_classes is 7"),
    "all otherwise": (
        lambda content: changed(num_classes=7, args__num_classes=7, cfg__num_classes=7)(
            {**content, "label_names": None, "class_counts": None}
        ),
        "its weights are not for 7 classes",
    ),
    # 16 is the width of a layer: of so many rows there are tensors.
    "all as wide as a layer": (
        lambda content: changed(num_classes=16, args__num_classes=16, cfg__num_classes=16)(
            {**content, "label_names": None, "class_counts": None}
        ),
        "size mismatch for fc.weight",
    ),
    "no classes": (
        lambda content: changed(num_classes=0, args__num_classes=0, cfg__num_classes=0)(
            {**content, "label_names": None, "class_counts": None}
        ),
        "unexpected keys",
    ),
    "names a text": (changed(label_names="ant"), "label_names: expected a list of class names"),
    "names a mapping": (changed(label_names={"0": "ant"}), "label_names: expected a list of class names"),
    "names empty": (changed(label_names=[]), "label_names: expected a list of class names"),
    "names too few": (changed(label_names=["ant"]), "label_names: expected 4 entries, as num_classes says, got 1"),
    "names too many": (changed(label_names=[*NAMES, "emu"]), "expected 4 entries, as num_classes says, got 5"),
    "names numbers": (changed(label_names=[0, 1, 2, 3]), "label_names[0]: expected a text, got 0"),
    "a name null": (changed(label_names=["ant", None, "cat", "dog"]), "label_names[1]: expected a text, got null"),
    "a name a list": (changed(label_names=["ant", ["bee"], "cat", "dog"]), "label_names[1]: expected a text"),
    "a lone surrogate": (changed(label_names=["ant", "b\udcff", "cat", "dog"]), "label_names[1]: expected a text"),
    "descriptions a list": (changed(label_descriptions=["ant"]), "label_descriptions: expected keys and values"),
    "counts a number": (changed(class_counts=4), "class_counts: expected a list of numbers of training images"),
    "counts a mapping": (changed(class_counts={"ant": 4}), "class_counts: expected a list"),
    "counts empty": (changed(class_counts=[]), "class_counts: expected a list"),
    "counts too few": (changed(class_counts=[4, 3, 2]), "class_counts: expected 4 entries, as num_classes says, got 3"),
    "counts too many": (changed(class_counts=[5, 4, 3, 2, 1]), "class_counts: expected 4 entries"),
    "a count negative": (changed(class_counts=[4, 3, -2, 1]), "class_counts[2]: expected a whole number from 1"),
    "a count zero": (changed(class_counts=[4, 3, 0, 1]), "class_counts[2]: expected a whole number from 1"),
    "a count fractional": (changed(class_counts=[4, 3, 2.5, 1]), "class_counts[2]: expected a whole number"),
    "a count a text": (changed(class_counts=[4, "3", 2, 1]), 'class_counts[1]: expected a whole number from 1 to 1,0'),
    "a count null": (changed(class_counts=[4, None, 2, 1]), "class_counts[1]: expected a whole number"),
    "a count true": (changed(class_counts=[4, True, 2, 1]), "class_counts[1]: expected a whole number"),
    "a count huge": (changed(class_counts=[2**63, 3, 2, 1]), "class_counts[0]: expected a whole number"),
    "a count not a number": (changed(class_counts=[float("nan"), 3, 2, 1]), "NaN is not a JSON number"),
    "prior unknown": (changed(logit_prior="balanced"), "logit_prior: expected one of uniform, train"),
    "prior a list": (changed(logit_prior=["train"]), "logit_prior: expected one of uniform, train"),
    # Its preprocessing
    "cfg a list": (changed(pretrained_cfg=[]), "pretrained_cfg: expected keys and values"),
    "cfg null": (changed(pretrained_cfg=None), "pretrained_cfg: expected keys and values, got null"),
    "model_args null": (changed(model_args=None), "model_args: expected keys and values, got null"),
    "cfg foreign": (changed(cfg__crop=0.9), "unknown key of pretrained_cfg 'crop': did you mean 'crop_"),
    "cfg weights": (changed(cfg__state_dict={}), "unknown key of pretrained_cfg 'state_dict'"),
    "size two numbers": (changed(cfg__input_size=[16, 16]), "pretrained_cfg.input_size: expected [channels, height"),
    "size a number": (changed(cfg__input_size=16), "pretrained_cfg.input_size: expected [channels, height, width]"),
    "size zero": (changed(cfg__input_size=[3, 0, 16]), "pretrained_cfg.input_size: expected [channels, height"),
    "size negative": (changed(cfg__input_size=[3, -16, 16]), "pretrained_cfg.input_size: expected"),
    "size fractional": (changed(cfg__input_size=[3, 16.0, 16]), "pretrained_cfg.input_size: expected"),
    "size huge": (changed(cfg__input_size=[3, 10**6, 10**6]), "pretrained_cfg.input_size: expected"),
    "size text": (changed(cfg__input_size="3x16x16"), "pretrained_cfg.input_size: expected"),
    "channels many": (changed(cfg__input_size=[10**6, 16, 16]), "pretrained_cfg.input_size: expected"),
    "channels other": (
        lambda content: changed(cfg__input_size=[1, 16, 16])({**content, "model_args": {"num_classes": 4}}),
        "expected 1 numbers, one for each channel",
    ),
    "test size a text": (changed(cfg__test_input_size="large"), "pretrained_cfg.test_input_size: expected"),
    "fixed size a text": (changed(cfg__fixed_input_size="no"), "pretrained_cfg.fixed_input_size: expected true or"),
    "fixed size of a free one": (changed(cfg__fixed_input_size=True), "unexpected keyword argument 'img_size'"),
    "mean too short": (changed(cfg__mean=[0.5]), "pretrained_cfg.mean: expected 3 numbers"),
    "mean too long": (changed(cfg__mean=[0.5] * 4), "pretrained_cfg.mean: expected 3 numbers"),
    "mean a number": (changed(cfg__mean=0.5), "pretrained_cfg.mean: expected a list of numbers"),
    "mean of texts": (changed(cfg__mean=["0.5"] * 3), 'pretrained_cfg.mean[0]: expected a number, got "0.5"'),
    "mean infinite": (changed(cfg__mean=[float("inf"), 0, 0]), "Infinity is not a JSON number"),
    "std zero": (changed(cfg__std=[0.2, 0, 0.2]), "pretrained_cfg.std[1]: expected a number above 0, got 0"),
    "std negative": (changed(cfg__std=[0.2, 0.2, -0.2]), "pretrained_cfg.std[2]: expected a number above 0"),
    "std too short": (changed(cfg__std=[0.2, 0.2]), "pretrained_cfg.std: expected 3 numbers"),
    "crop zero": (changed(cfg__crop_pct=0), "pretrained_cfg.crop_pct: expected a number from 0.01 to 2, got 0"),
    "crop negative": (changed(cfg__crop_pct=-0.5), "pretrained_cfg.crop_pct: expected"),
    "crop tiny": (changed(cfg__crop_pct=1e-9), "pretrained_cfg.crop_pct: expected"),
    "crop large": (changed(cfg__crop_pct=875), "pretrained_cfg.crop_pct: expected"),
    "crop a text": (changed(cfg__crop_pct="0.875"), "pretrained_cfg.crop_pct: expected"),
    "crop not a number": (changed(cfg__crop_pct=float("nan")), "NaN is not a JSON number"),
    "crop mode unknown": (changed(cfg__crop_mode="middle"), "crop_mode: expected one of center, squash, border"),
    "interpolation unknown": (changed(cfg__interpolation="cubic"), "interpolation: expected one of bilinear, bicubic"),
    "interpolation random": (changed(cfg__interpolation="random"), "interpolation: expected one of bilinear, bicubic"),
    "interpolation a number": (changed(cfg__interpolation=3), "interpolation: expected one of"),
    "classifier a number": (changed(cfg__classifier=7), "pretrained_cfg.classifier: expected a text, or a list"),
    "classifier of numbers": (changed(cfg__classifier=[7]), "pretrained_cfg.classifier: expected a text, or a list"),
    "first_conv a mapping": (changed(cfg__first_conv={}), "pretrained_cfg.first_conv: expected a text"),
    "label_offset": (changed(cfg__label_offset=1), "size mismatch"),
    "label_offset a text": (changed(cfg__label_offset="1"), "pretrained_cfg.label_offset: expected a whole number"),
    "pool_size a text": (changed(cfg__pool_size="8"), "pretrained_cfg.pool_size: expected a list of whole numbers"),
    "licence a list": (changed(cfg__license=["mit"]), "pretrained_cfg.license: expected a text"),
}  # fmt: skip


def spoil(folder, row):
    change, expected = REFUSED[row]
    file = folder / "config.json"
    file.write_bytes(change(json.loads(file.read_text())))
    return expected


@pytest.mark.parametrize("row", REFUSED)
def test_a_config_that_cannot_be_is_refused(folder, row):
    expected = spoil(folder, row)
    with pytest.raises(MbibError) as raised:
        load_model(str(folder))
    message = str(raised.value)
    assert expected in message
    assert str(folder) in message
    assert "\n" not in message
    assert len(message) < 500


def test_there_are_enough_rows():
    assert len(REFUSED) >= 73


ACCEPTED = {
    "as it is": lambda content: content,
    "foreign keys": lambda content: {**content, "hidden": {"a": [1]}, "license": "mit", "transformers_version": "4"},
    "nothing of the classes": lambda content: {
        key: content[key] for key in ("architecture", "num_classes", "num_features", "model_args", "pretrained_cfg")
    },
    "two classes of one name": lambda content: {**content, "label_names": ["crane", "crane", "cat", "dog"]},
    "nulls": lambda content: {**content, "label_names": None, "class_counts": None, "logit_prior": None},
    "no arguments": lambda content: {key: value for key, value in content.items() if key != "model_args"},
    "any script": lambda content: {**content, "label_names": ["蟻", "Käfer", "قط", "🐕"]},
}


@pytest.mark.parametrize("row", ACCEPTED)
def test_what_may_be_absent_or_foreign_loads(folder, row):
    file = folder / "config.json"
    expected = load_model(str(folder)).module.state_dict()
    content = ACCEPTED[row](json.loads(file.read_text()))
    file.write_text(json.dumps(content), encoding="utf-8")
    loaded = load_model(str(folder))
    assert loaded.class_names == (None if content.get("label_names") is None else tuple(content["label_names"]))
    assert all(torch.equal(value, expected[name]) for name, value in loaded.module.state_dict().items())
    assert "state_dict" not in loaded.module.pretrained_cfg


def test_what_timm_writes_itself_loads(tmp_path):
    """Every key of a cfg is checked; and what timm saves of one of its own models says less than ours."""
    fields = set(timm.models.PretrainedCfg.__dataclass_fields__)
    assert set(_CFG) == fields - {"state_dict"}
    assert not _TOP.keys() & _ARGS.keys() - {"num_classes"}
    model = timm.create_model("resnet10t", num_classes=5)
    for safe in (True, False):
        timm.models.save_for_hf(model, tmp_path / str(safe), safe_serialization=safe)
        loaded = load_model(str(tmp_path / str(safe)))
        assert loaded.num_classes == 5
        assert (loaded.class_names, loaded.class_counts, loaded.prior) == (None, None, None)


def test_class_names_outlive_timm(folder, tmp_path):
    """timm reads them at the top, and writes them into the cfg."""
    timm.models.save_for_hf(timm.create_model(f"local-dir:{folder}", pretrained=True), tmp_path / "again")
    assert load_model(str(tmp_path / "again")).class_names == NAMES


def test_class_names_of_the_model_before_do_not_stay(folder, tmp_path):
    """Its classes may be others, of which nobody knows the names."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    settings = dict(input_size=(3, 16, 16), recipe=settle(Recipe(), model), class_counts=np.arange(4, 0, -1))
    RunFolder(tmp_path).write_model(
        model, **settings, class_names=None, logit_prior=None, origin=Origin(), tag="made_up"
    )
    assert timm.create_model(f"local-dir:{tmp_path}", pretrained=True).pretrained_cfg.get("label_names") is None
    assert load_model(str(tmp_path)).class_names is None


@pytest.mark.slow
def test_every_cfg_of_timm_passes(tmp_path):
    """As its models on the Hub have it: architecture, classes, width and cfg."""
    for name in timm.list_pretrained():
        cfg = timm.get_pretrained_cfg(name)
        content = {
            "architecture": cfg.architecture, "num_classes": cfg.num_classes, "num_features": 8,
            "pretrained_cfg": {k: v for k, v in cfg.to_dict().items() if k != "architecture"},
        }  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps(content))
        assert read_config(tmp_path / "config.json").num_classes == cfg.num_classes, name


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from([0, 4, "train"]),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


def read_or_refused(file):
    """What a file says; None where it is refused in one line that names it."""
    try:
        return read_config(file)
    except CheckpointError as error:
        message = str(error)
    assert "\n" not in message
    assert str(file) in message
    return None


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_whatever_stands_in_a_config_is_read_or_refused_in_a_sentence(tmp_path_factory, data):
    """Any values under any of the known keys: what comes out is typed and agrees with itself."""
    content = json.loads((previous_run(CLASSES, names=NAMES) / "config.json").read_text())
    for place, keys in (
        (content, _TOP.keys()),
        (content["pretrained_cfg"], _CFG.keys()),
        (content["model_args"], _ARGS.keys()),
    ):
        for key in data.draw(st.lists(st.sampled_from(sorted(keys - {"architecture"})), max_size=2)):
            place[key] = data.draw(PLAIN)
    file = tmp_path_factory.getbasetemp() / "fuzzed.json"
    file.write_text(json.dumps(content))
    config = read_or_refused(file)
    if config is None:
        return
    assert timm.is_model(config.architecture)
    for values in (config.class_names, config.class_counts):
        assert values is None or config.num_classes is None or len(values) == config.num_classes
    assert config.class_names is None or all(name.encode() is not None for name in config.class_names)
    assert config.class_counts is None or (config.class_counts > 0).all()
    assert config.logit_prior in (None, "uniform", "train")


@settings(max_examples=300, deadline=None)
@given(cut=st.integers(0, 2000), junk=st.binary(max_size=8))
def test_a_damaged_config_is_read_or_refused_in_a_sentence(tmp_path_factory, cut, junk):
    content = (previous_run(CLASSES, names=NAMES) / "config.json").read_bytes()
    file = tmp_path_factory.getbasetemp() / "damaged.json"
    file.write_bytes(content[:cut] + junk + content[cut + len(junk) :])
    read_or_refused(file)


# Weights


def saved(change):
    def spoil(file):
        weights = load_file(file)
        change(weights)
        try:
            save_file(weights, file)
        except KeyError as dtype:
            pytest.skip(f"this safetensors cannot write {dtype}")

    return spoil


def filled(name, value):
    return saved(lambda weights: weights[name].view(-1)[-1:].fill_(value))


def as_kind(dtype):
    return saved(lambda weights: weights.update({"fc.weight": weights["fc.weight"].to(dtype)}))


def as_text(file):
    file.write_text("weights")


def as_folder(file):
    file.unlink()
    file.mkdir()


def as_pipe(file):
    file.unlink()
    os.mkfifo(file)


def to_nowhere(file):
    file.unlink()
    file.symlink_to("elsewhere")


WEIGHTS = {
    "gone": (lambda file: file.unlink(), "no weights at"),
    "empty": (lambda file: file.write_bytes(b""), "is not a weights file"),
    "cut": (lambda file: file.write_bytes(file.read_bytes()[:-100]), "is not a weights file"),
    "cut in the header": (lambda file: file.write_bytes(file.read_bytes()[:100]), "is not a weights file"),
    "longer": (lambda file: file.write_bytes(file.read_bytes() + b"x"), "is not a weights file"),
    "a text": (as_text, "is not a weights file"),
    "a folder": (as_folder, "it is not a regular file"),
    "a pipe": (as_pipe, "it is not a regular file"),
    "a link to nowhere": (to_nowhere, "no weights at"),
    "not a number": (filled("fc.weight", np.nan), "tensor 'fc.weight' holds numbers that are not finite"),
    "infinite": (filled("fc.bias", np.inf), "tensor 'fc.bias' holds numbers that are not finite"),
    "infinite statistics": (filled("bn1.running_var", -np.inf), "tensor 'bn1.running_var' holds numbers that are not"),
    "a tensor missing": (saved(lambda weights: weights.pop("fc.bias")), "missing keys: fc.bias"),
    "a tensor too many": (saved(lambda weights: weights.update(extra=torch.ones(1))), "unexpected keys: extra"),
    "another shape": (saved(lambda weights: weights.update({"bn1.weight": torch.ones(3)})), "size mismatch for bn1"),
    "of other classes": (
        saved(lambda weights: weights.update({"fc.weight": torch.ones(7, 64), "fc.bias": torch.ones(7)})),
        "its weights are not for 4 classes",
    ),
    "of whole numbers": (as_kind(torch.int8), "tensor 'fc.weight' is int8; expected float32"),
    "of large whole numbers": (as_kind(torch.int64), "tensor 'fc.weight' is int64; expected float32"),
    "complex": (as_kind(torch.complex64), "tensor 'fc.weight' is complex64; expected float32"),
    "of eight bits": (as_kind(torch.float8_e4m3fn), "tensor 'fc.weight' is float8_e4m3fn; expected float32"),
    "none": (saved(lambda weights: weights.clear()), "its weights are not for 4 classes"),
}


def beside(folder):
    """Other weights in the same folder, which must not stand in."""
    shutil.copy(folder / "model.safetensors", folder / "best.safetensors")


@pytest.mark.parametrize("row", WEIGHTS)
def test_weights_that_cannot_be_are_refused(folder, row):
    spoil, expected = WEIGHTS[row]
    beside(folder)
    spoil(folder / "model.safetensors")
    with pytest.raises(CheckpointError) as raised:
        load_model(str(folder))
    assert expected in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.fixture(scope="module")
def spoilt_runs(finished_run, tmp_path_factory):
    """Copies of a whole run, each with one thing that cannot be."""
    root = tmp_path_factory.mktemp("spoilt")

    def copy(name):
        shutil.copytree(finished_run, root / name / finished_run.name)
        return root / name / finished_run.name

    (copy("gone") / "model.safetensors").unlink()
    filled("bottleneck.classifier.weight", np.nan)(copy("nan") / "model.safetensors")
    file = copy("counts") / "config.json"
    file.write_bytes(changed(class_counts=[1] * 9 + [0])(json.loads(file.read_text())))
    return root


COMMANDS = {
    "predict": lambda run, out: ["predict", run, __file__, "--output", f"{out}/predictions.csv"],
    "validate": lambda run, out: ["validate", run, "--device", "cpu", "--workers", "0", "--results", f"{out}/r.json"],
    "export": lambda run, out: ["export", run, "--format", "torchscript", "--output", f"{out}/model.pt"],
    "analyze": lambda run, out: ["analyze", run, "--device", "cpu", "--workers", "0", "--output", f"{out}/analysis"],
    "demo": lambda run, out: ["demo", run, "--device", "cpu"],
    "publish": lambda run, out: ["publish", run, "--repo-id", "me/digits", "--dry-run"],
    "train": lambda run, out: _train(out, "--model", f"local-dir:{run}", "--pretrained"),
    "initial": lambda run, out: _train(out, "--initial-checkpoint", run),
    "teacher": lambda run, out: _train(out, "--method", "dive", "--method.teacher", run),
}


def _train(out, *flags):
    return [
        "train", "mbib_resnet20.digits", "--epochs", "1", "--warmup-epochs", "0", "--device", "cpu", "--workers", "0",
        "--output", out, *flags,
    ]  # fmt: skip


@pytest.mark.parametrize("fault", ["gone", "nan", "counts"])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_them(spoilt_runs, finished_run, command, fault, tmp_path, capsys):
    if command == "initial" and fault not in ("gone", "nan"):
        pytest.skip("weights alone: config.json is not read")
    run = str(spoilt_runs / fault / finished_run.name)
    capsys.readouterr()
    assert main(COMMANDS[command](run, str(tmp_path))) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert run in said.err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_backbones_weights_do_not_predict(tmp_path):
    """timm and training take them for a start; the heads are as they were initialised."""
    model, plain = timm.create_model("mbib_resnet20", num_classes=5), timm.create_model("cifar_resnet20", num_classes=5)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    save_file(plain.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"is only a starting point for training: its weights leave .* untrained"):
        load_model(str(tmp_path))
    assert timm.create_model(f"local-dir:{tmp_path}", pretrained=True).num_classes == 5


# Names

MODEL_NAMES = {
    "": "unknown model or folder ''",
    "resnet50.": "tag",
    "resnet50.a1_in1": "did you mean 'resnet50.a1_in1k'",
    "resnet5O": "unknown model or folder 'resnet5O'",
    "resnet50\0": "unknown model or folder",
    "local-dir:": "there is no folder",
    "local-dir:/nowhere": "there is no folder /nowhere",
    "local-dir:a\0b": "there is no folder a\\x00b",
    "x" * 5000: "unknown model or folder",
    "/" + "x" * 5000: "there is no folder",
    "hf-hub:": "expected ORGANISATION/NAME",
    "hf-hub:two words/a": "expected ORGANISATION/NAME",
    "hf-hub:a..b/c": "expected ORGANISATION/NAME",
    "hf-hub:../../etc/passwd": "expected ORGANISATION/NAME",
    "hf-hub:a/b/c": "expected ORGANISATION/NAME",
    "hf-hub:/a": "expected ORGANISATION/NAME",
    "hf-hub:a/": "expected ORGANISATION/NAME",
    "hf-hub:käfer/a": "expected ORGANISATION/NAME",
    "hf-hub:a/b.git": "expected ORGANISATION/NAME",
    f"hf-hub:a/{'b' * 200}": "expected ORGANISATION/NAME",
    "hf-hub:a/b@": "expected a revision after the @, and there is none",
    "hf-hub:a/b@v1@v2": "expected a revision after the @",
    "hf-hub:a/b@v 1": "expected a revision after the @",
    "hf-hub:a/b@../main": "expected a revision after the @",
    "hf-hub:a/b@\x1b[31m": "expected a revision after the @",
    "hf-hub:\x1b[31m": "expected ORGANISATION/NAME",
    "hf_hub:a b": "expected ORGANISATION/NAME",
    "http://example.org/a": "unknown source of models 'http'",
    "\x1b[31m:x": "unknown source of models",
}


@pytest.mark.parametrize("name", MODEL_NAMES, ids=lambda name: ascii(name)[:40])
def test_names_that_cannot_be(name, capsys):
    with pytest.raises(MbibError) as raised:
        find_source(name)
    message = str(raised.value)
    assert MODEL_NAMES[name] in message
    assert message.isprintable()
    assert len(message) < 400
