"""What dodo.py calls: one module for each command of `./doit`."""
