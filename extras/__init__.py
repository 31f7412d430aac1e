"""What stands beside the paper's own steps, each a command of its own: python -m extras.NAME --help. Nothing imports these."""
