"""How runs are kept: what every script needs, and nothing that Sec. 3 of the paper asks for."""
