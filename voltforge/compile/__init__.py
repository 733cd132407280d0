"""From a patched tree to a wheel: toolchain, sandbox, compile jobs and the objects that are kept."""
