"""The inputs: recipes, downloads, patched trees and locked environments, each identified by its hash."""
