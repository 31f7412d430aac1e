"""A parser of options with a short help and errors of one line. It needs no torch, which loads slowly."""

import argparse
import difflib
import os
import re
from pathlib import Path


def near(words, known):
    """A guess at what unknown words mean: "did you mean --shots? ", or "" where nothing is near."""
    found = []
    for word in words:
        found += difflib.get_close_matches(word, known, n=1)
    return f"did you mean {', '.join(found)}? " if found else ""


def at_home(value):
    """A value of an option, or a list of them, with the user's folder in place of ~ at the start."""
    if isinstance(value, list):
        return [at_home(one) for one in value]
    if isinstance(value, (str, Path)):
        return type(value)(os.path.expanduser(value))
    return value


class Parser(argparse.ArgumentParser):
    """usage: the command with its arguments; docstring: that of the command.

    The help shows the docstring's first two paragraphs. why no abbreviations: each new option could make them
    ambiguous; a near miss is named instead.
    """

    def __init__(self, usage, docstring, **more):
        description = "\n\n".join((docstring or "").split("\n\n")[:2])
        super().__init__(usage=usage, description=description, formatter_class=Help, allow_abbrev=False,
                         **more)

    def parse_args(self, args=None, namespace=None):
        """As argparse does, but a near miss of an option is suggested."""
        args, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}; {self.near(unknown)}--help lists what "
                       "there is")
        return args

    def near(self, unknown):
        """A guess at which options unknown words mean, as `near` says it."""
        options = [word.partition("=")[0] for word in unknown if word.startswith("--")]
        return near(options, re.findall(r"--[\w-]+", self.format_help()))

    def parse_known_args(self, args=None, namespace=None):
        """As argparse does; ~ becomes the user's folder where the shell left it, as in --csv=~/all.csv."""
        args, unknown = super().parse_known_args(args, namespace)
        for name, value in vars(args).items():
            setattr(args, name, at_home(value))
        return args, unknown

    def refuse_empty(self, args):
        """Ends the program where a text is empty or blank, which else would count as not given."""
        for action in self._actions:
            value = getattr(args, action.dest, None)
            texts = value if isinstance(value, list) else [value]
            has_empty = any(isinstance(text, str) and not text.strip() for text in texts)
            if has_empty and action.dest != "device":    # why not device: it has a message of its own
                self.error(f"{(action.option_strings or [action.metavar])[0]} is empty")

    def error(self, message):
        """Ends the program with one line in place of the whole usage, and exit code 2."""
        self.exit(2, f"error: {message}\n")


class Help(argparse.RawDescriptionHelpFormatter):
    """Options and their texts side by side, examples as they are written."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=25)
