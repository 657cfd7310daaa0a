"""Training: data sets, augmentation, the training loop, initial weights, evaluation and reports. Not in the archive."""
