"""The command line: every command's flags beside what it calls.

A command imports what it calls when it runs, so that help, lists and errors about flags answer at once: nothing at the
top of this file imports torch or timm. Bad input ends with one line and exit status 2, an interrupted run with status
130.
"""

import argparse
import dataclasses
import errno
import io
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import mbib_timm
from mbib_timm.errors import MbibError, first_line, shown, unknown_name
from mbib_timm.files import counted, printable, printable_lines
from mbib_timm.flags import (
    Parser,
    add_recipe_flags,
    not_negative,
    place,
    port,
    positive,
    random_seed,
    recipe_overrides,
    share,
    take_dotted,
    workers,
)
from mbib_timm.licences import check_licence
from mbib_timm.recipe import (
    DEFAULT_RECIPE,
    KEYS,
    OPENED_BY,
    Recipe,
    find_recipe,
    list_sweeps,
    load_recipe,
    packaged_recipes,
    prepare_run,
)
from mbib_timm.recipe.declared import export_formats, known_methods, load_entry_points

Namespace = argparse.Namespace
# Runs a command; returns its exit status, None for 0.
Action = Callable[[Namespace], int | None]

MODEL = "a run's folder, local-dir:FOLDER, hf-hub:REPO, or a timm model name"
PRIOR = (
    "class frequencies that the probabilities assume: train, uniform, a file of shares or counts, or estimate (from "
    "the images, without labels); when not given, those that the model was trained for"
)
LICENCE = "licence of the weights, as the Hub spells it, such as cc-by-4.0"
DEVICE = "cpu, cuda, cuda:1, mps; detected when not given"
# Recipe keys that an evaluation of a trained model depends on.
EVALUATION_KEYS = [name for name, item in KEYS.items() if item.metadata["evaluation"]]
# And that decide which images there are, and who decodes them.
DATA_FLAGS = [*OPENED_BY, "workers"]
SETTINGS_EPILOG = (
    "The settings of a method are flags too, such as --method.beta 3; mbib train RECIPE --help lists them. In a recipe "
    "with several stages, a flag applies to every stage that does not set the key itself; --stage2.lr 0.1 sets it for "
    "the second stage."
)


@dataclasses.dataclass(frozen=True)
class Command:
    """A command of ``mbib``.

    Attributes:
        add_flags: adds its flags to a parser, and returns what it does with them. Its docstring is the command's help.
        usage: its arguments, where those that argparse would list are too many to read.
        epilog: text below the help.
    """

    add_flags: Callable[[Parser], Action]
    usage: str
    epilog: str

    @property
    def help(self) -> str:
        """What it does, in a line."""
        text = (self.add_flags.__doc__ or "").rstrip(".")
        return text[:1].lower() + text[1:]


COMMANDS: dict[str, Command] = {}


def command(usage: str = "", epilog: str = "") -> Callable[[Callable[[Parser], Action]], Callable[[Parser], Action]]:
    """Decorator that files a command under its function's name; see `Command`."""

    def decorate(add_flags: Callable[[Parser], Action]) -> Callable[[Parser], Action]:
        COMMANDS[add_flags.__name__] = Command(add_flags, usage, epilog)
        return add_flags

    return decorate


@command("DIR | TABLE | RECIPE [flags]")
def data(flags: Parser) -> Action:
    """Check images before training: classes, sizes, unreadable files, duplicates, what is held out."""
    flags.add_argument(
        "target",
        nargs="?",
        help="folder or .tar file of images, CSV or Parquet file that lists images, or a recipe",
    )
    flags.add_argument("--csv", type=place, metavar="FILE", help="write one line per image to this file")
    flags.add_argument(
        "--figure", type=place, metavar="FILE", help="draw the number of images per class (.png, .pdf, .svg)"
    )
    flags.add_argument(
        "--write-split",
        type=place,
        metavar="FILE",
        help="write the split of each image to this CSV file, which --dataset table reads",
    )
    add_recipe_flags(flags, DATA_FLAGS)

    def run(given: Namespace) -> None:
        overrides = recipe_overrides(given)
        if given.target is None:
            words = [overrides.get("data_dir", "DIR")]
            if "table" in overrides:
                words = [overrides["table"], *(["--data-dir", *words] if "data_dir" in overrides else [])]
            command = shlex.join(["mbib", "data", *words])
            raise MbibError(f"the folder, table or recipe goes first, without a flag: {command}")
        from mbib_timm.reporting.data_report import data_report

        data_report(given.target, overrides, given.csv, given.figure, given.write_split)

    return run


@command("[RECIPE] [flags]", f"{SETTINGS_EPILOG} Values in [ ] are those of the recipe.")
def train(flags: Parser) -> Action:
    """Train a recipe."""
    said = f"name of a recipe, or a YAML file; {DEFAULT_RECIPE} when not given"
    flags.add_argument("recipe", nargs="?", default=DEFAULT_RECIPE, help=said)
    add_recipe_flags(flags, KEYS)

    def run(given: Namespace) -> None:
        path = find_recipe(given.recipe)
        # Of several processes the first speaks.
        say = print if os.environ.get("RANK", "0") == "0" else None
        recipe, name, epochs_asked = prepare_run(path, recipe_overrides(given), say)
        from mbib_timm.training import train

        train(recipe, name, epochs_asked=epochs_asked)

    return run


@command("SWEEP | RECIPE [RECIPE ...] [flags]", SETTINGS_EPILOG)
def sweep(flags: Parser) -> Action:
    """Train many recipes, one after another or several at once."""
    from mbib_timm.sweeps.sweep import PER_RUN, find_sweep

    flags.add_argument("sweep", nargs="+", help="name of a sweep, or its file; or names of recipes, or their files")
    flags.add_argument("--recipe", help="base recipe to use instead of the sweep's, such as mbib_resnet32.digits")
    flags.add_argument("--seeds", nargs="+", type=random_seed, metavar="N", help="seeds to use instead of the sweep's")
    flags.add_argument("--name", help="name for the sweep's folders")
    flags.add_argument(
        "--only", nargs="+", default=[""], metavar="TEXT", help="train only runs whose name contains one of these"
    )
    flags.add_argument(
        "--results", type=place, default=Path("results"), metavar="DIR", help="folder for tables and figures (results)"
    )
    flags.add_argument(
        "--jobs",
        type=positive,
        default=1,
        metavar="N",
        help="runs at once (1); above 1, each in a process of its own with one thread, or OMP_NUM_THREADS threads; on "
        "one CUDA device they share memory and time, and each has its own context, images and compiled code",
    )
    flags.add_argument("--dry-run", action="store_true", help="list the runs and which of them are done, then stop")
    add_recipe_flags(flags, [key for key in KEYS if key not in PER_RUN])

    def run(given: Namespace) -> int:
        overrides, sweep = recipe_overrides(given), find_sweep(given.sweep)
        from mbib_timm.sweeps.sweep_plan import on_recipe
        from mbib_timm.sweeps.sweep_runs import run_sweep

        if given.recipe is not None:
            sweep = on_recipe(sweep, given.recipe)
        if given.name is not None:
            sweep = dataclasses.replace(sweep, name=given.name)
        options = dict(seeds=given.seeds, only=given.only, jobs=given.jobs, dry_run=given.dry_run)
        return 0 if run_sweep(sweep, overrides, given.results, **options) else 1

    return run


def add_data_flags(flags: Parser, split: str) -> None:
    """Add the flags that say which data a trained model is looked at on; `split` is the help of the second."""
    flags.add_argument("--recipe", help="recipe that names the data, for models other than a run's folder")
    flags.add_argument("--split", help=split)


@command("MODEL [flags]")
def validate(flags: Parser) -> Action:
    """Evaluate a trained model."""
    flags.add_argument("target", metavar="MODEL", help=MODEL)
    add_data_flags(flags, split="split to evaluate; the one that the run reports when not given")
    flags.add_argument("--prior", metavar="PRIOR", help=PRIOR)
    flags.add_argument(
        "--results",
        type=place,
        metavar="FILE",
        help="write the metrics to this JSON file, and the predictions, the confusion matrix and the classes as CSV "
        "files beside it",
    )
    add_recipe_flags(flags, EVALUATION_KEYS)

    def run(given: Namespace) -> None:
        overrides = recipe_overrides(given)
        from mbib_timm.evaluation.validate import validate

        validate(
            given.target,
            recipe=given.recipe,
            overrides=overrides,
            split=given.split,
            prior=given.prior,
            results_file=given.results,
        )

    return run


@command("MODEL [flags]")
def aggregate(flags: Parser) -> Action:
    """Weight a model's experts for test sets with other class distributions."""
    flags.add_argument("target", metavar="MODEL", help=MODEL)
    add_data_flags(flags, split="split to draw the test sets from; the one that the run reports when not given")
    flags.add_argument(
        "--targets",
        nargs="+",
        metavar="NAME",
        help="class distributions: forward50, ..., forward2, uniform, backward2, ..., backward50; all when not given",
    )
    flags.add_argument(
        "--seed", dest="aggregation_seed", type=random_seed, default=0, metavar="N", help="random seed (0)"
    )
    flags.add_argument(
        "--results",
        type=place,
        help="write the results to this JSON file; by default aggregation.json in the run's folder",
    )
    add_recipe_flags(flags, EVALUATION_KEYS)

    def run(given: Namespace) -> None:
        overrides = recipe_overrides(given)
        from mbib_timm.evaluation.aggregate import aggregate

        aggregate(
            given.target,
            recipe=given.recipe,
            overrides=overrides,
            split=given.split,
            distributions=given.targets,
            seed=given.aggregation_seed,
            results_file=given.results,
        )

    return run


@command("MODEL [MODEL ...] [flags]")
def analyze(flags: Parser) -> Action:
    """Analyze trained models: errors, calibration, distances, t-SNE, costs."""
    flags.add_argument(
        "runs",
        nargs="+",
        metavar="MODEL",
        help="run folders, local-dir:FOLDER, hf-hub:REPO, or timm model names; the first is the reference",
    )
    add_data_flags(flags, split="split to analyze; the one that the run reports when not given")
    flags.add_argument(
        "--classes",
        nargs="+",
        type=not_negative,
        metavar="LABEL",
        help="labels of the classes that t-SNE shows; ten classes when not given",
    )
    flags.add_argument(
        "--images-per-class", type=positive, default=100, metavar="N", help="images that t-SNE shows per class (100)"
    )
    # Not the recipe's key of that name.
    flags.add_argument("--output", dest="folder", type=place, metavar="DIR", help="folder for the results")
    add_recipe_flags(flags, EVALUATION_KEYS)

    def run(given: Namespace) -> None:
        overrides = recipe_overrides(given)
        from mbib_timm.analysis.analyze import analyze

        analyze(
            given.runs,
            recipe=given.recipe,
            overrides=overrides,
            split=given.split,
            output=given.folder,
            classes=given.classes,
            images_per_class=given.images_per_class,
        )

    return run


@command()
def report(flags: Parser) -> Action:
    """Put runs and sweeps into one HTML file."""
    flags.add_argument(
        "results",
        nargs="+",
        help="folders of runs, kept results or sweep results, or names of published models",
    )
    flags.add_argument(
        "-o", "--output", type=place, default=Path("report.html"), metavar="FILE", help="file to write (report.html)"
    )
    flags.add_argument("--title", help="title of the page")

    def run(given: Namespace) -> None:
        from mbib_timm.reporting.report import report

        report(given.results, given.output, given.title)

    return run


@command()
def predict(flags: Parser) -> Action:
    """Classify images with a trained model."""
    flags.add_argument("model", help=MODEL)
    flags.add_argument(
        "images",
        nargs="+",
        help="image files, folders, archives, or tables (.csv, .parquet) of images; - reads names from standard input",
    )
    flags.add_argument("--top-k", type=positive, default=5, metavar="K", help="classes to show per image (5)")
    flags.add_argument(
        "--format",
        choices=("table", "csv", "jsonl", "parquet"),
        help="output format; by default that of the suffix of --output, or table",
    )
    flags.add_argument("--output", type=place, metavar="FILE", help="write to this file")
    flags.add_argument(
        "--resume", action="store_true", help="continue the CSV or JSON lines file of an interrupted run"
    )
    flags.add_argument("--probabilities", action="store_true", help="write the probabilities of all classes")
    flags.add_argument(
        "--threshold",
        type=share,
        default=0.0,
        metavar="P",
        help="answer 'unsure' if no class reaches this probability (0)",
    )
    flags.add_argument(
        "--embeddings",
        type=place,
        metavar="FILE",
        help="write the features before the classifiers to this .npy or .parquet file",
    )
    flags.add_argument(
        "--cam",
        type=place,
        metavar="DIR",
        help="write to this folder pictures of the image regions behind each prediction (Grad-CAM)",
    )
    flags.add_argument(
        "--data-dir",
        type=place,
        metavar="DIR",
        help="folder that a table's paths are relative to; its own when not given",
    )
    flags.add_argument("--path-column", default="path", metavar="NAME", help="column of a table with the paths (path)")
    flags.add_argument(
        "--label-column", metavar="NAME", help="column of a table with the class names (label, if there is one)"
    )
    flags.add_argument(
        "--labels",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="take folder names and the labels of tables as true classes, and report the accuracy at the end (yes)",
    )
    flags.add_argument(
        "--head",
        default="prediction",
        metavar="NAME",
        help="whose logits to use: prediction, or one of the model's heads or experts (prediction)",
    )
    flags.add_argument("--prior", metavar="PRIOR", help=PRIOR)
    flags.add_argument("--batch-size", type=positive, default=64, metavar="N", help="images per batch (64)")
    flags.add_argument(
        "--workers",
        type=workers,
        metavar="N",
        help="processes that decode images; by default one per CPU, 8 at most",
    )
    flags.add_argument("--device", help=DEVICE)

    def run(given: Namespace) -> int:
        from mbib_timm.inference.prediction_files import OutputChoice

        choice = OutputChoice(
            given.format, given.output, given.probabilities, given.embeddings, given.cam, given.resume
        )
        choice.check(given.prior == "estimate")  # before the imports that take seconds
        from mbib_timm.inference.inputs import Columns
        from mbib_timm.inference.predict import predict

        found = predict(
            given.model,
            given.images,
            choice,
            top_k=given.top_k,
            head=given.head,
            prior=given.prior,
            threshold=given.threshold,
            columns=Columns(given.path_column, given.label_column, given.data_dir),
            labels=given.labels,
            batch_size=given.batch_size,
            workers=given.workers,
            device=given.device,
        )
        if found.broken:
            print(f"could not read {len(found.broken):,} of {counted(found.images, 'image')}:", file=sys.stderr)
            for image in found.broken:
                print(printable(f"  {image.image}: {image.reason}"), file=sys.stderr)
        return 1 if found.broken else 0

    return run


@command()
def export(flags: Parser) -> Action:
    """Export a trained model to another format."""
    flags.add_argument("model", help=MODEL)
    flags.add_argument("--format", choices=export_formats(), required=True, help="file format")
    flags.add_argument("--output", type=place, metavar="FILE", help="file to write; named after the model by default")
    flags.add_argument("--softmax", action="store_true", help="output probabilities instead of logits")
    flags.add_argument("--license", type=check_licence, metavar="NAME", help=f"{LICENCE}; the model's own by default")

    def run(given: Namespace) -> None:
        from mbib_timm.inference.export import export

        export(given.model, given.format, given.output, softmax=given.softmax, license=given.license)

    return run


@command()
def demo(flags: Parser) -> Action:
    """Try a trained model in the browser."""
    flags.add_argument("model", help=MODEL)
    flags.add_argument("--port", type=port, metavar="N", help="port of the page; a free one when not given")
    flags.add_argument("--device", help=DEVICE)

    def run(given: Namespace) -> None:
        from mbib_timm.inference.demo import demo

        demo(given.model, given.port, given.device)

    return run


@command()
def publish(flags: Parser) -> Action:
    """Publish a finished run on the Hub."""
    flags.add_argument("run", type=place, help="the run's folder")
    flags.add_argument("--repo-id", metavar="OWNER/NAME", help="repository on the Hub; models of the zoo have theirs")
    flags.add_argument(
        "--seeds",
        type=place,
        nargs="+",
        default=[],
        metavar="RUN",
        help="runs with other seeds, for the mean and spread on the card",
    )
    flags.add_argument("--private", action="store_true", help="make the repository private, if it is new")
    flags.add_argument("--revision", metavar="TAG", help="tag of this release; the next of v1, v2, v3 by default")
    flags.add_argument(
        "--inference-only", action="store_true", help="leave out the classifiers that only training uses"
    )
    flags.add_argument("--dataset-name", metavar="TEXT", help="name of the training data on the card")
    flags.add_argument(
        "--license", type=check_licence, metavar="NAME", help=f"{LICENCE}; a model of the zoo has its own"
    )
    flags.add_argument("--dry-run", action="store_true", help="show the files, their sizes and the card, then stop")

    def run(given: Namespace) -> None:
        from mbib_timm.publishing.publish import publish

        publish(
            given.run,
            repository=given.repo_id,
            others=given.seeds,
            private=given.private,
            revision=given.revision,
            inference_only=given.inference_only,
            dataset_name=given.dataset_name,
            license=given.license,
            dry_run=given.dry_run,
        )

    return run


@command()
def models(flags: Parser) -> Action:
    """List the models that have weights: accuracy, size, where the weights are."""
    flags.add_argument("--all", action="store_true", help="list the names without weights too, and their recipes")

    def run(given: Namespace) -> None:
        from mbib_timm.models.zoo import ZOO
        from mbib_timm.results.catalogue import catalogue, text_table

        print(text_table(entries := catalogue(trained_only=not given.all)))
        if others := len(ZOO) - len(entries):
            print(f"\n{others} names have no weights yet, but a recipe: mbib models --all")

    return run


@command()
def methods(flags: Parser) -> Action:
    """List the training methods."""

    def run(given: Namespace) -> None:
        load_entry_points()
        print(_aligned([[name, method.title, method.citation] for name, method in known_methods().items()]))

    return run


@command()
def recipes(flags: Parser) -> Action:
    """List the packaged recipes and sweeps."""

    def run(given: Namespace) -> None:
        rows = [_recipe_row(name, load_recipe(path)) for name, path in packaged_recipes().items()]
        print(_aligned([["recipe", "data", "method", "epochs"], *rows]))
        print("\n".join(["", "for mbib sweep:", *list_sweeps()]))

    return run


def _recipe_row(name: str, recipe: Recipe) -> list[str]:
    tail = "" if recipe.imbalance == "none" else f", {recipe.imbalance} {recipe.imbalance_factor:g}"
    stages = recipe.chain()
    names, epochs = [stage.method["name"] for stage in stages], [str(stage.epochs) for stage in stages]
    return [name, f"{recipe.dataset}{tail}", " + ".join(names), " + ".join(epochs)]


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of cells as lines, the columns to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def build_parser(name: str = "", example: Recipe | None = None) -> Parser:
    """Build the parser of all commands.

    Args:
        name: of the command whose flags it reads; others are named alone.
        example: recipe whose values the command's help shows.
    """
    parser = Parser(prog="mbib", description="Long-tailed image classification with timm.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"mbib_timm {mbib_timm.__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for each, command in COMMANDS.items():
        usage = f"mbib {each} {command.usage}" if command.usage else None
        flags = subparsers.add_parser(
            each, help=command.help, usage=usage, epilog=command.epilog or None, allow_abbrev=False
        )
        if each == name:
            flags.shown = example
            flags.set_defaults(action=command.add_flags(flags))
    return parser


def parse(argv: Sequence[str]) -> Namespace:
    """Parse the command line. Raises MbibError for what it cannot read."""
    dotted, rest = take_dotted(argv)
    name = rest[0] if rest else ""
    asks = [word for word in rest if word in ("-h", "--help")]
    example = None
    if asks and name == "train":
        # Of this recipe, so that its values stand in the help, and its method's settings.
        known, _ = build_parser(name).parse_known_args([word for word in rest if word not in asks])
        example = load_recipe(find_recipe(known.recipe), {**recipe_overrides(known), **dotted})
    parser = build_parser(name, example)
    given, unknown = parser.parse_known_args(rest)
    if dotted and name not in ("train", "sweep"):
        raise MbibError(f"unexpected flag --{next(iter(dotted))}; see mbib {name} --help")
    for text in unknown:
        if text.startswith("--"):
            commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
            flags = [flag for flag in commands.choices[name]._option_string_actions if flag[:2] == "--"]
            raise unknown_name(f"flag of mbib {name}", text.partition("=")[0], flags)
        raise MbibError(f"unexpected argument {shown(text)}; see mbib {name} --help")
    given.dotted = dotted
    return given


def run(given: Namespace) -> int:
    """Run a parsed command; returns the exit status."""
    return given.action(given) or 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``mbib``; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names in letters that the terminal has not
    try:
        return run(parse(argv))
    except MbibError as error:
        # Names in it are somebody else's.
        print("mbib: error:", printable_lines(str(error)), file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        place = dict.fromkeys(("train", "sweep"), "from the last checkpoint, if there is one, ")
        if argv[0] == "predict" and any(word.endswith((".csv", ".jsonl")) for word in argv):
            place["predict"] = ""
        resume = {"train": ["--resume", "auto"], "predict": ["--resume"]}.get(argv[0], [])
        again = shlex.join(["mbib", *argv, *([] if "--resume" in argv else resume)])
        advice = f" Continue {place[argv[0]]}with: {again}" if argv[0] in place else ""
        print(f"\nmbib: interrupted.{advice}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever reads the output has had enough, as head has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        # A file or folder that is not as it should be, or a full disk, is no bug; other errors keep their traceback.
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = "the output folder" if error.filename is None else printable(str(error.filename))
        print(f"mbib: error: {error.strerror}: {where[:LONGEST_PLACE]}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        print(
            f"mbib: error: out of memory ({first_line(error)}); expected a smaller batch_size or img_size, or fewer "
            "workers",
            file=sys.stderr,
        )
        return 2


LONGEST_PLACE = 400  # characters of a file's name in a message


def _is_out_of_memory(error: Exception) -> bool:
    """Return whether an error is Python's, torch's of a device or its untyped one of the host."""
    named = type(error).__name__ in ("MemoryError", "OutOfMemoryError")
    return named or "can't allocate memory" in str(error)


if __name__ == "__main__":
    sys.exit(main())
