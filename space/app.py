"""The demo of mbib_timm as a Space: the page of the model that the variable `MBIB_MODEL` names.

Gradio takes the address and the port from the variables that a Space sets, and without them stays on this machine.
"""

import os

from mbib_timm.inference.demo import LARGEST_UPLOAD_BYTES, build_page

demo = build_page(os.environ.get("MBIB_MODEL", "mbib_resnet32.strong_cifar100_lt_if100"))
demo.launch(max_file_size=LARGEST_UPLOAD_BYTES)
