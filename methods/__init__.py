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

# Parameters that are True by default become options that switch them off: no_<parameter>, but for these two.
SWITCHES = {"vv_attention": "no_vv", "class_specific": "shared_local"}


def constructor_options(method):
    """A method's own options -> {option: (parameter of its constructor, default)}."""
    options = {}
    for parameter in [*inspect.signature(method).parameters.values()][2:]:
        name, default = parameter.name, parameter.default
        if default is True:
            options[SWITCHES.get(name, f"no_{name}")] = name, False
        elif parameter.kind is not parameter.VAR_KEYWORD:
            options[name] = name, default
    return options


OPTIONS = {name: constructor_options(method) for name, method in METHODS.items()}

# What is known about the options of the methods. Their defaults stand in the constructors.
HELP = {
    "n_global": "global prompts, shared by all classes",
    "n_local": "local prompts, per class in sotglp, shared by all classes in the other methods",
    "n_support": "K, patches kept per class; the paper finds 5-20 about equal, 1 and 100 worse",
    "epsilon": "entropy weight of the transport (Eq. 9); smaller is sharper and needs more --n-iters",
    "n_iters": "Sinkhorn iterations; log.jsonl of sotglp has the row error they leave",
    "lambda_local": "weight of the local branch in loss and fusion",
    "prompt_dropout": "share of the global prompts that each training image drops; with 0 they stay alike",
    "no_local_projection": "keep the identity; in the paper -0.9 accuracy, better OOD",
    "no_vv": "ordinary patch tokens in place of the V-V stream (Table 2)",
    "shared_local": "one set of local prompts for all classes (Table 2)",
    "no_plan_gradient": "hold the transport plan constant, as the released code",
    "local_mean": "mean over the local prompts in place of Eq. 10's sum, as the released code",
    "vv_alias": "add the first block's Q-K attention to the V-V stream, as the released code",
    "keep_underscores": "leave them in class names, as the released code; they become spaces otherwise",
    "n_context": "learned vectors in front of a class name",
    "words": "words to start from, such as 'a photo of a'; they replace --n-context",
    "class_specific": "a context of its own for each class",
    "top_k": "patches that each local prompt keeps (gallop); classes among which the own label is foreground (locoop)",
    "lambda_entropy": "weight of the entropy of background patches",
    "lambda_transport": "weight of the transport to the frozen CLIP; 0 is IVLP",
    "modality": "what the transport compares: joint, image or text",
    "plan": "exact: permutations of up to 8 images; sinkhorn: entropic, for batches of any size",
    "depth": "blocks with prompts, from the first; a tower with fewer blocks has them in all"}
