"""The commands of `./doit`, one module each, called by dodo.py."""
