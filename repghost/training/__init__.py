"""What happens between two epochs and in them: step, schedule, average, checkpoints, signals, loggers."""
