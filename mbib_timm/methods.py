"""What the methods are called: by the paper, in every table and every figure."""

# By the value of the recipe key `loss`, and by the first part of a recipe's and a model's name.
METHODS = {
    "ce": "CE",
    "focal": "Focal",
    "bsce": "BSCE",
    "bib": "BIB",
    "mbib": "MBIB",
    "se_mbib": "SE-MBIB",
    "all_mbib": "ALL-MBIB",
}


def method_title(name: object) -> str:
    """Return a method's title; anything else as it is."""
    return METHODS.get(str(name), str(name))
