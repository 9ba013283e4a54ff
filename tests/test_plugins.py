"""Methods from outside: files, modules, installed packages; and what is none, in one line and with nothing written."""

import contextlib
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import torch
import yaml

from mbib_timm.cli import main
from mbib_timm.data import SAMPLERS, DataPool, open_data
from mbib_timm.environment import World
from mbib_timm.errors import MbibError, NonFiniteLossError
from mbib_timm.methods import METHODS
from mbib_timm.models.origin import OwnData, origin_of
from mbib_timm.recipe import find_recipe, load_recipe, plugins
from mbib_timm.recipe.declared import named_models
from mbib_timm.recipe.plugins import code_behind, code_of, imported_code, load_plugin, moved_plugin, renew_plugin
from mbib_timm.results.record import read_history
from mbib_timm.sweeps.sweep import find_sweep
from mbib_timm.sweeps.sweep_plan import plan
from mbib_timm.training import train
from mbib_timm.training.provenance import inputs_of
from mbib_timm.training.setup import set_up

TOY = Path(__file__).parent / "toy_method.py"
DOCUMENTATION = Path(__file__).parents[1] / "docs" / "methods.md"
SHORT = ["--epochs", "1", "--warmup-epochs", "0", "--imbalance-max", "24", "--device", "cpu", "--workers", "0"]
METHOD = '''
from mbib_timm.methods import Method, register

@register("{name}")
class Outside(Method):
    """From outside."""
    title = "Outside"

    def head_loss(self, logits, targets):
        return logits.logsumexp(dim=1).sub(logits.gather(1, targets[:, None]).squeeze(1)).mean()
'''


SAMPLER = """
from mbib_timm.data import sampler

@sampler("{0}")
def {0}(counts, progress, number):
    return counts
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write plugins; what they register is forgotten afterwards."""
    before, loaded = set(METHODS), dict(plugins._loaded)
    monkeypatch.syspath_prepend(str(tmp_path))

    def text(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        return path

    yield text
    for name in set(METHODS) - before:
        METHODS.remove(name)
    plugins._loaded.clear()
    plugins._loaded.update(loaded)


# A file, a module


def test_a_file_brings_a_method_whose_settings_are_flags(tmp_path, capsys):
    flags = ["--plugin", str(TOY), "--method", "toy", "--method.strength", "0.5", *SHORT, "--output", str(tmp_path)]
    assert main(["train", "cifar_resnet20.ce_digits", *flags, "--experiment", "run"]) == 0
    recipe = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert recipe["method"] == {"name": "toy", "strength": 0.5}
    assert recipe["plugin"] == [str(TOY)]  # found from anywhere
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["method"] == "toy"
    with pytest.raises(SystemExit):
        main(["train", "cifar_resnet20.ce_digits", *flags, "--help"])
    out = capsys.readouterr().out
    assert "method: toy (Toy):" in out
    assert "the flag takes one, and is repeated for several" in " ".join(out.split())
    assert re.search(r"--method\.strength FLOAT\s+share of log n that is added in the last epoch \[0\.5\]", out)


def test_a_relative_path_is_found_from_anywhere(write, tmp_path, monkeypatch):
    write("here/mine.py", METHOD.format(name="mine"))
    monkeypatch.chdir(tmp_path / "here")
    recipe = load_recipe(write("own.yaml", "model: cifar_resnet20\nplugin: [mine.py]\nmethod: mine\n"))
    assert recipe.plugin == [str(tmp_path / "here" / "mine.py")]
    assert recipe.replace(seed=3).method == {"name": "mine"}


def test_a_module_brings_a_method_and_so_does_a_package(write):
    write("a_module_of_methods.py", METHOD.format(name="of_module"))
    write("a_package_of_methods/__init__.py", "from . import inner")
    write("a_package_of_methods/inner.py", METHOD.format(name="of_package"))
    assert load_plugin("a_module_of_methods") == "a_module_of_methods"
    assert load_plugin("a_package_of_methods") == "a_package_of_methods"
    assert {"of_module", "of_package"} <= set(METHODS)


def test_a_plugin_is_imported_once_whatever_it_is_called(write, tmp_path, monkeypatch):
    path = write("counted.py", "import builtins\nbuiltins.counted = getattr(builtins, 'counted', 0) + 1\n"
                 + METHOD.format(name="counted"))  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert load_plugin("counted.py") == load_plugin(str(path)) == load_plugin("./counted.py") == str(path)
    import builtins

    assert builtins.counted == 1
    del builtins.counted


def test_another_plugin_takes_the_place_of_the_files_own(write, tmp_path):
    """Also where the file's own is not there, or registers the same."""
    recipe = write("own.yaml", "model: cifar_resnet20\nplugin: [not_here.py]\nmethod: replaced\n")
    path = write("new/replaced.py", METHOD.format(name="replaced"))
    with pytest.raises(MbibError, match=r"not_here\.py: there is no such file"):
        load_recipe(recipe)
    assert load_recipe(recipe, {"plugin": [str(path)]}).plugin == [str(path)]
    old = write("old/replaced.py", METHOD.format(name="replaced"))
    recipe = write("own.yaml", f"model: cifar_resnet20\nplugin: ['{old}']\nmethod: replaced\n")
    assert load_recipe(recipe, {"plugin": [str(path)]}).plugin == [str(path)]


@pytest.mark.parametrize("broken", ["def f(:\n", "x = (1,\n", "  x = 1\n"])
def test_a_half_edited_plugin_does_not_train_as_it_was(write, tmp_path, broken):
    path = write("half_edited.py", METHOD.format(name="half_edited"))
    short_recipe(tmp_path, path, "half_edited")
    write("half_edited.py", METHOD.format(name="half_edited") + broken)
    with pytest.raises(MbibError, match=r"half_edited\.py cannot be imported: (Syntax|Indentation)Error"):
        short_recipe(tmp_path, path, "half_edited")
    write("half_edited.py", METHOD.format(name="half_edited"))
    short_recipe(tmp_path, path, "half_edited")


def test_plugins_that_failed_load_once_they_are_mended(write):
    """Modules that registered a sampler alone, and packages one of whose parts failed."""
    for name, sampler in (("alone.py", "of_file"), ("alone_as_module.py", "of_module")):
        path = write(name, SAMPLER.format(sampler))
        plugin = str(path) if sampler == "of_file" else "alone_as_module"
        with pytest.raises(MbibError, match="registers no method"):
            load_plugin(plugin)
        assert sampler not in SAMPLERS
        write(name, SAMPLER.format(sampler) + METHOD.format(name=f"method_{sampler}"))
        load_plugin(plugin)
        assert sampler in SAMPLERS
    write("half_a_package/__init__.py", "from . import a, b")
    write("half_a_package/a.py", METHOD.format(name="part_a"))
    write("half_a_package/b.py", "1 / 0")
    with pytest.raises(MbibError, match="ZeroDivisionError"):
        load_plugin("half_a_package")
    assert "part_a" not in METHODS
    write("half_a_package/b.py", METHOD.format(name="part_b") + "x = 1\n")
    load_plugin("half_a_package")
    assert {"part_a", "part_b"} <= set(METHODS)


def test_a_module_that_is_no_plugin_stays_imported():
    before = sys.modules["json"]
    with pytest.raises(MbibError, match="registers no method"):
        load_plugin("json")
    assert sys.modules["json"] is before


def test_plugins_inside_a_renewed_package_are_imported_again(write):
    write("outer/__init__.py", METHOD.format(name="outer"))
    write("outer/extra.py", METHOD.format(name="extra"))
    for plugin in ("outer", "outer.extra"):
        load_plugin(plugin)
    write("outer/__init__.py", METHOD.format(name="outer") + "x = 1\n")
    for plugin in ("outer", "outer.extra"):
        renew_plugin(plugin)
        load_plugin(plugin)
    assert {"outer", "extra"} <= set(METHODS)


def test_a_copied_plugin_takes_the_place_of_the_one_that_a_run_names(write):
    old, new = (write(f"{folder}/copied.py", METHOD.format(name="copied")) for folder in ("old", "new"))
    assert moved_plugin(str(old)) == str(old)
    load_plugin(str(new))
    assert moved_plugin(str(old)) == str(new)
    write("old/copied.py", METHOD.format(name="copied") + "x = 1\n")
    assert moved_plugin(str(old)) == str(old), "other code"


def test_a_plugins_sampler_serves_a_recipe(write, tmp_path):
    path = write("drawn.py", SAMPLER.format("cube_root") + METHOD.format(name="drawn"))
    keys = dict(base="digits", model="cifar_resnet20", plugin=[str(path)], method="drawn", sampler="cube_root")
    keys |= dict(epochs=1, warmup_epochs=0, imbalance_max=24, device="cpu", workers=0, output=str(tmp_path / "runs"))
    trained = train(load_recipe(write("own.yaml", yaml.safe_dump(keys))), "run")
    assert trained.record.method == "drawn"
    SAMPLERS.remove("cube_root")


# What is no plugin


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("import no_such_library\n", r"cannot be imported: ModuleNotFoundError: No module named 'no_such_library'"),
        ("def broken(:\n", r"cannot be imported: SyntaxError: "),
        ("1 / 0\n", r"cannot be imported: ZeroDivisionError: division by zero \(plugin\.py, line 1\)"),
        ("raise SystemExit(0)\n", r"cannot be imported: SystemExit: 0"),
        (METHOD.format(name="half") + "\nraise ValueError('first line\\nsecond line')\n", r"ValueError: first line"),
        ("x = 1\n", r"registers no method: expected a class under @register\('name'\)"),
        ("", r"registers no method"),
        ("from mbib_timm.methods.ce import CrossEntropy\n", r"registers no method"),
        (METHOD.format(name="mbib"), r"'mbib' is registered already, by mbib_timm\.methods\.mbib: choose another name"),
        (METHOD.format(name="twice") * 2, r"'twice' is registered already, by .*plugin\.py: give one of them another"),
        ("from mbib_timm.methods import register\n@register('function')\ndef f(): pass\n", r"expected a subclass of"),
    ],
    ids=lambda value: value[:30] if value.startswith(("r'", "does", "reg")) else None,
)  # fmt: skip
def test_what_is_no_plugin_is_an_error_of_one_line(write, tmp_path, capsys, content, message):
    path, before = write("plugin.py", content), set(METHODS)
    status = main(["train", "mbib_resnet20.digits", "--plugin", str(path), "--output", str(tmp_path / "runs")])
    error = capsys.readouterr().err
    assert status == 2
    assert error.startswith(f"mbib: error: plugin {path} ")
    assert error.count("\n") == 1
    assert re.search(message, error)
    assert set(METHODS) == before  # nothing half-registered
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        ("no/such/file.py", "plugin no/such/file.py: there is no such file"),
        ("no_such_module", "plugin no_such_module cannot be imported: ModuleNotFoundError"),
        ("json", "plugin json registers no method"),
        ("", "plugin"),
        (".", "plugin .: expected a file whose name ends in .py, or the name of a module"),
    ],
)
def test_plugins_that_do_not_exist(tmp_path, capsys, plugin, message):
    assert main(["train", "--plugin", plugin, "--output", str(tmp_path / "runs")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_slip_in_a_plugins_name_is_answered_with_the_file_beside(write, tmp_path, monkeypatch):
    write("focal_of_mine.py", METHOD.format(name="beside"))
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each not in ("", str(tmp_path))])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MbibError, match=r"No module named 'focal_of_mine'; did you mean 'focal_of_mine\.py'\?"):
        load_plugin("focal_of_mine")
    with pytest.raises(MbibError, match=r"there is no such file; did you mean 'focal_of_mine\.py'\?"):
        load_plugin("fokal_of_mine.py")


@pytest.mark.parametrize("flags", [[], ["--epochs", "1"]])
def test_the_code_of_a_plugin_that_does_not_import_runs_once(write, capsys, flags):
    write("noisy.py", "print('imported')\n1 / 0\n")
    recipe = write("own.yaml", "model: cifar_resnet20\nplugin: [noisy.py]\nmethod: noisy\n")
    assert main(["train", str(recipe), *flags]) == 2
    said = capsys.readouterr()
    assert said.out.count("imported") == 1
    assert said.err.startswith(f"mbib: error: own.yaml: plugin {recipe.parent / 'noisy.py'} cannot be imported: Zero")


def short_recipe(tmp_path, path, name, **keys):
    keys = dict(plugin=[str(path)], method=name, epochs=1, warmup_epochs=0, imbalance_max=24, device="cpu", workers=0,
                output=str(tmp_path / "runs"), **keys)  # fmt: skip
    return load_recipe(find_recipe("cifar_resnet20.ce_digits"), keys)


def test_an_edited_plugin_is_imported_anew_and_a_run_records_what_ran(write, tmp_path, capsys):
    text = METHOD.format(name="edited")
    path = write("edited.py", text)
    digests = [code_of(str(path))]
    first, early = train(short_recipe(tmp_path, path, "edited"), "first"), short_recipe(tmp_path, path, "edited")
    write("edited.py", text.replace("return logits", "return 0 * logits"))
    digests.append(code_of(str(path)))
    # A recipe that was read before the change trains with the earlier code.
    capsys.readouterr()
    runs = [first, train(early, "early")]
    said = "warning: edited.py has changed since it was imported; this trains with the earlier code"
    assert said in capsys.readouterr().out
    runs.append(train(short_recipe(tmp_path, path, "edited"), "later"))
    assert "since it was imported" not in capsys.readouterr().out
    assert [run.record.inputs[0].plugins["edited.py"] for run in runs] == [digests[0], digests[0], digests[1]]
    losses = [read_history(run.folder)[-1].losses["loss"] for run in runs]
    assert losses[0] == losses[1] > 0
    assert losses[2] == 0
    assert digests[0] != digests[1]


def test_what_a_plugin_had_registered_is_forgotten_with_its_code(write, tmp_path):
    path = write("renewed.py", SAMPLER.format("as_before") + METHOD.format(name="renewed"))
    load_plugin(str(path))
    before = METHODS["renewed"]
    renew_plugin(str(path))
    assert METHODS["renewed"] is before, "nothing has changed"
    write("renewed.py", SAMPLER.format("as_now") + METHOD.format(name="renewed"))
    load_plugin(str(path))
    assert METHODS["renewed"] is before, "once, unless it is to be renewed"
    renew_plugin(str(path))
    assert METHODS["renewed"] is not before
    assert {"as_before", "as_now"} & set(SAMPLERS) == {"as_now"}
    write("renewed.py", SAMPLER.format("half") + METHOD.format(name="renewed") + "1 / 0\n")
    with pytest.raises(MbibError, match="ZeroDivisionError"):
        renew_plugin(str(path))
    assert {"as_now", "half"} & set(SAMPLERS) == set()
    assert "renewed" not in METHODS
    write("a_module_to_renew.py", METHOD.format(name="module_before"))
    load_plugin("a_module_to_renew")
    write("a_module_to_renew.py", METHOD.format(name="another_name"))
    renew_plugin("a_module_to_renew")
    assert {"module_before", "another_name"} & set(METHODS) == {"another_name"}


def test_what_others_have_registered_stays(write, tmp_path):
    """Also what a plugin was the first to import."""
    write("a_helper_of_mine.py", SAMPLER.format("of_helper"))
    path = write("helped.py", "import a_helper_of_mine\n" + METHOD.format(name="helped"))
    load_plugin(str(path))
    for more in ("x = 1\n", "1 / 0\n"):
        write("helped.py", "import a_helper_of_mine\n" + METHOD.format(name="helped") + more)
        with contextlib.suppress(MbibError):
            renew_plugin(str(path))
        assert "of_helper" in SAMPLERS
    script = (
        "import pathlib\nfrom mbib_timm.recipe.plugins import load_plugin, renew_plugin\n"
        "path = pathlib.Path('helped.py')\ntext = path.read_text().replace('1 / 0', '')\n"
        "for more in ('', 'x = 2'):\n    path.write_text(text + more)\n"
        "    renew_plugin('helped.py')\n    load_plugin('helped.py')\n"
        "from mbib_timm.data import SAMPLERS\nfrom mbib_timm.methods import METHODS\n"
        "print('instance' in SAMPLERS, 'mbib' in METHODS, 'helped' in METHODS)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), str(tmp_path)])}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout == "True True True\n", done.stderr


def test_a_module_that_was_imported_before_is_imported_as_its_file_is_now(write):
    """Not where its file is older than this package's import: then it is what was imported."""
    path = write("imported_before.py", METHOD.format(name="imported_before"))
    importlib.import_module("imported_before")
    before = METHODS["imported_before"]
    os.utime(path, (1e9, 1e9))
    load_plugin("imported_before")
    assert METHODS["imported_before"] is before
    del plugins._loaded["imported_before"]
    write("package_before/inner.py", METHOD.format(name="inner_before"))
    os.utime(write("package_before/__init__.py", "from . import inner"), (1e9, 1e9))
    importlib.import_module("package_before")
    inner = METHODS["inner_before"]
    load_plugin("package_before")
    assert METHODS["inner_before"] is not inner, "a file of the package may have changed"
    path = write("imported_before.py", METHOD.format(name="imported_before") + "\nx = 1\n")
    load_plugin("imported_before")
    assert METHODS["imported_before"] is not before
    assert imported_code("imported_before") == code_of(str(path))


def test_an_override_is_of_the_settings_that_are_in_the_file_now(write, tmp_path):
    more = "@dataclass(frozen=True)\n    class Settings:\n        beta: float = option({0}, 'b')\n        weights: list[float] = option([1.0, 1.0], 'w')"  # noqa: E501
    text = OWN.replace("{name}", "own_defaults").replace("{more}", more)
    path = write("defaults.py", text.replace("{0}", "0.5"))
    assert short_recipe(tmp_path, path, "own_defaults").method["beta"] == 0.5
    write("defaults.py", text.replace("{0}", "0.9"))
    keys = {"plugin": [str(path)], "method": "own_defaults", "method.weights.0": 2.0}
    assert load_recipe(find_recipe("cifar_resnet20.ce_digits"), keys).method["beta"] == 0.9


OWN = """
from dataclasses import dataclass
import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from mbib_timm.methods import Method, option, register

class Wrap(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model, self.project = model, nn.Linear(64, 8)

    def forward(self, images):
        return self.model(images)

@register("{name}")
class Own(Method):
    'Own.'
    title = 'Own'

    def head_loss(self, logits, targets):
        return cross_entropy(logits, targets)

    {more}
"""
MISTAKES = {
    "prior": ("logit_prior = 'unifrom'", "logit_prior: expected train, uniform or None, got 'unifrom'"),
    "evaluated": (
        "build_network = classmethod(lambda cls, settings, build: Wrap(build()))",
        "get_eval_model returns a Wrap, which is not a timm model; expected the part of the network that is",
    ),
    "unwritten": (
        "build_network = classmethod(lambda cls, settings, build: "
        "[model := build(), setattr(model, '_model_args', {'act_layer': nn.ReLU})][0])",
        "cannot be saved: Model argument 'act_layer' is not serializable",
    ),
    "tensor": ("forward = lambda self, batch: self.trainable_module(batch.images).mean()", "got a Tensor"),
    "named": ("loss = lambda self, logits, targets: {'los': logits['logits'].mean()}", "among them, got 'los'"),
    "nothing": ("head_loss = lambda self, logits, targets: None", "head_loss: expected a scalar tensor, got None"),
    "unreduced": (
        "head_loss = lambda self, logits, targets: cross_entropy(logits, targets, reduction='none')",
        "head_loss: expected a scalar tensor, got one of shape (32,)",
    ),
    "number": ("loss = lambda self, logits, targets: {'loss': logits['logits'].mean(), 'a': 0.3}", "got 0.3 for 'a'"),
    "vector": (
        "loss = lambda self, logits, targets: {'loss': logits['logits'].mean(dim=1)}",
        "'loss' among them, got one of shape (32,) for 'loss'",
    ),
    "nameless": (
        "trainable_parameters = lambda self: [*self.trainable_module.parameters()]",
        "trainable_parameters(): expected pairs of a name and a parameter, as named_parameters() gives them, got a Par",
    ),
    "mapping": ("trainable_parameters = lambda self: dict(self.named_parameters())", "them, got a str"),
    "none_train": ("trainable_parameters = lambda self: None", "them, got a NoneType"),
    "late": (
        "head_loss = lambda self, logits, targets: [setattr(self, 'late', nn.Parameter(logits.mean().detach())), "
        "cross_entropy(logits, targets)][1]",
        "late: parameters that were made after training began, and that nothing updates; make them in __init__",
    ),
    "nan": ("report = lambda self: {'a': float('nan')}", "report(): expected finite numbers by name, got {'a': nan}"),
    "list": ("report = lambda self: [1.0]", "report(): expected finite numbers by name, got [1.0]"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_of_a_method_are_said_in_a_line(write, tmp_path, mistake):
    more, message = MISTAKES[mistake]
    path = write(f"{mistake}.py", OWN.replace("{name}", f"own_{mistake}").replace("{more}", more))
    recipe = short_recipe(tmp_path, path, f"own_{mistake}", imbalance_factor=4)
    with pytest.raises(MbibError, match=re.escape(message)):
        train(recipe, "run")
    if mistake in ("prior", "evaluated", "unwritten"):
        assert not (tmp_path / "runs").exists(), "before anything is trained"


def test_a_command_is_given_again_once_its_plugin_is_mended(write, tmp_path, capsys):
    """Of a name that nothing defines, the method, the file and the line are said; the run has taken no step."""
    text = OWN.replace("{name}", "slip").replace("{more}", "")
    path = write("slip.py", text.replace("cross_entropy(logits", "cross_entrpy(logits"))
    line = next(i for i, each in enumerate(path.read_text().splitlines(), start=1) if "entrpy" in each)
    command = ["train", "cifar_resnet20.ce_digits", "--plugin", str(path), "--method", "slip", *SHORT]
    command += ["--output", str(tmp_path / "runs"), "--experiment", "run"]
    assert main(command) == 2
    said = f"mbib: error: method 'slip': name 'cross_entrpy' is not defined ({path}, line {line})\n"
    assert capsys.readouterr().err == said
    left = {file.name for file in (tmp_path / "runs" / "run").iterdir()} - {".lock"}
    assert left == set()
    write("slip.py", text)
    assert main([*command, "--lr", "0.01"]) == 0
    assert main([*command, "--lr", "0.01"]) == 2
    assert "already holds a run" in capsys.readouterr().err


def test_a_network_around_the_model_is_not_taken_for_a_wrong_size(write, tmp_path):
    more = (
        "build_network = classmethod(lambda cls, settings, build: Faulty(build()))\n\n"
        "    def get_eval_model(self, module=None, ema=False):\n"
        "        return super().get_eval_model(module, ema).model"
    )
    faulty = "class Faulty(Wrap):\n    def forward(self, images):\n        return {}['mine']\n\n\n@register"
    text = OWN.replace("@register", faulty).replace("{name}", "faulty").replace("{more}", more)
    recipe = short_recipe(tmp_path, write("faulty.py", text), "faulty", imbalance_factor=4)
    with pytest.raises(KeyError, match="mine"):
        train(recipe.replace(img_size=28), "run")


MISFITS = {
    "bare": (
        "@dataclass(frozen=True)\n    class Settings:\n        power: float = 1.0",
        "its Settings must be a frozen dataclass of option() fields",
    ),
    "finish": ("def finish(self): pass", "finish(self): expected finish(self, data)"),
    "epoch": ("def start_epoch(self): pass", "start_epoch(self): expected start_epoch(self, epoch)"),
    "step": ("def after_step(self, step): pass", "after_step(self, step): expected after_step(self)"),
    "selfless": ("def report(): pass", "report(): expected report(self)"),
    "value": ("report = 3", "report: expected a function, got 3"),
    "init": (
        "def __init__(self, network): pass",
        "__init__(self, network): expected __init__(self, network, settings, ",
    ),
    "forward": ("def forward(self): pass", "forward(self): expected forward(self, *batches)"),
    "three": ("def forward(self, a, b, c): pass", "forward(self, a, b, c): expected forward(self, *batches)"),
    "average": (
        "def get_eval_model(self, module): pass",
        "get_eval_model(self, module): expected get_eval_model(self, module=None, ema=False)",
    ),
    "class": (
        "def build_network(cls, settings, build): pass",
        "build_network(cls, settings, build): expected a classmethod build_network(cls, settings, build)",
    ),
    "thawed": (
        "@dataclass\n    class Settings:\n        power: float = option(1.0, 'of n')",
        "its Settings must be a frozen dataclass of option() fields",
    ),
    "built": (
        "@dataclass(frozen=True)\n    class S:\n        power: float = option(1.0, 'of n')\n    Settings = S()",
        "its Settings must be a frozen dataclass of option() fields",
    ),
    "titled": ("title = 3", "title: expected a text, got 3"),
    "sampler": ("sampler = ['balanced']", "sampler: expected str, got ['balanced']"),
    "part": ("part = None", "part: expected str, got None"),
    "reset": ("reset = '(classifier'", "reset: '(classifier' is not a regular expression"),
    "start": ("classifier_start = 'means'", "unknown value of classifier_start 'means': did you mean 'class_means'?"),
    "frozen": ("frozen_bn = 'evl'", "unknown value of frozen_bn 'evl': did you mean 'eval'?"),
    "views": ("views = {}", "views: expected a tuple with a mapping for each view of an image, as in ({}, {}), got {}"),
    "view": ("views = ({}, {'rotatoin': 15})", "unknown key of view 2 'rotatoin': did you mean 'rotation'"),
    "rotated": ("views = ({'rotation': 'far'},)", "views: rotation: expected float, got 'far'"),
    "name": (
        "@dataclass(frozen=True)\n    class Settings:\n        name: str = option('a', 'of it')",
        "a setting cannot be called 'name': in a recipe, that is the method's name",
    ),
}


SETTING = "@dataclass(frozen=True)\n    class Settings:\n        power: "
UNUSABLE = {
    "tuple[int, ...] = option((1, 2), 'of n')": "expected the type float, int, .* these | None; got tuple[int, ...]",
    "tuple = option((1, 2), 'of n')": "got tuple",
    "list = option([1], 'of n')": "got list",
    "int | float = option(1, 'of n')": "got int | float",
    "'Nowhere' = option(1, 'of n')": "its types cannot be read: name 'Nowhere' is not defined",
    "float = option(None, 'of n')": "default: expected float, got None",
    "int = option(0, 'of n', minimum=1)": "default: expected at least 1, got 0",
    "list[int] = option([3, 0], 'of n', minimum=1)": "default: expected at least 1, got 0",
}


@pytest.mark.parametrize("declared", UNUSABLE)
def test_settings_that_no_recipe_can_have_are_refused_when_they_are_registered(write, declared):
    path = write("unusable.py", OWN.replace("{name}", "unusable").replace("{more}", SETTING + declared))
    message = re.escape(UNUSABLE[declared]).replace(re.escape(".*"), ".*")
    with pytest.raises(MbibError, match=f"method 'unusable': setting '(power|Settings)': .*{message}$"):
        load_plugin(str(path))
    assert "unusable" not in METHODS


@pytest.mark.parametrize("kind", ["Optional[float]", "Union[None, float]", "float | None", "None | float"])
def test_a_setting_may_be_left_out_however_that_is_written(write, tmp_path, kind):
    name = f"optional{re.sub(r'[^a-z]', '', kind.lower())}"
    declared = f"{SETTING}{kind} = option(None, 'of n')"
    text = OWN.replace("{name}", name).replace("{more}", declared)
    path = write(f"{name}.py", f"from typing import Optional, Union\n{text}")
    assert short_recipe(tmp_path, path, name).method["power"] is None
    keys = {"plugin": [str(path)], "method": name, "method.power": 2}
    assert load_recipe(find_recipe("cifar_resnet20.ce_digits"), keys).method["power"] == 2.0


@pytest.mark.parametrize("misfit", MISFITS)
def test_what_cannot_be_used_as_a_method_is_refused_when_it_is_registered(write, misfit):
    more, message = MISFITS[misfit]
    path = write("misfit.py", OWN.replace("{name}", "misfit").replace("{more}", more))
    with pytest.raises(MbibError, match=re.escape(f"method 'misfit': {message}")):
        load_plugin(str(path))
    assert "misfit" not in METHODS


@pytest.mark.parametrize(
    "more",
    [
        "def __init__(self, *args, power=1): super().__init__(*args)",
        "def __init__(self, network, *args, **kwargs): super().__init__(network, *args, **kwargs)",
        "finish = lambda self, *data: None",
        "@torch.no_grad()\n    def finish(self, passes, again=False): pass",
        "after_step = staticmethod(lambda: None)",
        "def forward(self, first, second): pass",
        "def get_eval_model(self, module=None, *, ema=False): pass",
        "def get_clip_parameters(self, **kwargs): pass",
        "build_network = staticmethod(lambda settings, build: build())",
        "sampler, views, frozen_bn = 'of_mine:2', [{'rotation': 15}], None",
        "finish = dict.fromkeys",  # of C: Python does not know what it takes
    ],
)
def test_what_can_be_called_as_it_will_be_is_registered(write, more):
    load_plugin(str(write("fitting.py", OWN.replace("{name}", "fitting").replace("{more}", more))))
    assert "fitting" in METHODS


def test_a_sampler_that_no_plugin_registers_is_said_of_the_method(write, tmp_path):
    path = write("drawing.py", OWN.replace("{name}", "drawing").replace("{more}", "sampler = 'balancd'"))
    with pytest.raises(MbibError, match=r"^method 'drawing': unknown sampler 'balancd': did you mean 'balanced'"):
        short_recipe(tmp_path, path, "drawing")


def test_a_moving_average_that_is_not_evaluated_is_refused(write, tmp_path):
    """Of a method that looks in its network whatever is asked for."""
    more = (
        "build_network = classmethod(lambda cls, settings, build: Wrap(build()))\n\n"
        "    def get_eval_model(self, module=None, ema=False):\n        return self.trainable_module.model"
    )
    path = write("unmoved.py", OWN.replace("{name}", "unmoved").replace("{more}", more))
    recipe = short_recipe(tmp_path, path, "unmoved", imbalance_factor=4, model_ema=True)
    message = r"'model_ema': get_eval_model\(ema=True\) of method 'unmoved' returns no part of the moving average"
    with pytest.raises(MbibError, match=message):
        train(recipe, "run")
    assert not (tmp_path / "runs").exists(), "before anything is trained"


NEAR_MISSES = {
    "start_epochs": ("def start_epochs(self, epoch): pass", "calls: did you mean start_epoch?"),
    "after_steps": ("def after_steps(self): pass", "calls: did you mean after_step?"),
    "finnish": ("finnish = staticmethod(lambda data: None)", "calls: did you mean finish?"),
    "Build_Networks": (
        "Build_Networks = classmethod(lambda cls, settings, build: None)",
        "calls: did you mean build_ne",
    ),
    "logit_priors": ("logit_priors = 'uniform'", "reads: did you mean logit_prior?"),
    "settings": ("settings = int", "reads: did you mean Settings?"),
    "Title": ("Title = 'X'", None),  # the class has a title too
    "names": ("names = ('a', 'b')", None),  # what methods may not define is not meant
    "start": ("start = 0", None),
    "_finis": ("def _finis(self): pass", None),
    "start_epoch": ("def start_epoch(self, epoch): pass", None),
    "state_dict": ("def state_dict(self, *args, **kwargs): return super().state_dict(*args, **kwargs)", None),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_a_name_that_looks_misspelt_is_said(write, capsys, name):
    more, message = NEAR_MISSES[name]
    load_plugin(str(write("near.py", OWN.replace("{name}", "near").replace("{more}", more))))
    said = capsys.readouterr()
    expected = "" if message is None else f"warning: method 'near' defines {name}, which the package never {message}"
    assert said.err.count("\n") == (message is not None)
    assert said.err.startswith(expected)
    assert not said.out


def test_finish_runs_again_where_a_finished_run_is_resumed_from_the_weights_that_training_left(write, tmp_path):
    more = (
        "def finish(self, data):\n        weights = [*self.trainable_module.parameters()]\n"
        "        finished.append(sum(each.sum().item() for each in weights))\n"
        "        for each in weights:\n            each.mul_(2)"
    )
    path = write("finishing.py", "finished = []\n" + OWN.replace("{name}", "finishing").replace("{more}", more))
    runs = [
        train(short_recipe(tmp_path, path, "finishing", imbalance_factor=4, resume=resume), "run")
        for resume in (None, "auto")
    ]
    first, second = sys.modules[METHODS["finishing"].__module__].finished
    assert first == second
    assert runs[0].record.result == runs[1].record.result


def test_numbers_of_any_kind_are_reported_and_a_prior_may_be_neither(write, tmp_path):
    more = "logit_prior = None\n\n    def report(self):\n        return dict(a=np.float32(0.5), b=torch.tensor(2))"
    path = write("numbers.py", OWN.replace("{name}", "own_numbers").replace("{more}", more))
    run = train(short_recipe(tmp_path, path, "own_numbers", imbalance_factor=4), "run")
    assert run.record.chosen == {"a": 0.5, "b": 2.0}
    assert "logit_prior" not in json.loads((Path(run.folder) / "config.json").read_text())


def test_weight_decay_spares_a_methods_own_biases_too(write, tmp_path):
    more = "def __init__(self, *args):\n        super().__init__(*args)\n        self.project = nn.Linear(4, 2)"
    path = write("decay.py", OWN.replace("{name}", "own_decay").replace("{more}", more))
    for filtered, expected in ((True, {"weight": 0.01, "bias": 0.0}), (False, {"weight": 0.01, "bias": 0.01})):
        keys = dict(weight_decay=0.01, filter_bias_and_bn=filtered, imbalance_factor=4)
        recipe = short_recipe(tmp_path, path, "own_decay", **keys)
        setup = set_up(recipe, open_data(recipe), World(torch.device("cpu")))
        named = {id(value): name for name, value in setup.method.project.named_parameters()}
        decays = {
            named[id(each)]: group["weight_decay"]
            for group in setup.optimizer.param_groups
            for each in group["params"]
            if id(each) in named
        }
        assert decays == expected


def test_models_that_any_setting_names_are_recorded(write, tmp_path):
    more = (
        "@dataclass(frozen=True)\n    class Settings:\n        teacher: float = option(0.5, 'a share')\n"
        "        prior_model: str | None = option('none', 'a trained model', place=True)\n"
        "        imitates: list[str] = option([], 'trained models', place=True)"
    )
    path = write("names.py", OWN.replace("{name}", "own_names").replace("{more}", more))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    named = dict(name="own_names", imitates=["mbib_resnet32.cifar100_lt_if100"], prior_model=str(tmp_path / "model"))
    recipe = short_recipe(tmp_path, path, named, imbalance_factor=4)
    assert named_models(recipe.method) == [str(tmp_path / "model"), "mbib_resnet32.cifar100_lt_if100"]
    (given,) = inputs_of(recipe, DataPool())
    assert len(given.teachers) == 1
    origin = origin_of(recipe.replace(method={**named, "prior_model": None}), OwnData())
    assert [weights.name for weights in origin.teachers] == ["mbib_resnet32.cifar100_lt_if100"]


@pytest.mark.slow
def test_a_run_may_move_with_its_plugin(write, tmp_path):
    """`report` and `validate` look for it in the current folder; a run goes on with the one that is given."""
    write("old/moving.py", METHOD.format(name="moving"))
    flags = ["--plugin", "moving.py", "--method", "moving", *SHORT, "--experiment", "run"]
    done = forked.mbib("train", "cifar_resnet20.ce_digits", *flags, folder=tmp_path / "old")
    assert done.returncode == 0, done.stderr
    (tmp_path / "old").rename(tmp_path / "new")
    for command in (["report", "runs/run"], ["validate", "runs/run"]):
        done = forked.mbib(*command, folder=tmp_path / "new")
        assert done.returncode == 0, done.stderr
    (tmp_path / "new/moving.py").rename(tmp_path / "moving.py")
    done = forked.mbib("report", "runs/run", folder=tmp_path / "new")
    assert done.returncode == 2
    assert f"plugin {tmp_path / 'old/moving.py'}: there is no such file" in done.stderr
    more = ["--resume", "auto", "--plugin", "../moving.py", "--epochs", "2"]
    done = forked.mbib("train", "cifar_resnet20.ce_digits", *flags[2:], *more, folder=tmp_path / "new")
    assert done.returncode == 0, done.stderr


def test_a_run_goes_on_with_its_plugin_under_another_name(write, tmp_path, capsys):
    """Also where the old file is there still, and registers the same."""
    text = METHOD.format(name="renamed_file")
    old, new = write("old_name.py", text), write("new_name.py", text)
    train(short_recipe(tmp_path, old, "renamed_file"), "run")
    for epochs in (2, 3):
        plugins._forget(plugins._place(str(old))[1])
        again = short_recipe(tmp_path, new, "renamed_file").replace(epochs=epochs, resume="auto")
        capsys.readouterr()
        assert len(read_history(train(again, "run").folder)) == epochs
        assert "warning" not in capsys.readouterr().out, "the code is the same"
        old.unlink(missing_ok=True)


def test_a_plugin_beside_its_recipe_is_found_and_so_is_a_recipe_beside_its_sweep(write, tmp_path, monkeypatch):
    write("own/mine_beside.py", METHOD.format(name="beside"))
    recipe = write("own/own.yaml", "base: digits\nmodel: cifar_resnet20\nplugin: [mine_beside.py]\nmethod: beside\n")
    sweep = write("own/sweep.yaml", "recipe: own.yaml\naxes: {lr: [0.1, 0.2]}\n")
    monkeypatch.chdir(tmp_path)
    assert load_recipe(recipe).plugin == [str(tmp_path / "own" / "mine_beside.py")]
    assert len(plan(find_sweep([str(sweep)]), {})) == 2
    here = write("mine_beside.py", METHOD.format(name="here"))
    assert load_recipe(recipe, {"method": "here"}).plugin == [str(here)], "the current folder's comes first"
    with pytest.raises(MbibError, match=r"recipe \./not_here\.yaml: there is no such file"):
        find_recipe("./not_here.yaml")


def test_the_code_of_a_package_is_that_of_all_its_files(write):
    write("several/__init__.py", "from . import losses")
    write("several/losses.py", METHOD.format(name="several"))
    load_plugin("several")
    before = METHODS["several"]
    write("several/losses.py", METHOD.format(name="several") + "x = 1\n")
    assert code_of("several") != imported_code("several")
    renew_plugin("several")
    assert METHODS["several"] is not before
    assert code_of("several") == imported_code("several")


def test_the_code_of_an_installed_method_is_recorded(write, tmp_path, capsys):
    """It comes without --plugin."""
    path = write("installed_methods.py", METHOD.format(name="installed"))
    importlib.import_module("installed_methods")
    other = write("other.py", METHOD.format(name="other"))
    own = short_recipe(tmp_path, other, "other").replace(plugin=[], method="installed")
    first = train(own, "run").record.inputs[0].plugins
    assert first == {"installed_methods": code_of(str(path))}
    write("installed_methods.py", METHOD.format(name="installed") + "x = 1\n")
    train(own.replace(epochs=2, resume="auto"), "run")
    assert "warning: installed_methods has changed since" in capsys.readouterr().out
    assert code_behind([], "mbib_timm.methods.mbib") == code_behind([], "__main__") == {}


def test_a_stage_records_the_code_of_those_plugins_that_it_uses(write, tmp_path):
    mine = write("mine.py", SAMPLER.format("drawn_so") + METHOD.format(name="of_mine"))
    based = METHOD.format(name="based").replace("(Method)", "(METHODS['of_mine'])")
    based = write("based.py", based.replace("import Method", "import METHODS"))
    other = write("other.py", METHOD.format(name="of_other"))
    keys = dict(base="digits", model="cifar_resnet20", plugin=[str(mine), str(based), str(other)])
    stages = [
        {"method": "ce"}, {"method": "of_mine"}, {"method": "based"}, {"method": "of_other", "sampler": "drawn_so"}
    ]  # fmt: skip
    recipe = load_recipe(write("stages.yaml", yaml.safe_dump({**keys, "stages": stages})))
    found = [set(given.plugins) for given in inputs_of(recipe, DataPool())]
    assert found == [set(), {"mine.py"}, {"mine.py", "based.py"}, {"mine.py", "other.py"}]
    SAMPLERS.remove("drawn_so")


def test_a_run_whose_plugin_is_gone_says_what_to_do(write, tmp_path):
    recipe = write("run/recipe.yaml", "model: cifar_resnet20\nplugin: [/nowhere/gone.py]\nmethod: gone\n")
    with pytest.raises(MbibError, match=r"plugin /nowhere/gone\.py: there is no such file; if it has moved, run"):
        load_recipe(recipe)


def test_code_that_has_trained_nothing_is_not_recorded(write, tmp_path, capsys):
    text = METHOD.format(name="stopped")
    path = write("stopped.py", text.replace("return logits", "return float('nan') * logits"))
    with pytest.raises(
        NonFiniteLossError, match=r"method 'stopped': the loss is nan before any update: look at its formula and"
    ):
        train(short_recipe(tmp_path, path, "stopped"), "run")
    assert not (tmp_path / "run" / "recipe.yaml").exists()
    assert not [*tmp_path.glob("**/*.ckpt")]
    write("stopped.py", text)
    run = train(short_recipe(tmp_path, path, "stopped").replace(resume="auto"), "run")
    assert run.record.inputs[0].plugins == {"stopped.py": code_of(str(path))}
    assert "has changed since" not in capsys.readouterr().out


def test_two_plugins_of_one_name(write, tmp_path, capsys):
    first, second = (write(f"{name}.py", METHOD.format(name="same")) for name in ("first", "second"))
    flags = ["--plugin", str(first), "--plugin", str(second), "--output", str(tmp_path / "runs")]
    assert main(["train", *flags]) == 2
    error = capsys.readouterr().err
    assert f"plugin {second} cannot be imported: method 'same' is registered already, by {first}: give one of" in error
    assert error.endswith("another name, or restart Python\n")
    assert not (tmp_path / "runs").exists()


# An installed package


def install(folder, group_line, content, name="outside"):
    """Write a distribution as an installer leaves it."""
    (folder / f"{name}_of_methods.py").write_text(content)
    info = folder / f"{name}_of_methods-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-of-methods\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[mbib_timm.methods]\n{group_line}\n")


@pytest.mark.slow
def test_an_installed_package_makes_its_methods_known_by_itself(tmp_path):
    site = tmp_path / "site"
    site.mkdir()
    install(site, "outside = outside_of_methods", METHOD.format(name="outside"))
    install(site, "broken = broken_of_methods", "import no_such_library\n", name="broken")
    install(site, "taken = taken_of_methods", METHOD.format(name="focal"), name="taken")
    flags = ["train", "cifar_resnet20.ce_digits", "--method", "outside", *SHORT]
    train = [*flags, "--output", str(tmp_path / "runs"), "--experiment", "run"]
    program = f"from mbib_timm.cli import main\nassert main({train}) == 0\nprint('---')\nmain(['methods'])"
    paths = [str(Path(__file__).parents[1]), str(site), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "runs" / "run" / "metrics.json").read_text())["method"] == "outside"
    lines = {line.partition(" ")[0]: line for line in done.stdout.rpartition("---\n")[2].splitlines()}
    assert "outside" in lines
    # A broken package stops nobody; it is named.
    assert "methods of broken_of_methods cannot be loaded: ModuleNotFoundError" in done.stderr
    # So is one that takes the name of another method, and passed over.
    assert "method 'focal' is registered already" in done.stderr
    assert "Lin et al." in lines["focal"]
    # Without it the name is unknown; a method of one's own name is not hidden by a package's.
    unknown = forked.mbib(*flags, "--output", str(tmp_path / "other"), folder=tmp_path)
    assert unknown.returncode == 2
    assert unknown.stderr.startswith("mbib: error: unknown method 'outside'")
    assert not (tmp_path / "other").exists()


# The documented one


def documented():
    """The complete method and the recipe that the documentation shows, by file name."""
    if not DOCUMENTATION.is_file():
        pytest.skip("no documentation beside the tests")
    text = DOCUMENTATION.read_text(encoding="utf-8")
    blocks = dict(zip(("python", "yaml"), re.findall(r"```(?:python|yaml)\n(.*?)```", text, re.DOTALL), strict=False))
    return {"tempered.py": blocks["python"], "tempered.yaml": blocks["yaml"]}


@pytest.mark.slow
def test_the_documented_method_is_short_and_trains_in_two_stages(tmp_path):
    files = documented()
    assert len(files["tempered.py"].splitlines()) <= 30
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    flags = ["--stage1.epochs", "1", "--stage1.warmup_epochs", "0", "--stage2.epochs", "1", "--imbalance-max", "24"]
    flags += ["--stage2.warmup-epochs", "0", "--device", "cpu", "--output", "runs", "--experiment", "run"]
    done = forked.mbib("train", "tempered.yaml", *flags, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "runs" / "run" / "metrics.json").read_text())
    assert metrics["stages"] == ["tempered", "crt"]
    shown = forked.mbib("train", "tempered.yaml", "--help", folder=tmp_path)
    assert "stage1.method: tempered (Tempered LA):" in shown.stdout
    assert "--stage1.method.warm-up FLOAT" in shown.stdout


@pytest.mark.slow
def test_the_documented_method_passes_the_contract_of_methods(tmp_path):
    (tmp_path / "tempered.py").write_text(documented()["tempered.py"])
    contract = Path(__file__).parent / "test_methods.py"
    options = ["--plugin", "tempered.py", "-k", "tempered", "-p", "no:cacheprovider", "-c", os.devnull]

    def work():
        sys.modules.pop("test_methods", None)  # which lists the methods that there are
        return pytest.main([str(contract), *options])

    done = forked.run(work, tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed
    assert int(passed[1]) >= 9


@pytest.mark.parametrize("commands", [re.findall(r"```sh\n(.*?)```", DOCUMENTATION.read_text("utf-8"), re.DOTALL)[0]])
def test_every_documented_command_is_one(tmp_path, monkeypatch, commands):
    """Parsed and its recipe read, without training."""
    from mbib_timm.cli import parse
    from mbib_timm.flags import recipe_overrides
    from mbib_timm.recipe import find_recipe

    for name, content in documented().items():
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    before = set(METHODS)
    for line in commands.splitlines():
        words = line.partition("#")[0].split()
        if words[:2] == ["mbib", "train"] and "--help" not in words:
            arguments = parse(words[1:])
            load_recipe(find_recipe(arguments.recipe), recipe_overrides(arguments))
        elif words[0] == "mbib" and "--help" not in words:
            parse(words[1:])
    for name in set(METHODS) - before:
        METHODS.remove(name)
