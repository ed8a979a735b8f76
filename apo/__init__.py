"""The machinery behind the three stages: tasks, sampling, grading, the model, files."""
