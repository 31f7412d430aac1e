"""The methods that train.py trains, by the name that --method gives them, one file for each.

A method is a `sotglp.Method`, whose docstring lists what a method has. To add one, write its file and add its line to
METHODS; what its constructor takes behind the CLIP and the class names becomes options of train.py. linear_probe.py is
a command of its own: it has no prompts and no epochs. released.py is the authors' recipe for SOT-GLP, no method.
"""

import inspect

from sotglp import SOTGLP

from methods.coop import CoOp
from methods.gallop import GalLoP
from methods.locoop import LoCoOp
from methods.plot import PLOT
from methods.promptot import PromptOT
from methods.variants import DenseTransport, IndependentTopK

METHODS = {"sotglp": SOTGLP, "coop": CoOp, "gallop": GalLoP, "plot": PLOT, "locoop": LoCoOp,
           "promptot": PromptOT, "independent": IndependentTopK, "dense": DenseTransport}

# Options of train.py that switch off what a method has by default, and what they switch off.
SWITCHES = {"no_local_projection": "local_projection", "no_vv": "vv_attention", "shared_local": "class_specific",
            "no_plan_gradient": "plan_gradient"}


def constructor_options(method):
    """A method's own options -> {option: (parameter of its constructor, default)}."""
    switches = {parameter: option for option, parameter in SWITCHES.items()}
    return {switches[p.name] if p.default is True else p.name: (p.name, False if p.default is True else p.default)
            for p in [*inspect.signature(method).parameters.values()][2:] if p.kind is not p.VAR_KEYWORD}


OPTIONS = {name: constructor_options(method) for name, method in METHODS.items()}
