"""What a method's class is asked when it is registered: whether it can be called as it will be, and slips in its names.

Nothing is built, and nothing of a method is called.
"""

from types import FunctionType

from mbib_timm.errors import nearest

# Names that are as alike as start_epoch and start_epochs.
NEAR_MISS = 0.85


def misspelt(method: type, base: type) -> list[str]:
    """Return a line for each attribute of a method's class that looks like a slip of one that the package uses.

    Args:
        method: the class; what it inherits is not looked at.
        base: `Method`, whose attributes the package uses. Those that the class defines too are meant as they are.
    """
    lines = []
    meant = {each for each in vars(base) if not each.startswith("_")} - {"name"} - vars(method).keys()
    for own, value in vars(method).items():
        near = [] if own.startswith("_") or hasattr(base, own) else nearest(own, meant, 1, NEAR_MISS)
        if near:
            unused = "calls" if isinstance(value, FunctionType | classmethod | staticmethod) else "reads"
            lines.append(f"defines {own}, which the package never {unused}: did you mean {near[0]}?")
    return lines
