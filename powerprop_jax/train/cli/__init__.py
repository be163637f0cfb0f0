"""The command `powerprop`."""
