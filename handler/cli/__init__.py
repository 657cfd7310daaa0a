"""The command `vivit`: one module per command, and what they share. Not part of the archive."""
