"""From settings to the parts of a run: its data, model, second branch and optimiser."""
