"""Several trainings instead of one: settings of a sweep, seeds, folds of a cross-validation."""
