"""The parts of a network that a recipe names: what trains, what starts anew, what has a learning rate of its own."""

import re
from collections.abc import Iterable

from torch import nn

from mbib_timm.errors import MbibError, nearest
from mbib_timm.models.adapters import plain_names
from mbib_timm.models.backbones import PREFIX, BackboneModel
from mbib_timm.models.head_outputs import classifiers_of

# Parts of a network that a recipe may name, besides all and none; several are joined by a plus sign.
PARTS = ("classifier", "heads", "norm", "bias")
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def part_of(network: nn.Module, part: str, key: str = "train") -> set[str]:
    """Return the names of the parameters and buffers in a part of a network.

    Args:
        network: whose names; expressions see those that they have without adapters, which only ``all`` includes.
        part: ``all``; ``none``; ``classifier``, all of its classifiers; ``heads``, what lies outside the backbone, of a
            plain timm model its classifier; ``norm``, the parameters of normalisation layers, but not their
            statistics; ``bias``, the biases, those of normalisation layers too (BitFit; Ben Zaken et al., ACL 2022);
            several of these, as in ``heads+norm+bias``; or a regular expression that a name contains.
        key: of the recipe, that names the part.

    Raises:
        MbibError: a network without classifiers, a malformed expression, or one that no name contains.
    """
    try:
        return _names_in(network, part)
    except MbibError as error:
        raise MbibError(f"recipe key {key!r}: {error}") from None


def _names_in(network: nn.Module, part: str) -> set[str]:
    """Return the names in a part of a network; see `part_of`."""
    if part in ("all", "none"):
        return set(network.state_dict()) if part == "all" else set()
    names = plain_names(network)
    pieces = [piece.strip() for piece in part.split("+")]
    if all(piece in PARTS for piece in pieces):
        return set().union(*(_named_part(network, piece, names) for piece in pieces))
    try:
        found = {name for name, plain in names.items() if re.search(part, plain)}
    except re.error as error:
        raise MbibError(f"{part!r} is not a regular expression: {error}") from None
    if not found:
        tops = ", ".join(dict.fromkeys(name.partition(".")[0] for name in network.state_dict()))
        near = [match for piece in pieces if piece not in PARTS for match in nearest(piece, PARTS, 1)]
        hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        raise MbibError(
            f"{part!r} matches no parameter's name; {hint}expected all, none, {', '.join(PARTS)}, several "
            f"of these joined by +, or an expression for names: the network has {tops}"
        )
    return found


def _named_part(network: nn.Module, part: str, names: Iterable[str]) -> set[str]:
    """Return the names, of those of a network, in one of `PARTS`."""
    if part == "classifier":
        return _classifiers(network, names)
    if part == "heads":
        return set(names) - _backbone(network, names)
    parameters = dict(network.named_parameters())
    if part == "norm":
        prefixes = {name for name, module in network.named_modules() if _is_norm(module)}
        return {name for name in names if name in parameters and name.rpartition(".")[0] in prefixes}
    return {name for name in names if name in parameters and re.search(r"(^|[._])bias$", name)}


def _classifiers(network: nn.Module, names: Iterable[str]) -> set[str]:
    model = network if hasattr(network, "get_classifier") else model_in(network)[1]
    wanted = {id(classifier) for classifier in classifiers_of(model)}
    prefixes = tuple(f"{name}." for name, module in network.named_modules() if id(module) in wanted)
    return {name for name in names if name.startswith(prefixes)}


def model_in(network: nn.Module) -> tuple[str, nn.Module]:
    """Return the name of the model in a network, and the model: the network itself where there is none in it."""
    models = ((name, module) for name, module in network.named_modules() if hasattr(module, "pretrained_cfg"))
    # The outermost comes first: a method's own layers lie around it, a backbone within.
    return next(models, ("", network))


def _backbone(network: nn.Module, names: Iterable[str]) -> set[str]:
    """Return the names below ``backbone`` of the model in a network; of a model that is one itself, all but the
    classifier's."""
    where, model = model_in(network)
    inside = f"{where}." if where else ""
    if isinstance(model, BackboneModel):
        inside += PREFIX
    within = {name for name in names if name.startswith(inside)}
    return within if isinstance(model, BackboneModel) else within - _classifiers(network, within)


def _is_norm(module: nn.Module) -> bool:
    # timm's own have no common base.
    own = type(module).__module__.startswith("timm.layers") and "norm" in type(module).__name__.lower()
    return own or isinstance(module, NORMS)
