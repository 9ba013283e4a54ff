"""Recipe files: finding them by name, reading them with their base and stages, changing and writing them."""

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from shlex import quote
from typing import Any

import yaml

from mbib_timm.errors import MbibError, few, nearest, shown, unknown_name
from mbib_timm.files import counted, read_yaml
from mbib_timm.options import default_of, without_none
from mbib_timm.recipe.checks import KEYS_OF_SOURCES, TABLE_KEYS, check_given
from mbib_timm.recipe.declared import known_methods, resolve_settings
from mbib_timm.recipe.keys import KEYS, STAGES, TYPES, Recipe, require_key
from mbib_timm.recipe.plugins import load_plugin, moved_plugin, renew_plugin

DEFAULT_RECIPE = "mbib_resnet20.digits"
BASE = "base"
RUN_RECIPE = "recipe.yaml"  # what a run leaves in its folder
MOST_STAGES = 20
# For images of one's own: of about 32 pixels; and photographs, the quickest first.
FOR_SMALL_IMAGES = "finetune/mbib_resnet32"
FOR_PHOTOGRAPHS = (
    "frozen/mbib_efficientnet_lite0",
    "finetune/mbib_efficientnet_lite0",
    "finetune/mbib_resnet50",
    "finetune/mbib_vit_base",
)
# What can be done where a run's plugin is no more where it was.
MOVED = "; if it has moved, run the command from the folder that it is in now, or resume with --plugin FILE"


def recipes_folder() -> Path:
    """Return the folder of the recipes that come with the package."""
    installed = Path(__file__).parents[1] / "recipes"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "recipes"


def list_recipes() -> list[str]:
    """Return the names of the recipes that come with the package, such as ``mbib_resnet32.cifar100_lt_if100``."""
    return list(packaged_recipes())


@cache
def packaged_recipes() -> Mapping[str, Path]:
    """Return the files of the packaged recipes by name, in the order of names.

    A file named ``arch.tag`` has that name, any other one its folder's too.
    """
    files = [path for path in recipes_folder().glob("*/*.yaml") if path.parent.name not in ("bases", "sweeps")]
    return dict(sorted((path.stem if "." in path.stem else f"{path.parent.name}/{path.stem}", path) for path in files))


def list_sweeps() -> list[str]:
    """Return the names of the sweeps that come with the package."""
    return sorted(path.stem for path in (recipes_folder() / "sweeps").glob("*.yaml"))


def find_recipe(name: str) -> Path:
    """Return the file of a recipe, given the path of a file or the name of a packaged recipe.

    Raises:
        MbibError: neither exists; the nearest names are given.
    """
    if name and Path(name).is_dir():
        raise MbibError(f"{name} is a folder, not a recipe; train on its images with: {train_command(name)}")
    if name and Path(name).exists():
        return Path(name)
    packaged = packaged_recipes()
    if name.endswith(".yaml") and name.removesuffix(".yaml") not in packaged:
        near = nearest(name.removesuffix(".yaml"), packaged, most=1)
        hint = f"did you mean {near[0]!r}?" if near else "mbib recipes lists those of the package"
        raise MbibError(f"recipe {name}: there is no such file; {hint}")
    if name.removesuffix(".yaml") not in packaged:
        raise unknown_name("recipe", name, packaged)
    return packaged[name.removesuffix(".yaml")]


def train_command(images: str) -> str:
    """Return the command that trains on a folder of somebody's own images, and what to change in it for photographs."""
    start = f"mbib train {FOR_SMALL_IMAGES} --data-dir {quote(images)}"
    return f"{start} (which is for small images; for photographs take {FOR_PHOTOGRAPHS[0]})"


def recipe_name(path: Path, method: str | None = None) -> str:
    """Return a run's name: the file's, where it is a model's arch.tag; else ``<file stem>.<folder>``.

    The recipe.yaml that a run leaves in its folder has the name of that run.

    Args:
        path: of the recipe.
        method: another one than the recipe's, which the name then says: ``cifar_resnet32.focal_digits``.
    """
    if path.name == RUN_RECIPE:
        return path.resolve().parent.name
    name = path.stem if "." in path.stem else f"{path.stem}.{path.resolve().parent.name}"
    own = load_recipe(path).method["name"] if method is not None else None
    if method == own:
        return name
    architecture, _, tag = name.partition(".")
    return f"{architecture}.{method}_{tag.removeprefix(f'{own}_')}"


def data_of(name: str) -> str:
    """Return what the name of a recipe or of a run says of its data; empty where it says nothing.

    ``cifar100_lt_if100`` of ``cifar_resnet32.bsce_cifar100_lt_if100``; of a sweep's recipe what all runs share:
    ``cifar100_lt`` of ``{method}cifar100_lt_if{imbalance_factor}``.
    """
    folder, _, last = name.rpartition("/")
    fixed = re.sub(r"_?[a-z]*{.*?}", "", last.removesuffix(".yaml"))
    if "." not in fixed and "{" not in last:
        return folder.rpartition("/")[2]
    tag = fixed.partition(".")[2] if "." in fixed else fixed
    methods = [method for method in known_methods() if tag.startswith(f"{method}_")]
    return tag.removeprefix(f"{max(methods, key=len)}_") if methods else tag


def load_recipe(
    path: Path, overrides: Mapping[str, Any] | None = None, say: Callable[[str], None] | None = None
) -> Recipe:
    """Read a recipe file and apply overrides.

    Fewer epochs shorten what counts in epochs, where it would leave none of them: the warm-up to all but the last
    epoch, and the epochs without mixing to fewer than half. What a file itself, or an override itself, contradicts is
    an error: there somebody has written both numbers.

    Args:
        path: a YAML file with keys of `Recipe`, and ``base`` and ``stages`` as `mbib_timm.recipe` has them. The
            ``recipe.yaml`` of a run may name plugins that lie elsewhere by now; see `moved_plugin`.
        overrides: values that replace the file's, by address: a key, ``method.beta`` and ``model_kwargs.taps`` for a
            part of one, ``method.observation_weights.0`` for an element, ``stage2.lr`` for the key of a stage, and
            ``stages`` for all of them. A key without stage holds for all stages that do not set it themselves, as in
            the file. Another `dataset` takes along what the file says of a table, of lists and of groups, and a table
            the folder of the other data.
        say: told in a line about each stage whose epochs shorten something.

    Raises:
        MbibError: the file is no mapping, or holds an unknown key, a wrong type or an impossible value.
    """
    content, of_run = read_recipe(path), path.name == RUN_RECIPE
    find = moved_plugin if of_run else partial(_beside, path.parent)
    for keys in (content, *content.get(STAGES, ())):
        if isinstance(plugins := keys.get("plugin"), list):
            keys["plugin"] = [find(each) if isinstance(each, str) else each for each in plugins]
    if not of_run:  # which is read while runs go on, with the code that they began with
        for plugin in [*_plugins_in(content), *_plugins_in(overrides or {})]:
            renew_plugin(plugin)
    alone = copy.deepcopy(content)
    try:
        return _overridden(content, overrides or {}, path.name, say)
    except MbibError as error:
        if of_run:
            gone = any(each.endswith(".py") and not Path(each).is_file() for each in _plugins_in(content))
            raise type(error)(f"{path}: {error}{MOVED * gone}") from None
        if path.name not in str(error) and _is_of_file(error, alone, path.name, overrides or {}):
            raise type(error)(f"{path.name}: {error}") from None
        raise


def _is_of_file(error: MbibError, content: Mapping[str, Any], where: str, overrides: Mapping[str, Any]) -> bool:
    """Return whether a file's content alone is wrong in the same way as with overrides.

    Of plugins that do not import the message says it: their code would run once more.
    """
    if not overrides or any(str(error).startswith(f"plugin {plugin} ") for plugin in _plugins_in(content)):
        return True
    try:
        _resolve(content, where)
    except MbibError as own:
        return str(own) == str(error)
    return False


def _beside(folder: Path, plugin: str) -> str:
    """Return where a plugin lies that a recipe's file in a folder names: in the current folder, or beside the file."""
    there = folder / plugin
    return str(there) if there.suffix == ".py" and there.is_file() and not Path(plugin).is_file() else plugin


def _plugins_in(keys: Mapping[str, Any]) -> Iterator[str]:
    """Give the plugins that keys name, and those of stages in them; what is no text the recipe's own check refuses."""
    for address, value in keys.items():
        if address == STAGES and isinstance(value, list):
            for stage in value:
                yield from _plugins_in(stage if isinstance(stage, Mapping) else {})
        elif address.rpartition(".")[2] == "plugin":
            listed = [value] if isinstance(value, str) else value if isinstance(value, list) else []
            yield from (each for each in listed if isinstance(each, str) and each)


def prepare_run(
    file: Path, overrides: Mapping[str, Any], say: Callable[[str], None] | None = None
) -> tuple[Recipe, str, bool]:
    """Return the recipe of a run to train, the run's name, and whether somebody says how many epochs.

    Raises:
        MbibError: as `load_recipe`; or an override that no stage reads.
    """
    recipe = load_recipe(file, overrides, say)
    check_given([recipe], overrides)
    name = recipe_name(file, recipe.method["name"] if "method" in overrides else None)
    return recipe, name, asks_for_epochs(file, overrides)


def asks_for_epochs(file: Path, overrides: Mapping[str, Any]) -> bool:
    """Return whether somebody says how many epochs: in overrides, or in a recipe file of their own."""
    said = any(address == STAGES or re.fullmatch(r"(stage\d+\.)?epochs", address) for address in overrides)
    return said or file not in packaged_recipes().values()


def change_recipe(recipe: Recipe, overrides: Mapping[str, Any], say: Callable[[str], None] | None = None) -> Recipe:
    """Apply overrides to a recipe, as `load_recipe` does to a file's. Raises MbibError as it does."""
    return _overridden(recipe.to_dict(), overrides, "the recipe", say)


def _overridden(
    content: dict[str, Any], overrides: Mapping[str, Any], where: str, say: Callable[[str], None] | None
) -> Recipe:
    if "dataset" in overrides and overrides["dataset"] != content.get("dataset"):
        dataset = overrides["dataset"]
        of_others = [*TABLE_KEYS, "group_by", *(["data_dir"] if dataset == "table" else [])]
        of_others += [key for key, sources in KEYS_OF_SOURCES.items() if dataset not in sources]
        for keys in (content, *content.get(STAGES, ())):
            for key in of_others:
                keys.pop(key, None)
    for address in sorted(overrides, key=lambda address: (address != STAGES, address.count("."))):
        _override(content, address, overrides[address], where)
    lines = list(_shorten(content, overrides))
    recipe = _resolve(content, where)
    lines += [*_keeping(recipe, content, overrides), *_unreached(recipe)]
    if say is not None:
        for line in lines:
            say(line)
    return recipe


def _keeping(recipe: Recipe, content: Mapping[str, Any], overrides: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each stage that keeps epochs of its own where others take those of an override."""
    for number, (stage, given) in enumerate(zip(recipe.chain(), content.get(STAGES, [{}]), strict=True), start=1):
        address = f"stage{number}.epochs"
        if "epochs" in overrides and "epochs" in given and address not in overrides and stage.epochs:
            yield f"stage {number} keeps its {counted(stage.epochs, 'epoch')}; --{address} N changes them"


def _unreached(recipe: Recipe) -> Iterator[str]:
    """Yield a line for each stage with milestones that its epochs do not reach."""
    stages = recipe.chain()
    for number, stage in enumerate(stages, start=1):
        beyond = [milestone for milestone in stage.decay_milestones if milestone > stage.epochs > 0]
        if stage.sched == "multistep" and beyond:
            of_stage = f"stage {number}, " if len(stages) > 1 else ""
            epochs = counted(stage.epochs, "epoch")
            yield f"{of_stage}{epochs}: training ends before decay_milestones {few(beyond)}"


def _shorten(content: dict[str, Any], overrides: Mapping[str, Any]) -> Iterator[str]:
    """Shorten what counts in epochs of stages that an override has left too few, in place; yield a line for each."""
    stages = content.get(STAGES, [content])
    for number, stage in enumerate(stages, start=1):
        prefix = f"stage{number}." if STAGES in content else ""
        counts = ("epochs", "warmup_epochs", "mixup_off_epochs")
        given = [key for key in counts if f"{prefix}{key}" in overrides or (key in overrides and key not in stage)]
        values = {key: stage.get(key, content.get(key, default_of(KEYS[key]))) for key in counts}
        epochs = values["epochs"]
        if "epochs" not in given or not isinstance(epochs, int) or epochs < 1:
            continue
        shortened = []
        for key, most in (("warmup_epochs", epochs - 1), ("mixup_off_epochs", (epochs - 1) // 2)):
            before = values[key]
            if key not in given and isinstance(before, int) and before > most:
                stage[key] = most
                shortened.append(f"{key} shortened from {before} to {most}")
        if shortened:
            run = counted(epochs, "epoch")
            yield f"{f'stage {number}, ' if prefix else ''}{run}: {', '.join(shortened)}"


def read_recipe(path: Path) -> dict[str, Any]:
    """Return the content of a recipe file over that of its base, unresolved.

    Raises:
        MbibError: not a mapping, an unknown key, a base that is missing or has a base of its own.
    """
    content = _read_mapping(path)
    base = content.pop(BASE, None)
    if base is None:
        return content
    if not isinstance(base, str):
        raise MbibError(f"{path}: key 'base': expected the name of another file, got {shown(base)}")
    beside, packaged = path.parent / f"{base}.yaml", recipes_folder() / "bases" / f"{base}.yaml"
    files = [file for file in (Path(base), beside, packaged) if file.is_file()]
    if not files:
        names = [file.stem for file in packaged.parent.glob("*.yaml")]
        raise MbibError(f"{path.name}: {unknown_name('base', base, names)}")
    below = _read_mapping(files[0])
    for key in (BASE, STAGES):
        if key in below:
            raise MbibError(f"{files[0]}: a base has no {key!r} of its own")
    return {**below, **content}


def _read_mapping(path: Path) -> dict[str, Any]:
    content = read_yaml(path, "recipe")
    if not content and isinstance(content, dict | None):
        raise MbibError(f"{path}: expected 'key: value' lines, got none; without a recipe, {DEFAULT_RECIPE} trains")
    if not isinstance(content, dict):
        raise MbibError(f"{path}: expected 'key: value' lines, got a {type(content).__name__}")
    _check_keys(content, path.name, (BASE, STAGES))
    if STAGES in content:
        _check_stages(content[STAGES], str(path))
    return content


def _check_stages(stages: Any, where: str) -> None:
    if not isinstance(stages, list) or not stages:
        raise MbibError(f"{where}: key 'stages': expected a list of stages, got {shown(stages)}")
    if len(stages) > MOST_STAGES:
        raise MbibError(f"{where}: key 'stages': expected at most {MOST_STAGES} stages, got {len(stages):,}")
    for number, stage in enumerate(stages, start=1):
        if not isinstance(stage, dict):
            raise MbibError(f"{where}: stage {number}: expected keys and values, got {shown(stage)}")
        _check_keys(stage, f"stage {number} of {Path(where).name}")


def _check_keys(content: Mapping[str, Any], where: str, others: tuple[str, ...] = ()) -> None:
    for name in content:
        if name not in KEYS and name not in others:
            raise MbibError(f"{where}: {unknown_name('key', str(name), [*KEYS, *others])}")


def _resolve(content: Mapping[str, Any], where: str) -> Recipe:
    """Build the recipe of a file's content, stage by stage; an error in one of several names the stage."""
    shared = {key: value for key, value in content.items() if key != STAGES}
    stages = content.get(STAGES, [{}])
    recipe: Recipe | None = None
    for number, stage in enumerate(stages, start=1):
        # What a recipe starts from, its first stage does.
        keys = {
            key: value
            for key, value in shared.items()
            if number == 1 or key not in ("initial_checkpoint", "pretrained")
        }
        try:
            recipe = Recipe(**{**keys, **stage, "previous": recipe})
        except MbibError as error:
            if len(stages) == 1:
                raise
            raise MbibError(f"stage {number} of {where}: {error}") from None
    assert recipe is not None
    return recipe


def _override(content: dict[str, Any], address: str, value: Any, where: str) -> None:
    """Set what an address names in a file's content; see `load_recipe`."""
    if address == STAGES:
        _check_stages(value, where)
        content[STAGES] = copy.deepcopy(value)
        return
    first, *rest = address.split(".")
    stages, target, shared = content.get(STAGES, []), content, content
    number = re.fullmatch(r"stage(\d{1,4})", first)
    if number and rest:
        if not 1 <= int(number[1]) <= len(stages):
            raise MbibError(f"{address}: {where} has {len(stages) or 'no'} stages")
        target = stages[int(number[1]) - 1]
        first, *rest = rest
    require_key(first)
    if target is content and stages and all(first in stage for stage in stages):
        value_of = "N" if not rest and without_none(TYPES[first]) in (int, float) else "VALUE"
        key = ".".join([first, *rest]).replace("_", "-")
        flags = " or ".join(f"--stage{i}.{key} {value_of}" for i in range(1, len(stages) + 1))
        raise MbibError(f"every stage of {where} sets {first!r} itself; say which: {flags}")
    if not rest:
        target[first] = value
        return
    whole: Any
    if first in target or first in shared:
        whole = copy.deepcopy(target.get(first, shared.get(first)))
    else:
        whole = default_of(KEYS[first])
    if first == "lora":
        whole = {} if whole is None else whole
    if first == "method":
        whole = {"name": whole} if isinstance(whole, str) else whole
        if len(rest) > 1:  # an element of a setting, which the file may leave to the method
            for plugin in target.get("plugin", shared.get("plugin", [])):
                load_plugin(plugin)
            whole = {**resolve_settings(whole)[1], **whole}
    inner = whole
    for part in rest[:-1]:
        inner = _element(inner, part, address)
    _element(inner, rest[-1], address, create=True)
    inner[int(rest[-1]) if isinstance(inner, list) else rest[-1]] = value
    target[first] = whole


def _element(whole: Any, part: str, address: str, create: bool = False) -> Any:
    """Return an element of a list or a mapping. Raises MbibError where there is none, and where none can be."""
    try:
        if isinstance(whole, list):
            return whole[int(part)]
        if isinstance(whole, dict) and (create or part in whole):
            return whole.get(part)
    except (ValueError, IndexError):
        pass
    raise MbibError(f"{address}: there is no element {shown(part)} in {shown(whole)}")


def dump_recipe(recipe: Recipe) -> bytes:
    """Return the resolved recipe as YAML."""
    return yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True).encode()
