"""`distkv demo`: a real model, a restart and a long text."""
