"""What goes in: recipes, downloads, patched trees and locked environments, each by its hash."""
