"""The methods that train.py trains, by the name that --method gives them, one file for each.

A method is a `sotglp.Method`, whose stubs say what a method has. To add one, write its file and add its line
to METHODS; what its constructor takes behind the CLIP and the class names becomes options of train.py.
zero_shot.py learns nothing, and linear_probe.py has no prompts and no epochs: these two are not trained by
train.py.
"""

# why before the imports: they fail where a file of this folder is started by its path
if __name__ == "__main__":
    raise SystemExit("methods/__init__.py is no command: python train.py --help lists the methods")

import inspect

from sotglp import SOTGLP

from methods.cocoop import CoCoOp
from methods.coop import CoOp
from methods.gallop import GalLoP
from methods.locoop import LoCoOp
from methods.lsn import LSN
from methods.maple import MaPLe
from methods.plot import PLOT
from methods.plotpp import PLOTPP
from methods.proda import ProDA
from methods.promptot import PromptOT
from methods.promptsrc import PromptSRC
from methods.released import Released
from methods.variants import DenseTransport, IndependentTopK

METHODS = {"sotglp": SOTGLP, "coop": CoOp, "cocoop": CoCoOp, "maple": MaPLe, "promptsrc": PromptSRC,
           "promptot": PromptOT, "plot": PLOT, "plotpp": PLOTPP, "proda": ProDA, "locoop": LoCoOp,
           "gallop": GalLoP, "lsn": LSN, "released": Released,
           "independent": IndependentTopK, "dense": DenseTransport}


def constructor_options(method):
    """The options of a method, {parameter: default}, without those that all methods share."""
    parameters = [*inspect.signature(method).parameters.values()][2:]
    return {p.name: p.default for p in parameters if p.kind is not p.VAR_KEYWORD}


OPTIONS = {name: constructor_options(method) for name, method in METHODS.items()}
