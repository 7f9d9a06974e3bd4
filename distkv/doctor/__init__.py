"""`distkv doctor`: what of this machine keeps distkv from running, or from running well, and the cure."""
