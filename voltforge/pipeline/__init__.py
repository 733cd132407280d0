"""The stages from a recipe to a finished wheel, with their keys and records."""
