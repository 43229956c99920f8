"""A run on disk: its files and names, its lock, its commits, its manifest, and its readers."""
