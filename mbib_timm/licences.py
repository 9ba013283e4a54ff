"""The licences that the Hub knows, and the check of the one that somebody gives to a model."""

import re

from mbib_timm.errors import MbibError, unknown_name

# The identifiers of https://huggingface.co/docs/hub/repositories-licenses, without `unknown`, which states none.
LICENCES = (
    "apache-2.0", "mit", "openrail", "bigscience-openrail-m", "creativeml-openrail-m", "bigscience-bloom-rail-1.0",
    "bigcode-openrail-m", "openrail++", "afl-3.0", "artistic-2.0", "bsl-1.0", "bsd", "bsd-2-clause", "bsd-3-clause",
    "bsd-3-clause-clear", "c-uda", "cc", "cc0-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0",
    "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nd-4.0",
    "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0",
    "cdla-sharing-1.0", "cdla-permissive-1.0", "cdla-permissive-2.0", "wtfpl", "ecl-2.0", "epl-1.0", "epl-2.0",
    "etalab-2.0", "eupl-1.1", "agpl-3.0", "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "lgpl", "lgpl-2.1", "lgpl-3.0",
    "lgpl-lr", "isc", "lppl-1.3c", "ms-pl", "mpl-2.0", "odc-by", "odbl", "osl-3.0", "postgresql", "ofl-1.1", "ncsa",
    "unlicense", "zlib", "pddl", "deepfloyd-if-license", "llama2", "gemma", "other",
)  # fmt: skip
# Of these that are none by themselves: a page under `cc` says nothing of what one may do.
FAMILIES = {"cc", "bsd", "gpl", "lgpl"}


def check_licence(identifier: str) -> str:
    """Return a licence's identifier as the Hub spells it, in lower case.

    Raises:
        MbibError: the Hub does not know it; names the nearest that it does.
    """
    given = identifier.lower()
    if given not in LICENCES:
        # Of licences that differ in their version alone, the latest.
        letters, all_of_it = re.sub("[^a-z]", "", given), re.sub("[^a-z0-9]", "", given)
        versions = [each for each in LICENCES if re.sub("[^a-z]", "", each) == letters]
        same = [each for each in versions if re.sub("[^a-z0-9]", "", each).startswith(all_of_it)]
        if versions:
            raise MbibError(f"unknown licence of the Hub {given!r}: did you mean {(same or versions)[-1]!r}?")
        raise unknown_name("licence of the Hub", given, set(LICENCES) - FAMILIES)
    return given
