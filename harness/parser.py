"""A parser of options whose help is short and whose errors are one line. It needs no torch, whose import takes long."""

import argparse
import difflib
import re


def near(words, known):
    """What may have been meant by unknown words, as text: "did you mean --shots? "; "" where nothing is near."""
    found = []
    for word in words:
        found += difflib.get_close_matches(word, known, n=1)
    return f"did you mean {', '.join(found)}? " if found else ""


class Parser(argparse.ArgumentParser):
    """usage: the command with its arguments; docstring: the command's, of which the help shows the first two paragraphs.

    why no abbreviations: each new option could make them ambiguous; a near miss is named instead.
    """

    def __init__(self, usage, docstring, **more):
        description = "\n\n".join((docstring or "").split("\n\n")[:2])
        super().__init__(usage=usage, description=description, allow_abbrev=False, formatter_class=Help, **more)

    def parse_args(self, args=None, namespace=None):
        """As argparse does, but a near miss of an option is suggested."""
        args, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}; {self.near(unknown)}--help lists what there is")
        return args

    def near(self, unknown):
        """What options may have been meant, as `near` says it."""
        options = [word.partition("=")[0] for word in unknown if word.startswith("--")]
        return near(options, re.findall(r"--[\w-]+", self.format_help()))

    def refuse_empty(self, args):
        """Ends the program where an option was given an empty text, which else would count as not given."""
        for name, value in vars(args).items():
            if value in ("", [""]) and name != "device":         # why not device: it has a message of its own
                self.error(f"--{name.replace('_', '-')} is empty")

    def error(self, message):
        """Ends the program with one line in place of the whole usage, and exit code 2."""
        self.exit(2, f"error: {message}\n")


class Help(argparse.RawDescriptionHelpFormatter):
    """Options and their texts side by side, examples as they are written."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=25)
