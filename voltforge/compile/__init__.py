"""From a patched tree to a wheel: toolchain, sandbox, scheduler and object cache."""
