"""The stages that lead from a recipe to a kept wheel, with their keys and records."""
