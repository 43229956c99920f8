"""The stages of a run over the whole corpus; `pipeline` calls them in the order of the data."""
