"""Detection and instance segmentation: RepGhostNet as the backbone of torchvision's detectors."""
