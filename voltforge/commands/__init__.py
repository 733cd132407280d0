"""The commands of `./doit`, called by dodo.py, and what several of them need."""
