"""`import mbib_timm` registers the models with timm, before or after timm is imported, in this process or another."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import timm

import mbib_timm  # noqa: F401 (registers the models)

ROOT = Path(__file__).parents[1]
IMPORTS = {
    "after timm": "import timm; import mbib_timm",
    "by the command, before timm": (
        "from mbib_timm.cli import main; main(['recipes']); assert 'timm' not in sys.modules; import timm"
    ),
    "before a part of timm": "import mbib_timm; from timm.layers import SelectAdaptivePool2d; import timm",
    "after a look for timm": "import mbib_timm; from importlib.util import find_spec; find_spec('timm'); import timm",
    "by the methods, which import timm": "from mbib_timm.methods import METHODS; import timm",
}
CREATE = """
assert timm.is_model("mbib_resnet20")
assert "mbib_resnet32.cifar100_lt_if100" in timm.list_pretrained("mbib_*")
assert type(timm.__loader__) is type(timm.__spec__.loader) is type(timm.models.__loader__)  # as without us
timm.create_model("mbib_resnet20", num_classes=10)
"""


def run(program, content=b""):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", program], input=content, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.slow
@pytest.mark.parametrize("imports", IMPORTS)
def test_the_models_are_registered(imports):
    run(f"import sys\n{IMPORTS[imports]}{CREATE}")


@pytest.mark.slow
def test_a_model_that_was_pickled_brings_all_of_them():
    """As a worker that is spawned gets what it works with; its models, which import timm, come first."""
    content = pickle.dumps(timm.create_model("mbib_resnet20", num_classes=10))
    run(
        "import pickle, sys\npickle.load(sys.stdin.buffer)\nimport timm\nassert timm.is_model('mbib_resnet32')", content
    )
