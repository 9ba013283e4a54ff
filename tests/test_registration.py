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


PICKLED = "import pickle; pickle.loads(content); import timm; assert timm.is_model('mbib_resnet32')"
# Each in a process in which torch alone is imported, which takes longer than all else.
EACH = """
import os, pickle, sys, traceback
import torch, torchvision
content, programs = pickle.load(sys.stdin.buffer)
for name, program in programs.items():
    if os.fork() == 0:
        try:
            exec(program, {"sys": sys, "content": content})
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.wait()[1] == 0, name
"""


@pytest.mark.slow
def test_the_models_are_registered():
    """Also by a model that was pickled, as a worker that is spawned gets what it works with: its models come first."""
    content = pickle.dumps(timm.create_model("mbib_resnet20", num_classes=10))
    programs = {**{name: imports + CREATE for name, imports in IMPORTS.items()}, "pickled": PICKLED}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-c", EACH], input=pickle.dumps((content, programs)), env=environment, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
