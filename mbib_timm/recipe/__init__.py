"""The recipe: every setting of a run, typed and checked: data, model, method, optimisation, machine.

A recipe is a YAML file whose keys are the fields of `Recipe`, named as in timm's train.py where timm has the flag.
Every key is also a flag of `mbib train`. What a file leaves out keeps its default; what it should not hold is refused,
with the nearest valid key. Three keys are more than values:

```yaml
base: cifar100_lt                       # another file, whose keys hold where this one has none of its own
model: cifar_resnet32
method: {name: bsce}                    # with settings of its own, checked by the method
stages:                                 # runs one after another, each from the weights of the one before
  - {method: ce}                        # a stage's keys win over those outside
  - {method: crt, epochs: 30, lr: 0.1}
```

Nothing here imports torch or timm, unless a plugin does: the command line answers at once.
"""

from mbib_timm.recipe.checks import WHOLE_IMAGES, check_given
from mbib_timm.recipe.keys import (
    COMPUTING,
    DATA_KEYS,
    DATA_PLACES,
    KEYS,
    MODEL_KEYS,
    OPENED_BY,
    STAGES,
    TYPES,
    LoraSettings,
    Recipe,
    check_key,
    in_proportion,
    longest_epochs,
)
from mbib_timm.recipe.recipe_files import (
    BASE,
    DEFAULT_RECIPE,
    FOR_PHOTOGRAPHS,
    FOR_SMALL_IMAGES,
    asks_for_epochs,
    change_recipe,
    data_of,
    dump_recipe,
    find_recipe,
    list_recipes,
    list_sweeps,
    load_recipe,
    packaged_recipes,
    prepare_run,
    read_recipe,
    recipe_name,
    recipes_folder,
    train_command,
)

__all__ = [
    "BASE",
    "COMPUTING",
    "DATA_KEYS",
    "DATA_PLACES",
    "DEFAULT_RECIPE",
    "FOR_PHOTOGRAPHS",
    "FOR_SMALL_IMAGES",
    "KEYS",
    "MODEL_KEYS",
    "OPENED_BY",
    "STAGES",
    "TYPES",
    "WHOLE_IMAGES",
    "LoraSettings",
    "Recipe",
    "asks_for_epochs",
    "change_recipe",
    "check_given",
    "check_key",
    "data_of",
    "dump_recipe",
    "find_recipe",
    "in_proportion",
    "list_recipes",
    "list_sweeps",
    "load_recipe",
    "longest_epochs",
    "packaged_recipes",
    "prepare_run",
    "read_recipe",
    "recipe_name",
    "recipes_folder",
    "train_command",
]
