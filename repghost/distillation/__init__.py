"""Learning from a teacher: a better classifier, whose answers are a part of the target."""
