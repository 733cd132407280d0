"""This machine: files, programs, the terminal. Every other room may use it."""
