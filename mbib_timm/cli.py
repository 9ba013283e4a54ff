"""The command line: train, sweep, validate, aggregate, analyze, report, predict, export, demo, publish, and the lists.

Bad input ends with one line and exit status 2, an interrupted run with status 130.
"""

import argparse
import dataclasses
import errno
import itertools
import os
import re
import sys
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

import mbib_timm
from mbib_timm.errors import MbibError, unknown_name
from mbib_timm.options import option_types
from mbib_timm.recipe import DEFAULT_RECIPE, KEYS, TYPES, Recipe, find_recipe, list_recipes, load_recipe, recipe_name

UNCHANGED = "as the recipe has it, or the model's own recipe, where not given"
# Recipe keys that a sweep sets by itself.
SET_BY_SWEEP = ("seed", "experiment", "resume")
DOTTED = re.compile(r"--([a-z][a-z0-9_-]*(?:\.[a-zA-Z0-9_-]+)+)(?:=(.*))?", re.DOTALL)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are ours: one line, with the nearest valid flag."""

    def error(self, message: str) -> NoReturn:
        raise MbibError(message)


def name_value(text: str) -> tuple[str, Any]:
    """Parse ``name=value``, the value as YAML."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"expected name=value, got {text!r}")
    return name, yaml.safe_load(value)


def mapping(text: str) -> dict[str, Any]:
    """Parse a YAML mapping, such as ``{cutout: 8}``."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a mapping such as {{cutout: 8}}, got {text!r}")
    return value


def positive(text: str) -> int:
    """Parse a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def flag(key: str) -> str:
    """Return the flag of a recipe key: ``--data-dir`` for ``data_dir``."""
    return f"--{key.replace('_', '-')}"


def add_recipe_flags(parser: argparse.ArgumentParser, keys: Iterable[str], shown: Recipe | None = None) -> None:
    """Add the flags of recipe keys, in groups; those that are not given leave the recipe's value.

    Args:
        parser: of a command.
        keys: which have an effect on it.
        shown: the recipe whose values the help shows.
    """
    for title, names in itertools.groupby(keys, key=lambda name: KEYS[name].metadata["group"]):
        group = parser.add_argument_group(title, None if shown else UNCHANGED)
        for name in names:
            item = KEYS[name]
            value = None if shown is None else getattr(shown, name)
            _add_flag(group, name, TYPES[name], item, value["name"] if name == "method" and value else value)
        if title == "method" and shown is not None:
            for number, stage in enumerate(shown.chain(), start=1):
                _add_method_flags(parser, f"stage{number}.method" if shown.stage else "method", stage.method)


def _add_method_flags(parser: argparse.ArgumentParser, place: str, method: dict[str, Any]) -> None:
    from mbib_timm.methods import METHODS

    kind = METHODS[method["name"]]
    group = parser.add_argument_group(f"{place}: {method['name']} ({kind.title})", kind.citation or None)
    types = option_types(kind.Settings)
    for item in dataclasses.fields(kind.Settings):
        options: dict[str, Any] = {
            "type": yaml.safe_load,
            "metavar": _type_name(types[item.name]),
            "default": argparse.SUPPRESS,
        }
        text = _described(item, method[item.name])
        group.add_argument(f"--{place}.{item.name.replace('_', '-')}", help=text, **options)


def _add_flag(group: Any, name: str, expected: Any, item: dataclasses.Field, value: Any) -> None:
    if typing.get_origin(expected) is types.UnionType:
        expected = typing.get_args(expected)[0]
    options: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": _described(item, value)}
    if expected is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif name == "method":
        options["metavar"] = "NAME"
    elif name == "plugin":
        options |= {"action": "append", "metavar": "FILE"}
    elif typing.get_origin(expected) is list:
        (item_type,) = typing.get_args(expected)
        of_mappings = typing.get_origin(item_type) is dict
        options |= {"nargs": "+", "type": mapping if of_mappings else item_type}
        options["metavar"] = "{KEY: VALUE}" if of_mappings else "X"
    elif typing.get_origin(expected) is dict:
        options |= {"nargs": "*", "type": name_value, "metavar": "NAME=VALUE"}
    else:
        options |= {"type": expected, "metavar": expected.__name__.upper()}
    group.add_argument(flag(name), **options)


def _type_name(expected: Any) -> str:
    if typing.get_origin(expected) is types.UnionType:
        expected = typing.get_args(expected)[0]
    return getattr(typing.get_origin(expected) or expected, "__name__", "VALUE").upper()


def _described(item: dataclasses.Field, value: Any) -> str:
    """Return an option's help: what it is, what it may be, and what it is now."""
    text = item.metadata["help"]
    if item.metadata["choices"]:
        text += f" ({', '.join(item.metadata['choices'])})"
    if value is not None and value != [] and value != {}:
        text += f" [{' '.join(map(str, value)) if isinstance(value, list) else value}]"
    return text.replace("%", "%%")


def recipe_overrides(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what was given as flags, by the address that `load_recipe` takes."""
    given = {name: value for name, value in vars(arguments).items() if name in TYPES}
    overrides = {name: dict(value) if name.endswith("_kwargs") else value for name, value in given.items()}
    return {**overrides, **getattr(arguments, "dotted", {})}


def take_dotted(argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Take flags such as ``--method.beta 3`` and ``--stage2.lr=0.1`` out of a command line; values are YAML."""
    dotted: dict[str, Any] = {}
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        match = DOTTED.fullmatch(word)
        if match is None:
            rest.append(word)
            continue
        text = match[2] if match[2] is not None else next(words, None)
        if text is None or text.startswith("--"):
            raise MbibError(f"flag --{match[1]} needs a value")
        try:
            dotted[match[1].replace("-", "_")] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise MbibError(f"flag --{match[1]}: {text!r} is no value") from None
    return dotted, rest


def build_parser(shown: Recipe | None = None) -> Parser:
    """Build the parser of all commands; the help of ``train`` shows the values of a recipe, where one is given."""
    parser = Parser(prog="mbib", description="Long-tailed image classification with timm.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"mbib_timm {mbib_timm.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    training: dict[str, Any] = {
        "epilog": "A method's settings are flags as well: --method.beta 3; mbib train RECIPE --help shows them. In a "
        "recipe of several stages a flag holds for the stages that do not set the key themselves; --stage2.lr 0.1 is "
        "the second stage's. Values in [ ] are the recipe's."
    }
    usage = "mbib {} [flags]"
    train = commands.add_parser(
        "train", help="train a recipe", usage=usage.format("train [RECIPE]"), allow_abbrev=False, **training
    )
    train.add_argument("recipe", nargs="?", default=DEFAULT_RECIPE, help="name of a recipe, or a YAML file")
    add_recipe_flags(train, KEYS, shown)

    sweep = commands.add_parser(
        "sweep",
        help="train many recipes in one process",
        usage=usage.format("sweep SWEEP | RECIPE [RECIPE ...]"),
        allow_abbrev=False,
        **training,
    )
    sweep.add_argument("sweep", nargs="+", help="name of a sweep, or its file; or names of recipes, or their files")
    sweep.add_argument("--recipe", help="another base recipe than the sweep's, such as mbib_resnet32.digits")
    sweep.add_argument("--seeds", nargs="+", type=int, metavar="N", help="seeds, in the place of the sweep's own")
    sweep.add_argument("--name", help="name of the sweep's folders")
    sweep.add_argument("--only", default="", metavar="TEXT", help="only runs whose name contains this")
    sweep.add_argument(
        "--results", type=Path, default=Path("results"), metavar="DIR", help="folder of tables and figures (results)"
    )
    sweep.add_argument("--dry-run", action="store_true", help="list the runs, and which are done, and stop")
    add_recipe_flags(sweep, [key for key in KEYS if key not in SET_BY_SWEEP])

    validate = commands.add_parser(
        "validate", help="evaluate a trained model", usage=usage.format("validate MODEL"), allow_abbrev=False
    )
    validate.add_argument("target", help="a run's folder, local-dir:FOLDER, hf-hub:REPO, or a timm model name")
    validate.add_argument("--recipe", help="recipe that names the data, for targets that are no run's folder")
    validate.add_argument("--split", help="split to evaluate; the one of the run's result when not given")
    validate.add_argument("--results", type=Path, help="write the metrics to this JSON file")
    evaluated = [name for name, item in KEYS.items() if item.metadata["evaluation"]]
    add_recipe_flags(validate, evaluated)

    aggregate = commands.add_parser(
        "aggregate",
        help="weigh a model's experts on test sets of other class distributions",
        usage=usage.format("aggregate MODEL"),
        allow_abbrev=False,
    )
    aggregate.add_argument("target", help="a run's folder, local-dir:FOLDER, hf-hub:REPO, or a timm model name")
    aggregate.add_argument("--recipe", help="recipe that names the data, for targets that are no run's folder")
    aggregate.add_argument("--split", help="split the test sets are drawn from; that of the run's result if not given")
    aggregate.add_argument(
        "--targets",
        nargs="+",
        metavar="NAME",
        help="class distributions: forward50, ..., forward2, uniform, backward2, ..., backward50; all when not given",
    )
    aggregate.add_argument("--seed", dest="aggregation_seed", type=int, default=0, metavar="N", help="of all draws (0)")
    aggregate.add_argument(
        "--results",
        type=Path,
        help="write the results to this JSON file; by default aggregation.json in the run's folder",
    )
    add_recipe_flags(aggregate, evaluated)

    analyze = commands.add_parser(
        "analyze", help="look into trained models", usage=usage.format("analyze MODEL [MODEL ...]"), allow_abbrev=False
    )
    analyze.add_argument(
        "runs",
        nargs="+",
        help="runs' folders, local-dir:FOLDER, hf-hub:REPO, or timm model names; the first is compared",
    )
    analyze.add_argument("--recipe", help="recipe that names the data, for targets that are no run's folder")
    analyze.add_argument("--split", help="split to analyze; the one of the run's result when not given")
    analyze.add_argument("--classes", nargs="+", type=int, metavar="LABEL", help="classes to embed; ten when not given")
    analyze.add_argument(
        "--images-per-class", type=positive, default=100, metavar="N", help="images of each class to embed (100)"
    )
    # Not the recipe's key of that name.
    analyze.add_argument("--output", dest="folder", type=Path, metavar="DIR", help="folder of the analysis")
    add_recipe_flags(analyze, evaluated)

    report = commands.add_parser("report", help="put runs and sweeps into one HTML file", allow_abbrev=False)
    report.add_argument(
        "results",
        nargs="+",
        help="folders of runs, of kept results and of sweeps' results; or names of published models",
    )
    report.add_argument("-o", "--output", type=Path, default=Path("report.html"), metavar="FILE", help="(report.html)")
    report.add_argument("--title", help="of the page")

    predict = commands.add_parser("predict", help="classify images with a trained model", allow_abbrev=False)
    predict.add_argument("model", help="a run's folder, local-dir:FOLDER, hf-hub:REPO, or a timm model name")
    predict.add_argument("images", nargs="+", help="image files, folders and tars")
    predict.add_argument("--top-k", type=positive, default=5, metavar="K", help="classes of each image (5)")
    predict.add_argument("--format", choices=("table", "csv", "jsonl"), default="table", help="of what is written")
    predict.add_argument("--output", type=Path, metavar="FILE", help="write to this file")
    predict.add_argument(
        "--head",
        default="prediction",
        metavar="NAME",
        help="prediction, or one of the model's heads or experts (prediction)",
    )
    predict.add_argument(
        "--prior",
        metavar="PRIOR",
        help="class frequencies that the probabilities are for: train, uniform, or a file of counts; those that the "
        "model was trained for when not given",
    )
    predict.add_argument("--batch-size", type=positive, default=64, metavar="N", help="images at once (64)")
    predict.add_argument("--workers", type=int, default=2, metavar="N", help="processes that decode (2)")
    predict.add_argument("--device", help="cpu, cuda, cuda:1, mps; found when not given")

    export = commands.add_parser("export", help="write a trained model in another format", allow_abbrev=False)
    export.add_argument("model", help="a run's folder, local-dir:FOLDER, hf-hub:REPO, or a timm model name")
    export.add_argument("--format", choices=("onnx", "torch-export", "torchscript"), required=True, help="of the file")
    export.add_argument("--output", type=Path, metavar="FILE", help="file to write; named after the model by default")

    demo = commands.add_parser("demo", help="try a trained model in the browser", allow_abbrev=False)
    demo.add_argument("model", help="a run's folder, local-dir:FOLDER, hf-hub:REPO, or a timm model name")
    demo.add_argument("--port", type=positive, metavar="N", help="of the page; a free one when not given")
    demo.add_argument("--device", help="cpu, cuda, cuda:1, mps; found when not given")

    publish = commands.add_parser("publish", help="put a finished run on the Hub", allow_abbrev=False)
    publish.add_argument("run", type=Path, help="the run's folder")
    publish.add_argument("--repo-id", metavar="ORG/NAME", help="repository; a model of the zoo has its own")
    publish.add_argument(
        "--seeds",
        type=Path,
        nargs="+",
        default=[],
        metavar="RUN",
        help="runs of other seeds: the card gives the spread",
    )
    publish.add_argument("--private", action="store_true", help="make the repository private, if it is new")
    publish.add_argument("--revision", metavar="TAG", help="tag of this release; the next of v1, v2, v3 by default")
    publish.add_argument(
        "--inference-only", action="store_true", help="leave out the classifiers that serve training only"
    )
    publish.add_argument("--dry-run", action="store_true", help="show the files, their sizes and the card, and stop")

    commands.add_parser("models", help="list the zoo: what is trained, how well, how large", allow_abbrev=False)
    commands.add_parser("methods", help="list the methods of training", allow_abbrev=False)
    commands.add_parser("recipes", help="list the packaged recipes and sweeps", allow_abbrev=False)
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line. Raises MbibError for what it cannot read."""
    dotted, rest = take_dotted(argv)
    asks = [word for word in rest if word in ("-h", "--help")]
    shown = None
    if asks and rest[0] == "train":
        # Of this recipe, so that its values stand in the help, and its method's settings.
        known, _ = build_parser().parse_known_args([word for word in rest if word not in asks])
        shown = load_recipe(find_recipe(known.recipe), {**recipe_overrides(known), **dotted})
    parser = build_parser(shown)
    arguments, unknown = parser.parse_known_args(rest)
    if dotted and arguments.command not in ("train", "sweep"):
        raise MbibError(f"unexpected flag --{next(iter(dotted))}; see mbib {arguments.command} --help")
    for text in unknown:
        if text.startswith("--"):
            commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
            flags = [name for name in commands.choices[arguments.command]._option_string_actions if name[:2] == "--"]
            raise unknown_name(f"flag of mbib {arguments.command}", text.partition("=")[0], flags)
        raise MbibError(f"unexpected argument {text!r}; see mbib {arguments.command} --help")
    arguments.dotted = dotted
    return arguments


def run(arguments: argparse.Namespace) -> int:
    """Run a parsed command; returns the exit status."""
    if arguments.command == "recipes":
        from mbib_timm.sweeps.sweep import list_sweeps

        print("\n".join([*list_recipes(), "", "for mbib sweep:", *list_sweeps()]))
    elif arguments.command == "methods":
        from mbib_timm.methods import METHODS, load_entry_points

        load_entry_points()
        rows = [[name, METHODS[name].title, METHODS[name].citation] for name in METHODS]
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        print("\n".join(f"{name:<{widths[0]}}  {title:<{widths[1]}}  {text}".rstrip() for name, title, text in rows))
    elif arguments.command == "models":
        from mbib_timm.results.catalogue import catalogue, text_table

        print(text_table(catalogue()))
    elif arguments.command == "train":
        path = find_recipe(arguments.recipe)
        recipe = load_recipe(path, recipe_overrides(arguments))
        from mbib_timm.training import train  # each command loads what it needs; --help and errors stay quick

        name = recipe_name(path, recipe.method["name"] if "method" in vars(arguments) else None)
        train(recipe, name)
    elif arguments.command == "sweep":
        from mbib_timm.sweeps.sweep import find_sweep
        from mbib_timm.sweeps.sweep_runs import on_recipe, run_sweep

        sweep = find_sweep(arguments.sweep)
        if arguments.recipe is not None:
            sweep = on_recipe(sweep, arguments.recipe)
        if arguments.name is not None:
            sweep = dataclasses.replace(sweep, name=arguments.name)
        complete = run_sweep(
            sweep,
            recipe_overrides(arguments),
            arguments.results,
            seeds=arguments.seeds,
            only=arguments.only,
            dry_run=arguments.dry_run,
        )
        return 0 if complete else 1
    elif arguments.command == "analyze":
        from mbib_timm.analysis.analyze import analyze

        analyze(
            arguments.runs,
            recipe=arguments.recipe,
            overrides=recipe_overrides(arguments),
            split=arguments.split,
            output=arguments.folder,
            classes=arguments.classes,
            images_per_class=arguments.images_per_class,
        )
    elif arguments.command == "report":
        from mbib_timm.reporting.report import report

        report(arguments.results, arguments.output, arguments.title)
    elif arguments.command == "predict":
        from mbib_timm.inference.predict import predict

        broken = predict(
            arguments.model,
            arguments.images,
            top_k=arguments.top_k,
            format=arguments.format,
            output=arguments.output,
            head=arguments.head,
            prior=arguments.prior,
            batch_size=arguments.batch_size,
            workers=arguments.workers,
            device=arguments.device,
        )
        if broken:
            print(f"could not read {len(broken)} of the images:", file=sys.stderr)
            for image in broken:
                print(f"  {image.image}: {image.reason}", file=sys.stderr)
            return 1
    elif arguments.command == "export":
        from mbib_timm.inference.export import export

        export(arguments.model, arguments.format, arguments.output)
    elif arguments.command == "demo":
        from mbib_timm.inference.demo import demo

        demo(arguments.model, arguments.port, arguments.device)
    elif arguments.command == "publish":
        from mbib_timm.publishing.publish import publish

        publish(
            arguments.run,
            repository=arguments.repo_id,
            others=arguments.seeds,
            private=arguments.private,
            revision=arguments.revision,
            inference_only=arguments.inference_only,
            dry_run=arguments.dry_run,
        )
    elif arguments.command == "aggregate":
        from mbib_timm.evaluation.aggregate import aggregate

        aggregate(
            arguments.target,
            recipe=arguments.recipe,
            overrides=recipe_overrides(arguments),
            split=arguments.split,
            distributions=arguments.targets,
            seed=arguments.aggregation_seed,
            results_file=arguments.results,
        )
    elif arguments.command == "validate":
        from mbib_timm.evaluation.validate import validate

        validate(
            arguments.target,
            recipe=arguments.recipe,
            overrides=recipe_overrides(arguments),
            split=arguments.split,
            results_file=arguments.results,
        )
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``mbib``; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        return run(parse(argv))
    except MbibError as error:
        print(f"mbib: error: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        goes_on = {"train": "" if "--resume" in argv else " --resume auto", "sweep": ""}
        again = " ".join(["mbib", *argv]) + goes_on.get(argv[0], "")
        advice = f" Continue from the last checkpoint with: {again}" if argv[0] in goes_on else ""
        print(f"\nmbib: interrupted.{advice}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever reads the output has had enough, as head has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        # A full or closed disk is no bug; other system errors keep their traceback.
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        print(f"mbib: error: {error.strerror}: {error.filename or 'the output folder'}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
