"""U-Nets, their weights, test-time augmentation and resizing."""
