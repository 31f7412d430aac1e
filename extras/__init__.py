"""What stands beside the paper's own steps, most of it commands: python -m extras.NAME --help.

Nothing outside this folder imports these.
"""
