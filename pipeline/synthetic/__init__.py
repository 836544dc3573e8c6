"""The synthetic sample competition: cars, their photographs and masks."""
