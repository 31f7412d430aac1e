"""Other packages that have the names of this project's own: evaluate.py looks for them before all imports."""

import importlib.util
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
NAMES = ("clip", "data", "harness", "methods", "sinkhorn", "sotglp", "sources")


def refuse_others():
    """Raises ImportError where one of our names is that of another package, imported or first on the path."""
    for name in NAMES:
        imported = sys.modules.get(name)
        found = getattr(imported, "__spec__", None) or imported or importlib.util.find_spec(name)
        place = place_of(found)
        if found and not Path(place).resolve().is_relative_to(PROJECT):
            how = "was imported first" if imported else "comes first on the path"
            raise ImportError(f"another package called {name} {how}, {place}: import evaluate before it, or "
                              f"leave it out; this project brings a {name} of its own")


def place_of(found):
    """Where a module is, or the specification of one; "built in" where it has no file and no folder."""
    file = getattr(found, "origin", None) or getattr(found, "__file__", None)
    folders = getattr(found, "submodule_search_locations", None) or ()
    return next(filter(None, [file, *folders]), "built in")
